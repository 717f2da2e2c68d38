/* Scale bytes of q4 and q3 in AVX2 registers, which have no table of 256 numbers: a polynomial instead. */

/* Rounded, what SCALE_LOG holds for the first eight bits behind the point of numbers from 1 to 2: for all 256 no nearer to a half than
   0.003. */
static inline __m256i scale_logs(Floats numbers) {
    const Floats x = floats_sub(numbers, floats_all(1.5f));
    Floats log = floats_fused(x, floats_all(-2.18f), floats_all(4.68f));
    log = floats_fused(log, x, floats_all(-10.2f));
    log = floats_fused(log, x, floats_all(30.74f));
    return _mm256_cvtps_epi32(floats_fused(log, x, floats_all(18.78f)));
}

static inline __m256i eight_steps(const float *scales, const float *supers) {
    const Floats super = floats_load(supers), ratio = floats_at_most(floats_div(floats_load(scales), super), floats_all(1));
    /* Of a ratio of 0, the step is more than enough for none. */
    const __m256i bits = _mm256_castps_si256(_mm256_and_ps(ratio, _mm256_cmp_ps(super, floats_all(0), _CMP_NEQ_OQ)));
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(255 << 15)), octaves = _mm256_srli_epi32(bits, 23);
    const __m256i logs = scale_logs(_mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_castps_si256(floats_all(1)))));
    return _mm256_sub_epi32(_mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), octaves), 5), logs);
}

static inline void scale_steps(uint8_t steps[16], const float scales[16], const float supers[16]) {
    const __m256i both = _mm256_packs_epi32(eight_steps(scales, supers), eight_steps(scales + 8, supers + 8));
    const __m256i step = _mm256_permute4x64_epi64(both, 0xD8), smallest = _mm256_set1_epi16(SMALLEST_SCALE);
    const __m256i none = _mm256_cmpgt_epi16(step, _mm256_set1_epi16(SMALLEST_SCALE + STEPS_PER_OCTAVE));
    const __m256i nearest = _mm256_min_epi16(_mm256_max_epi16(step, _mm256_setzero_si256()), smallest);
    const __m256i found = _mm256_sub_epi16(nearest, none); /* NO_SCALE is the one behind SMALLEST_SCALE */
    _mm_storeu_si128((void *)steps, _mm_packus_epi16(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1)));
}
