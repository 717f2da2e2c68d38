/* The kernels for x86-64 with AVX-512 and VBMI (Ice Lake and later). Only this file may use them: dispatch.c asks the CPU before
   it comes here. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")
#endif

#include "half.h"
#include "shape.h"
#include "tables.h"

#include "lanes_avx512.h"

#include "kernels.h"

const Kernels avx512_kernels = KERNELS("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
