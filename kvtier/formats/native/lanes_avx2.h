/* Groups of 16 numbers in AVX2 registers, with F16C for fp16 and FMA. What a group must offer is listed in kernels.h; what AVX2 does in its
   own way is in the other *_avx2*.h. */
#include <immintrin.h>

#define GROUP 16
#define WITH_FETCHING
#define DECODES_FAR 1
#define PARTS 2        /* registers of floats */
#define SHORT_PARTS 1  /* registers of 16-bit whole numbers */

typedef __m256 Floats;
typedef __m256i Shorts;

static inline Floats floats_add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats floats_sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats floats_mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats floats_fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats floats_all(float number) { return _mm256_set1_ps(number); }
static inline Floats floats_div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats floats_root(Floats a) { return _mm256_sqrt_ps(a); }
static inline Floats floats_at_most(Floats a, Floats most) { return _mm256_min_ps(a, most); }
static inline Floats floats_zero_below(Floats a, Floats key, float least) {
    return _mm256_and_ps(a, _mm256_cmp_ps(key, _mm256_set1_ps(least), _CMP_GE_OQ));
}
static inline Floats floats_load(const float *from) { return _mm256_loadu_ps(from); }
static inline void floats_store(float *to, Floats a) { _mm256_storeu_ps(to, a); }
static inline Shorts shorts_add(Shorts a, Shorts b) { return _mm256_add_epi16(a, b); }
static inline Shorts shorts_sub(Shorts a, Shorts b) { return _mm256_sub_epi16(a, b); }

static inline Floats magnitude_max(Floats most, Floats a) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), magnitude));
}

static inline Floats keys_max(Floats a, Floats b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

/* Across the lanes of 16 registers at once: halves of two registers meet until each lane holds what one register had. */
#define ACROSS(name, combine) \
    static inline void name(float results[16], const Floats rows[16]) { \
        Floats pairs[8], fours[4]; \
        for (int i = 0; i < 8; i++) { \
            pairs[i] = combine(_mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1])); \
        } \
        for (int i = 0; i < 4; i++) { \
            const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]); \
            fours[i] = combine(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b))); \
        } \
        for (int i = 0; i < 2; i++) { \
            const Floats a = fours[2 * i], b = fours[2 * i + 1]; \
            floats_store(results + 8 * i, combine(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))); \
        } \
    }

ACROSS(rows_sum, floats_add)
ACROSS(rows_magnitude, keys_max) /* magnitudes have no sign */

static inline void group_load(Floats group[PARTS], const void *numbers, int dtype) {
    for (int part = 0; part < PARTS; part++) {
        const char *from = (const char *)numbers + part * 8 * (dtype == FP32 ? 4 : 2);
        if (dtype == FP32) group[part] = _mm256_loadu_ps((const void *)from);
        else if (dtype == FP16) group[part] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
        else group[part] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16));
    }
}

/* Pairs of bf16: of each the first, then the other. */
static inline void split_pairs(Floats both[2], __m256i pairs) {
    both[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    both[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000)));
}

#define SUMS_AT_ONCE 2

/* Sums of some groups of numbers, side by side, of each of `count` rows; `most` becomes at least as large as each magnitude. Of bf16 the sums of
   pairs, which are put in order at the end, and the magnitudes of both at once. */
INLINE void groups_sums(float *sums, Floats *most, const char *numbers, size_t stride, int count, int groups, int dtype) {
    Floats totals[SUMS_AT_ONCE][PARTS], group[PARTS];
    __m256i largest[SUMS_AT_ONCE];
    for (int i = 0; i < groups; i++) totals[i][0] = totals[i][1] = floats_all(0), largest[i] = _mm256_setzero_si256();
    for (int row = 0; row < count; row++) {
        for (int i = 0; i < groups; i++) {
            const char *const from = numbers + row * stride + i * GROUP * (dtype == FP32 ? 4 : 2);
            if (dtype == BF16) {
                const __m256i pairs = _mm256_loadu_si256((const void *)from);
                largest[i] = _mm256_max_epi16(largest[i], _mm256_and_si256(pairs, _mm256_set1_epi16(0x7FFF)));
                split_pairs(group, pairs);
            } else {
                group_load(group, from, dtype);
                *most = magnitude_max(magnitude_max(*most, group[0]), group[1]);
            }
            for (int part = 0; part < PARTS; part++) totals[i][part] = floats_add(totals[i][part], group[part]);
        }
    }
    for (int i = 0; i < groups; i++) {
        Floats *const total = totals[i];
        if (dtype == BF16) {
            split_pairs(group, largest[i]);
            *most = magnitude_max(magnitude_max(*most, group[0]), group[1]);
            const Floats low = _mm256_unpacklo_ps(total[0], total[1]), high = _mm256_unpackhi_ps(total[0], total[1]);
            total[0] = _mm256_permute2f128_ps(low, high, 0x20), total[1] = _mm256_permute2f128_ps(low, high, 0x31);
        }
        for (int part = 0; part < PARTS; part++) floats_store(sums + i * GROUP + 8 * part, total[part]);
    }
}

