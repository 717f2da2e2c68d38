/* Chooses kernels. The chosen set is the only state of the module; it changes only under the interpreter's lock. */
#include "dispatch.h"

#if defined(__x86_64__)
static const Kernels *const sets[] = {&avx512_bf16_kernels, &avx512_kernels, &avx2_kernels, &portable_kernels};
#else
static const Kernels *const sets[] = {&portable_kernels};
#endif

enum { SETS = sizeof sets / sizeof *sets };

static int chosen = SETS - 1;

int chosen_set(void) { return chosen; }

int kernel_sets(void) { return SETS; }

const char *set_name(int set) { return sets[set]->name; }

void choose_set(int set) { chosen = set; }

bool set_available(int set) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool avx512 = avx2 && wide && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi");
    if (sets[set] == &avx2_kernels) return avx2;
    if (sets[set] == &avx512_kernels) return avx512;
    if (sets[set] == &avx512_bf16_kernels) {
        return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    }
#endif
    return sets[set] == &portable_kernels;
}

const Kernels *kernels_for(int set, const Shape *shape) {
    while (hadamard_block(shape) % sets[set]->group) set++;
    return sets[set];
}

bool decodes_far(const Kernels *kernels, int codec, const Shape *shape, uintptr_t places) {
    enum { LINE = 64 };
    const size_t vector_bytes = (size_t)shape->head_dim * value_bytes(shape->dtype);
    const bool rotates = codec == Q8 || codec == Q6 || codec == Q4 || codec == Q3;
    return rotates && kernels->decodes_far && !((places | vector_bytes) % LINE);
}
