/* Numbers that kernels look up, filled once at load. */
#ifndef KVTIER_TABLES_H
#define KVTIER_TABLES_H

#include <stdint.h>

/* The best 16, 8 and 4 levels for a Gaussian (Lloyd and Max), in whole numbers, so that every boundary between two is whole as well. By
   code; ascending but for LEVELS3, whose third bit is the sign. Places beyond the levels are unused. */
extern const int8_t LEVELS4[16], LEVELS3[16], LEVELS2[16];

#define PER_RMS4 44.64 /* LEVELS4 of a vector of rms 1 */
#define PER_RMS3 56.0
#define PER_RMS2 79.5

/* Cell m holds what lies from m to m + 1: the number of boundaries from 1 to m. Cell ~m has the mirrored level. */
extern uint8_t STEPS_BELOW4[128], STEPS_BELOW3[128], STEPS_BELOW2[128];

/* A vector's scale is super * SCALE_STEP[code], code 127 being none; 32 steps per octave.
   SCALE_LOG[m] = rint(32 * log2(1 + (m + 0.5) / 256)). */
extern float SCALE_STEP[128];
extern int32_t SCALE_LOG[256];

void tables_fill(void);

#endif
