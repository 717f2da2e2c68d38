/* Which kernels run: one table per instruction set, chosen for the CPU at load and, for shapes narrower than its registers, one below. */
#ifndef KVTIER_DISPATCH_H
#define KVTIER_DISPATCH_H

#include "shape.h"

typedef void Encode(const Shape *shape, const void *numbers, uint8_t *coded);
typedef void Decode(const Shape *shape, const uint8_t *coded, void *numbers);
typedef void CopyFar(char *to, const char *from, size_t count);

typedef struct {
    const char *name;
    int group; /* numbers handled at once: the Hadamard block must hold that many */
    Encode *encode[CODECS];
    Decode *decode[CODECS];
    bool decodes_far; /* whether codecs that rotate obey `Shape.far` */
    CopyFar *copy_far;
    void (*lines_arrive)(void);
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#endif

/* Index of the set in use; sets are numbered from the widest (0) to the portable one (kernel_sets() - 1). */
int chosen_set(void);
int kernel_sets(void);
const char *set_name(int set);
bool set_available(int set);
void choose_set(int set);

/* The widest chosen kernels that fit the shape. */
const Kernels *kernels_for(int set, const Shape *shape);

/* Whether these kernels obey `Shape.far` where blocks begin at multiples of all bits that are set in `places`: the codec rotates, and each
   vector is whole lines of memory. */
bool decodes_far(const Kernels *kernels, int codec, const Shape *shape, uintptr_t places);

#endif
