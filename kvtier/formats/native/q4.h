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

/* Steps below the super, from the bits of the ratio: the same on every machine. `super` must be the largest scale, rounded. */
static void scale_steps(int *steps, const float *scales, float super, int count) {
    for (int i = 0; i < count; i++) {
        const uint32_t bits = bits_of(at_most(scales[i] / super, 1));
        const int step = (127 - (int)(bits >> 23)) * STEPS_PER_OCTAVE - SCALE_LOG[bits >> 15 & 255];
        const int nearest = step < 0 ? 0 : step > SMALLEST_SCALE ? SMALLEST_SCALE : step;
        const bool none = step > SMALLEST_SCALE + STEPS_PER_OCTAVE || scales[i] == 0 || super == 0;
        steps[i] = none ? NO_SCALE : nearest;
    }
}

/* One head of the first tokens, up to 16: scales, and codes of all but the very first, whose vector without its mean goes to `first`. */
static __attribute__((noinline)) void encode_first_tokens(const Shape *shape, int head, uint8_t *codes, float scales[32], float *first,
    uint8_t *packed, const Levels *levels, const float *rows, const float *const *means, const float energies[16], int count) {
    const int head_dim = shape->head_dim, heads = shape->heads, special = special_tokens(shape, levels->bits, true), paying = special - 1;
    const Levels fewer = fewer_levels(levels->bits);
    float rest[32] = {0}, largest = 0;
    memcpy(rest, energies, 16 * sizeof(float));
    for (int i = 0; i < head_dim; i++) {
        first[i] = rows[i] - (means ? means[0][i] : 0);
        largest = fabsf(first[i]) > largest ? fabsf(first[i]) : largest;
    }
    encode_levels(codes + head_dim, scales + 1, &fewer, rows + head_dim, means ? means + 1 : NULL, rest + 1, paying, head_dim);
    encode_levels(codes + special * head_dim, scales + special, levels, rows + special * head_dim, means ? means + special : NULL,
        rest + special, count - special, head_dim);
    scales[0] = largest * (float)(levels->per_rms / LARGEST_CODE);
    for (int i = 0; i < paying; i++) {
        const size_t vector = (size_t)i * heads + head;
        pack_codes(packed + heads * head_dim, codes + (1 + i) * head_dim, vector, (size_t)paying * heads, head_dim, fewer.bits);
    }
}

/* Codes of 8 bits for the first token, by a step of its scale that is not smaller than the scale itself. */
static __attribute__((noinline)) void encode_first_codes(int8_t *codes, int *step, const float *first, float scale, float super,
    float norm, const Levels *levels, int head_dim) {
    if (*step > 0 && *step < NO_SCALE && super * SCALE_STEP[*step] < scale) --*step;
    const float factor = inverse(super * SCALE_STEP[*step] / (float)levels->per_rms);
    for (int i = 0; i < head_dim; i++) {
        const float code = rintf(first[i] * norm * factor);
        codes[i] = (int8_t)(code < -LARGEST_CODE ? -LARGEST_CODE : code > LARGEST_CODE ? LARGEST_CODE : code);
    }
}

