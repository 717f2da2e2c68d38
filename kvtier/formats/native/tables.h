/* Numbers that kernels look up, filled once at load. */
#ifndef KVTIER_TABLES_H
#define KVTIER_TABLES_H

#include <stdint.h>

/* The best 16, 8 and 4 levels for a Gaussian (Lloyd and Max), in whole numbers, so that every boundary between two is whole as well. */
typedef struct {
    int8_t values[16];     /* by code; places beyond the levels are unused */
    uint8_t bf16_low[16];  /* the same as bf16, byte by byte */
    uint8_t bf16_high[16];
    uint8_t codes[256];    /* of what lies from m to m + 1, at m for m = 0 to 127, at m + 256 for m = -128 to -1 */
    uint8_t ranks[16];     /* by four upper bits of m: how many levels are below that of the first such m */
    int8_t lasts[16];      /* the last such m of the same level; those after it have the next one */
    uint8_t ordered[16];   /* codes by rank */
} LevelTable;

extern LevelTable LEVELS4, LEVELS3, LEVELS2;

#define PER_RMS4 44.64 /* the level of LEVELS4 that stands for one rms */
#define PER_RMS3 56.0
#define PER_RMS2 79.5

/* A vector's scale is super * SCALE_STEP[code], code 127 being none; 32 steps per octave.
   SCALE_LOG[m] = rint(32 * log2(1 + (m + 0.5) / 256)). */
extern float SCALE_STEP[128];
extern uint8_t SCALE_LOG[256];

void tables_fill(void);

#endif
