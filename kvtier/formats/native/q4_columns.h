/* q4 in columns, for registers of 16 numbers: a register holds one dimension of 16 tokens of a head. Nothing is summed across a register
   then, the steps of the rotation need no exchange of lanes, and the mean of a key is one number for all of them. Rows of bf16 and fp16 pay
   for that with one transposition of their pairs. For whole pages of usual numbers; encode_gaussian does the others. */

enum { COLUMN_TOKENS = 16, LINE_BYTES = 64, LINE_VALUES = 32, MAX_COLUMNS = 128, MAX_COLUMN_HEADS = KEPT_SCALES / COLUMN_TOKENS };

static int column_batches(const Shape *shape) { return (shape->tokens + COLUMN_TOKENS - 1) / COLUMN_TOKENS; }

static bool suits_columns(const Shape *shape) {
    const bool usual = shape->dtype != FP32 && (shape->head_dim == 64 || shape->head_dim == MAX_COLUMNS);
    return usual && shape->tokens >= COLUMN_TOKENS / 2 && column_batches(shape) * shape->heads <= KEPT_SCALES / COLUMN_TOKENS;
}

/* 16 rows of 32 bits each to 16 columns. */
INLINE void to_columns(__m512i lines[16]) {
    __m512i twos[16], fours[16], halves[16];
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]), twos[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    }
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 4; j++) {
            halves[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0x88);
            halves[i + j + 4] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0xDD);
        }
    }
    for (int i = 0; i < 8; i++) {
        lines[i] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0x88), lines[i + 8] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0xDD);
    }
}

/* Two columns become their sum and difference, both by the CPU's adders. */
static inline void meet_added(Floats *a, Floats *b) {
    const Floats sum = floats_add(*a, *b);
    *b = floats_sub(*a, *b), *a = sum;
}

/* One step of the rotation, between 16 columns that are `distance` apart, a constant: half of the differences by adders, half by multipliers. */
INLINE void meet_columns(Floats *columns, int distance) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const int at = i / distance * 2 * distance + i % distance;
        if (i % 2) meet_added(&columns[at], &columns[at + distance]);
        else meet_both(&columns[at], &columns[at + distance]);
    }
}

/* The mean of a head, not rotated. */
typedef struct {
    const float *numbers;
    const uint32_t *high, *low; /* each two neighbours as bf16, and what that leaves of them */
} Mean;

/* Of the numbers of 16 tokens: the sum of their squares, and their inner product with the mean. */
typedef struct { Floats whole, shared; } Products;

/* The products of two neighbours of 16 tokens each. */
INLINE void add_pairs(Products *products, __m512i pairs, const Mean *mean, int at, bool keys, int dtype) {
#if defined(WITH_AVX512_BF16)
    if (dtype == BF16) {
        products->whole = _mm512_dpbf16_ps(products->whole, (__m512bh)pairs, (__m512bh)pairs);
        if (!keys) return;
        products->shared = _mm512_dpbf16_ps(products->shared, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32((int)mean->high[at]));
        products->shared = _mm512_dpbf16_ps(products->shared, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32((int)mean->low[at]));
        return;
    }
#endif
    Floats both[2];
    split_pairs(both, pairs, dtype);
    for (int i = 0; i < 2; i++) {
        products->whole = floats_fused(both[i], both[i], products->whole);
        if (keys) products->shared = floats_fused(both[i], floats_all(mean->numbers[2 * at + i]), products->shared);
    }
}

/* The rows of 16 tokens, each `offset` bytes on, in `lines` of LINE_VALUES numbers to columns of neighbours. */
INLINE void load_pairs_of(__m512i *pairs, Products *products, const char *const rows[16], size_t offset, const Mean *mean, int lines, bool keys,
    int dtype) {
    Products some[4];
    for (int i = 0; i < 4; i++) some[i].whole = some[i].shared = floats_all(0);
#pragma GCC unroll 1
    for (int line = 0; line < lines; line++) {
        __m512i own[16];
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) own[row] = _mm512_loadu_si512(rows[row] + offset + line * LINE_BYTES);
        to_columns(own);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            add_pairs(&some[i % 4], own[i], mean, 16 * line + i, keys, dtype);
            pairs[16 * line + i] = own[i];
        }
    }
    *products = some[0];
    for (int i = 1; i < 4; i++) {
        products->whole = floats_add(products->whole, some[i].whole), products->shared = floats_add(products->shared, some[i].shared);
    }
}

/* Half of what becomes of 16 pairs of neighbours, in steps up to 16 apart: their sums or, if `odd`, their differences; of `reduced` tokens
   without the mean. */
