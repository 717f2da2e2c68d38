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

#if ENERGIES_FIRST
/* Up to 16 vectors, one after the other, and their energies. These tell instead of the largest magnitudes which rows to clean: no number of
   a vector is larger than the root of the energy that it had before it was rotated. */
INLINE void load_tile_energies(Tile *tile, float energies[16], const Shape *shape, const char *numbers, int count, int head_dim) {
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype);
    const float most = FP16_MAX * FP16_MAX / 4 * (float)hadamard_block(shape);
    int clean = 1;
    rotate_rows_energy(tile->rows, energies, numbers, vector_bytes, count, head_dim, shape->dtype);
    for (int i = 0; i < 16; i++) clean &= energies[i] < most;
    if (clean) return;
    for (int i = 0; i < count; i++) {
        if (energies[i] < most) continue;
        clean_row(tile->rows + i * head_dim, tile->largest + i, numbers + i * vector_bytes, shape, FP16_MAX);
    }
    rows_energy(energies, tile->rows, count, head_dim);
}
#else
/* The same, without the energies of keys, which choose_rows finds beside those of others. */
INLINE void load_tile_energies(Tile *tile, float energies[16], const Shape *shape, const char *numbers, int count, int head_dim) {
    load_tile(tile, shape, numbers, count, FP16_MAX);
    if (!shape->keys) rows_energy(energies, tile->rows, count, head_dim);
}
#endif

/* What becomes of the codes of rows: [count, head_dim] codes; the same, for scales that are rounded to fp16 and nothing coarser; or [count,
   head_dim / 2] bytes packed as in pack_nibbles, where LEVELS_BY_ROW and head_dim is a multiple of 64. */
typedef enum { CODES, EXACT_CODES, NIBBLES } Wanted;

#if LEVELS_BY_ROW
/* Codes of rotated vectors, and their inner products with the levels. */
INLINE void level_codes(float along[16], uint8_t *to, Wanted wanted, const Levels *levels, const float *const rows[16],
    const float factors[16], int count, int head_dim) {
    const bool ordered = levels->bits != 3;
    const int bits = finer_bits(levels->per_rms, head_dim);
    const Floats parts = floats_all((float)(1 << bits)), half = floats_all(0.5f);
    Floats totals[16], last = floats_all(0);
    float finer[16];
    SIXTEEN(finer, floats_mul(floats_load(factors + i), parts));
    for (int row = 0; row < count; row++) {
        if (wanted == NIBBLES) last = row_nibbles(to + row * (head_dim / 2), rows[row], finer[row], bits, head_dim);
        else last = row_levels(to + row * head_dim, rows[row], finer[row], bits, head_dim, levels->table, ordered);
        totals[row] = last;
    }
    for (int row = 0; row < count && wanted == EXACT_CODES; row++) {
        totals[row] = row_along(to + row * head_dim, rows[row], head_dim, levels->table);
    }
    for (int row = count; row < 16; row++) totals[row] = last;
    rows_sum(along, totals);
    if (wanted == EXACT_CODES) return;
    SIXTEEN(along, floats_mul(floats_mul(floats_load(along + i), half), inverses(floats_load(finer + i))));
}
#else
/* The same by groups. The last row is done twice rather than alone. */
INLINE void level_codes(float along[16], uint8_t *codes, Wanted wanted, const Levels *levels, const float *const rows[16],
    const float factors[16], int count, int head_dim) {
    (void)wanted;
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

/* What rows of these energies are multiplied by to become levels. Roots and quotients take long: asked for well before encode_levels, they
   cost nothing. */
INLINE void level_factors(float factors[16], const float energies[16], double per_rms, int head_dim) {
    const Floats size = floats_all((float)head_dim), rms = floats_all((float)per_rms);
    SIXTEEN(factors, floats_mul(inverses(floats_root(floats_div(floats_load(energies + i), size))), rms));
}

/* Codes of up to 16 rows of these energies and factors, and the scales that keep the inner product of a vector with itself: 0
   where there is nothing to code. */
SIZED void encode_levels(uint8_t *to, Wanted wanted, float scales[16], const Levels *levels, const float *const rows[16],
    const float energies[16], const float factors[16], int count, int head_dim) {
    float along[16];
    level_codes(along, to, wanted, levels, rows, factors, count, head_dim);
    const Floats per_rms = floats_all((float)levels->per_rms);
    SIXTEEN(scales, floats_mul(floats_mul(floats_load(energies + i), inverses(floats_load(along + i))), per_rms));
}
