/* AVX-512 for CPUs without it: `run` puts this into its copies of avx512.c and avx512_bf16.c, in place of the line that lets the compiler
   use the real one.

   SIMD Everywhere (simde) has most of the intrinsics, made of AVX2. Here are those that Debian 12's version lacks, and two whose rules for
   what is not a number or subnormal it does not keep. They do what Intel's manuals say, number by number or, where AVX2 has the same, half
   by half. */
#pragma GCC target("avx2,f16c,fma")

#include <float.h>
#include <immintrin.h>
#include <math.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "half.h"

typedef union {
    __m512 floats;
    __m512i whole;
    float f32[16];
    int32_t i32[16];
    uint16_t u16[32];
    uint8_t u8[64];
    int8_t i8[64];
    __m256 float_halves[2];
    __m256i halves[2];
    __m128 float_quarters[4];
    __m128i quarters[4];
} Register;

/* -- conversions ------------------------------------------------------------------------------------------------------------------- */

/* From a register that `a` has as its `part`, `count` times `value`, of which `a` and `i` are parts, to the same of another. */
#define CONVERSION(name, type, result, count, element, value, a_type, part) \
    INLINE type emulated_##name(a_type given) { \
        const Register a = {.part = given}; \
        Register made; \
        for (int i = 0; i < (count); i++) made.element[i] = (value); \
        return made.result; \
    }

CONVERSION(cvtepi8_epi32, __m512i, whole, 16, i32, a.i8[i], __m128i, quarters[0])
CONVERSION(cvtepu8_epi16, __m512i, whole, 32, u16, a.u8[i], __m256i, halves[0])
CONVERSION(cvtepi32_epi16, __m256i, halves[0], 16, u16, (uint16_t)a.i32[i], __m512i, whole)
CONVERSION(cvtepi32_epi8, __m128i, quarters[0], 16, u8, (uint8_t)a.i32[i], __m512i, whole)
CONVERSION(cvtepi32_ps, __m512, floats, 16, f32, (float)a.i32[i], __m512i, whole)
CONVERSION(cvttps_epi32, __m512i, whole, 2, halves, _mm256_cvttps_epi32(a.float_halves[i]), __m512, floats)
CONVERSION(cvtph_ps, __m512, floats, 2, float_halves, _mm256_cvtph_ps(a.quarters[i]), __m256i, halves[0])

INLINE __m256i emulated_cvtps_ph(__m512 given, int rounding) {
    const Register a = {.floats = given};
    return _mm256_set_m128i(_mm256_cvtps_ph(a.float_halves[1], rounding), _mm256_cvtps_ph(a.float_halves[0], rounding));
}

/* -- numbers that change their places ---------------------------------------------------------------------------------------------- */

INLINE __m256 emulated_extractf32x8_ps(__m512 given, int half) { return ((Register){.floats = given}).float_halves[half]; }

INLINE __m512 emulated_permute_ps(__m512 given, int places) {
    const Register a = {.floats = given};
    Register made;
    for (int i = 0; i < 16; i++) made.f32[i] = a.f32[(i & ~3) + (places >> 2 * (i & 3) & 3)];
    return made.floats;
}

INLINE __m512i emulated_shuffle_i64x2(__m512i low, __m512i high, int places) {
    const Register both[2] = {{.whole = low}, {.whole = high}};
    Register made;
    for (int i = 0; i < 4; i++) made.quarters[i] = both[i / 2].quarters[places >> 2 * i & 3];
    return made.whole;
}

INLINE __m512 emulated_shuffle_f32x4(__m512 low, __m512 high, int places) {
    return _mm512_castsi512_ps(emulated_shuffle_i64x2(_mm512_castps_si512(low), _mm512_castps_si512(high), places));
}

INLINE void emulated_stream_si512(void *to, __m512i line) { *(__m512i *)to = line; }

/* -- arithmetic -------------------------------------------------------------------------------------------------------------------- */

