/* A libcuda for tests: addresses without memory are inaccessible pages, copies are done at once, wrong arguments are refused. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_CONTEXT = 201 };
typedef struct { int type, id; } location;
typedef struct { int type, handles; location where; void *win32; uint8_t flags[8]; } allocation;
typedef struct { location where; int flags; } access_rights;
typedef struct { int order; location source, target; unsigned flags; } attributes;

#define STEP (64 << 10)
static int here = 7, depth;
uint64_t memory_left = 64 * STEP;
int batches, singles, mappings, registered, refuse_access, granted[3]; /* by device: how often */

int cuGetErrorString(int code, const char **text) { *text = code == NO_MEMORY ? "out of memory" : "invalid argument"; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 10; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = (attribute == 102 || attribute == 91) && device >= 10; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = device >= 10 ? &here : NULL; return OK; }
int cuStreamCreate(void **stream, unsigned flags) { static char streams[99]; static int made; *stream = &streams[made++]; return depth && flags == 1 ? OK : INVALID; }
static int mode;
int cuThreadExchangeStreamCaptureMode(int *wanted) { int before = mode; mode = *wanted; *wanted = before; return before == mode ? INVALID : OK; }
int capture_mode(void) { return mode; }
int cuCtxPushCurrent_v2(void *context) { depth++; return context == &here ? OK : INVALID; }
int cuCtxPopCurrent_v2(void **context) { *context = &here; return depth-- > 0 ? OK : INVALID; }

static int good(const allocation *given) { return given->type == 1 && given->handles == 0 && given->where.type == 1 && given->where.id == 13 && !given->win32; }
int cuMemGetAllocationGranularity(size_t *size, const allocation *given, int option) { *size = STEP; return depth && good(given) && option == 0 ? OK : INVALID; }
int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t wanted, uint64_t flags) {
    void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = (uint64_t)found;
    return depth && !(size % STEP) && !alignment && !wanted && !flags && found != MAP_FAILED ? OK : INVALID;
}
int cuMemAddressFree(uint64_t address, size_t size) { return mappings ? INVALID : munmap((void *)address, size) ? INVALID : OK; }
int cuMemCreate(uint64_t *handle, size_t size, const allocation *given, uint64_t flags) {
    if (!depth) return NO_CONTEXT;
    if (!good(given) || flags || size % STEP) return INVALID;
    if (size > memory_left) return NO_MEMORY;
    memory_left -= size;
    *handle = size;
    return OK;
}
int cuMemRelease(uint64_t handle) { return handle ? OK : INVALID; }
int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle, uint64_t flags) {
    if (handle != size || offset || flags) return INVALID;
    mappings++;
    return OK;
}
int cuMemSetAccess(uint64_t address, size_t size, const access_rights *rights, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (rights[i].where.type != 1 || rights[i].where.id < 10 || rights[i].flags != 3) return INVALID;
    if (refuse_access || !depth) return INVALID;
    for (size_t i = 0; i < count; i++) granted[rights[i].where.id == 13 ? 0 : rights[i].where.id == 11 ? 1 : 2]++;
    return mprotect((void *)address, size, PROT_READ | PROT_WRITE) ? INVALID : OK;
}
int cuMemUnmap(uint64_t address, size_t size) {
    memory_left += size;
    mappings--;
    return mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? INVALID : OK;
}
int cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    if (!depth) return NO_CONTEXT;
    if (!address || flags != 3 || size > (1 << 20)) return NO_MEMORY;
    registered++;
    return OK;
}
int cuMemHostUnregister(void *address) { registered--; return address && depth ? OK : INVALID; }
int cuMemcpyAsync(uint64_t target, uint64_t source, size_t size, void *stream) {
    singles++;
    if (!depth) return NO_CONTEXT;
    memcpy((void *)target, (void *)source, size);
    return OK;
}
static int batch(uint64_t *targets, uint64_t *sources, size_t *sizes, size_t count, attributes *given, size_t *firsts, size_t kinds, void *stream) {
    if (!depth) return NO_CONTEXT;
    if (!stream || kinds != 1 || firsts[0] != 0 || given->order != 1 || given->flags || given->source.type || given->target.type) return INVALID;
    batches++;
    for (size_t i = 0; i < count; i++) memcpy((void *)targets[i], (void *)sources[i], sizes[i]);
    return OK;
}
#if BATCH == 13
int cuMemcpyBatchAsync_v2(uint64_t *t, uint64_t *s, size_t *n, size_t count, attributes *a, size_t *f, size_t k, void *stream) { return batch(t, s, n, count, a, f, k, stream); }
#elif BATCH == 12
int cuMemcpyBatchAsync(uint64_t *t, uint64_t *s, size_t *n, size_t count, attributes *a, size_t *f, size_t k, size_t *failed, void *stream) {
    *failed = ~(size_t)0;
    return batch(t, s, n, count, a, f, k, stream);
}
#endif