INLINE void rotate_pairs(Floats *columns, const __m512i *pairs, const float *less, __mmask16 reduced, bool odd, bool keys, int dtype) {
    Floats met[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16 && keys; i++) {
        const Floats start = _mm512_maskz_mov_ps(reduced, floats_all(less[2 * i + odd]));
        met[i] = met_pairs(&start, pairs[i], odd, dtype);
    }
    if (keys) meet_columns(met, 1);
#pragma GCC unroll 8
    for (int i = 0; i < 16 && !keys; i += 2) met_both(&met[i], &met[i + 1], pairs[i], pairs[i + 1], odd, dtype);
    meet_columns(met, 2), meet_columns(met, 4), meet_columns(met, 8);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) columns[2 * i + odd] = met[i];
}

/* All steps but the last one of columns [32 * lines]. */
INLINE void rotate_columns_of(Floats *columns, const __m512i *pairs, const float *less, __mmask16 reduced, int lines, bool keys, int dtype) {
#pragma GCC unroll 1
    for (int line = 0; line < lines; line++) {
        rotate_pairs(columns + line * LINE_VALUES, pairs + line * 16, less + line * LINE_VALUES, reduced, false, keys, dtype);
        rotate_pairs(columns + line * LINE_VALUES, pairs + line * 16, less + line * LINE_VALUES, reduced, true, keys, dtype);
    }
    for (int i = 0; i < LINE_VALUES && lines == 4; i++) {
        meet_both(&columns[i], &columns[i + LINE_VALUES]);
        meet_both(&columns[i + 2 * LINE_VALUES], &columns[i + 3 * LINE_VALUES]);
    }
}

/* Not inlined, as all loops here are not unrolled: the whole has to fit the CPU's cache of instructions. */
static __attribute__((noinline)) void load_pairs(__m512i *pairs, Products *products, const char *const rows[16], size_t offset, const Mean *mean,
    int lines, bool keys, int dtype) {
    switch (dtype * 2 + keys) {
    case BF16 * 2: load_pairs_of(pairs, products, rows, offset, mean, lines, false, BF16); break;
    case FP16 * 2: load_pairs_of(pairs, products, rows, offset, mean, lines, false, FP16); break;
    case BF16 * 2 + 1: load_pairs_of(pairs, products, rows, offset, mean, lines, true, BF16); break;
    case FP16 * 2 + 1: load_pairs_of(pairs, products, rows, offset, mean, lines, true, FP16); break;
    }
}

static __attribute__((noinline)) void rotate_columns(Floats *columns, const __m512i *pairs, const float *less, __mmask16 reduced, int lines,
    int dtype) {
    switch (dtype * 2 + (reduced != 0)) {
    case BF16 * 2: rotate_columns_of(columns, pairs, less, reduced, lines, false, BF16); break;
    case FP16 * 2: rotate_columns_of(columns, pairs, less, reduced, lines, false, FP16); break;
    case BF16 * 2 + 1: rotate_columns_of(columns, pairs, less, reduced, lines, true, BF16); break;
    case FP16 * 2 + 1: rotate_columns_of(columns, pairs, less, reduced, lines, true, FP16); break;
    }
}

/* Sums of the squares of columns, which the last step would double. */
static __attribute__((noinline)) Floats columns_energy(const Floats *columns, int head_dim) {
    Floats sums[2] = {floats_all(0), floats_all(0)};
    for (int i = 0; i < head_dim; i++) sums[i % 2] = floats_fused(columns[i], columns[i], sums[i % 2]);
    return floats_mul(floats_add(sums[0], sums[1]), floats_all(2));
}

#include "q4_means.h"

static const int CODED_TOGETHER[4] = {0, 1, 4, 5};

/* Numbers are rounded down to whole ones, as the boundaries between levels are, and for their inner product with the levels to whole
   parts of that. Both fit 16 bits, and the sums of products of a row of MAX_COLUMNS numbers 32: no number is larger than the whole
   vector, sqrt(MAX_COLUMNS) * PER_RMS4, and a level no more than 6 larger than what it stands for. */
enum { FINER_BITS = 4, FINER = 1 << FINER_BITS, ALONG_PARTS = FINER * 256 };

/* `sums` and the products of each two neighbours. */
static inline __m512i add_products(__m512i sums, __m512i a, __m512i b) {
#if defined(WITH_AVX512_BF16)
    return _mm512_dpwssd_epi32(sums, a, b);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}

/* Dimensions that are coded together: four for each of TOGETHER registers of codes. Each step is taken for all of them before the next one:
   the CPU does not see far enough ahead to do that by itself. */
enum { TOGETHER = 4 };

