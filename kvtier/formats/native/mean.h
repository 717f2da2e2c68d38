/* The mean of a block of keys: fp16 scales [heads], then 4-bit codes [heads, head_dim / 2]; see kvtier/formats/page_mean.py. */

/* What is subtracted from, and added to, vectors that keep their mean. */
static const float no_mean[MAX_HEAD_DIM];

/* The sums of the vectors of one head, not yet rotated, and in `most` the largest magnitude among its numbers or a larger one. */
INLINE void head_sums(float *sums, Floats *most, const Shape *shape, const char *numbers, int head_dim, int dtype) {
    const size_t stride = shape->heads * head_dim * value_bytes(dtype);
    *most = floats_all(0);
#if defined(SUMS_AT_ONCE)
    int i = 0;
    for (; i + SUMS_AT_ONCE * GROUP <= head_dim; i += SUMS_AT_ONCE * GROUP) {
        groups_sums(sums + i, most, numbers + i * value_bytes(dtype), stride, shape->tokens, SUMS_AT_ONCE, dtype);
    }
    for (; i < head_dim; i += GROUP) groups_sums(sums + i, most, numbers + i * value_bytes(dtype), stride, shape->tokens, 1, dtype);
#else
    for (int i = 0; i < head_dim; i += GROUP) group_sums(sums + i, most, numbers + i * value_bytes(dtype), stride, shape->tokens, dtype);
#endif
}

/* The same where a number has to be cleaned first. */
static __attribute__((noinline)) void clean_sums(float *sums, const Shape *shape, const char *numbers) {
    const size_t number_bytes = value_bytes(shape->dtype), stride = shape->heads * shape->head_dim * number_bytes;
    for (int i = 0; i < shape->head_dim; i += GROUP) {
        float total[GROUP] = {0}, some[GROUP];
        for (int token = 0; token < shape->tokens; token++) {
            Floats group[PARTS];
            group_load(group, numbers + token * stride + i * number_bytes, shape->dtype);
            for (int part = 0; part < PARTS; part++) floats_store(some + part * (GROUP / PARTS), group[part]);
            for (int j = 0; j < GROUP; j++) total[j] += clean_number(some[j], FP16_MAX);
        }
        memcpy(sums + i, total, sizeof total);
    }
}

/* Codes the rotated means of all heads. `means` [heads, head_dim]: as they will be decoded, but like the rows of a tile without the factor
   of the rotation. Sixteen heads at a time. */
SIZED void encode_means_of(float *means, const Shape *shape, const char *numbers, uint8_t *coded, int head_dim) {
    const Levels levels = levels4();
    const float norm = norm_of(shape), share = 1 / (float)shape->tokens;
    for (int first = 0; first < shape->heads; first += 16) {
        const int count = fewer(shape->heads - first, 16);
        const size_t vector_bytes = head_dim * value_bytes(shape->dtype);
        const char *const place = numbers + first * vector_bytes;
        Floats most[16];
        float largest[16], energies[16], factors[16], scales[16];
        const float *rows[16];
        uint8_t codes[16 * MAX_HEAD_DIM];
        uint16_t halves[16];
        Tile tile;
        float *const sums = means + first * head_dim;
        for (unsigned row = (unsigned)count; row < 16; row++) most[row] = floats_all(0);
        for (int row = 0; row < count; row++) {
            float *const own = sums + row * head_dim;
            const char *const from = place + row * vector_bytes;
            switch (shape->dtype) {
            case BF16: head_sums(own, most + row, shape, from, head_dim, BF16); break;
            case FP16: head_sums(own, most + row, shape, from, head_dim, FP16); break;
            case FP32: head_sums(own, most + row, shape, from, head_dim, FP32); break;
            }
        }
        rows_magnitude(largest, most);
        for (int row = 0; row < count; row++) {
            if (!(largest[row] <= FP16_MAX)) clean_sums(sums + row * head_dim, shape, place + row * vector_bytes);
        }
        for (int i = 0; i < count * head_dim; i += GROUP / PARTS) {
            floats_store(sums + i, floats_mul(floats_load(sums + i), floats_all(share)));
        }
#if ENERGIES_FIRST
        rotate_rows_energy(tile.rows, energies, (const char *)sums, head_dim * sizeof(float), count, head_dim, FP32);
#else
        rotate_rows(tile.rows, tile.largest, (const char *)sums, head_dim * sizeof(float), count, head_dim, FP32);
        rows_energy(energies, tile.rows, count, head_dim);
#endif
        for (int row = 0; row < 16; row++) rows[row] = tile.rows + row * head_dim;
        level_factors(factors, energies, levels.per_rms, head_dim);
        encode_levels(codes, EXACT_CODES, scales, &levels, rows, energies, factors, count, head_dim);
        SIXTEEN(scales, floats_mul(floats_load(scales + i), floats_all(norm)));
        round_scales(halves, scales);
        copy_halves(coded + 2 * first, halves, count);
        for (int row = 0; row < count; row++) {
            const Floats factor = floats_all(scales[row] * (float)(1 / PER_RMS4) / norm);
            pack_nibbles(coded + 2 * shape->heads + (first + row) * (head_dim / 2), codes + row * head_dim, head_dim);
            for (int i = 0; i < head_dim; i += GROUP) {
                Floats values[PARTS];
                group_values(values, codes + row * head_dim + i, &LEVELS4);
                for (int part = 0; part < PARTS; part++) {
                    floats_store(sums + row * head_dim + i + part * (GROUP / PARTS), floats_mul(values[part], factor));
                }
            }
        }
    }
}

