/* Groups of 16 numbers in plain C, for any CPU. What a group must offer is listed in kernels.h. */
#include <math.h>

#include "half.h"

#define GROUP 16
#define DECODES_FAR 0
#define group_store_far group_store
#define WITHOUT_CONSTANT_SIZES
#define PARTS 1
#define SHORT_PARTS 1

typedef struct { float lane[GROUP]; } Floats;
typedef struct { int16_t lane[GROUP]; } Shorts;

#define EACH(type, expression) \
    type result; \
    for (int i = 0; i < GROUP; i++) result.lane[i] = (expression); \
    return result

static inline Floats floats_add(Floats a, Floats b) { EACH(Floats, a.lane[i] + b.lane[i]); }
static inline Floats floats_sub(Floats a, Floats b) { EACH(Floats, a.lane[i] - b.lane[i]); }
static inline Floats floats_mul(Floats a, Floats b) { EACH(Floats, a.lane[i] * b.lane[i]); }
static inline Floats floats_fused(Floats a, Floats b, Floats c) { EACH(Floats, a.lane[i] * b.lane[i] + c.lane[i]); }
static inline Floats floats_all(float number) { EACH(Floats, number); }
static inline Floats floats_div(Floats a, Floats b) { EACH(Floats, a.lane[i] / b.lane[i]); }
static inline Floats floats_root(Floats a) { EACH(Floats, sqrtf(a.lane[i])); }
static inline Floats floats_at_most(Floats a, Floats most) { EACH(Floats, a.lane[i] < most.lane[i] ? a.lane[i] : most.lane[i]); }
static inline Floats floats_zero_below(Floats a, Floats key, float least) { EACH(Floats, key.lane[i] >= least ? a.lane[i] : 0); }
static inline Floats floats_load(const float *from) { EACH(Floats, from[i]); }
static inline Shorts shorts_add(Shorts a, Shorts b) { EACH(Shorts, (int16_t)(a.lane[i] + b.lane[i])); }
static inline Shorts shorts_sub(Shorts a, Shorts b) { EACH(Shorts, (int16_t)(a.lane[i] - b.lane[i])); }

static inline void floats_store(float *to, Floats a) { memcpy(to, a.lane, sizeof a.lane); }

static inline float floats_sum(Floats a) {
    float sum = 0;
    for (int i = 0; i < GROUP; i++) sum += a.lane[i];
    return sum;
}

static inline uint32_t magnitude_bits(float number) { return bits_of(number) & 0x7FFFFFFF; }

static inline Floats magnitude_max(Floats most, Floats a) {
    EACH(Floats, float_of(magnitude_bits(a.lane[i]) > bits_of(most.lane[i]) ? magnitude_bits(a.lane[i]) : bits_of(most.lane[i])));
}

static inline Floats keys_max(Floats a, Floats b) {
    EACH(Floats, float_of(bits_of(a.lane[i]) > bits_of(b.lane[i]) ? bits_of(a.lane[i]) : bits_of(b.lane[i])));
}

static inline float magnitude_of(Floats most) {
    uint32_t bits = 0;
    for (int i = 0; i < GROUP; i++) bits = bits_of(most.lane[i]) > bits ? bits_of(most.lane[i]) : bits;
    return float_of(bits);
}

static inline void rows_sum(float results[16], const Floats rows[16]) {
    for (int row = 0; row < 16; row++) results[row] = floats_sum(rows[row]);
}

static inline void rows_magnitude(float results[16], const Floats rows[16]) {
    for (int row = 0; row < 16; row++) results[row] = magnitude_of(rows[row]);
}

static inline void group_load(Floats group[PARTS], const void *numbers, int dtype) {
    const uint16_t *halves = numbers;
    if (dtype == FP32) memcpy(group->lane, numbers, sizeof group->lane);
    else if (dtype == FP16) for (int i = 0; i < GROUP; i++) group->lane[i] = from_fp16(halves[i]);
    else for (int i = 0; i < GROUP; i++) group->lane[i] = from_bf16(halves[i]);
}

/* Sums of a group of numbers of each of `count` rows; `most` becomes at least as large as each magnitude. */
static inline void group_sums(float sums[GROUP], Floats *most, const char *numbers, size_t stride, int count, int dtype) {
    Floats total = floats_all(0), group;
    for (int row = 0; row < count; row++) {
        group_load(&group, numbers + row * stride, dtype);
        total = floats_add(total, group);
        *most = magnitude_max(*most, group);
    }
    floats_store(sums, total);
}

static inline Floats group_magnitude(const Floats group[PARTS]) { return magnitude_max(floats_all(0), group[0]); }

static inline void group_store(void *numbers, const Floats group[PARTS], int dtype) {
    uint16_t *halves = numbers;
    if (dtype == FP32) memcpy(numbers, group->lane, sizeof group->lane);
    else if (dtype == FP16) for (int i = 0; i < GROUP; i++) halves[i] = to_fp16(fmaxf(fminf(group->lane[i], 65504), -65504));
    else for (int i = 0; i < GROUP; i++) halves[i] = to_bf16(group->lane[i]);
}

/* Neighbours meet in each of four steps; sums go to the lower half, differences to the upper one, which brings every number back to its
   place in the end. All steps alike, without branches: compilers make vector instructions of them. */
#define ROTATE(lane, type) \
    for (int step = 0; step < 4; step++) { \
        type before[GROUP]; \
        memcpy(before, lane, sizeof before); \
        for (int i = 0; i < GROUP / 2; i++) lane[i] = (type)(before[2 * i] + before[2 * i + 1]); \
        for (int i = 0; i < GROUP / 2; i++) lane[i + GROUP / 2] = (type)(before[2 * i] - before[2 * i + 1]); \
    }