/* Codes of four dimensions in each register: those of a token side by side in 16 bits; the first two of four tokens, the others of the same
   tokens, then so on for the next four tokens. `along`: sums of inner products with the levels, in parts of 1 / (ALONG_PARTS * factor). */
INLINE void column_codes(__m512i codes[TOGETHER], __m512i along[2], const Floats (*numbers)[4], Floats factor) {
    const __m512i lows = _mm512_set_epi16(62, 30, 60, 28, 58, 26, 56, 24, 54, 22, 52, 20, 50, 18, 48, 16, 46, 14, 44, 12, 42, 10, 40, 8, 38,
        6, 36, 4, 34, 2, 32, 0);
    const __m512i none = _mm512_setzero_si512(); /* before a value, which makes it 256 times as large */
    const Floats finer = floats_mul(factor, floats_all(FINER));
    __m512i first[TOGETHER], last[TOGETHER], values[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) {
        __m512i whole[4];
        for (int j = 0; j < 4; j++) {
            whole[j] = _mm512_castps_si512(_mm512_fmadd_round_ps(numbers[i][j], finer, floats_all(WHOLE),
                _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
        }
        first[i] = _mm512_permutex2var_epi16(whole[0], lows, whole[1]), last[i] = _mm512_permutex2var_epi16(whole[2], lows, whole[3]);
    }
    for (int i = 0; i < TOGETHER; i++) {
        codes[i] = _mm512_packs_epi16(_mm512_srai_epi16(first[i], FINER_BITS), _mm512_srai_epi16(last[i], FINER_BITS));
    }
    for (int i = 0; i < TOGETHER; i++) codes[i] = codes_of(codes[i], &LEVELS4);
    for (int i = 0; i < TOGETHER; i++) {
        values[i] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)LEVELS4.values)), codes[i]);
    }
    for (int i = 0; i < TOGETHER; i++) {
        along[0] = add_products(along[0], first[i], _mm512_unpacklo_epi8(none, values[i]));
        along[1] = add_products(along[1], last[i], _mm512_unpackhi_epi8(none, values[i]));
    }
}

/* 16 bytes of each token: lane i of `rows[j]` is token 4 * i + j. */
INLINE void column_bytes(__m512i rows[4], __m512i along[2], const Floats *columns, Floats factor, int head_dim) {
    __m512i packed[4], pairs[4];
    for (int i = 0; i < 4; i += TOGETHER / 2) {
        Floats numbers[TOGETHER][4]; /* numbers that meet in the last step, one register behind the other */
        __m512i codes[TOGETHER];
        for (int k = 0; k < TOGETHER / 2; k++) {
            for (int j = 0; j < 4; j++) {
                const Floats *const from = columns + (i + k) / 2 * 8 + (i + k) % 2 * 2 + CODED_TOGETHER[j];
                Floats *const a = &numbers[2 * k][j], *const b = &numbers[2 * k + 1][j];
                *a = from[0], *b = from[head_dim / 2];
                meet_added(a, b);
            }
        }
        column_codes(codes, along, (const Floats(*)[4])numbers, factor);
        for (int k = 0; k < TOGETHER / 2; k++) packed[i + k] = _mm512_or_si512(codes[2 * k], _mm512_slli_epi16(codes[2 * k + 1], 4));
    }
    for (int i = 0; i < 4; i += 2) {
        const __m512i fours = _mm512_unpacklo_epi16(packed[i], packed[i + 1]), next = _mm512_unpackhi_epi16(packed[i], packed[i + 1]);
        pairs[i] = _mm512_unpacklo_epi32(fours, next), pairs[i + 1] = _mm512_unpackhi_epi32(fours, next);
    }
    for (int i = 0; i < 2; i++) {
        rows[2 * i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]), rows[2 * i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    }
}

/* The codes of up to 16 tokens, the first at `packed`, the next ones `stride` bytes apart, and their inner products with the levels. */
static __attribute__((noinline)) __m512i code_columns(const Floats *columns, Floats factor, uint8_t *packed, size_t stride, int count,
    int head_dim) {
    __m512i along[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 1
    for (int place = 0; place < head_dim / 2; place += 32) {
        __m512i rows[2][4];
#pragma GCC unroll 1
        for (int half = 0; half < 2; half++) column_bytes(rows[half], along, columns + place + 16 * half, factor, head_dim);
        for (int i = 0; i < 4; i++) {
            const __m512i first = _mm512_permutex2var_epi64(rows[0][i], _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), rows[1][i]);
            const __m512i last = _mm512_permutex2var_epi64(rows[0][i], _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), rows[1][i]);
            const __m256i bytes[4] = {_mm512_castsi512_si256(first), _mm512_extracti64x4_epi64(first, 1), _mm512_castsi512_si256(last),
                _mm512_extracti64x4_epi64(last, 1)};
            for (int lane = 0; lane < 4; lane++) {
                if (4 * lane + i < count) _mm256_storeu_si256((void *)(packed + (4 * lane + i) * stride + place), bytes[lane]);
            }
        }
    }
    return _mm512_add_epi32(along[0], along[1]);
}

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

