/* Means of keys for q4 in columns: coded as encode_means does, and kept as they are before the rotation, where they are subtracted while
   neighbours are paired. */

/* The means of a block, not rotated, [heads, head_dim]; `less`: their sums and differences of neighbours, negative. */
typedef struct {
    float numbers[MAX_HEADS_TIMES_DIM], less[MAX_HEADS_TIMES_DIM], energies[MAX_COLUMN_HEADS];
    uint32_t high[MAX_HEADS_TIMES_DIM / 2], low[MAX_HEADS_TIMES_DIM / 2];
} Means;

/* Keeps the mean of a head from what it becomes when rotated. */
INLINE void keep_mean(Means *means, Floats (*rotated)[PARTS], int head, int groups) {
    Floats energy = floats_all(0);
    for (int i = 0; i < groups * PARTS; i++) {
        const int at = head * groups * GROUP + i * LANES;
        const Floats own = floats_mul(rotated[i / PARTS][i % PARTS], floats_all(1 / (float)(groups * GROUP)));
        energy = floats_fused(own, own, energy);
        floats_store(means->numbers + at, own);
        floats_store(means->less + at, floats_mul(meet(own, _mm512_permute_ps(own, 0xB1), 0xAAAA), floats_all(-1)));
#if defined(WITH_AVX512_BF16)
        const __m256bh high = _mm512_cvtneps_pbh(own);
        const Floats left = floats_sub(own, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)high), 16)));
        _mm256_storeu_si256((void *)(means->high + at / 2), (__m256i)high);
        _mm256_storeu_si256((void *)(means->low + at / 2), (__m256i)_mm512_cvtneps_pbh(left));
#endif
    }
    means->energies[head] = _mm512_reduce_add_ps(energy);
}

/* Rotates GROUPS_AT_ONCE groups of heads of `groups` each. */
INLINE void rotate_means(Floats (*rotated)[PARTS], const float *rows, int groups) {
    const char *from[GROUPS_AT_ONCE];
    for (int i = 0; i < GROUPS_AT_ONCE; i++) from[i] = (const char *)(rows + i * GROUP);
    groups_load_rotated(rotated, from, GROUPS_AT_ONCE, FP32);
    for (int i = 0; i < GROUPS_AT_ONCE && groups == 2; i += 2) {
        for (int part = 0; part < PARTS; part++) meet_both(&rotated[i][part], &rotated[i + 1][part]);
    }
}

/* As encode_means: codes the means of as many heads as have GROUPS_AT_ONCE groups, from `first` on, the last one again rather than fewer. All
   steps of one head wait for each other; those of the others fill the time. */
INLINE void encode_some_means(Means *means, const Shape *shape, const char *numbers, uint8_t *coded, int first, int groups) {
    enum { MOST = GROUPS_AT_ONCE };
    const int heads = shape->heads, head_dim = groups * GROUP, beside = MOST / groups;
    const float norm = norm_of(shape), share = 1 / (float)shape->tokens;
    const size_t number_bytes = value_bytes(shape->dtype), stride = heads * head_dim * number_bytes;
    float rows[MOST * GROUP] __attribute__((aligned(64))), energies[MOST], along[MOST];
    uint8_t codes[MOST * GROUP];
    Floats rotated[MOST][PARTS], values[MOST][PARTS], factors[MOST];
    for (int i = 0; i < MOST; i++) {
        const char *const from = numbers + ((size_t)fewer(first + i / groups, heads - 1) * head_dim + i % groups * GROUP) * number_bytes;
        if (shape->dtype == BF16) group_sums(rows + i * GROUP, NULL, from, stride, shape->tokens, BF16);
        else group_sums(rows + i * GROUP, NULL, from, stride, shape->tokens, FP16);
        for (int part = 0; part < PARTS; part++) {
            float *const to = rows + i * GROUP + part * LANES;
            floats_store(to, floats_mul(floats_load(to), floats_all(share)));
        }
    }
    rotate_means(rotated, rows, groups);
    for (int i = 0; i < beside; i++) {
        Floats sum = floats_all(0);
        for (int j = 0; j < groups * PARTS; j++) {
            const Floats number = rotated[i * groups + j / PARTS][j % PARTS];
            sum = floats_fused(number, number, sum);
            floats_store(rows + i * head_dim + j * LANES, number);
        }
        energies[i] = _mm512_reduce_add_ps(sum);
    }
    for (int i = 0; i < MOST; i++) factors[i] = floats_all(inverse(sqrtf(energies[i / groups] / (float)head_dim)) * (float)PER_RMS4);
    for (int i = 0; i < MOST; i += LEVELS_AT_ONCE) {
        uint8_t *const to[LEVELS_AT_ONCE] = {codes + i * GROUP, codes + (i + 1) * GROUP};
        const float *const from[LEVELS_AT_ONCE] = {rows + i * GROUP, rows + (i + 1) * GROUP};
        groups_levels(to, values + i, from, factors + i, LEVELS_AT_ONCE, &LEVELS4);
    }
    for (int i = 0; i < beside; i++) {
        Floats sum = floats_all(0);
        for (int j = 0; j < groups * PARTS; j++) {
            sum = floats_fused(rotated[i * groups + j / PARTS][j % PARTS], values[i * groups + j / PARTS][j % PARTS], sum);
        }
        along[i] = _mm512_reduce_add_ps(sum);
    }
    for (int i = 0; i < beside; i++) {
        const int head = fewer(first + i, heads - 1);
        const float scale = energies[i] * inverse(along[i]) * (float)PER_RMS4 * norm;
        const __m128i half = _mm_cvtps_ph(_mm_set_ss(at_most(scale, FP16_MAX)), _MM_FROUND_TO_NEAREST_INT);
        const uint16_t bits = (uint16_t)_mm_cvtsi128_si32(half);
        memcpy(coded + 2 * head, &bits, sizeof bits);
        pack_nibbles(coded + 2 * heads + head * (head_dim / 2), codes + i * head_dim, head_dim);
        const Floats factor = floats_all(_mm_cvtss_f32(_mm_cvtph_ps(half)) * (float)(1 / PER_RMS4) / norm);
        for (int j = 0; j < groups * PARTS; j++) {
            floats_store(rows + i * head_dim + j * LANES, floats_mul(values[i * groups + j / PARTS][j % PARTS], factor));
        }
    }
    rotate_means(rotated, rows, groups);
    for (int i = 0; i < beside; i++) keep_mean(means, rotated + i * groups, fewer(first + i, heads - 1), groups);
}

static __attribute__((noinline)) void encode_column_means(Means *means, const Shape *shape, const char *numbers, uint8_t *coded) {
    const int groups = shape->head_dim / GROUP;
    for (int first = 0; first < shape->heads; first += GROUPS_AT_ONCE / groups) {
        if (groups == 1) encode_some_means(means, shape, numbers, coded, first, 1);
        else encode_some_means(means, shape, numbers, coded, first, 2);
    }
}
