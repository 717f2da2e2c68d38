/* Groups of 64 numbers in AVX-512 registers. What a group must offer is listed in kernels.h. */
#include <immintrin.h>

#define GROUP 64
#define WITH_COLUMNS
#define DECODES_FAR 1
#define PARTS 4        /* registers of floats */
#define SHORT_PARTS 2  /* registers of 16-bit whole numbers */

typedef __m512 Floats;
typedef __m512i Shorts;

static inline Floats floats_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats floats_sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats floats_mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats floats_fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats floats_all(float number) { return _mm512_set1_ps(number); }
static inline Floats floats_div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats floats_root(Floats a) { return _mm512_sqrt_ps(a); }
static inline Floats floats_at_most(Floats a, Floats most) { return _mm512_min_ps(a, most); }
static inline Floats floats_zero_below(Floats a, Floats key, float least) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key, _mm512_set1_ps(least), _CMP_GE_OQ), a);
}
static inline Floats floats_load(const float *from) { return _mm512_loadu_ps(from); }
static inline void floats_store(float *to, Floats a) { _mm512_storeu_ps(to, a); }
static inline Shorts shorts_add(Shorts a, Shorts b) { return _mm512_add_epi16(a, b); }
static inline Shorts shorts_sub(Shorts a, Shorts b) { return _mm512_sub_epi16(a, b); }

static inline Floats magnitude_max(Floats most, Floats a) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), magnitude));
}

/* Across the lanes of 16 registers at once: halves of two registers meet until each lane holds what one register had. */
#define ACROSS(name, combine) \
    static inline void name(float results[16], const Floats rows[16]) { \
        Floats pairs[8], fours[4]; \
        for (int i = 0; i < 8; i++) { \
            pairs[i] = combine(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1])); \
        } \
        for (int i = 0; i < 4; i++) { \
            const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]); \
            fours[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b))); \
        } \
        const Floats low = combine(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xDD)); \
        const Floats high = combine(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xDD)); \
        _mm512_storeu_ps(results, combine(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD))); \
    }

static inline Floats keys_max(Floats a, Floats b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

ACROSS(rows_sum, floats_add)
ACROSS(rows_key, keys_max)
ACROSS(rows_magnitude, keys_max) /* magnitudes have no sign */

/* bf16 numbers are the upper halves of floats: each goes to an odd place, zeros between them. */
static inline void load_bf16(Floats pair[2], const void *numbers) {
    const __m512i low = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1,
        1, 0, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16)), line = _mm512_loadu_si512(numbers);
    pair[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, low, line));
    pair[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, high, line));
}

/* Half a group, which is a ggml block of 32 numbers. */
enum { BLOCK_PARTS = 2 };

static inline void block_load(Floats block[BLOCK_PARTS], const void *numbers, int dtype) {
    for (int part = 0; part < BLOCK_PARTS && dtype != BF16; part++) {
        if (dtype == FP32) block[part] = _mm512_loadu_ps((const float *)numbers + part * 16);
        else block[part] = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)numbers + part * 16)));
    }
    if (dtype == BF16) load_bf16(block, numbers);
}

static inline void group_load(Floats group[PARTS], const void *numbers, int dtype) {
    block_load(group, numbers, dtype);
    block_load(group + 2, (const char *)numbers + 32 * (dtype == FP32 ? 4 : 2), dtype);
}

#if defined(WITH_AVX512_BF16)
/* The instruction flushes subnormal numbers; decoded ones are never smaller than 2**-61. */
static inline __m512i to_bf16_line(Floats a, Floats b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
#else
/* bf16 of 16 finite floats, in the upper halves. */
static inline __m512i rounded_to_bf16(Floats a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), even);
}

static inline __m512i to_bf16_line(Floats a, Floats b) {
    const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
        19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(rounded_to_bf16(a), upper_halves, rounded_to_bf16(b));
}
#endif

