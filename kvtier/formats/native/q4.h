/* q4 and q3: mean of keys, fp16 supers [heads], scale bytes [tokens, heads], codes; see kvtier/formats/q4.py. The two differ in
   their levels and in how codes are packed. A block that begins a sequence has three runs of codes: one token with 8 bits, some with one
   bit less, the others. Such blocks are rare, so what is theirs alone is compiled once for all sizes. */

enum { NO_SCALE = 127, SMALLEST_SCALE = 126, STEPS_PER_OCTAVE = 32, LARGEST_CODE = 127, BEGINS = 0x80 };

/* Tokens before the usual ones: none if the block does not begin a sequence or is too short to. */
static int special_tokens(const Shape *shape, int bits, bool begins) { return begins && shape->tokens > 8 - bits ? 9 - bits : 0; }

/* Bytes of their codes. */
static size_t special_bytes(const Shape *shape, int bits, int special) {
    const size_t token_values = (size_t)shape->heads * shape->head_dim;
    return special ? token_values + (special - 1) * token_values * (bits - 1) / 8 : 0;
}

static Levels fewer_levels(int bits) { return bits == 4 ? levels3() : levels2(); }

/* What encoding leaves for the end of a block, which is when the largest scale of a head is known: [tokens, heads] scales. A block of more
   vectors than that is coded twice: first for the largest scales alone. */
enum { KEPT_SCALES = 4096 };

typedef struct {
    const float *means;
    float largest[MAX_HEADS_TIMES_DIM / MIN_BLOCK]; /* by head; rounded to fp16 when complete */
    float scales[KEPT_SCALES + 16];
    uint8_t reduced[KEPT_SCALES + 16]; /* 0 or 1; no bool, because what is behind the last one is read, too, and not used */
    bool complete;
} Sizes;

/* Steps of scales below their supers, from the bits of the ratio: the same on every machine. */
#if defined(WITH_SCALE_STEPS)
#include "q4_steps_avx2.h"
#else
INLINE void scale_steps(uint8_t steps[16], const float scales[16], const float supers[16]) {
    for (int i = 0; i < 16; i++) {
        const uint32_t bits = bits_of(at_most(scales[i] / supers[i], 1));
        const int step = (127 - (int)(bits >> 23)) * STEPS_PER_OCTAVE - SCALE_LOG[bits >> 15 & 255];
        const int nearest = step < 0 ? 0 : step > SMALLEST_SCALE ? SMALLEST_SCALE : step;
        const bool none = step > SMALLEST_SCALE + STEPS_PER_OCTAVE || scales[i] == 0 || supers[i] == 0;
        steps[i] = (uint8_t)(none ? NO_SCALE : nearest);
    }
}
#endif

/* Scale bytes of the scales that are kept, the first of them of `head`. */
static __attribute__((noinline)) void scale_bytes(uint8_t *bytes, const Sizes *sizes, int count, int head, int heads) {
    float supers[16] = {0};
    uint8_t steps[16];
    for (int first = 0; first < count; first += 16) {
        const int some = fewer(count - first, 16);
        for (int i = 0; i < some && (first == 0 || 16 % heads); i++) {
            supers[i] = sizes->largest[head];
            if (++head == heads) head = 0;
        }
        scale_steps(steps, sizes->scales + first, supers);
        for (int i = 0; i < 16; i++) steps[i] |= (uint8_t)(sizes->reduced[first + i] << 7);
        if (some == 16) memcpy(bytes + first, steps, 16); /* one instruction instead of a call */
        else memcpy(bytes + first, steps, (size_t)some);
    }
}

/* The largest scales of heads so far, and of `count` vectors more, the first of them of `head`. */
INLINE void keep_largest(float *largest, const float *scales, int count, int head, int heads) {
    for (int first = 0; first < fewer(count, heads); first++) {
        float most = largest[head];
        for (int i = first; i < count; i += heads) most = scales[i] > most ? scales[i] : most;
        largest[head] = most;
        if (++head == heads) head = 0;
    }
}

#if defined(WITH_COLUMNS)
#include "q4_columns.h"
#endif

