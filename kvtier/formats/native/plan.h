/* The plan: what the caller says about its pages and payloads, as bytes: struct "<8i" dtype, layers, planes, tokens, heads, head_dim,
   entries, reserved; then per layer and plane "<iiq" codec, is-key-plane, offset in the payload; then "<q" payload bytes. */
#ifndef KVTIER_PLAN_H
#define KVTIER_PLAN_H

#include <string.h>

#include "shape.h"

enum { PLAN_ENTRY_BYTES = 16 };

typedef struct {
    int codec;
    size_t offset;
    Shape shape;
} Entry;

typedef struct {
    const unsigned char *entries;
    Shape shape;
    int layers, planes;
    size_t payload_bytes, layer_bytes;
} Plan;

/* NULL, or why these bytes are no plan that the kernels can carry out. */
const char *plan_open(Plan *plan, const void *bytes, size_t size);

static inline Entry plan_entry(const Plan *plan, int layer, int plane) {
    const unsigned char *bytes = plan->entries + ((size_t)layer * plan->planes + plane) * PLAN_ENTRY_BYTES;
    int32_t codec, keys;
    int64_t offset;
    memcpy(&codec, bytes, 4);
    memcpy(&keys, bytes + 4, 4);
    memcpy(&offset, bytes + 8, 8); /* a negative offset becomes a huge one, which plan_open refuses */
    Entry entry = {codec, (size_t)offset, plan->shape};
    entry.shape.keys = keys != 0;
    return entry;
}

#endif
