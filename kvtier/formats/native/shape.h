/* The block: one plane of one layer of one page, [tokens, heads, head_dim] numbers; and how many bytes each codec makes of it.

   Vector: head_dim numbers of one token and head. Hadamard block: the largest power of two that divides head_dim. */
#ifndef KVTIER_SHAPE_H
#define KVTIER_SHAPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BF16, FP16, FP32, DTYPES };
enum { RAW, Q8, Q6, Q4, Q3, Q8_0, Q4_0, CODECS };

typedef struct {
    int dtype, tokens, heads, head_dim;
    bool keys;   /* plane 0 of a page with two planes: Q6, Q4 and Q3 subtract its mean */
    bool begins; /* to be encoded as the begin of a sequence; when decoding, the block says it */
    bool far;    /* to be decoded past the caches, into whole lines of memory, by codecs that rotate, where kernels say that they obey this */
} Shape;

/* Limits that keep every temporary on the stack: a tile of rotated vectors, one number per token, one vector per head. */
enum { MAX_TOKENS = 1024, MAX_HEAD_DIM = 1024, MAX_HEADS_TIMES_DIM = 16384, MIN_BLOCK = 16, MAX_BLOCK = 256 };

static inline int hadamard_block(const Shape *shape) { return shape->head_dim & -shape->head_dim; }

static inline size_t value_bytes(int dtype) { return dtype == FP32 ? 4 : 2; }

static inline size_t block_values(const Shape *shape) { return (size_t)shape->tokens * shape->heads * shape->head_dim; }

static inline size_t block_bytes(const Shape *shape) { return block_values(shape) * value_bytes(shape->dtype); }

/* Bytes of the mean that precedes the block: an fp16 scale and head_dim 4-bit codes per head. */
static inline size_t mean_bytes(const Shape *shape) { return shape->keys ? (size_t)shape->heads * (2 + shape->head_dim / 2) : 0; }

bool shape_supported(const Shape *shape);

/* For a codec and a supported shape: whether the codec has kernels for it. */
bool codec_supported(int codec, const Shape *shape);

size_t coded_bytes(int codec, const Shape *shape);

#endif
