/* q8_0 and q4_0: rows of ggml blocks of 32 numbers, neither rotated nor reduced by a mean; see kvtier/formats/ggml.py. Bytes are those of
   the torch reference. Sixteen blocks at a time, so that quotients and fp16 scales are computed side by side. */

enum { Q8_0_BYTES = 34, Q4_0_BYTES = 18, SCALE_BYTES = 2 };

static int ggml_blocks(const Shape *shape) { return (int)(block_values(shape) / 32); }

#if !defined(WITH_BLOCKS)
/* Of up to 16 blocks of bf16 or fp16, with signs whether they are needed or not. */
INLINE void halves_extremes(float extremes[16], const char *numbers, int count, int dtype, bool with_sign) {
    (void)with_sign;
    Floats keys[16];
    for (int block = count; block < 16; block++) keys[block] = floats_all(0);
    for (int block = 0; block < count; block++) {
        Floats values[BLOCK_PARTS], most = floats_all(0);
        block_load(values, numbers + (size_t)block * 32 * value_bytes(dtype), dtype);
        for (int part = 0; part < BLOCK_PARTS; part++) most = keys_max(most, extreme_keys(values[part], part * LANES));
        keys[block] = most;
    }
    rows_key(extremes, keys);
    for (int block = 0; block < 16; block++) {
        const uint32_t key = bits_of(extremes[block]);
        extremes[block] = float_of((key >> 1 & ~31u) | key << 31);
    }
}

INLINE void encode_block_q8_0(int8_t codes[32], const char *numbers, float factor, int dtype) {
    Floats values[BLOCK_PARTS];
    block_load(values, numbers, dtype);
    for (int part = 0; part < BLOCK_PARTS; part++) values[part] = floats_mul(values[part], floats_all(factor));
    block_round(codes, values);
}

INLINE void encode_block_q4_0(uint8_t packed[16], const char *numbers, float factor, int dtype) {
    Floats values[BLOCK_PARTS];
    block_load(values, numbers, dtype);
    for (int part = 0; part < BLOCK_PARTS; part++) {
        values[part] = floats_add(floats_mul(values[part], floats_all(factor)), floats_all(8.5f));
    }
    block_nibbles(packed, values);
}
#endif

/* The number of largest magnitude of each of up to 16 blocks, with its sign if that is needed; the first of equals, as in ggml. NaN if
   there is one. */
INLINE void blocks_extremes(float extremes[16], const char *numbers, int count, int dtype, bool with_sign) {
    if (dtype == FP32) {
        for (int block = 0; block < count; block++) {
            const float *const values = (const float *)numbers + 32 * block;
            float extreme = values[0];
            for (int i = 1; i < 32 && !isnan(extreme); i++) extreme = fabsf(values[i]) <= fabsf(extreme) ? extreme : values[i];
            extremes[block] = extreme;
        }
        for (int block = count; block < 16; block++) extremes[block] = 0;
        return;
    }
    halves_extremes(extremes, numbers, count, dtype, with_sign);
}

/* NaN becomes 0, everything else is moved to within +-most. */
static __attribute__((noinline)) void clean_blocks(float clean[16 * 32], const char *numbers, int count, int dtype, float most) {
    for (int block = 0; block < count; block++) {
        Floats values[BLOCK_PARTS];
        block_load(values, numbers + (size_t)block * 32 * value_bytes(dtype), dtype);
        for (int part = 0; part < BLOCK_PARTS; part++) floats_store(clean + 32 * block + part * LANES, values[part]);
    }
    for (int i = 0; i < 32 * count; i++) clean[i] = clean_number(clean[i], most);
}

INLINE void encode_q8_0_blocks(uint8_t *coded, const float extremes[16], const char *numbers, int count, int dtype) {
    float scales[16], factors[16];
    uint16_t halves[16];
    for (int i = 0; i < 16; i++) scales[i] = fabsf(extremes[i]) / 127;
    for (int i = 0; i < 16; i++) factors[i] = inverse(scales[i]);
    round_scales(halves, scales);
    for (int block = 0; block < count; block++, coded += Q8_0_BYTES) {
        memcpy(coded, halves + block, SCALE_BYTES);
        encode_block_q8_0((int8_t *)coded + SCALE_BYTES, numbers + (size_t)block * 32 * value_bytes(dtype), factors[block], dtype);
    }
}

INLINE void encode_q4_0_blocks(uint8_t *coded, const float extremes[16], const char *numbers, int count, int dtype) {
    float scales[16], factors[16];
    uint16_t halves[16];
    for (int i = 0; i < 16; i++) scales[i] = extremes[i] / -8;
    for (int i = 0; i < 16; i++) factors[i] = copysignf(inverse(fabsf(scales[i])), scales[i]);
    halves_store(halves, scales);
    for (int block = 0; block < count; block++, coded += Q4_0_BYTES) {
        memcpy(coded, halves + block, SCALE_BYTES);
        encode_block_q4_0(coded + SCALE_BYTES, numbers + (size_t)block * 32 * value_bytes(dtype), factors[block], dtype);
    }
}

INLINE void encode_ggml_blocks(uint8_t *coded, const float extremes[16], const char *numbers, int count, int codec, int dtype) {
    if (codec == Q8_0) encode_q8_0_blocks(coded, extremes, numbers, count, dtype);
    else encode_q4_0_blocks(coded, extremes, numbers, count, dtype);
}

/* The same where a number has to be cleaned first. */
static __attribute__((noinline)) void encode_clean_blocks(uint8_t *coded, const char *numbers, int count, int codec, int dtype, float most) {
    float clean[16 * 32], extremes[16];
    clean_blocks(clean, numbers, count, dtype, most);
    blocks_extremes(extremes, (const char *)clean, count, FP32, true);
    encode_ggml_blocks(coded, extremes, (const char *)clean, count, codec, FP32);
}

