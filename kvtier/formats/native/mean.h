/* The mean of a block of keys: fp16 scales [heads], then 4-bit codes [heads, head_dim / 2]; see kvtier/formats/page_mean.py. */

/* What is subtracted from, and added to, vectors that keep their mean. */
static const float no_mean[MAX_HEAD_DIM];

/* The rotated mean of one head as it will be decoded, without the factor of the rotation, like the rows of a tile. All tokens are in
   the tile afterwards if they fit. */
INLINE void encode_mean(Tile *tile, float *mean, const Shape *shape, int head, const char *numbers, uint8_t *coded, int head_dim) {
    const int rows = tile_rows(shape);
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype), stride = shape->heads * vector_bytes;
    const Levels levels = levels4();
    const float norm = norm_of(shape), share = 1 / (float)shape->tokens;
    memset(mean, 0, head_dim * sizeof(float));
    for (int first = 0; first < shape->tokens; first += rows) {
        const int count = fewer(shape->tokens - first, rows);
        load_tile(tile, shape, numbers + head * vector_bytes + first * stride, stride, count, FP16_MAX);
        for (int i = 0; i < head_dim; i += GROUP / PARTS) {
            Floats sum = floats_load(mean + i);
            for (int row = 0; row < count; row++) sum = floats_add(sum, floats_load(tile->rows + row * head_dim + i));
            floats_store(mean + i, sum);
        }
    }
    for (int i = 0; i < head_dim; i += GROUP / PARTS) floats_store(mean + i, floats_mul(floats_load(mean + i), floats_all(share)));
    float energies[16], scales[16];
    uint8_t codes[MAX_HEAD_DIM];
    uint16_t halves[16];
    rows_energy(energies, mean, 1, head_dim);
    encode_levels(codes, scales, &levels, mean, NULL, energies, 1, head_dim);
    for (int i = 0; i < 16; i++) scales[i] *= norm;
    round_scales(halves, scales);
    memcpy(coded + 2 * head, halves, 2);
    pack_nibbles(coded + 2 * shape->heads + head * (head_dim / 2), codes, head_dim);
    const float factor = scales[0] * (float)(1 / PER_RMS4) / norm;
    for (int i = 0; i < head_dim; i++) mean[i] = factor * levels.values[codes[i]];
}

/* For up to 16 rows: the mean, or none where the vector is shorter with it, and the energy of what remains. */
INLINE void choose_means(const float *means[16], float energies[16], const float *mean, const float *rows, int count, int head_dim) {
    Floats with[16], without[16];
    float rest[16];
    for (int row = count; row < 16; row++) with[row] = without[row] = floats_all(0);
    for (int row = 0; row < count; row++) {
        Floats whole_sums[PARTS], rest_sums[PARTS];
        for (int part = 0; part < PARTS; part++) whole_sums[part] = rest_sums[part] = floats_all(0);
        for (int i = 0; i < head_dim; i += GROUP) {
            Floats group[PARTS], reduced[PARTS];
            row_group(group, rows + row * head_dim + i);
            row_group_without(reduced, rows + row * head_dim, &mean, i);
            for (int part = 0; part < PARTS; part++) {
                whole_sums[part] = floats_fused(group[part], group[part], whole_sums[part]);
                rest_sums[part] = floats_fused(reduced[part], reduced[part], rest_sums[part]);
            }
        }
        with[row] = parts_sum(whole_sums), without[row] = parts_sum(rest_sums);
    }
    rows_sum(energies, with);
    rows_sum(rest, without);
    for (int row = 0; row < 16; row++) {
        means[row] = rest[row] < energies[row] ? mean : no_mean;
        energies[row] = at_most(rest[row], energies[row]);
    }
}

/* fp32 means [heads, head_dim] as they are added to decoded numbers. */
INLINE void decode_means(float *means, const Shape *shape, const uint8_t *coded, int head_dim) {
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
        for (int i = 0; i < count * head_dim; i += GROUP) group_lookup((int8_t *)codes + i, (const int8_t *)codes + i, LEVELS4);
        unrotate_rows((char *)(means + first * head_dim), (const int8_t *)codes, factors, NULL, count, head_dim, FP32);
    }
}
