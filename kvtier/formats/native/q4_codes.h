/* Codes of q4 in columns: the last step of the rotation, keys less their mean, the codes, their inner products with the levels, and the way
   back from columns to the bytes of each token. */

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

/* 16 bytes of each token, of `reduced` ones (`some` say whether there are any) less the mean: lane i of `rows[j]` is token 4 * i + j. */
INLINE void column_bytes(__m512i rows[4], __m512i along[2], const Floats *columns, const float *mean, __mmask16 reduced, bool some,
    Floats factor, int head_dim) {
    __m512i packed[4], pairs[4];
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += TOGETHER / 2) {
        Floats numbers[TOGETHER][4]; /* numbers that meet in the last step, one register behind the other */
        __m512i codes[TOGETHER];
        for (int k = 0; k < TOGETHER / 2; k++) {
            for (int j = 0; j < 4; j++) {
                const int at = (i + k) / 2 * 8 + (i + k) % 2 * 2 + CODED_TOGETHER[j], next = at + head_dim / 2;
                Floats *const a = &numbers[2 * k][j], *const b = &numbers[2 * k + 1][j];
                *a = columns[column_of(at)], *b = columns[column_of(next)];
                if (some) *a = less_mean(*a, mean + at, reduced), *b = less_mean(*b, mean + next, reduced);
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

/* 32 bytes of each of `count` tokens, `stride` bytes apart, from the halves of them that column_bytes gives. */
INLINE void store_tokens(uint8_t *to, size_t stride, int count, __m512i halves[2][4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, to += stride) {
        const __m512i first = _mm512_permutex2var_epi64(halves[0][i], _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), halves[1][i]);
        const __m512i last = _mm512_permutex2var_epi64(halves[0][i], _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), halves[1][i]);
        const __m256i bytes[4] = {_mm512_castsi512_si256(first), _mm512_extracti64x4_epi64(first, 1), _mm512_castsi512_si256(last),
            _mm512_extracti64x4_epi64(last, 1)};
#pragma GCC unroll 4
        for (int lane = 0; lane < 4; lane++) {
            if (4 * lane + i < count) _mm256_storeu_si256((void *)(to + 4 * lane * stride), bytes[lane]);
        }
    }
}

INLINE __m512i code_columns_of(const Floats *columns, const float *mean, __mmask16 reduced, bool some, Floats factor, uint8_t *packed,
    size_t stride, int count, int head_dim) {
    __m512i along[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 1
    for (int place = 0; place < head_dim / 2; place += 32) {
        __m512i halves[2][4];
#pragma GCC unroll 1
        for (int half = 0; half < 2; half++) {
            const int at = place + 16 * half;
            column_bytes(halves[half], along, columns + column_of(at), mean + at, reduced, some, factor, head_dim);
        }
        if (count == COLUMN_TOKENS) store_tokens(packed + place, stride, COLUMN_TOKENS, halves);
        else store_tokens(packed + place, stride, count, halves);
    }
    return _mm512_add_epi32(along[0], along[1]);
}

#define CODE(some, head_dim) return code_columns_of(columns, mean, reduced, some, factor, packed, stride, count, head_dim)

/* The codes of up to 16 tokens, the first at `packed`, the next ones `stride` bytes apart, and their inner products with the levels. */
static __attribute__((noinline)) __m512i code_columns(const Floats *columns, const float *mean, __mmask16 reduced, Floats factor,
    uint8_t *packed, size_t stride, int count, int head_dim) {
    switch ((head_dim == MAX_COLUMNS) * 2 + (reduced != 0)) {
    case 0: CODE(false, GROUP);
    case 1: CODE(true, GROUP);
    case 2: CODE(false, MAX_COLUMNS);
    default: CODE(true, MAX_COLUMNS);
    }
}