/* Up to 16 vectors ready to be coded. */
typedef struct {
    Tile tile;
    float rest[TILE_VALUES] __attribute__((aligned(64)));
    const float *rows[16];
    float energies[16], factors[16];
    bool reduced[16];
    int first, count, head;
} Batch;

SIZED void open_batch(Batch *batch, const Sizes *sizes, const Shape *shape, const char *numbers, double per_rms, int head_dim) {
    const char *const place = numbers + batch->first * head_dim * value_bytes(shape->dtype);
    float *const tile = batch->tile.rows;
    fetch_next(shape, place, batch->count);
    for (int row = 0; row < 16; row++) batch->rows[row] = tile + row * head_dim, batch->reduced[row] = false;
    load_tile_energies(&batch->tile, batch->energies, shape, place, batch->count, head_dim);
    if (shape->keys) {
        choose_rows(batch->rows, batch->reduced, batch->energies, batch->rest, tile, sizes->means, batch->head, shape->heads, batch->count,
            head_dim);
    }
    level_factors(batch->factors, batch->energies, per_rms, head_dim);
}

/* Vectors `start` to `stop`, from the first head of one token to the last of another: a run of codes alike, at `packed`, and their scales.
   Of 8 bits only the scales. The CPU gets the next vectors to prepare before the codes of those that wait for roots and quotients. */
INLINE void encode_run(Sizes *sizes, const Shape *shape, const char *numbers, uint8_t *steps, uint8_t *packed, const Levels levels, int start,
    int stop, int head_dim) {
    const int heads = shape->heads;
    const bool all_kept = shape->tokens * heads <= KEPT_SCALES;
    const Floats norm = floats_all(norm_of(shape));
    Batch batches[2];
    uint8_t codes[16 * MAX_HEAD_DIM];
    for (int next = start, turn = 0; next < stop + 16; next += 16, turn ^= 1) {
        if (next < stop) {
            batches[turn].first = next, batches[turn].count = fewer(stop - next, 16), batches[turn].head = (next - start) % heads;
            open_batch(&batches[turn], sizes, shape, numbers, levels.per_rms, head_dim);
        }
        if (next == start) continue;
        const Batch *const batch = &batches[!turn];
        const int first = batch->first, count = batch->count, kept = all_kept ? first : 0;
        float *const scales = sizes->scales + kept;
        if (levels.bits == 8) {
            rows_largest(scales, batch->rows, count, head_dim);
            SIXTEEN(scales, floats_mul(floats_load(scales + i), floats_all((float)(levels.per_rms / LARGEST_CODE))));
        } else if (LEVELS_BY_ROW && levels.bits == 4 && head_dim % 64 == 0) {
            uint8_t *const to = packed + (size_t)(first - start) * (head_dim / 2);
            encode_levels(to, NIBBLES, scales, &levels, batch->rows, batch->energies, batch->factors, count, head_dim);
        } else {
            encode_levels(codes, CODES, scales, &levels, batch->rows, batch->energies, batch->factors, count, head_dim);
            for (int row = 0; row < count; row++) {
                pack_codes(packed, codes + row * head_dim, (size_t)(first - start + row), (size_t)(stop - start), head_dim, levels.bits);
            }
        }
        SIXTEEN(scales, floats_mul(floats_load(scales + i), norm));
        memcpy(sizes->reduced + kept, batch->reduced, sizeof batch->reduced);
        if (sizes->complete) scale_bytes(steps + first, sizes, count, batch->head, heads);
        else keep_largest(sizes->largest, scales, count, batch->head, heads);
    }
}

/* The tokens before the usual ones. */
static __attribute__((noinline)) void encode_special(Sizes *sizes, const Shape *shape, const char *numbers, uint8_t *steps, uint8_t *packed,
    const Levels *levels, int special) {
    const Levels whole = {.bits = 8, .per_rms = levels->per_rms};
    const int heads = shape->heads, head_dim = shape->head_dim;
    encode_run(sizes, shape, numbers, steps, packed, whole, 0, heads, head_dim);
    packed += (size_t)heads * head_dim;
    encode_run(sizes, shape, numbers, steps, packed, fewer_levels(levels->bits), heads, special * heads, head_dim);
}