static inline __m256i to_fp16_half_line(Floats a) {
    const Floats within = _mm512_max_ps(_mm512_min_ps(a, _mm512_set1_ps(65504)), _mm512_set1_ps(-65504));
    return _mm512_cvtps_ph(within, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline void block_store(void *numbers, const Floats block[BLOCK_PARTS], int dtype) {
    for (int part = 0; part < BLOCK_PARTS && dtype != BF16; part++) {
        if (dtype == FP32) _mm512_storeu_ps((float *)numbers + part * 16, block[part]);
        else _mm256_storeu_si256((void *)((uint16_t *)numbers + part * 16), to_fp16_half_line(block[part]));
    }
    if (dtype == BF16) _mm512_storeu_si512(numbers, to_bf16_line(block[0], block[1]));
}

static inline void group_store(void *numbers, const Floats group[PARTS], int dtype) {
    block_store(numbers, group, dtype);
    block_store((char *)numbers + 32 * (dtype == FP32 ? 4 : 2), group + 2, dtype);
}

/* The same past the caches, to whole lines of memory. */
static inline void group_store_far(char *numbers, const Floats group[PARTS], int dtype) {
    for (int part = 0; part < PARTS && dtype == FP32; part++) {
        _mm512_stream_si512((void *)(numbers + part * 64), _mm512_castps_si512(group[part]));
    }
    for (int half = 0; half < 2 && dtype != FP32; half++) {
        const Floats *const block = group + 2 * half;
        const __m512i low = _mm512_castsi256_si512(to_fp16_half_line(block[0]));
        const __m512i line = dtype == BF16 ? to_bf16_line(block[0], block[1]) : _mm512_inserti64x4(low, to_fp16_half_line(block[1]), 1);
        _mm512_stream_si512((void *)(numbers + half * 64), line);
    }
}

/* In one register: lane i meets lane i ^ distance; the lower becomes the sum, the upper the difference. Multiplying by +-1 is exact. */
static inline Floats meet(Floats a, Floats other, __mmask16 upper) {
    return _mm512_fmadd_ps(a, _mm512_mask_blend_ps(upper, _mm512_set1_ps(1), _mm512_set1_ps(-1)), other);
}

/* Two registers become their sum and difference; subtracting the product with 1 is as exact, and done where nothing else waits. */
static inline void meet_both(Floats *a, Floats *b) {
    const Floats sum = floats_add(*a, *b);
    *b = _mm512_fnmadd_ps(*b, _mm512_set1_ps(1), *a), *a = sum;
}

/* Two registers: what has to meet in adjacent lanes of 32 or 128 bits gets into different registers, meets, and stays there. */
static inline void meet_adjacent(Floats *a, Floats *b) {
    const Floats even = _mm512_shuffle_ps(*a, *b, 0x88);
    *b = _mm512_shuffle_ps(*a, *b, 0xDD), *a = even;
    meet_both(a, b);
}

static inline void meet_lanes(Floats *a, Floats *b) {
    const Floats even = _mm512_shuffle_f32x4(*a, *b, 0x88);
    *b = _mm512_shuffle_f32x4(*a, *b, 0xDD), *a = even;
    meet_both(a, b);
}

/* 16 pairs of numbers, which are the halves of 32 bits. */
static inline void split_pairs(Floats both[2], __m512i pairs, int dtype) {
    if (dtype == FP16) {
        both[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
        both[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    } else {
        both[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        both[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
    }
}

/* Their sums or, if `minus`, the lower halves less the upper ones; added to `start` unless that is NULL. */
static inline Floats met_pairs(const Floats *start, __m512i pairs, bool minus, int dtype) {
#if defined(WITH_AVX512_BF16)
    if (dtype == BF16) {
        const __m512i signs = _mm512_set1_epi32(minus ? (int)0xBF803F80 : 0x3F803F80);
        return _mm512_dpbf16_ps(start ? *start : _mm512_setzero_ps(), (__m512bh)pairs, (__m512bh)signs);
    }
#endif
    Floats both[2];
    split_pairs(both, pairs, dtype);
    const Floats met = minus ? floats_sub(both[0], both[1]) : floats_add(both[0], both[1]);
    return start ? floats_add(*start, met) : met;
}

/* Two columns of pairs: the sum and the difference of what met_pairs makes of them. */
static inline void met_both(Floats *a, Floats *b, __m512i first, __m512i second, bool minus, int dtype) {
    *a = met_pairs(NULL, first, minus, dtype);
#if defined(WITH_AVX512_BF16)
    if (dtype == BF16) {
        const __m512bh less = (__m512bh)_mm512_set1_epi32(minus ? 0x3F80BF80 : (int)0xBF80BF80);
        *b = _mm512_dpbf16_ps(*a, (__m512bh)second, less), *a = met_pairs(a, second, minus, dtype);
        return;
    }
#endif
    *b = met_pairs(NULL, second, minus, dtype);
    meet_both(a, b);
}

/* 32 bf16 numbers: the sum and the difference of each two neighbours. */
static inline void load_met_pairs(Floats met[2], const char *numbers) {
    const __m512i pairs = _mm512_loadu_si512(numbers);
    met[0] = met_pairs(NULL, pairs, false, BF16), met[1] = met_pairs(NULL, pairs, true, BF16);
}

/* How many groups to rotate side by side: the CPU does not see far enough ahead to do that by itself. */
#define GROUPS_AT_ONCE 4

/* `count` is a constant; each step is taken for all groups before the next one. Neighbours meet first, then numbers 2, 4, ... apart,
   as in the reference. Each step moves what met in the one before back between the lanes, until all numbers stand in their order. */
INLINE void groups_load_rotated(Floats (*groups)[PARTS], const char *const *numbers, int count, int dtype) {
    if (dtype == BF16) {
        for (int i = 0; i < count; i++) {
            for (int line = 0; line < 2; line++) load_met_pairs(groups[i] + 2 * line, numbers[i] + 64 * line);
        }
        for (int step = 0; step < 2; step++) {
            for (int i = 0; i < count; i++) meet_adjacent(&groups[i][0], &groups[i][1]), meet_adjacent(&groups[i][2], &groups[i][3]);
        }
        for (int step = 0; step < 2; step++) {
            for (int i = 0; i < count; i++) meet_lanes(&groups[i][0], &groups[i][1]), meet_lanes(&groups[i][2], &groups[i][3]);
        }
    } else {
        for (int i = 0; i < count; i++) {
            group_load(groups[i], numbers[i], dtype);
            for (int part = 0; part < PARTS; part++) {
                Floats a = groups[i][part];
                a = meet(a, _mm512_permute_ps(a, 0xB1), 0xAAAA);
                a = meet(a, _mm512_permute_ps(a, 0x4E), 0xCCCC);
                a = meet(a, _mm512_shuffle_f32x4(a, a, 0xB1), 0xF0F0);
                groups[i][part] = meet(a, _mm512_shuffle_f32x4(a, a, 0x4E), 0xFF00);
            }
            meet_both(&groups[i][0], &groups[i][1]), meet_both(&groups[i][2], &groups[i][3]);
        }
    }
    for (int i = 0; i < count; i++) meet_both(&groups[i][0], &groups[i][2]), meet_both(&groups[i][1], &groups[i][3]);
}

/* Sums of a group of numbers of each of `count` rows, in the order of memory; `most`, if not NULL, becomes at least as large as each
   magnitude. */
INLINE void group_sums(float sums[GROUP], Floats *most, const char *numbers, size_t stride, int count, int dtype) {
    Floats total[PARTS] = {floats_all(0), floats_all(0), floats_all(0), floats_all(0)};
#if defined(WITH_AVX512_BF16)
    if (dtype == BF16) {
        /* Two rows at once: each sum takes two numbers that are beside each other then. */
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
        const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
        __m512i largest = _mm512_setzero_si512();
        for (int row = 0; row < count; row += 2) {
            for (int line = 0; line < 2; line++) {
                const __m512i one = _mm512_loadu_si512(numbers + row * stride + line * 64);
                const __m512i next = row + 1 < count ? _mm512_loadu_si512(numbers + (row + 1) * stride + line * 64) : _mm512_setzero_si512();
                total[2 * line] = _mm512_dpbf16_ps(total[2 * line], (__m512bh)_mm512_unpacklo_epi16(one, next), ones);
                total[2 * line + 1] = _mm512_dpbf16_ps(total[2 * line + 1], (__m512bh)_mm512_unpackhi_epi16(one, next), ones);
                if (!most) continue;
                largest = _mm512_max_epu16(largest, _mm512_and_si512(one, magnitude));
                largest = _mm512_max_epu16(largest, _mm512_and_si512(next, magnitude));
            }
        }
        if (most) {
            *most = magnitude_max(*most, _mm512_castsi512_ps(_mm512_slli_epi32(largest, 16)));
            *most = magnitude_max(*most, _mm512_castsi512_ps(largest));
        }
        for (int line = 0; line < 2; line++) {
            const __m512i low = _mm512_castps_si512(total[2 * line]), high = _mm512_castps_si512(total[2 * line + 1]);
            const __m512i first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
            const __m512i last = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
            floats_store(sums + 32 * line, _mm512_castsi512_ps(first)), floats_store(sums + 32 * line + 16, _mm512_castsi512_ps(last));
        }
        return;
    }
#endif
    for (int row = 0; row < count; row++) {
        Floats group[PARTS];
        group_load(group, numbers + row * stride, dtype);
        for (int part = 0; part < PARTS; part++) {
            total[part] = floats_add(total[part], group[part]);
            if (most) *most = magnitude_max(*most, group[part]);
        }
    }
    for (int part = 0; part < PARTS; part++) floats_store(sums + 16 * part, total[part]);
}

/* The largest magnitudes in a group; not a number and infinite where all numbers are one of the two. */
static inline Floats group_magnitude(const Floats group[PARTS]) {
    enum { LARGEST_MAGNITUDE = 0xB };
    const Floats low = _mm512_range_ps(group[0], group[1], LARGEST_MAGNITUDE);
    const Floats high = _mm512_range_ps(group[2], group[3], LARGEST_MAGNITUDE);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(_mm512_range_ps(low, high, LARGEST_MAGNITUDE)),
        _mm512_set1_epi32(0x7FFFFFFF)));
}

/* The rotation of 64 codes but for its last step, which group_widen does. Bit k of a code's index decides about step k. Steps are taken
   where they are cheapest: adjacent bytes and, in the end, adjacent 16-bit numbers meet in one multiply-add each; between them two
   registers exchange halves, so that what has to meet lies in different registers. That moves numbers about; reading the codes
   in the right order in the first place brings every number to its place. */
static inline void group_rotate_codes(Shorts group[SHORT_PARTS], const int8_t *codes) {
    static const uint8_t order[64] = {
        0, 4, 16, 20, 32, 36, 48, 52, 1, 5, 17, 21, 33, 37, 49, 53,
        2, 6, 18, 22, 34, 38, 50, 54, 3, 7, 19, 23, 35, 39, 51, 55,
        8, 12, 24, 28, 40, 44, 56, 60, 9, 13, 25, 29, 41, 45, 57, 61,
        10, 14, 26, 30, 42, 46, 58, 62, 11, 15, 27, 31, 43, 47, 59, 63,
    };
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(order), _mm512_loadu_si512(codes));
    const __m512i ones = _mm512_set1_epi8(1), signs = _mm512_set1_epi16((int16_t)0xFF01), offset = _mm512_set1_epi8(-128);
    Shorts a = _mm512_maddubs_epi16(ones, bytes), b = _mm512_maddubs_epi16(_mm512_xor_si512(bytes, offset), signs);
    Shorts u = _mm512_shuffle_i64x2(a, b, 0x44), v = _mm512_shuffle_i64x2(a, b, 0xEE);
    a = shorts_add(u, v), b = shorts_sub(u, v);
    u = _mm512_shuffle_i64x2(a, b, 0x88), v = _mm512_shuffle_i64x2(a, b, 0xDD);
    a = shorts_add(u, v), b = shorts_sub(u, v);
    u = _mm512_unpacklo_epi32(a, b), v = _mm512_unpackhi_epi32(a, b);
    a = shorts_add(u, v), b = shorts_sub(u, v);
    u = _mm512_unpacklo_epi32(a, b), v = _mm512_unpackhi_epi32(a, b);
    group[0] = shorts_add(u, v), group[1] = shorts_sub(u, v);
}

static inline void group_widen(Floats group[PARTS], const Shorts whole[SHORT_PARTS]) {
    const __m512i ones = _mm512_set1_epi16(1), signs = _mm512_set1_epi32((int32_t)0xFFFF0001);
    for (int part = 0; part < SHORT_PARTS; part++) {
        group[2 * part] = _mm512_cvtepi32_ps(_mm512_madd_epi16(whole[part], ones));
        group[2 * part + 1] = _mm512_cvtepi32_ps(_mm512_madd_epi16(whole[part], signs));
    }
}

/* Added to a number below 2**15 and rounded, this leaves a whole number in the 16 lowest bits. */
#define WHOLE 0x1.8p23f

/* Whole numbers that WHOLE was added to, as bytes, saturated. Four numbers of each register follow each other, then the next four of each:
   that is also the order in which bytes widen to registers with the fewest instructions. */
static inline __m512i bytes_of(const Floats whole[PARTS]) {
    const __m512i fours = _mm512_set_epi16(62, 60, 58, 56, 30, 28, 26, 24, 54, 52, 50, 48, 22, 20, 18, 16, 46, 44, 42, 40, 14, 12, 10, 8,
        38, 36, 34, 32, 6, 4, 2, 0);
    const __m512i low = _mm512_permutex2var_epi16(_mm512_castps_si512(whole[0]), fours, _mm512_castps_si512(whole[1]));
    const __m512i high = _mm512_permutex2var_epi16(_mm512_castps_si512(whole[2]), fours, _mm512_castps_si512(whole[3]));
    return _mm512_packs_epi16(low, high);
}

/* From that order to the usual one and back. */
static inline __m512i in_order(__m512i fours) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), fours);
}

