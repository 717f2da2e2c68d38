/* All kernels, for the instruction set whose lanes_*.h was included before; each of portable.c, avx2.c, avx512.c and avx512_bf16.c includes
   this once.

   A group is GROUP numbers, as PARTS registers of floats or SHORT_PARTS of 16-bit whole numbers. The lanes files offer: arithmetic on
   registers (floats_*, shorts_*; floats_fused may round once or twice and is for sums that need not be exact), the largest magnitude
   (magnitude_max; NaN counts as larger than everything; group_magnitude, of a group), the total or largest magnitude of each of 16
   registers (rows_sum, rows_magnitude), groups from and to memory (group_load, group_store; group_store_far, past the caches where
   DECODES_FAR), sums over rows (group_sums), the +-1 Hadamard transform of groups from memory (groups_load_rotated, GROUPS_AT_ONCE side by
   side) and of codes (group_rotate_codes, then group_widen to floats), rounding to codes (group_round; groups_levels, LEVELS_AT_ONCE side
   by side; group_values back to floats), table look-up, and 16 fp16 numbers at once (halves_*). For ggml blocks of 32 numbers in
   BLOCK_PARTS registers of floats: from and to memory (block_load, block_from_bytes, block_store, which takes a block of a dtype in the
   order in which block_from_bytes gives it), rounded to the nearest, halves away from zero, of magnitude up to 127 (block_round), cut to
   0..15 and packed (block_nibbles), looked up in a table of 16 numbers of 16 bits (nibble_numbers); and whole numbers that order numbers
   whose 13 lowest bits are 0 by magnitude, the first of equals in front, with the sign in their lowest bit (extreme_keys, keys_max;
   rows_key, the largest of each of 16 registers). 64 bytes copied past the caches (line_copy_far), and what makes others see them
   (lines_arrive).

   What lanes may do in their own way instead. Encoding: WITH_FETCHING, memory is brought nearer ahead of large batches, and
   WITH_ROW_ROTATION, row_rotate, a row at a time, and WITH_ROW_ROUNDING, row_round, as in rotate.h; LEVELS_BY_ROW, row_levels, row_nibbles
   and row_along, as in gaussian.h; WITH_SCALE_STEPS, scale_steps, and WITH_COLUMNS, whole pages in columns, as in q4.h; SUMS_AT_ONCE, how
   many groups group_sums takes side by side, as in mean.h. Decoding: WITH_SPANS, larger Hadamard blocks (unrotate_spans; split_means, means
   in the order that it adds them in; unpacks_spans, unpack_levels and unpack_signed_6, see bits.h). Both: WITH_BLOCKS, halves_extremes,
   encode_block_q8_0, encode_block_q4_0, nibble_blocks, of q4_0 up to 16, and apart_load, their scales from between their codes, as in ggml.h.

   Rotated vectors are kept without the factor block**-0.5: it goes into the scale, where it costs nothing. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "dispatch.h"

/* FOR_HEAD_DIMS defines `name` from `name##_of`, which takes head_dim last: the usual ones as constants, so that loops over a vector unroll.
   FOR_DTYPES is the macro `call` with the dtype as a constant. SIZED is part of such functions. Where registers are no larger than any compiler
   knows, constants gain nothing, and compiling would take five times as long. */
#if defined(WITHOUT_CONSTANT_SIZES)
#define SIZED static __attribute__((noinline))
#define FOR_HEAD_DIMS(name, arguments, ...) \
    static void name arguments { name##_of(__VA_ARGS__, shape->head_dim); }
#else
#define SIZED INLINE
#define FOR_HEAD_DIMS(name, arguments, ...) \
    static void name arguments { \
        switch (shape->head_dim) { \
        case 64: name##_of(__VA_ARGS__, 64); break; \
        case 128: name##_of(__VA_ARGS__, 128); break; \
        default: name##_of(__VA_ARGS__, shape->head_dim); \
        } \
    }
#endif

#define FOR_DTYPES(dtype, call) \
    switch (dtype) { \
    case BF16: call(BF16); break; \
    case FP16: call(FP16); break; \
    case FP32: call(FP32); break; \
    }

#include "scales.h"
#include "rotate.h"
#include "unrotate.h"
#include "bits.h"
#include "gaussian.h"
#include "mean.h"
#include "raw.h"
#include "q8.h"
#include "q6.h"
#include "q4.h"
#include "ggml.h"
#include "far.h"

#define KERNELS(instruction_set) \
    {.name = instruction_set, \
     .group = GROUP, \
     .encode = {encode_raw, encode_q8, encode_q6, encode_q4, encode_q3, encode_q8_0, encode_q4_0}, \
     .decode = {decode_raw, decode_q8, decode_q6, decode_q4, decode_q3, decode_q8_0, decode_q4_0}, \
     .decodes_far = DECODES_FAR, \
     .copy_far = copy_far, \
     .lines_arrive = lines_arrive}
