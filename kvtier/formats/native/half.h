/* fp16 and bf16 without hardware for them; IEEE rounding to nearest, ties to even. */
#ifndef KVTIER_HALF_H
#define KVTIER_HALF_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

static inline uint32_t bits_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline float from_bf16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* Finite numbers only. */
static inline uint16_t to_bf16(float number) {
    const uint32_t bits = bits_of(number);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline float from_fp16(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | rest << 13);
    if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));
    /* A subnormal is a whole number of 2**-24. */
    return float_of(sign | bits_of((float)rest * 0x1p-24f));
}

/* Numbers of magnitude up to 65504 only. */
static inline uint16_t to_fp16(float number) {
    const uint32_t sign = bits_of(number) >> 16 & 0x8000, rest = bits_of(number) & 0x7FFFFFFF;
    /* Adding 0.5 leaves the ulp of 0.5 in fp32, 2**-24, which is that of fp16 subnormals: the hardware rounds for us. */
    if (rest < 113u << 23) return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13);
}

#endif