static inline void group_round(int8_t *codes, const Floats group[PARTS], Floats factor, int largest) {
    Floats whole[PARTS];
    for (int part = 0; part < PARTS; part++) whole[part] = floats_add(floats_mul(group[part], factor), floats_all(WHOLE));
    const __m512i bytes = _mm512_max_epi8(in_order(bytes_of(whole)), _mm512_set1_epi8((int8_t)-largest));
    _mm512_storeu_si512(codes, largest < 127 ? _mm512_min_epi8(bytes, _mm512_set1_epi8((int8_t)largest)) : bytes);
}

/* Levels are exact in bf16, the upper halves of floats: their two bytes are looked up and put in place. Codes as bytes_of has them. */
static inline void values_of(Floats values[PARTS], __m512i code, const LevelTable *levels) {
    const __m512i lower = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)levels->bf16_low)), code);
    const __m512i upper = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)levels->bf16_high)), code);
    const __m512i zero = _mm512_setzero_si512();
    for (int half = 0; half < 2; half++) {
        const __m512i numbers = half ? _mm512_unpackhi_epi8(lower, upper) : _mm512_unpacklo_epi8(lower, upper);
        values[2 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, numbers));
        values[2 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, numbers));
    }
}

static inline void group_values(Floats values[PARTS], const uint8_t *codes, const LevelTable *levels) {
    values_of(values, in_order(_mm512_loadu_si512(codes)), levels);
}

