/* Vectors coded with 16, 8 or 4 Gaussian levels; see kvtier/formats/levels.py. Sixteen vectors at a time, step by step, so that roots and
   quotients, which take long, are computed side by side. */

typedef struct {
    int bits;
    double per_rms;
    const int8_t *values;       /* 16 of them, by code; the last ones unused if there are fewer levels */
    const uint8_t *steps_below; /* see tables.h */
} Levels;

static inline Levels levels4(void) { return (Levels){4, PER_RMS4, LEVELS4, STEPS_BELOW4}; }

static inline Levels levels3(void) { return (Levels){3, PER_RMS3, LEVELS3, STEPS_BELOW3}; }

static inline Levels levels2(void) { return (Levels){2, PER_RMS2, LEVELS2, STEPS_BELOW2}; }

/* Sums of squares of up to 16 rows. */
INLINE void rows_energy(float energies[16], const float *rows, int count, int head_dim) {
    Floats totals[16];
    for (int row = count; row < 16; row++) totals[row] = floats_all(0);
    for (int row = 0; row < count; row++) {
        Floats sums[PARTS];
        for (int part = 0; part < PARTS; part++) sums[part] = floats_all(0);
        for (int i = 0; i < head_dim; i += GROUP) {
            Floats group[PARTS];
            row_group(group, rows + row * head_dim + i);
            for (int part = 0; part < PARTS; part++) sums[part] = floats_fused(group[part], group[part], sums[part]);
        }
        totals[row] = parts_sum(sums);
    }
    rows_sum(energies, totals);
}

/* Codes of one rotated vector without its mean; the result sums up to its inner product with the levels. */
INLINE Floats level_codes(uint8_t *codes, const Levels *levels, const float *row, const float *const *mean, float factor, int head_dim) {
    const Floats factors = floats_all(factor);
    Floats sums[PARTS];
    for (int part = 0; part < PARTS; part++) sums[part] = floats_all(0);
    for (int i = 0; i < head_dim; i += GROUP) {
        Floats group[PARTS], values[PARTS];
        int8_t found[GROUP];
        row_group_without(group, row, mean, i);
        for (int part = 0; part < PARTS; part++) values[part] = floats_mul(group[part], factors);
        group_cells((int8_t *)codes + i, values);
        group_codes((int8_t *)codes + i, levels->steps_below, 1 << levels->bits);
        group_lookup(found, (const int8_t *)codes + i, levels->values);
        group_from_bytes(values, found);
        for (int part = 0; part < PARTS; part++) sums[part] = floats_fused(values[part], group[part], sums[part]);
    }
    return parts_sum(sums);
}

/* Codes [count, head_dim] of up to 16 rows of these energies, each without its mean (NULL: there are none), and the scales that keep the
   inner product of a vector with itself: 0 where there is nothing to code. */
INLINE void encode_levels(uint8_t *codes, float scales[16], const Levels *levels, const float *rows, const float *const *means,
    const float energies[16], int count, int head_dim) {
    float factors[16], along[16];
    Floats totals[16];
    for (int row = 0; row < 16; row++) factors[row] = inverse(sqrtf(energies[row] / (float)head_dim)) * (float)levels->per_rms;
    for (int row = count; row < 16; row++) totals[row] = floats_all(0);
    for (int row = 0; row < count; row++) {
        const float *const vector = rows + row * head_dim;
        totals[row] = level_codes(codes + row * head_dim, levels, vector, means ? means + row : NULL, factors[row], head_dim);
    }
    rows_sum(along, totals);
    for (int row = 0; row < 16; row++) scales[row] = energies[row] * inverse(along[row]) * (float)levels->per_rms;
}
