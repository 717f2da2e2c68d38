/* Vectors coded with 16, 8 or 4 Gaussian levels; see kvtier/formats/levels.py. Sixteen vectors at a time, step by step, so that roots and
   quotients, which take long, are computed side by side. */

typedef struct {
    int bits;
    double per_rms;
    const LevelTable *table;
} Levels;

static inline Levels levels4(void) { return (Levels){4, PER_RMS4, &LEVELS4}; }

static inline Levels levels3(void) { return (Levels){3, PER_RMS3, &LEVELS3}; }

static inline Levels levels2(void) { return (Levels){2, PER_RMS2, &LEVELS2}; }

/* Sums of squares of up to 16 rows. */
INLINE void rows_energy(float energies[16], const float *rows, int count, int head_dim) {
    Floats totals[16];
    for (unsigned row = (unsigned)count; row < 16; row++) totals[row] = floats_all(0);
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

/* Codes of one rotated vector; the result sums up to its inner product with the levels. */
INLINE Floats level_codes(uint8_t *codes, const Levels *levels, const float *row, float factor, int head_dim) {
    const Floats factors = floats_all(factor);
    Floats sums[PARTS];
    for (int part = 0; part < PARTS; part++) sums[part] = floats_all(0);
    for (int i = 0; i < head_dim; i += GROUP) {
        Floats group[PARTS], values[PARTS];
        row_group(group, row + i);
        group_levels(codes + i, values, group, factors, levels->table);
        for (int part = 0; part < PARTS; part++) sums[part] = floats_fused(values[part], group[part], sums[part]);
    }
    return parts_sum(sums);
}

/* Codes [count, head_dim] of up to 16 rows of these energies, and the scales that keep the inner product of a vector with itself: 0
   where there is nothing to code. */
INLINE void encode_levels(uint8_t *codes, float scales[16], const Levels *levels, const float *const rows[16], const float energies[16],
    int count, int head_dim) {
    float factors[16], along[16];
    Floats totals[16];
    const Floats per_rms = floats_all((float)levels->per_rms), size = floats_all((float)head_dim);
    SIXTEEN(factors, floats_mul(inverses(floats_root(floats_div(floats_load(energies + i), size))), per_rms));
    for (unsigned row = (unsigned)count; row < 16; row++) totals[row] = floats_all(0);
    for (int row = 0; row < count; row++) totals[row] = level_codes(codes + row * head_dim, levels, rows[row], factors[row], head_dim);
    rows_sum(along, totals);
    SIXTEEN(scales, floats_mul(floats_mul(floats_load(energies + i), inverses(floats_load(along + i))), per_rms));
}
