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
SIZED void rows_energy(float energies[16], const float *rows, int count, int head_dim) {
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

#if defined(WITH_ROW_LEVELS)
/* Codes of rotated vectors, and their inner products with the levels. */
INLINE void level_codes(float along[16], uint8_t *codes, const Levels *levels, const float *const rows[16], const float factors[16], int count,
    int head_dim) {
    Floats totals[16];
    for (int row = 0; row < count; row++) {
        totals[row] = row_levels(codes + row * head_dim, rows[row], factors[row], head_dim, levels->table);
    }
    for (unsigned row = (unsigned)count; row < 16; row++) totals[row] = floats_all(0);
    rows_sum(along, totals);
    const Floats part = floats_all(1 / (float)(1 << finer_bits(head_dim)));
    SIXTEEN(along, floats_mul(floats_mul(floats_load(along + i), part), inverses(floats_load(factors + i))));
}
#else
/* The same by groups. The last row is done twice rather than alone. */
INLINE void level_codes(float along[16], uint8_t *codes, const Levels *levels, const float *const rows[16], const float factors[16], int count,
    int head_dim) {
    Floats totals[16];
    for (unsigned row = (unsigned)count; row < 16; row++) totals[row] = floats_all(0);
    for (int first = 0; first < count; first += LEVELS_AT_ONCE) {
        int at[LEVELS_AT_ONCE];
        Floats sums[LEVELS_AT_ONCE][PARTS], factor[LEVELS_AT_ONCE];
        for (int i = 0; i < LEVELS_AT_ONCE; i++) {
            at[i] = fewer(first + i, count - 1);
            factor[i] = floats_all(factors[at[i]]);
            for (int part = 0; part < PARTS; part++) sums[i][part] = floats_all(0);
        }
        for (int place = 0; place < head_dim; place += GROUP) {
            uint8_t *to[LEVELS_AT_ONCE];
            const float *from[LEVELS_AT_ONCE];
            Floats values[LEVELS_AT_ONCE][PARTS];
            for (int i = 0; i < LEVELS_AT_ONCE; i++) to[i] = codes + at[i] * head_dim + place, from[i] = rows[at[i]] + place;
            groups_levels(to, values, from, factor, LEVELS_AT_ONCE, levels->table);
            for (int i = 0; i < LEVELS_AT_ONCE; i++) {
                for (int part = 0; part < PARTS; part++) {
                    sums[i][part] = floats_fused(values[i][part], floats_load(from[i] + part * LANES), sums[i][part]);
                }
            }
        }
        for (int i = 0; i < LEVELS_AT_ONCE; i++) totals[at[i]] = parts_sum(sums[i]);
    }
    rows_sum(along, totals);
}
#endif

/* Codes [count, head_dim] of up to 16 rows of these energies, and the scales that keep the inner product of a vector with itself: 0
   where there is nothing to code. */
SIZED void encode_levels(uint8_t *codes, float scales[16], const Levels *levels, const float *const rows[16], const float energies[16],
    int count, int head_dim) {
    float factors[16], along[16];
    const Floats per_rms = floats_all((float)levels->per_rms), size = floats_all((float)head_dim);
    SIXTEEN(factors, floats_mul(inverses(floats_root(floats_div(floats_load(energies + i), size))), per_rms));
    level_codes(along, codes, levels, rows, factors, count, head_dim);
    SIXTEEN(scales, floats_mul(floats_mul(floats_load(energies + i), inverses(floats_load(along + i))), per_rms));
}
