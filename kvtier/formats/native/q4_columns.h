/* q4 in columns, for registers of 16 numbers: a register holds one dimension of 16 tokens of a head. Nothing is summed across a register
   then, the steps of the rotation need no exchange of lanes, and the mean of a key is one number for all of them. Rows of bf16 and fp16 pay
   for that with one transposition of their pairs. For whole pages of usual numbers; encode_gaussian does the others. */

enum { COLUMN_TOKENS = 16, LINE_VALUES = 32, MAX_COLUMNS = 128, MAX_COLUMN_HEADS = KEPT_SCALES / COLUMN_TOKENS };

static int column_batches(const Shape *shape) { return (shape->tokens + COLUMN_TOKENS - 1) / COLUMN_TOKENS; }

static bool suits_columns(const Shape *shape) {
    const bool usual = shape->dtype != FP32 && (shape->head_dim == 64 || shape->head_dim == MAX_COLUMNS);
    return usual && shape->tokens >= COLUMN_TOKENS / 2 && column_batches(shape) * shape->heads <= KEPT_SCALES / COLUMN_TOKENS;
}

#include "q4_rotation.h"
#include "q4_means.h"
#include "q4_codes.h"

/* An energy is the difference of others for tokens that are reduced by the mean. Below this share of the whole, and where squares may have
   become subnormal, it is summed up again. */
#define SMALL_SHARE 0x1p-6f
#define SMALL_ENERGY 0x1p-80f

/* Where 16 tokens begin; if there are fewer, the last one again. */
typedef struct {
    const char *rows[COLUMN_TOKENS];
    int first, count;
} Tokens;

static Tokens tokens_of(const Shape *shape, const char *numbers, int first) {
    const size_t token_bytes = (size_t)shape->heads * shape->head_dim * value_bytes(shape->dtype);
    Tokens tokens = {.first = first, .count = fewer(shape->tokens - first, COLUMN_TOKENS)};
    for (int row = 0; row < COLUMN_TOKENS; row++) tokens.rows[row] = numbers + fewer(first + row, shape->tokens - 1) * token_bytes;
    return tokens;
}

/* Up to 16 tokens of one head as columns of neighbours, and the sums of their squares. */
typedef struct {
    const __m512i *pairs;
    Floats squares;
} Loaded;

/* False if a number is none or too large. */
INLINE bool load_head(Loaded *loaded, __m512i *pairs, const Shape *shape, const Tokens *tokens, int head) {
    const int head_dim = shape->head_dim;
    const size_t offset = head * head_dim * value_bytes(shape->dtype);
    loaded->pairs = pairs;
    loaded->squares = load_pairs(pairs, tokens->rows, offset, head_dim / LINE_VALUES, shape->dtype);
    return _mm512_cmp_ps_mask(loaded->squares, floats_all(FP16_MAX * FP16_MAX), _CMP_LT_OQ) == 0xFFFF;
}

/* Up to 16 tokens of one head, ready to be coded. */
typedef struct {
    Floats columns[MAX_COLUMNS], energies, factor;
    const float *mean;
    __mmask16 reduced;
    int first, count; /* the first one's place among the vectors of the block */
} Columns;

INLINE void open_columns(Columns *columns, const Loaded *loaded, const Shape *shape, const Tokens *tokens, const Means *means, int head) {
    const int head_dim = shape->head_dim, lines = head_dim / LINE_VALUES;
    const float *const mean = shape->keys ? means->numbers + head * head_dim : no_mean;
    Floats energies = loaded->squares, least = floats_all(SMALL_ENERGY);
    const Floats shared = rotate_columns(columns->columns, loaded->pairs, mean, lines, shape->keys, shape->dtype);
    columns->first = tokens->first * shape->heads + head, columns->count = tokens->count;
    columns->mean = mean, columns->reduced = 0;
    if (shape->keys) {
        /* What is rotated by all steps but one has half of what all of them make of a sum of squares. */
        const Floats gain = floats_sub(floats_add(shared, shared), floats_all(means->energies[head]));
        const Floats saved = floats_mul(gain, floats_all(2 / (float)head_dim));
        columns->reduced = _mm512_cmp_ps_mask(saved, floats_all(0), _CMP_GT_OQ);
        energies = _mm512_mask_sub_ps(energies, columns->reduced, energies, saved);
        least = _mm512_max_ps(least, floats_mul(loaded->squares, floats_all(SMALL_SHARE)));
    }
    const bool precise = _mm512_cmp_ps_mask(energies, least, _CMP_LT_OQ) == 0;
    columns->energies = precise ? floats_mul(energies, floats_all((float)head_dim))
                                : columns_energy(columns->columns, mean, columns->reduced, head_dim);
    const Floats mean_square = floats_mul(columns->energies, floats_all(1 / (float)head_dim));
    columns->factor = floats_mul(inverses(floats_root(mean_square)), floats_all((float)PER_RMS4));
}

