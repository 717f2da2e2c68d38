/* Reads and checks a plan once per call, before anything is written; see plan.h. */
#include "plan.h"

#include <string.h>

enum { HEAD_BYTES = 32 };

/* `sizes`: bytes of blocks by codec and whether they hold keys, once they are known. Most blocks of a plan are alike. */
static const char *check_entry(const Plan *plan, Entry entry, size_t sizes[CODECS][2]) {
    if (entry.codec < 0 || entry.codec >= CODECS) return "plan: unknown codec; expected 0 raw, 1 q8, 2 q6, 3 q4, 4 q3, 5 q8_0 or 6 q4_0";
    size_t *const size = &sizes[entry.codec][entry.shape.keys];
    if (*size == 0) {
        if (!codec_supported(entry.codec, &entry.shape)) return "plan: no kernels for this codec and head_dim; ask supports() first";
        *size = coded_bytes(entry.codec, &entry.shape);
    }
    if (entry.offset > plan->payload_bytes || *size > plan->payload_bytes - entry.offset) return "plan: a block lies outside the payload";
    return NULL;
}

static const char *check_entries(const Plan *plan) {
    size_t sizes[CODECS][2] = {{0}};
    for (int layer = 0; layer < plan->layers; layer++) {
        for (int plane = 0; plane < plan->planes; plane++) {
            const char *error = check_entry(plan, plan_entry(plan, layer, plane), sizes);
            if (error) return error;
        }
    }
    return NULL;
}

const char *plan_open(Plan *plan, const void *bytes, size_t size) {
    int32_t head[8];
    int64_t payload_bytes;
    if (size < HEAD_BYTES + sizeof payload_bytes) return "plan: too short; expected a head of 8 int32, 16 bytes per block, an int64";
    memcpy(head, bytes, sizeof head);
    plan->shape = (Shape){head[0], head[3], head[4], head[5], false, false, false};
    plan->layers = head[1];
    plan->planes = head[2];
    if (plan->layers < 1 || plan->layers > 4096) return "plan: expected 1 to 4096 layers";
    if (plan->planes < 1 || plan->planes > 2) return "plan: expected 1 or 2 planes";
    if (!shape_supported(&plan->shape)) return "plan: no kernels for this block shape; ask supports() first";
    const size_t entries = (size_t)plan->layers * plan->planes;
    if ((size_t)head[6] != entries || size != HEAD_BYTES + entries * PLAN_ENTRY_BYTES + sizeof payload_bytes) {
        return "plan: the number of blocks differs from layers * planes";
    }
    plan->entries = (const unsigned char *)bytes + HEAD_BYTES;
    memcpy(&payload_bytes, plan->entries + entries * PLAN_ENTRY_BYTES, sizeof payload_bytes);
    if (payload_bytes < 0) return "plan: negative payload size";
    plan->payload_bytes = (size_t)payload_bytes;
    plan->layer_bytes = plan->planes * block_bytes(&plan->shape);
    return check_entries(plan);
}