/* Up to 16 tokens of one head, ready to be coded. */
typedef struct {
    Floats columns[MAX_COLUMNS], energies, factor;
    __mmask16 reduced;
    int first, count; /* the first one's place among the vectors of the block */
} Columns;

/* False if a number is none or too large. */
INLINE bool open_columns(Columns *columns, const Shape *shape, const Tokens *tokens, const Means *means, int head) {
    const int head_dim = shape->head_dim, lines = head_dim / LINE_VALUES, place = head * head_dim;
    const Mean mean = {means->numbers + place, means->high + place / 2, means->low + place / 2};
    __m512i pairs[MAX_COLUMNS / 2];
    Products products;
    columns->first = tokens->first * shape->heads + head, columns->count = tokens->count;
    load_pairs(pairs, &products, tokens->rows, place * value_bytes(shape->dtype), &mean, lines, shape->keys, shape->dtype);
    if (_mm512_cmp_ps_mask(products.whole, floats_all(FP16_MAX * FP16_MAX), _CMP_LT_OQ) != 0xFFFF) return false;
    Floats energies = products.whole, least = floats_all(SMALL_ENERGY);
    columns->reduced = 0;
    if (shape->keys) {
        const Floats saved = floats_sub(floats_add(products.shared, products.shared), floats_all(means->energies[head]));
        columns->reduced = _mm512_cmp_ps_mask(saved, floats_all(0), _CMP_GT_OQ);
        energies = _mm512_mask_sub_ps(energies, columns->reduced, energies, saved);
        least = _mm512_max_ps(least, floats_mul(products.whole, floats_all(SMALL_SHARE)));
    }
    rotate_columns(columns->columns, pairs, means->less + place, columns->reduced, lines, shape->dtype);
    const bool precise = _mm512_cmp_ps_mask(energies, least, _CMP_LT_OQ) == 0;
    columns->energies = precise ? floats_mul(energies, floats_all((float)head_dim)) : columns_energy(columns->columns, head_dim);
    const Floats mean_square = floats_mul(columns->energies, floats_all(1 / (float)head_dim));
    columns->factor = floats_mul(inverses(floats_root(mean_square)), floats_all((float)PER_RMS4));
    return true;
}

#include "q4_sizes.h"

/* A whole block, the mean of keys at `coded_mean`; false, and nothing of use written, if a number is none or too large. The CPU gets the next
   columns to load before the codes of those that wait for roots and quotients. */
static bool encode_columns(const Shape *shape, const char *numbers, uint8_t *coded_mean, uint8_t *supers, uint8_t *steps, uint8_t *packed) {
    const int heads = shape->heads, head_dim = shape->head_dim;
    const size_t packed_bytes = (size_t)head_dim / 2;
    const Floats unit = floats_all((float)(PER_RMS4 * ALONG_PARTS) * norm_of(shape));
    Means means;
    Columns columns[2];
    Floats scales[KEPT_SCALES / COLUMN_TOKENS];
    __mmask16 reduced[KEPT_SCALES / COLUMN_TOKENS];
    Tokens tokens;
    if (shape->keys) encode_column_means(&means, shape, numbers, coded_mean);
    for (int next = 0, head = 0; next <= heads * column_batches(shape); next++) {
        Columns *const ready = &columns[next % 2], *const own = &columns[1 - next % 2];
        if (next < heads * column_batches(shape)) {
            if (head == 0) tokens = tokens_of(shape, numbers, next / heads * COLUMN_TOKENS);
            if (!open_columns(ready, shape, &tokens, &means, head)) return false;
            head = head + 1 < heads ? head + 1 : 0;
        }
        if (next == 0) continue;
        uint8_t *const place = packed + own->first * packed_bytes;
        const __m512i along = code_columns(own->columns, own->factor, place, heads * packed_bytes, own->count, head_dim);
        const Floats sized = floats_mul(floats_mul(own->energies, own->factor), unit);
        scales[next - 1] = floats_mul(sized, inverses(_mm512_cvtepi32_ps(along))), reduced[next - 1] = own->reduced;
    }
    encode_sizes(shape, supers, steps, scales, reduced);
    return true;
}
