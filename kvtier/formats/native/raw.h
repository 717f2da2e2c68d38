/* raw: the numbers as they are. */

static void encode_raw(const Shape *shape, const void *numbers, uint8_t *coded) { memcpy(coded, numbers, block_bytes(shape)); }

static void decode_raw(const Shape *shape, const uint8_t *coded, void *numbers) {
    memcpy(numbers, coded, block_bytes(shape));
}
