/* q8: int8 codes [tokens, heads, head_dim], then fp16 scales [tokens, heads]; see kvtier/formats/q8.py. */

/* Scales of up to 16 rows from their largest magnitudes, and what rows are multiplied with. */
INLINE void q8_scales(uint8_t *coded, float factors[16], const float largest[16], float norm, int count) {
    float scales[16];
    uint16_t halves[16];
    for (int i = 0; i < 16; i++) scales[i] = largest[i] * norm / 127;
    round_scales(halves, scales);
    copy_halves(coded, halves, count);
    for (int i = 0; i < 16; i++) factors[i] = norm * inverse(scales[i]);
}

INLINE void q8_codes(int8_t *codes, const float *rows, const float factors[16], int count, int head_dim) {
    for (int row = 0; row < count; row++) {
        const Floats factor = floats_all(factors[row]);
        for (int i = 0; i < head_dim; i += GROUP) {
            Floats group[PARTS];
            row_group(group, rows + row * head_dim + i);
            for (int part = 0; part < PARTS; part++) group[part] = floats_mul(group[part], factor);
            group_round(codes + row * head_dim + i, group, 127);
        }
    }
}

INLINE void encode_q8_of(const Shape *shape, const void *numbers, uint8_t *coded, int head_dim) {
    const int vectors = shape->tokens * shape->heads;
    const size_t stride = head_dim * value_bytes(shape->dtype);
    const float norm = norm_of(shape), limit = 127 * FP16_MAX * norm;
    uint8_t *const scales = coded + block_values(shape);
    Tile tile;
    float factors[16];
    for (int first = 0; first < vectors; first += 16) {
        const int count = fewer(vectors - first, 16);
        load_tile(&tile, shape, (const char *)numbers + first * stride, stride, count, limit);
        q8_scales(scales + 2 * first, factors, tile.largest, norm, count);
        q8_codes((int8_t *)coded + (size_t)first * head_dim, tile.rows, factors, count, head_dim);
    }
}

INLINE void decode_q8_of(const Shape *shape, const uint8_t *coded, void *numbers, int head_dim) {
    const int vectors = shape->tokens * shape->heads;
    const float norm = norm_of(shape);
    for (int first = 0; first < vectors; first += 16) {
        const int count = fewer(vectors - first, 16);
        float factors[16];
        load_scales(factors, coded + block_values(shape) + 2 * first, count);
        for (int i = 0; i < 16; i++) factors[i] *= norm;
        char *const place = (char *)numbers + (size_t)first * head_dim * value_bytes(shape->dtype);
        unrotate_rows(place, (const int8_t *)coded + (size_t)first * head_dim, factors, NULL, count, head_dim, shape->dtype);
    }
}

FOR_HEAD_DIMS(encode_q8, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(decode_q8, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