INLINE void encode_ggml(const Shape *shape, const char *numbers, uint8_t *coded, int codec, int dtype) {
    const int blocks = ggml_blocks(shape), coded_bytes = codec == Q8_0 ? Q8_0_BYTES : Q4_0_BYTES;
    const float limit = (codec == Q8_0 ? 127 : 8) * FP16_MAX, most = dtype == FP16 ? FP16_MAX : limit;
    for (int first = 0; first < blocks; first += 16) {
        const int count = fewer(blocks - first, 16);
        const char *const place = numbers + (size_t)first * 32 * value_bytes(dtype);
        uint8_t *const target = coded + (size_t)first * coded_bytes;
        float extremes[16];
        bool clean = true;
        blocks_extremes(extremes, place, count, dtype, codec == Q4_0);
        for (int i = 0; i < 16; i++) clean &= fabsf(extremes[i]) <= most;
        if (clean) encode_ggml_blocks(target, extremes, place, count, codec, dtype);
        else encode_clean_blocks(target, place, count, codec, dtype, most);
    }
}

/* Scales of up to 16 blocks, each in front of its codes. */
INLINE void load_block_scales(float scales[16], const uint8_t *coded, int count, int coded_bytes) {
#if defined(WITH_BLOCKS)
    if (count == 16) {
        apart_load(scales, coded, coded_bytes);
        return;
    }
#endif
    uint16_t halves[16] = {0};
    for (int block = 0; block < count; block++) memcpy(halves + block, coded + block * coded_bytes, SCALE_BYTES);
    halves_load(scales, halves);
}

INLINE void decode_q8_0_as(const Shape *shape, const uint8_t *coded, char *numbers, int dtype) {
    const int blocks = ggml_blocks(shape);
    for (int first = 0; first < blocks; first += 16) {
        const int count = fewer(blocks - first, 16);
        float scales[16];
        load_block_scales(scales, coded, count, Q8_0_BYTES);
        for (int block = 0; block < count; block++, coded += Q8_0_BYTES, numbers += 32 * value_bytes(dtype)) {
            Floats values[BLOCK_PARTS];
            block_from_bytes(values, (const int8_t *)coded + SCALE_BYTES, dtype);
            for (int part = 0; part < BLOCK_PARTS; part++) values[part] = floats_mul(floats_all(scales[block]), values[part]);
            block_store(numbers, values, dtype);
        }
    }
}

static const float nibble_wholes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

/* A block has at most 16 different numbers: they are computed and rounded once, and looked up. */
#if !defined(WITH_BLOCKS)
INLINE void nibble_blocks(char *numbers, const uint8_t *coded, const float scales[16], int count, int dtype) {
    for (int some = 0; some < count; some += GROUP / 16) {
        Floats values[PARTS];
        char table[GROUP * 2] __attribute__((aligned(64)));
        for (int part = 0; part < PARTS; part++) {
            const float scale = scales[some + part * LANES / 16];
            values[part] = floats_mul(floats_all(scale), floats_load(nibble_wholes + part * LANES % 16));
        }
        group_store(table, values, dtype);
        for (int block = some; block < fewer(count, some + GROUP / 16); block++) {
            const uint16_t *const own = (const uint16_t *)table + (block - some) * 16;
            nibble_numbers((uint16_t *)numbers + 32 * block, coded + block * Q4_0_BYTES + SCALE_BYTES, own);
        }
    }
}
#endif

INLINE void nibble_floats(float *numbers, const uint8_t *codes, float scale) {
    for (int i = 0; i < 16; i++) {
        numbers[i] = scale * nibble_wholes[codes[i] & 15];
        numbers[i + 16] = scale * nibble_wholes[codes[i] >> 4];
    }
}

INLINE void decode_q4_0_as(const Shape *shape, const uint8_t *coded, char *numbers, int dtype) {
    const int blocks = ggml_blocks(shape);
    for (int first = 0; first < blocks; first += 16) {
        const int count = fewer(blocks - first, 16);
        float scales[16];
        load_block_scales(scales, coded, count, Q4_0_BYTES);
        if (dtype != FP32) nibble_blocks(numbers, coded, scales, count, dtype);
        for (int block = 0; block < count && dtype == FP32; block++) {
            nibble_floats((float *)numbers + 32 * block, coded + block * Q4_0_BYTES + SCALE_BYTES, scales[block]);
        }
        coded += count * Q4_0_BYTES, numbers += (size_t)count * 32 * value_bytes(dtype);
    }
}

#define ENCODE_Q8_0(dtype) encode_ggml(shape, numbers, coded, Q8_0, dtype)
#define ENCODE_Q4_0(dtype) encode_ggml(shape, numbers, coded, Q4_0, dtype)
#define DECODE_Q8_0(dtype) decode_q8_0_as(shape, coded, numbers, dtype)
#define DECODE_Q4_0(dtype) decode_q4_0_as(shape, coded, numbers, dtype)

static void encode_q8_0(const Shape *shape, const void *numbers, uint8_t *coded) { FOR_DTYPES(shape->dtype, ENCODE_Q8_0) }
static void encode_q4_0(const Shape *shape, const void *numbers, uint8_t *coded) { FOR_DTYPES(shape->dtype, ENCODE_Q4_0) }
static void decode_q8_0(const Shape *shape, const uint8_t *coded, void *numbers) { FOR_DTYPES(shape->dtype, DECODE_Q8_0) }
static void decode_q4_0(const Shape *shape, const uint8_t *coded, void *numbers) { FOR_DTYPES(shape->dtype, DECODE_Q4_0) }
