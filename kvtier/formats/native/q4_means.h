/* Means of keys for q4 in columns: coded as encode_means does, and kept rotated by all steps but the last one, as columns are when they are
   coded. In steps, each of which waits for the one before: others can fill the time. */

/* The means of a block, [heads, head_dim], and the sums of their squares. */
typedef struct {
    float numbers[MAX_HEADS_TIMES_DIM], energies[MAX_COLUMN_HEADS];
} Means;

enum { MEANS_AT_ONCE = GROUPS_AT_ONCE, MEAN_STEPS = 4 };

/* The means of as many heads as have GROUPS_AT_ONCE groups, from `first` on, the last one again rather than fewer: [heads, head_dim] `rows`, what
   they were rotated to, their codes and the levels of these. */
typedef struct {
    float rows[MEANS_AT_ONCE * GROUP] __attribute__((aligned(64))), energies[MEANS_AT_ONCE], along[MEANS_AT_ONCE];
    uint8_t codes[MEANS_AT_ONCE * GROUP] __attribute__((aligned(64)));
    Floats levels[MEANS_AT_ONCE * PARTS];
    int first;
} MeanCoding;

static int means_at_once(int head_dim) { return MEANS_AT_ONCE * GROUP / head_dim; }

INLINE void sum_heads(MeanCoding *coding, const Shape *shape, const char *numbers, int groups) {
    const int heads = shape->heads, head_dim = groups * GROUP;
    const size_t number_bytes = value_bytes(shape->dtype), stride = heads * head_dim * number_bytes;
    const Floats share = floats_all(1 / (float)shape->tokens);
    for (int i = 0; i < MEANS_AT_ONCE; i++) {
        float *const to = coding->rows + i * GROUP;
        const int head = fewer(coding->first + i / groups, heads - 1);
        const char *const from = numbers + ((size_t)head * head_dim + i % groups * GROUP) * number_bytes;
        if (shape->dtype == BF16) group_sums(to, NULL, from, stride, shape->tokens, BF16);
        else group_sums(to, NULL, from, stride, shape->tokens, FP16);
        for (int part = 0; part < PARTS; part++) floats_store(to + part * LANES, floats_mul(floats_load(to + part * LANES), share));
    }
}

INLINE void rotate_heads(MeanCoding *coding, int groups) {
    const char *from[MEANS_AT_ONCE];
    Floats rotated[MEANS_AT_ONCE][PARTS];
    for (int i = 0; i < MEANS_AT_ONCE; i++) from[i] = (const char *)(coding->rows + i * GROUP);
    groups_load_rotated(rotated, from, MEANS_AT_ONCE, FP32);
    for (int i = 0; i < MEANS_AT_ONCE && groups == 2; i += 2) {
        for (int part = 0; part < PARTS; part++) meet_both(&rotated[i][part], &rotated[i + 1][part]);
    }
    for (int i = 0; i < MEANS_AT_ONCE / groups; i++) {
        Floats sums[2] = {floats_all(0), floats_all(0)};
        for (int j = 0; j < groups * PARTS; j++) {
            const Floats number = rotated[i * groups + j / PARTS][j % PARTS];
            sums[j % 2] = floats_fused(number, number, sums[j % 2]);
            floats_store(coding->rows + i * groups * GROUP + j * LANES, number);
        }
        coding->energies[i] = _mm512_reduce_add_ps(floats_add(sums[0], sums[1]));
    }
}

INLINE void level_heads(MeanCoding *coding, int groups) {
    Floats factors[MEANS_AT_ONCE];
    for (int i = 0; i < MEANS_AT_ONCE; i++) {
        const float mean_square = coding->energies[i / groups] * (1 / (float)(groups * GROUP));
        factors[i] = floats_all(inverse(sqrtf(mean_square)) * (float)PER_RMS4);
    }
    for (int i = 0; i < MEANS_AT_ONCE; i += LEVELS_AT_ONCE) {
        Floats values[LEVELS_AT_ONCE][PARTS];
        uint8_t *const to[LEVELS_AT_ONCE] = {coding->codes + i * GROUP, coding->codes + (i + 1) * GROUP};
        const float *const from[LEVELS_AT_ONCE] = {coding->rows + i * GROUP, coding->rows + (i + 1) * GROUP};
        groups_levels(to, values, from, factors + i, LEVELS_AT_ONCE, &LEVELS4);
        memcpy(coding->levels + i * PARTS, values, sizeof values);
    }
    for (int i = 0; i < MEANS_AT_ONCE / groups; i++) {
        Floats sums[2] = {floats_all(0), floats_all(0)};
        for (int j = i * groups * PARTS; j < (i + 1) * groups * PARTS; j++) {
            sums[j % 2] = floats_fused(floats_load(coding->rows + j * LANES), coding->levels[j], sums[j % 2]);
        }
        coding->along[i] = _mm512_reduce_add_ps(floats_add(sums[0], sums[1]));
    }
}

INLINE void keep_heads(const MeanCoding *coding, Means *means, const Shape *shape, uint8_t *coded, int groups) {
    enum { HALF = PARTS / 2 };
    const int heads = shape->heads, head_dim = groups * GROUP;
    const float norm = norm_of(shape);
    for (int i = 0; i < MEANS_AT_ONCE / groups && coding->first + i < heads; i++) {
        const int head = coding->first + i;
        const float scale = coding->energies[i] * inverse(coding->along[i]) * (float)PER_RMS4 * norm;
        const __m128i half = _mm_cvtps_ph(_mm_set_ss(at_most(scale, FP16_MAX)), _MM_FROUND_TO_NEAREST_INT);
        const uint16_t bits = (uint16_t)_mm_cvtsi128_si32(half);
        memcpy(coded + 2 * head, &bits, sizeof bits);
        pack_nibbles(coded + 2 * heads + head * (head_dim / 2), coding->codes + i * head_dim, head_dim);
        /* The last step taken back, which is the step once more and a half. */
        const Floats factor = floats_all(_mm_cvtss_f32(_mm_cvtph_ps(half)) * (float)(0.5 / PER_RMS4) / norm);
        Floats energy = floats_all(0);
        for (int j = 0; j < groups * HALF; j++) {
            const Floats a = coding->levels[i * groups * PARTS + j], b = coding->levels[i * groups * PARTS + j + groups * HALF];
            const Floats sum = floats_mul(floats_add(a, b), factor), difference = floats_mul(floats_sub(a, b), factor);
            energy = floats_fused(sum, sum, floats_fused(difference, difference, energy));
            floats_store(means->numbers + head * head_dim + j * LANES, sum);
            floats_store(means->numbers + head * head_dim + head_dim / 2 + j * LANES, difference);
        }
        means->energies[head] = _mm512_reduce_add_ps(energy);
    }
}

INLINE void code_means_of(MeanCoding *coding, Means *means, const Shape *shape, const char *numbers, uint8_t *coded, int step, int groups) {
    switch (step) {
    case 0: sum_heads(coding, shape, numbers, groups); break;
    case 1: rotate_heads(coding, groups); break;
    case 2: level_heads(coding, groups); break;
    case 3: keep_heads(coding, means, shape, coded, groups); break;
    }
}

/* One step of MEAN_STEPS. */
static __attribute__((noinline)) void code_means(MeanCoding *coding, Means *means, const Shape *shape, const char *numbers, uint8_t *coded,
    int step) {
    if (shape->head_dim == GROUP) code_means_of(coding, means, shape, numbers, coded, step, 1);
    else code_means_of(coding, means, shape, numbers, coded, step, 2);
}
