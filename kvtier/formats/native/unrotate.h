/* From codes to numbers of a page: the +-1 transform on whole numbers, exact in 16 bits, then one factor per vector, then perhaps a mean.
   Products and sums are rounded one by one, as in the torch reference, so the bits are the same. */

INLINE void unrotate_rows_of(char *numbers, const int8_t *codes, const float *factors, const float *const *means, int count, int head_dim,
    int dtype, bool far, bool add_means, int block) {
    const int groups = block / GROUP;
#if defined(WITH_SPANS)
    if (block >= SPAN) {
        unrotate_spans(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, block);
        return;
    }
#endif
    for (int row = 0; row < count; row++) {
        const Floats factor = floats_all(factors[row]);
        for (int start = 0; start < head_dim; start += block) {
            Shorts whole[MAX_BLOCK / GROUP][SHORT_PARTS];
            for (int group = 0; group < groups; group++) {
                group_rotate_codes(whole[group], codes + (size_t)row * head_dim + start + group * GROUP);
            }
            for (int distance = 1; distance < groups; distance *= 2) {
                for (int group = 0; group < groups; group++) {
                    if (group & distance) continue;
                    for (int part = 0; part < SHORT_PARTS; part++) {
                        const Shorts a = whole[group][part], b = whole[group + distance][part];
                        whole[group][part] = shorts_add(a, b), whole[group + distance][part] = shorts_sub(a, b);
                    }
                }
            }
            for (int group = 0; group < groups; group++) {
                const int place = start + group * GROUP;
                Floats values[PARTS];
                group_widen(values, whole[group]);
                for (int part = 0; part < PARTS; part++) {
                    values[part] = floats_mul(values[part], factor);
                    if (add_means) values[part] = floats_add(values[part], floats_load(means[row] + place + part * (GROUP / PARTS)));
                }
                char *const to = numbers + ((size_t)row * head_dim + place) * value_bytes(dtype);
                if (far) group_store_far(to, values, dtype);
                else group_store(to, values, dtype);
            }
        }
    }
}

/* The block is a constant in each case, so that its loops unroll and the block stays in registers. */
INLINE void unrotate_rows_as(char *numbers, const int8_t *codes, const float *factors, const float *const *means, int count, int head_dim,
    int dtype, bool far, bool add_means) {
#if defined(WITHOUT_CONSTANT_SIZES)
    unrotate_rows_of(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, head_dim & -head_dim);
#else
    switch (head_dim & -head_dim) {
#if GROUP <= 16
    case 16: unrotate_rows_of(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, 16); break;
    case 32: unrotate_rows_of(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, 32); break;
#endif
    case 64: unrotate_rows_of(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, 64); break;
    case 128: unrotate_rows_of(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, 128); break;
    case 256: unrotate_rows_of(numbers, codes, factors, means, count, head_dim, dtype, far, add_means, 256); break;
    }
#endif
}

/* Spans gain from instructions that alternate, too. */
#if defined(WITH_SPANS)
#define UNROTATING ALTERNATING
#else
#define UNROTATING
#endif

/* `count` vectors, one after the other, as numbers of `dtype`; `means` is NULL or the row to add to each vector. */
static UNROTATING void unrotate_near(char *numbers, const int8_t *codes, const float *factors, const float *const *means, int count,
    int head_dim, int dtype) {
#define UNROTATE_ROWS(dtype) unrotate_rows_as(numbers, codes, factors, NULL, count, head_dim, dtype, false, false)
#define UNROTATE_REDUCED_ROWS(dtype) unrotate_rows_as(numbers, codes, factors, means, count, head_dim, dtype, false, true)
    if (means) FOR_DTYPES(dtype, UNROTATE_REDUCED_ROWS)
    else FOR_DTYPES(dtype, UNROTATE_ROWS)
}

/* The same past the caches, to whole lines of memory. Apart, because a branch in the innermost loop would cost a fifth of the whole. */
static UNROTATING void unrotate_far(char *numbers, const int8_t *codes, const float *factors, const float *const *means, int count,
    int head_dim, int dtype) {
#define UNROTATE_ROWS_FAR(dtype) unrotate_rows_as(numbers, codes, factors, NULL, count, head_dim, dtype, true, false)
#define UNROTATE_REDUCED_ROWS_FAR(dtype) unrotate_rows_as(numbers, codes, factors, means, count, head_dim, dtype, true, true)
    if (means) FOR_DTYPES(dtype, UNROTATE_REDUCED_ROWS_FAR)
    else FOR_DTYPES(dtype, UNROTATE_ROWS_FAR)
}

/* `unrotate_near`, or with `far` the other. */
INLINE void unrotate_rows(char *numbers, const int8_t *codes, const float *factors, const float *const *means, int count, int head_dim,
    int dtype, bool far) {
    if (DECODES_FAR && far) unrotate_far(numbers, codes, factors, means, count, head_dim, dtype);
    else unrotate_near(numbers, codes, factors, means, count, head_dim, dtype);
}
