/* Tokens to columns for q4: loaded, and rotated by all steps but the last one, which is taken when columns are coded. */

/* 16 rows of 32 bits each to 16 columns. */
INLINE void to_columns(__m512i lines[16]) {
    __m512i twos[16], fours[16], halves[16];
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]), twos[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    }
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 4; j++) {
            halves[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0x88);
            halves[i + j + 4] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0xDD);
        }
    }
    for (int i = 0; i < 8; i++) {
        lines[i] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0x88), lines[i + 8] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0xDD);
    }
}

/* Two columns become their sum and difference, both by the CPU's adders. */
static inline void meet_added(Floats *a, Floats *b) {
    const Floats sum = floats_add(*a, *b);
    *b = floats_sub(*a, *b), *a = sum;
}

/* One step of the rotation, between 16 columns that are `distance` apart, a constant: half of the differences by adders, half by multipliers. */
INLINE void meet_columns(Floats *columns, int distance) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const int at = i / distance * 2 * distance + i % distance;
        if (i % 2) meet_added(&columns[at], &columns[at + distance]);
        else meet_both(&columns[at], &columns[at + distance]);
    }
}

/* The products of each two neighbours of 16 tokens with themselves. */
static inline Floats add_squares(Floats sums, __m512i pairs, int dtype) {
#if defined(WITH_AVX512_BF16)
    if (dtype == BF16) return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)pairs);
#endif
    Floats both[2];
    split_pairs(both, pairs, dtype);
    return floats_fused(both[1], both[1], floats_fused(both[0], both[0], sums));
}

/* The rows of 16 tokens, each `offset` bytes on, in `lines` of LINE_VALUES numbers to columns of neighbours; the sums of their squares. */
INLINE Floats load_pairs_of(__m512i *pairs, const char *const rows[16], size_t offset, int lines, int dtype) {
    Floats sums[4] = {floats_all(0), floats_all(0), floats_all(0), floats_all(0)};
#pragma GCC unroll 1
    for (int line = 0; line < lines; line++) {
        __m512i own[16];
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) own[row] = _mm512_loadu_si512(rows[row] + offset + line * LINE_BYTES);
        to_columns(own);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            sums[i % 4] = add_squares(sums[i % 4], own[i], dtype);
            pairs[16 * line + i] = own[i];
        }
    }
    return floats_add(floats_add(sums[0], sums[1]), floats_add(sums[2], sums[3]));
}

/* Where a dimension is among columns: of each line those of even dimensions come first, since they are written first, and CPUs write one line
   after the other the fastest. */
static inline int column_of(int dimension) {
    return dimension / LINE_VALUES * LINE_VALUES + dimension % 2 * (LINE_VALUES / 2) + dimension % LINE_VALUES / 2;
}

/* Half of what becomes of 16 pairs of neighbours, in steps up to 16 apart: their sums or, if `odd`, their differences; their products
   with the mean of `keys` are added to `shared`. */
INLINE void rotate_pairs(Floats *columns, Floats shared[4], const __m512i *pairs, const float *mean, bool odd, bool keys, int dtype) {
    Floats met[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) met_both(&met[i], &met[i + 1], pairs[i], pairs[i + 1], odd, dtype);
    meet_columns(met, 2), meet_columns(met, 4), meet_columns(met, 8);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (keys) shared[i % 4] = floats_fused(met[i], floats_all(mean[2 * i + odd]), shared[i % 4]);
        columns[column_of(2 * i + odd)] = met[i];
    }
}

/* All steps but the last one of columns [32 * lines]; the inner products of `keys` with the mean. */
INLINE Floats rotate_columns_of(Floats *columns, const __m512i *pairs, const float *mean, int lines, bool keys, int dtype) {
    Floats shared[4] = {floats_all(0), floats_all(0), floats_all(0), floats_all(0)};
#pragma GCC unroll 1
    for (int line = 0; line < lines; line++) {
        Floats *const to = columns + line * LINE_VALUES;
        rotate_pairs(to, shared, pairs + line * 16, mean + line * LINE_VALUES, false, keys && lines == 2, dtype);
        rotate_pairs(to, shared, pairs + line * 16, mean + line * LINE_VALUES, true, keys && lines == 2, dtype);
    }
    for (int i = 0; i < LINE_VALUES && lines == 4; i++) {
        Floats *const own = columns + column_of(i);
        meet_both(own, own + LINE_VALUES), meet_both(own + 2 * LINE_VALUES, own + 3 * LINE_VALUES);
        for (int j = 0; j < 4 && keys; j++) {
            shared[j] = floats_fused(own[j * LINE_VALUES], floats_all(mean[i + j * LINE_VALUES]), shared[j]);
        }
    }
    return floats_add(floats_add(shared[0], shared[1]), floats_add(shared[2], shared[3]));
}

/* Not inlined, as all loops here are not unrolled: the whole has to fit the CPU's cache of instructions. */
static __attribute__((noinline)) Floats load_pairs(__m512i *pairs, const char *const rows[16], size_t offset, int lines, int dtype) {
    if (dtype == BF16) return load_pairs_of(pairs, rows, offset, lines, BF16);
    return load_pairs_of(pairs, rows, offset, lines, FP16);
}

#define ROTATE(lines, keys, dtype) return rotate_columns_of(columns, pairs, mean, lines, keys, dtype)

static __attribute__((noinline)) Floats rotate_columns(Floats *columns, const __m512i *pairs, const float *mean, int lines, bool keys,
    int dtype) {
    switch ((lines == 4) * 4 + (dtype == BF16) * 2 + keys) {
    case 0: ROTATE(2, false, FP16);
    case 1: ROTATE(2, true, FP16);
    case 2: ROTATE(2, false, BF16);
    case 3: ROTATE(2, true, BF16);
    case 4: ROTATE(4, false, FP16);
    case 5: ROTATE(4, true, FP16);
    case 6: ROTATE(4, false, BF16);
    default: ROTATE(4, true, BF16);
    }
}

/* A number less that of the mean, for `reduced` tokens. */
INLINE Floats less_mean(Floats column, const float *mean, __mmask16 reduced) {
    return _mm512_mask_sub_ps(column, reduced, column, floats_all(*mean));
}

/* Sums of the squares of columns, which the last step would double. */
static __attribute__((noinline)) Floats columns_energy(const Floats *columns, const float *mean, __mmask16 reduced, int head_dim) {
    Floats sums[2] = {floats_all(0), floats_all(0)};
    for (int i = 0; i < head_dim; i++) {
        const Floats column = less_mean(columns[column_of(i)], mean + i, reduced);
        sums[i % 2] = floats_fused(column, column, sums[i % 2]);
    }
    return floats_mul(floats_add(sums[0], sums[1]), floats_all(2));
}