FOR_HEAD_DIMS(encode_means, (float *means, const Shape *shape, const char *numbers, uint8_t *coded), means, shape, numbers, coded)

/* Up to 16 rows, one after the other, the first of `head`, each perhaps without the mean of its head: what is coded, in `chosen`, is the
   shorter vector, and `reduced` says which; `energies` are theirs, and before that, where ENERGIES_FIRST, those of the rows. `rest` takes
   rows without their means. */
SIZED void choose_rows(const float *chosen[16], bool reduced[16], float energies[16], float *rest, const float *rows, const float *means,
    int head, int heads, int count, int head_dim) {
    Floats with[16], without[16];
    float shorter[16];
    for (unsigned row = (unsigned)count; row < 16; row++) with[row] = without[row] = floats_all(0);
    for (int row = 0; row < count; row++) {
        const float *const mean = means + head * head_dim;
        if (++head == heads) head = 0;
        with[row] = without[row] = floats_all(0);
        for (int i = 0; i < head_dim; i += GROUP / PARTS) {
            const Floats whole = floats_load(rows + row * head_dim + i), less = floats_sub(whole, floats_load(mean + i));
            floats_store(rest + row * head_dim + i, less);
            if (!ENERGIES_FIRST) with[row] = floats_fused(whole, whole, with[row]);
            without[row] = floats_fused(less, less, without[row]);
        }
    }
    if (!ENERGIES_FIRST) rows_sum(energies, with);
    rows_sum(shorter, without);
    for (int row = 0; row < count; row++) {
        reduced[row] = shorter[row] < energies[row];
        chosen[row] = (reduced[row] ? rest : rows) + row * head_dim;
    }
    SIXTEEN(energies, floats_at_most(floats_load(shorter + i), floats_load(energies + i)));
}

/* fp32 means [heads, head_dim] as they are added to decoded numbers. */
static __attribute__((noinline)) void decode_means(float *means, const Shape *shape, const uint8_t *coded) {
    const int head_dim = shape->head_dim;
    const float part = (float)(1 / sqrt(hadamard_block(shape)) / PER_RMS4);
    for (int first = 0; first < shape->heads; first += 16) {
        const int count = fewer(shape->heads - first, 16);
        uint8_t codes[16 * MAX_HEAD_DIM];
        float factors[16];
        load_scales(factors, coded + 2 * first, count);
        for (int i = 0; i < 16; i++) factors[i] = fabsf(factors[i]) * part;
        for (int row = 0; row < count; row++) {
            unpack_nibbles(codes + row * head_dim, coded + 2 * shape->heads + (first + row) * (head_dim / 2), head_dim);
        }
        for (int i = 0; i < count * head_dim; i += GROUP) group_lookup((int8_t *)codes + i, (const int8_t *)codes + i, LEVELS4.values);
        unrotate_rows((char *)(means + first * head_dim), (const int8_t *)codes, factors, NULL, count, head_dim, FP32, false);
#if defined(WITH_SPANS)
        if (hadamard_block(shape) >= SPAN) split_means(means + first * head_dim, count * head_dim);
#endif
    }
}
