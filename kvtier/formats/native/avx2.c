/* The kernels for x86-64 with AVX2, F16C and FMA. Only this file may use them: dispatch.c asks the CPU before it comes here. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma")
#endif

#include "half.h"
#include "shape.h"
#include "tables.h"

#include "lanes_avx2.h"
#include "lanes_avx2_decode.h"
#include "rotate_avx2.h"
#include "ggml_avx2.h"

#include "kernels.h"

const Kernels avx2_kernels = KERNELS("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
