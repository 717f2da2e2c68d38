/* Sizes and limits of blocks; see shape.h. */
#include "shape.h"

bool shape_supported(const Shape *shape) {
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    return false; /* payloads are little-endian and the kernels copy numbers as they are in memory */
#endif
    if (shape->dtype < 0 || shape->dtype >= DTYPES || shape->tokens < 1 || shape->heads < 1 || shape->head_dim < 1) return false;
    if (shape->tokens > MAX_TOKENS || shape->head_dim > MAX_HEAD_DIM || shape->heads > MAX_HEADS_TIMES_DIM / shape->head_dim) return false;
    return hadamard_block(shape) >= MIN_BLOCK && hadamard_block(shape) <= MAX_BLOCK;
}

bool codec_supported(int codec, const Shape *shape) {
    if (codec == Q8_0 || codec == Q4_0) return shape->head_dim % 32 == 0;
    return codec >= 0 && codec < CODECS;
}

size_t coded_bytes(int codec, const Shape *shape) {
    const size_t values = block_values(shape), vectors = (size_t)shape->tokens * shape->heads, heads = shape->heads;
    switch (codec) {
    case RAW: return block_bytes(shape);
    case Q8: return values + 2 * vectors;
    case Q6: return mean_bytes(shape) + 2 * vectors + values / 2 + values / 4;
    case Q4: return mean_bytes(shape) + 2 * heads + vectors + values / 2;
    case Q8_0: return values / 32 * 34;
    case Q4_0: return values / 32 * 18;
    default: return mean_bytes(shape) + 2 * heads + vectors + values / 4 + values / 8;
    }
}