/* Codes of what lies from each of these whole numbers to the next. */
static inline __m512i codes_of(__m512i cells, const LevelTable *levels) {
    const __m512i *const table = (const void *)levels->codes;
    const __m512i above = _mm512_loadu_si512(table), far_above = _mm512_loadu_si512(table + 1);
    const __m512i far_below = _mm512_loadu_si512(table + 2), below = _mm512_loadu_si512(table + 3);
    const __m512i positive = _mm512_permutex2var_epi8(above, cells, far_above);
    const __m512i negative = _mm512_permutex2var_epi8(far_below, cells, below);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(cells), positive, negative);
}

#define LEVELS_BY_ROW 0
#define LEVELS_AT_ONCE 2

/* `count` is a constant; each step is taken for all groups before the next one. */
INLINE void groups_levels(uint8_t *const *codes, Floats (*values)[PARTS], const float *const *rows, const Floats *factors, int count,
    const LevelTable *levels) {
    __m512i code[LEVELS_AT_ONCE];
    for (int i = 0; i < count; i++) {
        for (int part = 0; part < PARTS; part++) {
            values[i][part] = _mm512_fmadd_round_ps(floats_load(rows[i] + part * 16), factors[i], floats_all(WHOLE),
                _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        }
    }
    for (int i = 0; i < count; i++) code[i] = codes_of(bytes_of(values[i]), levels);
    for (int i = 0; i < count; i++) {
        _mm512_storeu_si512(codes[i], in_order(code[i]));
        values_of(values[i], code[i], levels);
    }
}

/* Codes below 16 to what the table holds for them. */
static inline void group_lookup(int8_t *values, const int8_t *codes, const int8_t table[16]) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    _mm512_storeu_si512(values, _mm512_shuffle_epi8(all, _mm512_loadu_si512(codes)));
}