#include "q4_sizes.h"

/* Loads some heads while their means are coded, whose steps wait for each other; false if a number is none or too large. */
static bool load_heads(Loaded *loaded, __m512i *pairs, Means *means, const Shape *shape, const char *numbers, const Tokens *tokens, int head,
    uint8_t *coded_mean) {
    const int head_dim = shape->head_dim, count = fewer(shape->heads - head, means_at_once(head_dim));
    MeanCoding coding;
    bool usual = true;
    coding.first = head;
    for (int step = 0; step < MEAN_STEPS; step++) {
        code_means(&coding, means, shape, numbers, coded_mean, step);
        if (step < count) usual &= load_head(&loaded[step], pairs + step * (head_dim / 2), shape, tokens, head + step);
    }
    return usual;
}

/* A whole block, the mean of keys at `coded_mean`; false, and nothing of use written, if a number is none or too large. The CPU gets the next
   columns to load before the codes of those that wait for roots and quotients. */
static bool encode_columns(const Shape *shape, const char *numbers, uint8_t *coded_mean, uint8_t *supers, uint8_t *steps, uint8_t *packed) {
    const int heads = shape->heads, head_dim = shape->head_dim, together = means_at_once(head_dim);
    const size_t packed_bytes = (size_t)head_dim / 2;
    const Floats unit = floats_all((float)(PER_RMS4 * ALONG_PARTS) * norm_of(shape));
    Means means;
    Columns columns[2];
    Loaded loaded[MEANS_AT_ONCE];
    __m512i pairs[MEANS_AT_ONCE * GROUP / 2];
    Floats scales[KEPT_SCALES / COLUMN_TOKENS];
    __mmask16 reduced[KEPT_SCALES / COLUMN_TOKENS];
    Tokens tokens;
    const char *ahead = numbers + block_bytes(shape);
    /* `at`: which of the heads that were loaded together; `first`: the token behind those that were loaded. */
    for (int next = 0, head = 0, at = 0, first = 0; next <= heads * column_batches(shape); next++) {
        Columns *const ready = &columns[next % 2], *const own = &columns[1 - next % 2];
        if (next < heads * column_batches(shape)) {
            ahead = fetch_ahead(ahead, COLUMN_TOKENS * packed_bytes * 4);
            if (head == 0) tokens = tokens_of(shape, numbers, first), first += COLUMN_TOKENS;
            const bool with_means = shape->keys && next < heads;
            bool usual = true;
            at = with_means && head > 0 && at + 1 < together ? at + 1 : 0;
            if (!with_means) usual = load_head(loaded, pairs, shape, &tokens, head);
            else if (at == 0) usual = load_heads(loaded, pairs, &means, shape, numbers, &tokens, head, coded_mean);
            if (!usual) return false;
            open_columns(ready, &loaded[at], shape, &tokens, &means, head);
            head = head + 1 < heads ? head + 1 : 0;
        }
        if (next == 0) continue;
        uint8_t *const place = packed + own->first * packed_bytes;
        const __m512i along = code_columns(own->columns, own->mean, own->reduced, own->factor, place, heads * packed_bytes, own->count, head_dim);
        const Floats sized = floats_mul(floats_mul(own->energies, own->factor), unit);
        scales[next - 1] = floats_mul(sized, inverses(_mm512_cvtepi32_ps(along))), reduced[next - 1] = own->reduced;
    }
    encode_sizes(shape, supers, steps, scales, reduced);
    return true;
}