/* Codes of 8 bits for the first token, by steps of its scales that are not smaller than the scales themselves. */
static __attribute__((noinline)) void encode_first_token(const Sizes *sizes, const Shape *shape, const char *numbers, uint8_t *steps,
    int8_t *codes, const Levels *levels) {
    const int head_dim = shape->head_dim;
    const float norm = norm_of(shape);
    for (int head = 0; head < shape->heads; head++) {
        Tile tile;
        float largest[16];
        const float *const rows[16] = {tile.rows}, *const row = tile.rows;
        const int reduced = steps[head] & 128, step = steps[head] & 127;
        load_tile(&tile, shape, numbers + head * head_dim * value_bytes(shape->dtype), 1, FP16_MAX);
        for (int i = 0; i < head_dim && reduced; i += GROUP / PARTS) {
            floats_store(tile.rows + i, floats_sub(floats_load(row + i), floats_load(sizes->means + head * head_dim + i)));
        }
        rows_largest(largest, rows, 1, head_dim);
        const float scale = largest[0] * (float)(levels->per_rms / LARGEST_CODE) * norm, super = sizes->largest[head];
        const int larger = step - (step > 0 && step < NO_SCALE && super * SCALE_STEP[step] < scale);
        steps[head] = (uint8_t)(larger | reduced);
        const Floats factor = floats_all(norm * inverse(super * SCALE_STEP[larger] / (float)levels->per_rms));
        for (int i = 0; i < head_dim; i += GROUP) {
            Floats group[PARTS];
            row_group(group, row + i);
            group_round(codes + head * head_dim + i, group, factor, LARGEST_CODE);
        }
    }
}

INLINE void encode_gaussian(const Shape *shape, const char *numbers, uint8_t *coded, const Levels levels, int head_dim) {
    const int heads = shape->heads, vectors = shape->tokens * heads, special = special_tokens(shape, levels.bits, shape->begins);
    uint8_t *const supers = coded + mean_bytes(shape), *const steps = supers + 2 * heads, *const packed = steps + vectors;
    uint8_t *const usual = packed + special_bytes(shape, levels.bits, special);
    Sizes sizes;
    float means[MAX_HEADS_TIMES_DIM];
    sizes.means = shape->keys ? means : no_mean;
    sizes.complete = false;
#if defined(WITH_COLUMNS)
    if (levels.bits == 4 && !special && suits_columns(shape)) {
        if (encode_columns(shape, numbers, coded, supers, steps, packed)) return;
    }
#endif
    if (shape->keys) encode_means(means, shape, numbers, coded);
    memset(sizes.largest, 0, heads * sizeof(float));
    for (int again = vectors > KEPT_SCALES; again >= 0; again--) {
        if (special) encode_special(&sizes, shape, numbers, steps, packed, &levels, special);
        encode_run(&sizes, shape, numbers, steps, usual, levels, special * heads, vectors, head_dim);
        for (int head = 0; head < heads && !sizes.complete; head += 16) {
            const int some = fewer(heads - head, 16);
            float largest[16] = {0};
            uint16_t halves[16];
            memcpy(largest, sizes.largest + head, some * sizeof(float));
            round_scales(halves, largest);
            memcpy(sizes.largest + head, largest, some * sizeof(float));
            copy_halves(supers + 2 * head, halves, some);
        }
        sizes.complete = true;
    }
    if (vectors <= KEPT_SCALES) scale_bytes(steps, &sizes, vectors, 0, heads);
    if (!special) return;
    for (int head = 0; head < heads; head++) supers[2 * head + 1] |= BEGINS;
    encode_first_token(&sizes, shape, numbers, steps, (int8_t *)packed, &levels);
}

/* What all vectors of a block are decoded with. */
typedef struct {
    const float *means, *supers;
    const uint8_t *steps;
} Sides;

/* Vectors `start` to `stop`, from the first head of one token to the last of another: a run of codes alike, at `packed`. 8 bits are whole
   numbers instead of levels. */
