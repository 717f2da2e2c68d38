/* q4 and q3: mean of keys, fp16 supers [heads], scale bytes [tokens, heads], codes; see kvtier/formats/q4.py. The two differ in
   their levels and in how codes are packed. */

enum { NO_SCALE = 127, SMALLEST_SCALE = 126, STEPS_PER_OCTAVE = 32 };

/* Steps below the super, from the bits of the ratio: the same on every machine. `super` must be the largest scale, rounded. */
static void scale_steps(int *steps, const float *scales, float super, int count) {
    for (int i = 0; i < count; i++) {
        const uint32_t bits = bits_of(at_most(scales[i] / super, 1));
        const int step = (127 - (int)(bits >> 23)) * STEPS_PER_OCTAVE - SCALE_LOG[bits >> 15 & 255];
        const int nearest = step < 0 ? 0 : step > SMALLEST_SCALE ? SMALLEST_SCALE : step;
        const bool none = step > SMALLEST_SCALE + STEPS_PER_OCTAVE || scales[i] == 0 || super == 0;
        steps[i] = none ? NO_SCALE : nearest;
    }
}

INLINE void encode_gaussian(const Shape *shape, const char *numbers, uint8_t *coded, const Levels levels, int bits, bool keys,
    int head_dim) {
    const int heads = shape->heads, rows = tile_rows(shape);
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype), stride = heads * vector_bytes, packed_bytes = head_dim / 8 * bits;
    const float norm = norm_of(shape);
    uint8_t *const supers = coded + mean_bytes(shape), *const steps = supers + 2 * heads;
    uint8_t *const packed = steps + (size_t)shape->tokens * heads;
    Tile tile;
    float mean[MAX_HEAD_DIM], scales[MAX_TOKENS + 16];
    bool reduced[MAX_TOKENS + 16];
    int nearest[MAX_TOKENS];
    for (int head = 0; head < heads; head++) {
        float largest[16] = {0};
        uint16_t halves[16];
        if (keys) encode_mean(&tile, mean, shape, head, numbers, coded, head_dim);
        for (int token = 0; token < shape->tokens; token += 16) {
            const int count = fewer(shape->tokens - token, 16), row = token % rows;
            if (row == 0 && !(keys && shape->tokens <= rows)) {
                const char *const place = numbers + head * vector_bytes + token * stride;
                load_tile(&tile, shape, place, stride, fewer(shape->tokens - token, rows), FP16_MAX);
            }
            const float *const vectors = tile.rows + row * head_dim, *means[16];
            float energies[16];
            uint8_t codes[16 * MAX_HEAD_DIM];
            if (keys) choose_means(means, energies, mean, vectors, count, head_dim);
            else rows_energy(energies, vectors, count, head_dim);
            encode_levels(codes, scales + token, &levels, vectors, keys ? means : NULL, energies, count, head_dim);
            for (int i = 0; i < count; i++) {
                pack_codes(packed + ((size_t)(token + i) * heads + head) * packed_bytes, codes + i * head_dim, head_dim, bits);
                reduced[token + i] = keys && means[i] != no_mean;
            }
        }
        for (int token = 0; token < shape->tokens; token++) {
            scales[token] *= norm;
            largest[0] = scales[token] > largest[0] ? scales[token] : largest[0];
        }
        round_scales(halves, largest);
        memcpy(supers + 2 * head, halves, 2);
        scale_steps(nearest, scales, largest[0], shape->tokens);
        for (int token = 0; token < shape->tokens; token++) {
            steps[(size_t)token * heads + head] = (uint8_t)(nearest[token] | reduced[token] << 7);
        }
    }
}

INLINE void decode_gaussian(const Shape *shape, const uint8_t *coded, void *numbers, const Levels levels, double per_rms, int bits,
    int head_dim) {
    const int heads = shape->heads, vectors = shape->tokens * heads;
    const uint8_t *const coded_supers = coded + mean_bytes(shape), *const steps = coded_supers + 2 * heads, *const packed = steps + vectors;
    const float factor = (float)(1 / sqrt(hadamard_block(shape)) / per_rms);
    uint8_t codes[16 * MAX_HEAD_DIM];
    float means[MAX_HEADS_TIMES_DIM], supers[MAX_HEADS_TIMES_DIM / MIN_BLOCK + 16];
    if (shape->keys) decode_means(means, shape, coded, head_dim);
    for (int head = 0; head < heads; head += 16) load_scales(supers + head, coded_supers + 2 * head, fewer(heads - head, 16));
    for (int first = 0, head = 0; first < vectors; first += 16) {
        const int count = fewer(vectors - first, 16);
        float factors[16];
        const float *chosen[16];
        for (int row = 0; row < count; row++) {
            const int step = steps[first + row];
            chosen[row] = step & 128 ? means + head * head_dim : no_mean;
            factors[row] = fabsf(supers[head]) * SCALE_STEP[step & 127] * factor;
            if (++head == heads) head = 0;
            const uint8_t *const source = packed + (size_t)(first + row) * (head_dim / 8 * bits);
            unpack_codes(codes + row * head_dim, source, head_dim, bits);
        }
        for (int i = 0; i < count * head_dim; i += GROUP) group_lookup((int8_t *)codes + i, (const int8_t *)codes + i, levels.values);
        char *const place = (char *)numbers + (size_t)first * head_dim * value_bytes(shape->dtype);
        unrotate_rows(place, (const int8_t *)codes, factors, shape->keys ? chosen : NULL, count, head_dim, shape->dtype);
    }
}

INLINE void encode_q4_of(const Shape *shape, const void *numbers, uint8_t *coded, int head_dim) {
    if (shape->keys) encode_gaussian(shape, numbers, coded, levels4(), 4, true, head_dim);
    else encode_gaussian(shape, numbers, coded, levels4(), 4, false, head_dim);
}

INLINE void encode_q3_of(const Shape *shape, const void *numbers, uint8_t *coded, int head_dim) {
    if (shape->keys) encode_gaussian(shape, numbers, coded, levels3(), 3, true, head_dim);
    else encode_gaussian(shape, numbers, coded, levels3(), 3, false, head_dim);
}

#define decode_q4_of(shape, coded, numbers, head_dim) decode_gaussian(shape, coded, numbers, levels4(), PER_RMS4, 4, head_dim)
#define decode_q3_of(shape, coded, numbers, head_dim) decode_gaussian(shape, coded, numbers, levels3(), PER_RMS3, 3, head_dim)

FOR_HEAD_DIMS(encode_q4, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(encode_q3, (const Shape *shape, const void *numbers, uint8_t *coded), shape, numbers, coded)
FOR_HEAD_DIMS(decode_q4, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
FOR_HEAD_DIMS(decode_q3, (const Shape *shape, const uint8_t *coded, void *numbers), shape, coded, numbers)
