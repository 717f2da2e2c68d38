/* Supers and scale bytes of q4 in columns, from the scales of 16 tokens in a register. */

/* For 16 tokens of up to 4 heads, one byte for each head: steps of scales below the largest of their head, from the bits of the ratio, as in
   scale_bytes. Within bytes: what is as many octaves below as fit no byte is none anyway. */
INLINE __m512i column_steps(const Floats scales[4], const Floats supers[4], const __mmask16 reduced[4]) {
    const __m512i *const table = (const void *)SCALE_LOG;
    __m512i exponents = _mm512_setzero_si512(), parts = exponents, marks = exponents;
    for (int i = 0; i < 4; i++) {
        const __mmask64 byte = UINT64_C(0x1111111111111111) << i;
        const Floats ratio = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(supers[i], floats_all(0), _CMP_NEQ_OQ), scales[i], supers[i]);
        const __m512i bits = _mm512_castps_si512(floats_at_most(ratio, floats_all(1)));
        exponents = _mm512_mask_mov_epi8(exponents, byte, _mm512_rolv_epi32(bits, _mm512_set1_epi32(9 + 8 * i)));
        parts = _mm512_mask_mov_epi8(parts, byte, _mm512_rolv_epi32(bits, _mm512_set1_epi32(17 + 8 * i)));
        marks = _mm512_mask_or_epi32(marks, reduced[i], marks, _mm512_set1_epi32((int)(128u << 8 * i)));
    }
    const __m512i below = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), parts, _mm512_loadu_si512(table + 1));
    const __m512i above = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 2), parts, _mm512_loadu_si512(table + 3));
    const __m512i logs = _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(parts), above);
    const __m512i octaves = _mm512_min_epu8(_mm512_sub_epi8(_mm512_set1_epi8(127), exponents), _mm512_set1_epi8(255 / STEPS_PER_OCTAVE));
    const __m512i steps = _mm512_subs_epu8(_mm512_slli_epi16(octaves, 5), logs);
    const __mmask64 none = _mm512_cmpgt_epu8_mask(steps, _mm512_set1_epi8((int8_t)(SMALLEST_SCALE + STEPS_PER_OCTAVE)));
    const __m512i nearest = _mm512_min_epu8(steps, _mm512_set1_epi8(SMALLEST_SCALE));
    return _mm512_or_si512(_mm512_mask_mov_epi8(nearest, none, _mm512_set1_epi8(NO_SCALE)), marks);
}

/* The largest number of each of 4 registers. */
static inline __m128 fours_max(const Floats rows[4]) {
    Floats pairs[2];
    for (int i = 0; i < 2; i++) {
        pairs[i] = _mm512_max_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
    const Floats fours = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
    return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Supers of all heads, from [batches, heads] scales of 16 tokens; `rounded` as they will be decoded. Of 4 heads at once, of the last one again
   rather than of fewer: what reaches over the end of supers is where steps are written next. */
INLINE void encode_supers(uint8_t *supers, float *rounded, const Floats *scales, int heads, int batches) {
    for (int first = 0; first < heads; first += 4) {
        Floats largest[4];
        for (int i = 0; i < 4; i++) {
            const Floats *const own = scales + fewer(first + i, heads - 1);
            largest[i] = own[0];
            for (int batch = 1; batch < batches; batch++) largest[i] = _mm512_max_ps(largest[i], own[batch * heads]);
        }
        const __m128i halves = _mm_cvtps_ph(_mm_min_ps(fours_max(largest), _mm_set1_ps(FP16_MAX)), _MM_FROUND_TO_NEAREST_INT);
        _mm_storel_epi64((void *)(supers + 2 * first), halves);
        _mm_storeu_ps(rounded + first, _mm_cvtph_ps(halves));
    }
}

/* Bytes of 4 heads for each of 16 tokens to their places, `stride` bytes apart; nothing behind `stop`. */
INLINE void store_quads(uint8_t *place, const uint8_t *stop, size_t stride, int count, __m512i quads) {
    const __m128i fours[4] = {_mm512_castsi512_si128(quads), _mm512_extracti32x4_epi32(quads, 1), _mm512_extracti32x4_epi32(quads, 2),
        _mm512_extracti32x4_epi32(quads, 3)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint64_t twos[2] = {(uint64_t)_mm_cvtsi128_si64(fours[i]), (uint64_t)_mm_extract_epi64(fours[i], 1)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, place += stride) {
            const uint32_t quad = (uint32_t)(twos[j / 2] >> 32 * (j % 2));
            if (4 * i + j >= count) return;
            if (stop - place >= 4) memcpy(place, &quad, 4);
            else memcpy(place, &quad, (size_t)(stop - place));
        }
    }
}

/* Supers and steps of all heads. Those of 4 heads are written at once, of the last ones first: if these are fewer, what reaches over a token's
   end is written again. */
INLINE void encode_sizes(const Shape *shape, uint8_t *supers, uint8_t *steps, const Floats *scales, const __mmask16 *reduced) {
    const int heads = shape->heads, batches = column_batches(shape);
    float rounded[MAX_COLUMN_HEADS];
    encode_supers(supers, rounded, scales, heads, batches);
    for (int batch = 0; batch < batches; batch++) {
        const int token = batch * COLUMN_TOKENS, count = fewer(shape->tokens - token, COLUMN_TOKENS);
        for (int first = (heads - 1) / 4 * 4; first >= 0; first -= 4) {
            Floats some[4], largest[4];
            __mmask16 marked[4];
            for (int i = 0; i < 4; i++) {
                const int head = fewer(first + i, heads - 1), at = batch * heads + head;
                some[i] = scales[at], marked[i] = reduced[at], largest[i] = floats_all(rounded[head]);
            }
            store_quads(steps + token * heads + first, steps + shape->tokens * heads, heads, count, column_steps(some, largest, marked));
        }
    }
}