static inline void halves_store(uint16_t *halves, const float *numbers) {
    const __m256i rounded = _mm512_cvtps_ph(_mm512_loadu_ps(numbers), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((void *)halves, rounded);
}

static inline void halves_load(float *numbers, const uint16_t *halves) {
    _mm512_storeu_ps(numbers, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)halves)));
}

/* ggml blocks of 32 numbers; see kernels.h. */
static inline void block_from_bytes(Floats block[BLOCK_PARTS], const int8_t *bytes, int dtype) {
    (void)dtype;
    for (int part = 0; part < BLOCK_PARTS; part++) {
        block[part] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(bytes + 16 * part))));
    }
}

static inline void block_round(int8_t *codes, const Floats block[BLOCK_PARTS]) {
    for (int part = 0; part < BLOCK_PARTS; part++) {
        const Floats half = _mm512_or_ps(_mm512_and_ps(block[part], _mm512_set1_ps(-0.f)), _mm512_set1_ps(0x1.fffffep-2f));
        const __m512i whole = _mm512_cvttps_epi32(floats_add(block[part], half));
        _mm_storeu_si128((void *)(codes + 16 * part), _mm512_cvtepi32_epi8(whole));
    }
}

static inline void block_nibbles(uint8_t packed[16], const Floats block[BLOCK_PARTS]) {
    const __m512i most = _mm512_set1_epi32(15);
    const __m512i low = _mm512_min_epi32(_mm512_cvttps_epi32(block[0]), most), high = _mm512_min_epi32(_mm512_cvttps_epi32(block[1]), most);
    _mm_storeu_si128((void *)packed, _mm512_cvtepi32_epi8(_mm512_or_si512(low, _mm512_slli_epi32(high, 4))));
}

static inline void nibble_numbers(uint16_t numbers[32], const uint8_t packed[16], const uint16_t table[16]) {
    const __m128i codes = _mm_loadu_si128((const void *)packed);
    const __m256i halves = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(codes, 4), codes), _mm256_set1_epi8(15));
    const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)table)); /* codes never reach the upper half */
    _mm512_storeu_si512(numbers, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(halves), all));
}

static inline Floats extreme_keys(Floats a, int place) {
    const __m512i before = _mm512_setr_epi32(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32);
    const __m512i rotated = _mm512_rol_epi32(_mm512_castps_si512(a), 1);
    return _mm512_castsi512_ps(_mm512_or_si512(rotated, _mm512_sub_epi32(before, _mm512_set1_epi32(2 * place))));
}

/* -- copies past the caches, a line at a time -------------------------------------------------------------------------------------- */

static inline void line_copy_far(void *to, const void *from) { _mm512_stream_si512(to, _mm512_loadu_si512(from)); }
static inline void lines_arrive(void) { _mm_sfence(); }