static inline void group_load_rotated(Floats group[PARTS], const void *numbers, int dtype) {
    group_load(group, numbers, dtype);
    ROTATE(group->lane, float)
}

#define GROUPS_AT_ONCE 1

INLINE void groups_load_rotated(Floats (*groups)[PARTS], const char *const *numbers, int count, int dtype) {
    for (int i = 0; i < count; i++) group_load_rotated(groups[i], numbers[i], dtype);
}

static inline void group_rotate_codes(Shorts group[SHORT_PARTS], const int8_t *codes) {
    for (int i = 0; i < GROUP; i++) group->lane[i] = codes[i];
    ROTATE(group->lane, int16_t)
}

static inline void group_widen(Floats group[PARTS], const Shorts whole[SHORT_PARTS]) {
    for (int i = 0; i < GROUP; i++) group->lane[i] = whole->lane[i];
}

static inline int8_t within(float number, int least, int most) {
    return (int8_t)(number < (float)least ? least : number > (float)most ? most : (int)number);
}

static inline void group_round(int8_t *codes, const Floats group[PARTS], Floats factor, int largest) {
    for (int i = 0; i < GROUP; i++) codes[i] = within(rintf(group->lane[i] * factor.lane[i]), -largest, largest);
}

static inline void group_values(Floats values[PARTS], const uint8_t *codes, const LevelTable *levels) {
    for (int i = 0; i < GROUP; i++) values->lane[i] = levels->values[codes[i]];
}

static inline void group_levels(uint8_t *codes, Floats values[PARTS], const Floats group[PARTS], Floats factor, const LevelTable *levels) {
    for (int i = 0; i < GROUP; i++) codes[i] = levels->codes[(uint8_t)within(floorf(group->lane[i] * factor.lane[i]), -128, 127)];
    group_values(values, codes, levels);
}

#define LEVELS_BY_ROW 0
#define LEVELS_AT_ONCE 1

INLINE void groups_levels(uint8_t *const *codes, Floats (*values)[PARTS], const float *const *rows, const Floats *factors, int count,
    const LevelTable *levels) {
    for (int i = 0; i < count; i++) {
        Floats group[PARTS];
        for (int part = 0; part < PARTS; part++) group[part] = floats_load(rows[i] + part * (GROUP / PARTS));
        group_levels(codes[i], values[i], group, factors[i], levels);
    }
}

/* Codes below 16 to what the table holds for them. */
static inline void group_lookup(int8_t *values, const int8_t *codes, const int8_t table[16]) {
    for (int i = 0; i < GROUP; i++) values[i] = table[codes[i]];
}

static inline void halves_store(uint16_t *halves, const float *numbers) {
    for (int i = 0; i < 16; i++) halves[i] = to_fp16(numbers[i]);
}

static inline void halves_load(float *numbers, const uint16_t *halves) {
    for (int i = 0; i < 16; i++) numbers[i] = from_fp16(halves[i]);
}

/* ggml blocks of 32 numbers; see kernels.h. */
enum { BLOCK_PARTS = 2 };

static inline void block_load(Floats block[BLOCK_PARTS], const void *numbers, int dtype) {
    const char *const place = numbers;
    for (int part = 0; part < BLOCK_PARTS; part++) group_load(block + part, place + part * 16 * (dtype == FP32 ? 4 : 2), dtype);
}

static inline void block_store(void *numbers, const Floats block[BLOCK_PARTS], int dtype) {
    char *const place = numbers;
    for (int part = 0; part < BLOCK_PARTS; part++) group_store(place + part * 16 * (dtype == FP32 ? 4 : 2), block + part, dtype);
}

static inline void block_from_bytes(Floats block[BLOCK_PARTS], const int8_t *bytes, int dtype) {
    (void)dtype;
    for (int i = 0; i < 32; i++) block[i / GROUP].lane[i % GROUP] = bytes[i];
}

static inline void block_round(int8_t *codes, const Floats block[BLOCK_PARTS]) {
    for (int i = 0; i < 32; i++) {
        const float number = block[i / 16].lane[i % 16];
        codes[i] = (int8_t)(number + copysignf(0x1.fffffep-2f, number));
    }
}

static inline void block_nibbles(uint8_t packed[16], const Floats block[BLOCK_PARTS]) {
    for (int i = 0; i < 16; i++) packed[i] = (uint8_t)(within(block[0].lane[i], 0, 15) | within(block[1].lane[i], 0, 15) << 4);
}

static inline void nibble_numbers(uint16_t numbers[32], const uint8_t packed[16], const uint16_t table[16]) {
    uint16_t found[32];
    for (int i = 0; i < 16; i++) found[i] = table[packed[i] & 15];
    for (int i = 0; i < 16; i++) found[i + 16] = table[packed[i] >> 4];
    memcpy(numbers, found, sizeof found);
}

static inline Floats extreme_keys(Floats a, int place) {
    EACH(Floats, float_of(bits_of(a.lane[i]) << 1 | bits_of(a.lane[i]) >> 31 | (uint32_t)(31 - place - i) << 1));
}

static inline void rows_key(float results[16], const Floats rows[16]) {
    for (int row = 0; row < 16; row++) {
        uint32_t most = 0;
        for (int i = 0; i < GROUP; i++) most = bits_of(rows[row].lane[i]) > most ? bits_of(rows[row].lane[i]) : most;
        results[row] = float_of(most);
    }
}

/* -- copies past the caches, a line at a time -------------------------------------------------------------------------------------- */

static inline void line_copy_far(void *to, const void *from) { memcpy(to, from, 64); }
static inline void lines_arrive(void) {}