INLINE void encode_gaussian(const Shape *shape, const char *numbers, uint8_t *coded, const Levels levels, bool keys, int head_dim) {
    const int heads = shape->heads, rows = tile_rows(shape), special = special_tokens(shape, levels.bits, shape->begins);
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype), stride = heads * vector_bytes;
    const size_t usual = (size_t)(shape->tokens - special) * heads;
    const float norm = norm_of(shape);
    uint8_t *const supers = coded + mean_bytes(shape), *const steps = supers + 2 * heads;
    uint8_t *const packed = steps + (size_t)shape->tokens * heads;
    uint8_t *const usual_packed = packed + special_bytes(shape, levels.bits, special);
    Tile tile;
    float mean[MAX_HEAD_DIM], scales[MAX_TOKENS + 32], first[MAX_HEAD_DIM];
    bool reduced[MAX_TOKENS + 16];
    int nearest[MAX_TOKENS];
    for (int head = 0; head < heads; head++) {
        float largest[16] = {0};
        uint16_t halves[16];
        if (keys) encode_mean(&tile, mean, shape, head, numbers, coded, head_dim);
        for (int token = 0; token < shape->tokens; token += 16) {
            const int count = fewer(shape->tokens - token, 16), row = token % rows;
            if (row == 0 && !(keys && shape->tokens <= rows)) {
                const char *const place = numbers + head * vector_bytes + token * stride;
                load_tile(&tile, shape, place, stride, fewer(shape->tokens - token, rows), FP16_MAX);
            }
            const float *const vectors = tile.rows + row * head_dim, *chosen[16];
            const float *const *const means = keys ? chosen : NULL;
            float energies[16];
            uint8_t codes[16 * MAX_HEAD_DIM];
            if (keys) choose_means(chosen, energies, mean, vectors, count, head_dim);
            else rows_energy(energies, vectors, count, head_dim);
            if (token < special) {
                encode_first_tokens(shape, head, codes, scales, first, packed, &levels, vectors, means, energies, count);
            } else {
                encode_levels(codes, scales + token, &levels, vectors, means, energies, count, head_dim);
            }
            for (int i = token < special ? special : 0; i < count; i++) {
                const size_t vector = (size_t)(token + i - special) * heads + head;
                pack_codes(usual_packed, codes + i * head_dim, vector, usual, head_dim, levels.bits);
            }
            for (int i = 0; i < count; i++) reduced[token + i] = keys && chosen[i] != no_mean;
        }
        for (int token = 0; token < shape->tokens; token++) {
            scales[token] *= norm;
            largest[0] = scales[token] > largest[0] ? scales[token] : largest[0];
        }
        round_scales(halves, largest);
        memcpy(supers + 2 * head, halves, 2);
        scale_steps(nearest, scales, largest[0], shape->tokens);
        if (special) {
            supers[2 * head + 1] |= BEGINS;
            int8_t *const codes = (int8_t *)packed + (size_t)head * head_dim;
            encode_first_codes(codes, nearest, first, scales[0], largest[0], norm, &levels, head_dim);
        }
        for (int token = 0; token < shape->tokens; token++) {
            steps[(size_t)token * heads + head] = (uint8_t)(nearest[token] | reduced[token] << 7);
        }
    }
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
    for (int first = start, head = 0; first < stop; first += 16) {
        const int count = fewer(stop - first, 16);
        float factors[16];
        const float *chosen[16];
        for (int row = 0; row < count; row++) {
            const int step = sides->steps[first + row];
            const size_t vector = (size_t)(first - start + row);
            chosen[row] = step & 128 ? sides->means + head * head_dim : no_mean;
            factors[row] = fabsf(sides->supers[head]) * SCALE_STEP[step & 127] * factor;
            if (++head == shape->heads) head = 0;
            if (levels.bits == 8) memcpy(codes + row * head_dim, packed + vector * head_dim, (size_t)head_dim);
            else unpack_codes(codes + row * head_dim, packed, vector, (size_t)(stop - start), head_dim, levels.bits);
        }
        for (int i = 0; i < count * head_dim && levels.bits != 8; i += GROUP) {
            group_lookup((int8_t *)codes + i, (const int8_t *)codes + i, levels.values);
        }
        char *const place = (char *)numbers + (size_t)first * head_dim * value_bytes(shape->dtype);
        unrotate_rows(place, (const int8_t *)codes, factors, shape->keys ? chosen : NULL, count, head_dim, shape->dtype);
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
    if (shape->keys) decode_means(means, shape, coded, head_dim);
    for (int head = 0; head < heads; head += 16) load_scales(supers + head, coded_supers + 2 * head, fewer(heads - head, 16));
    if (special) decode_special(shape, numbers, &sides, packed, &levels, special);
    decode_run(shape, numbers, &sides, packed + special_bytes(shape, levels.bits, special), levels, special * heads, vectors, head_dim);
}

INLINE void encode_q4_of(const Shape *shape, const void *numbers, uint8_t *coded, int head_dim) {
    if (shape->keys) encode_gaussian(shape, numbers, coded, levels4(), true, head_dim);
    else encode_gaussian(shape, numbers, coded, levels4(), false, head_dim);
}

INLINE void encode_q3_of(const Shape *shape, const void *numbers, uint8_t *coded, int head_dim) {
    if (shape->keys) encode_gaussian(shape, numbers, coded, levels3(), true, head_dim);
    else encode_gaussian(shape, numbers, coded, levels3(), false, head_dim);
}

#define decode_q4_of(shape, coded, numbers, head_dim) decode_gaussian(shape, coded, numbers, levels4(), head_dim)
#define decode_q3_of(shape, coded, numbers, head_dim) decode_gaussian(shape, coded, numbers, levels3(), head_dim)

FOR_HEAD_DIMS(encode_q4, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(encode_q3, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(decode_q4, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
FOR_HEAD_DIMS(decode_q3, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
