/* q8: int8 codes [tokens, heads, head_dim], then fp16 scales [tokens, heads]; see kvtier/formats/q8.py. Bytes are those of
   the torch reference: each step rounds where it does, and sums are taken in its order. */

/* Scales of up to 16 rows from their largest magnitudes, and what rows are multiplied with. */
INLINE void q8_scales(uint8_t *coded, float factors[16], const float largest[16], float norm, int count) {
    float scales[16];
    uint16_t halves[16];
    SIXTEEN(scales, floats_div(floats_mul(floats_load(largest + i), floats_all(norm)), floats_all(127)));
    round_scales(halves, scales);
    copy_halves(coded, halves, count);
    SIXTEEN(factors, floats_mul(floats_all(norm), inverses(floats_load(scales + i))));
}

INLINE void q8_codes(int8_t *codes, const float *rows, const float factors[16], int count, int head_dim) {
    for (int row = 0; row < count; row++) {
        row_round(codes + row * head_dim, rows + row * head_dim, floats_all(factors[row]), head_dim, 127);
    }
}

/* Scales take long, one after the other: the CPU gets the next rows to rotate before the codes of those that wait for them. */
INLINE void encode_q8_of(const Shape *shape, const void *numbers, uint8_t *coded, int head_dim) {
    const int vectors = shape->tokens * shape->heads;
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype);
    const float norm = norm_of(shape), limit = (float)(127.0 * FP16_MAX / sqrt(hadamard_block(shape)));
    uint8_t *const scales = coded + block_values(shape);
    Tile tiles[2];
    float factors[2][16];
    for (int first = 0, turn = 0; first < vectors + 16; first += 16, turn ^= 1) {
        if (first < vectors) {
            const int count = fewer(vectors - first, 16);
            load_tile(&tiles[turn], shape, (const char *)numbers + first * vector_bytes, count, limit);
            q8_scales(scales + 2 * first, factors[turn], tiles[turn].largest, norm, count);
        }
        if (first == 0) continue;
        int8_t *const codes = (int8_t *)coded + (size_t)(first - 16) * head_dim;
        q8_codes(codes, tiles[!turn].rows, factors[!turn], fewer(vectors - first + 16, 16), head_dim);
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
        unrotate_rows(place, (const int8_t *)coded + (size_t)first * head_dim, factors, NULL, count, head_dim, shape->dtype, shape->far);
    }
}

FOR_HEAD_DIMS(encode_q8, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(decode_q8, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