static inline Floats group_magnitude(const Floats group[PARTS]) { return magnitude_max(magnitude_max(floats_all(0), group[0]), group[1]); }

static inline Shorts meet_codes(Shorts a, Shorts other, Shorts signs) { return shorts_add(other, _mm256_sign_epi16(a, signs)); }

/* The rotation of 16 codes but for its last step, in which group_widen lets adjacent numbers meet: hence the two halves are interleaved. */
static inline void group_rotate_codes(Shorts group[SHORT_PARTS], const int8_t *codes) {
    const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    Shorts a = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const void *)codes), order));
    a = meet_codes(a, _mm256_shuffle_epi32(a, 0xB1), _mm256_set1_epi64x((int64_t)0xFFFFFFFF00010001));
    a = meet_codes(a, _mm256_shuffle_epi32(a, 0x4E), _mm256_setr_epi64x(0x0001000100010001, -1, 0x0001000100010001, -1));
    group[0] = meet_codes(a, _mm256_permute2x128_si256(a, a, 0x01), _mm256_setr_epi64x(0x0001000100010001, 0x0001000100010001, -1, -1));
}

static inline void group_widen(Floats group[PARTS], const Shorts whole[SHORT_PARTS]) {
    group[0] = _mm256_cvtepi32_ps(_mm256_madd_epi16(whole[0], _mm256_set1_epi16(1)));
    group[1] = _mm256_cvtepi32_ps(_mm256_madd_epi16(whole[0], _mm256_set1_epi32((int32_t)0xFFFF0001)));
}

/* 16 whole numbers as bytes, saturated. */
static inline __m128i bytes_of(__m256i a, __m256i b) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
}

static inline void group_round(int8_t *codes, const Floats group[PARTS], Floats factor, int largest) {
    const __m256i low = _mm256_cvtps_epi32(floats_mul(group[0], factor)), high = _mm256_cvtps_epi32(floats_mul(group[1], factor));
    const __m128i bytes = _mm_max_epi8(bytes_of(low, high), _mm_set1_epi8((int8_t)-largest));
    _mm_storeu_si128((void *)codes, largest < 127 ? _mm_min_epi8(bytes, _mm_set1_epi8((int8_t)largest)) : bytes);
}

/* 32 bytes from four registers of numbers, packed within their halves, in the order of the numbers. */
static inline __m256i in_order(__m256i bytes) {
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

#define WITH_ROW_ROUNDING

/* A whole row, 32 numbers at a time: registers are packed within their halves, and fours of bytes brought to their places once. */
INLINE void row_round(int8_t *codes, const float *row, Floats factor, int head_dim, int largest) {
    for (int place = 0; place + 32 <= head_dim; place += 32) {
        __m256i whole[4];
        for (int i = 0; i < 4; i++) whole[i] = _mm256_cvtps_epi32(floats_mul(floats_load(row + place + 8 * i), factor));
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        __m256i bytes = _mm256_max_epi8(packed, _mm256_set1_epi8((int8_t)-largest));
        if (largest < 127) bytes = _mm256_min_epi8(bytes, _mm256_set1_epi8((int8_t)largest));
        _mm256_storeu_si256((void *)(codes + place), in_order(bytes));
    }
    if (head_dim % 32 == 0) return;
    const Floats last[PARTS] = {floats_load(row + head_dim - 16), floats_load(row + head_dim - 8)};
    group_round(codes + head_dim - 16, last, factor, largest);
}

static inline void values_of(Floats values[PARTS], __m128i codes, const LevelTable *levels) {
    const __m128i found = _mm_shuffle_epi8(_mm_loadu_si128((const void *)levels->values), codes);
    values[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(found));
    values[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(found, 8)));
}

static inline void group_values(Floats values[PARTS], const uint8_t *codes, const LevelTable *levels) {
    values_of(values, _mm_loadu_si128((const void *)codes), levels);
}

#define LEVELS_BY_ROW 1
#define WITH_SCALE_STEPS
#include "levels_avx2.h"

/* Codes below 16 to what the table holds for them. */
static inline void group_lookup(int8_t *values, const int8_t *codes, const int8_t table[16]) {
    const __m128i found = _mm_shuffle_epi8(_mm_loadu_si128((const void *)table), _mm_loadu_si128((const void *)codes));
    _mm_storeu_si128((void *)values, found);
}

static inline void halves_store(uint16_t *halves, const float *numbers) {
    for (int i = 0; i < 16; i += 8) {
        _mm_storeu_si128((void *)(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(numbers + i), _MM_FROUND_TO_NEAREST_INT));
    }
}

static inline void halves_load(float *numbers, const uint16_t *halves) {
    for (int i = 0; i < 16; i += 8) _mm256_storeu_ps(numbers + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(halves + i))));
}

/* -- copies past the caches, a line at a time -------------------------------------------------------------------------------------- */

static inline void line_copy_far(void *to, const void *from) {
    for (int i = 0; i < 2; i++) _mm256_stream_si256((__m256i *)to + i, _mm256_loadu_si256((const __m256i *)from + i));
}

static inline void lines_arrive(void) { _mm_sfence(); }