INLINE void decode_run(const Shape *shape, void *numbers, const Sides *sides, const uint8_t *packed, const Levels levels, int start,
    int stop, int head_dim) {
    const float factor = (float)(1 / sqrt(hadamard_block(shape)) / levels.per_rms);
    uint8_t codes[16 * MAX_HEAD_DIM];
    const bool spans = unpacks_spans(head_dim);
    for (int first = start, head = 0; first < stop; first += 16) {
        const int count = fewer(stop - first, 16);
        float factors[16];
        const float *chosen[16];
        for (int row = 0; row < count; row++) {
            const int step = sides->steps[first + row];
            const size_t vector = (size_t)(first - start + row), vectors = (size_t)(stop - start);
            chosen[row] = step & 128 ? sides->means + head * head_dim : no_mean;
            factors[row] = fabsf(sides->supers[head]) * SCALE_STEP[step & 127] * factor;
            if (++head == shape->heads) head = 0;
            uint8_t *const own = codes + row * head_dim;
            if (levels.bits == 8) memcpy(own, packed + vector * head_dim, (size_t)head_dim);
            else if (spans) unpack_levels((int8_t *)own, packed, vector, vectors, head_dim, levels.bits, levels.table->values);
            else unpack_codes(own, packed, vector, vectors, head_dim, levels.bits);
        }
        for (int i = 0; i < count * head_dim && levels.bits != 8 && !spans; i += GROUP) {
            group_lookup((int8_t *)codes + i, (const int8_t *)codes + i, levels.table->values);
        }
        char *const place = (char *)numbers + (size_t)first * head_dim * value_bytes(shape->dtype);
        unrotate_rows(place, (const int8_t *)codes, factors, shape->keys ? chosen : NULL, count, head_dim, shape->dtype, shape->far);
    }
}

/* The tokens before the usual ones. */
static __attribute__((noinline)) void decode_special(const Shape *shape, void *numbers, const Sides *sides, const uint8_t *packed,
    const Levels *levels, int special) {
    const Levels whole = {.bits = 8, .per_rms = levels->per_rms};
    decode_run(shape, numbers, sides, packed, whole, 0, shape->heads, shape->head_dim);
    packed += (size_t)shape->heads * shape->head_dim;
    decode_run(shape, numbers, sides, packed, fewer_levels(levels->bits), shape->heads, special * shape->heads, shape->head_dim);
}

INLINE void decode_gaussian(const Shape *shape, const uint8_t *coded, void *numbers, const Levels levels, int head_dim) {
    const int heads = shape->heads, vectors = shape->tokens * heads;
    const uint8_t *const coded_supers = coded + mean_bytes(shape), *const steps = coded_supers + 2 * heads, *const packed = steps + vectors;
    const int special = special_tokens(shape, levels.bits, coded_supers[1] & BEGINS);
    float means[MAX_HEADS_TIMES_DIM], supers[MAX_HEADS_TIMES_DIM / MIN_BLOCK + 16];
    const Sides sides = {means, supers, steps};
    if (shape->keys) decode_means(means, shape, coded);
    for (int head = 0; head < heads; head += 16) load_scales(supers + head, coded_supers + 2 * head, fewer(heads - head, 16));
    if (special) decode_special(shape, numbers, &sides, packed, &levels, special);
    decode_run(shape, numbers, &sides, packed + special_bytes(shape, levels.bits, special), levels, special * heads, vectors, head_dim);
}

#define encode_q4_of(shape, numbers, coded, head_dim) encode_gaussian(shape, numbers, coded, levels4(), head_dim)
#define encode_q3_of(shape, numbers, coded, head_dim) encode_gaussian(shape, numbers, coded, levels3(), head_dim)
#define decode_q4_of(shape, coded, numbers, head_dim) decode_gaussian(shape, coded, numbers, levels4(), head_dim)
#define decode_q3_of(shape, coded, numbers, head_dim) decode_gaussian(shape, coded, numbers, levels3(), head_dim)

FOR_HEAD_DIMS(encode_q4, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(encode_q3, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(decode_q4, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
FOR_HEAD_DIMS(decode_q3, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
