/* The kernels for x86-64 with AVX-512, VBMI, VNNI and BF16 (Zen 4, Sapphire Rapids and later), where rounding to bf16 is one instruction. Only
   this file may use them: dispatch.c asks the CPU before it comes here. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")
#endif

#include "half.h"
#include "shape.h"
#include "tables.h"

#define WITH_AVX512_BF16
#include "lanes_avx512.h"

#include "kernels.h"

const Kernels avx512_bf16_kernels = KERNELS("avx512bf16");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
