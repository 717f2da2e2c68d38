/* q6: mean of keys, fp16 scales [tokens, heads] with the sign bit set where the mean was subtracted, codes; see kvtier/formats/q6.py. */

/* The largest magnitudes of up to 16 rows. */
SIZED void rows_largest(float largest[16], const float *const rows[16], int count, int head_dim) {
    Floats most[16];
    for (int row = 0; row < 16; row++) most[row] = floats_all(0);
    for (int row = 0; row < count; row++) {
        for (int i = 0; i < head_dim; i += GROUP) {
            Floats group[PARTS];
            row_group(group, rows[row] + i);
            most[row] = keys_max(most[row], group_magnitude(group));
        }
    }
    rows_magnitude(largest, most);
}

INLINE void encode_q6_of(const Shape *shape, const char *numbers, uint8_t *coded, int head_dim) {
    const int heads = shape->heads, vectors = shape->tokens * heads;
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype), packed_bytes = head_dim / 4 * 3;
    const float norm = norm_of(shape);
    uint8_t *const coded_scales = coded + mean_bytes(shape), *const packed = coded_scales + 2 * (size_t)vectors;
    Tile tile, rest;
    float means[MAX_HEADS_TIMES_DIM];
    if (shape->keys) encode_means(means, shape, numbers, coded);
    for (int first = 0, head = 0; first < vectors; first += 16) {
        const int count = fewer(vectors - first, 16);
        const float *rows[16];
        float energies[16], scales[16];
        bool reduced[16] = {false};
        uint16_t halves[16];
        for (int row = 0; row < count; row++) rows[row] = tile.rows + row * head_dim;
        fetch_next(shape, numbers + first * vector_bytes, count);
        if (!shape->keys) {
            load_tile(&tile, shape, numbers + first * vector_bytes, count, FP16_MAX);
            memcpy(scales, tile.largest, sizeof scales);
        } else {
            load_tile_energies(&tile, energies, shape, numbers + first * vector_bytes, count, head_dim);
            choose_rows(rows, reduced, energies, rest.rows, tile.rows, means, head, heads, count, head_dim);
            rows_largest(scales, rows, count, head_dim);
            head = (head + count) % heads;
        }
        SIXTEEN(scales, floats_div(floats_mul(floats_load(scales + i), floats_all(norm)), floats_all(31)));
        round_scales(halves, scales);
        for (int row = 0; row < count; row++) {
            const uint16_t signed_scale = halves[row] | (uint16_t)(reduced[row] << 15);
            const Floats factor = floats_all(norm * inverse(scales[row]));
            uint8_t codes[MAX_HEAD_DIM];
            row_round((int8_t *)codes, rows[row], factor, head_dim, 31);
            for (int i = 0; i < head_dim; i++) codes[i] += 32;
            memcpy(coded_scales + 2 * (first + row), &signed_scale, 2);
            pack_6(packed + (first + row) * packed_bytes, codes, head_dim);
        }
    }
}

INLINE void decode_q6_of(const Shape *shape, const uint8_t *coded, void *numbers, int head_dim) {
    const int heads = shape->heads, vectors = shape->tokens * heads;
    const float norm = norm_of(shape);
    const uint8_t *const coded_scales = coded + mean_bytes(shape), *const packed = coded_scales + 2 * (size_t)vectors;
    uint8_t codes[16 * MAX_HEAD_DIM];
    const bool spans = unpacks_spans(head_dim);
    float means[MAX_HEADS_TIMES_DIM];
    if (shape->keys) decode_means(means, shape, coded);
    for (int first = 0, head = 0; first < vectors; first += 16) {
        const int count = fewer(vectors - first, 16);
        float factors[16];
        const float *chosen[16];
        load_scales(factors, coded_scales + 2 * first, count);
        for (int row = 0; row < count; row++) {
            chosen[row] = signbit(factors[row]) ? means + head * head_dim : no_mean;
            factors[row] = fabsf(factors[row]) * norm;
            if (++head == heads) head = 0;
            const uint8_t *const from = packed + (size_t)(first + row) * (head_dim / 4 * 3);
            if (spans) unpack_signed_6((int8_t *)codes + row * head_dim, from, head_dim);
            else unpack_6(codes + row * head_dim, from, head_dim);
        }
        for (int i = 0; i < count * head_dim && !spans; i++) codes[i] -= 32;
        char *const place = (char *)numbers + (size_t)first * head_dim * value_bytes(shape->dtype);
        unrotate_rows(place, (const int8_t *)codes, factors, shape->keys ? chosen : NULL, count, head_dim, shape->dtype, shape->far);
    }
}

FOR_HEAD_DIMS(encode_q6, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(decode_q6, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