/* The order is that of the compilers' headers: halves, quarters, then pairs meet. */
INLINE float emulated_reduce_add_ps(__m512 given) {
    Register a = {.floats = given};
    for (int count = 8; count; count /= 2) {
        for (int i = 0; i < count; i++) a.f32[i] += a.f32[i + count];
    }
    return a.f32[0];
}

/* The CPU rounds as it is told to meanwhile; codes for rounding are the same in instructions and in its control word. */
INLINE __m512 emulated_fmadd_round_ps(__m512 given, __m512 factor, __m512 added, int rounding) {
    enum { ROUNDING_SHIFT = 13 };
    Register a = {.floats = given};
    const Register b = {.floats = factor}, c = {.floats = added};
    const unsigned before = _mm_getcsr(), meanwhile = (before & ~_MM_ROUND_MASK) | (unsigned)(rounding & 3) << ROUNDING_SHIFT;
    for (int i = 0; i < 2; i++) {
        __asm__ volatile("vldmxcsr %3\n\tvfmadd213ps %2, %1, %0\n\tvldmxcsr %4"
                         : "+x"(a.float_halves[i])
                         : "x"(b.float_halves[i]), "x"(c.float_halves[i]), "m"(meanwhile), "m"(before));
    }
    return a.floats;
}

/* Of two, the larger magnitude, or the one that is a number; a signalling NaN is passed on, quiet. Without its sign. */
INLINE float larger_magnitude(float a, float b) {
    const uint32_t quiet = 0x00400000;
    for (int i = 0; i < 2; i++) {
        const float one = i ? b : a;
        if (isnan(one) && !(bits_of(one) & quiet)) return fabsf(float_of(bits_of(one) | quiet));
    }
    return isnan(a) || fabsf(b) >= fabsf(a) ? fabsf(b) : fabsf(a);
}

INLINE __m512 emulated_range_ps(__m512 one, __m512 other, int which) {
    const Register a = {.floats = one}, b = {.floats = other};
    Register made;
    if (which != 0xB) __builtin_trap(); /* the only one in use */
    for (int i = 0; i < 16; i++) made.f32[i] = larger_magnitude(a.f32[i], b.f32[i]);
    return made.floats;
}

/* What reads or makes bf16 takes subnormal numbers for zeros and, where it adds, makes none. */
INLINE float flushed(float number) { return fabsf(number) < FLT_MIN ? copysignf(0, number) : number; }

INLINE __m512bh emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
    const Register both[2] = {{.floats = low}, {.floats = high}};
    Register made;
    for (int i = 0; i < 32; i++) {
        const float number = flushed(both[i / 16].f32[i % 16]);
        made.u16[i] = isnan(number) ? (uint16_t)(bits_of(number) >> 16 | 0x40) : to_bf16(number);
    }
    return (__m512bh)made.floats;
}

INLINE __m512 emulated_dpbf16_ps(__m512 sums, __m512bh one, __m512bh other) {
    const Register a = {.floats = (__m512)one}, b = {.floats = (__m512)other};
    Register made = {.floats = sums};
    for (int i = 0; i < 16; i++) {
        float sum = flushed(made.f32[i]);
        for (int j = 1; j >= 0; j--) {
            sum = flushed(fmaf(flushed(from_bf16(a.u16[2 * i + j])), flushed(from_bf16(b.u16[2 * i + j])), sum));
        }
        made.f32[i] = sum;
    }
    return made.floats;
}

#undef _mm512_dpbf16_ps
#undef _mm512_madd_epi16
#undef _mm512_range_ps
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvttps_epi32 emulated_cvttps_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_permute_ps emulated_permute_ps
#define _mm512_shuffle_i64x2 emulated_shuffle_i64x2
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4
#define _mm512_stream_si512 emulated_stream_si512
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_fmadd_round_ps emulated_fmadd_round_ps
#define _mm512_madd_epi16 simde_mm512_madd_epi16 /* simde 0.7.4 gives this name too many parameters */
#define _mm512_range_ps emulated_range_ps
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated_dpbf16_ps
