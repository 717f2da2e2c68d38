/* Fills the tables of tables.h, in double precision, so that every build holds the same numbers as the torch reference. */
#include "tables.h"

#include <math.h>

const int8_t LEVELS4[16] = {-122, -92, -72, -56, -42, -30, -18, -6, 6, 18, 30, 42, 56, 72, 92, 122};
const int8_t LEVELS3[16] = {14, 42, 76, 120, -14, -42, -76, -120};
const int8_t LEVELS2[16] = {-120, -36, 36, 120};
uint8_t STEPS_BELOW4[128], STEPS_BELOW3[128], STEPS_BELOW2[128];
int32_t SCALE_LOG[256];
float SCALE_STEP[128];

/* From the positive levels, ascending. */
static void fill_steps(uint8_t *steps, const int8_t *levels, int count) {
    for (int cell = 0; cell < 128; cell++) {
        steps[cell] = 0;
        for (int level = 0; level + 1 < count; level++) steps[cell] += (levels[level] + levels[level + 1]) / 2 <= cell;
    }
}

void tables_fill(void) {
    fill_steps(STEPS_BELOW4, LEVELS4 + 8, 8);
    fill_steps(STEPS_BELOW3, LEVELS3, 4);
    fill_steps(STEPS_BELOW2, LEVELS2 + 2, 2);
    for (int code = 0; code < 127; code++) SCALE_STEP[code] = (float)exp2(-code / 32.0);
    SCALE_STEP[127] = 0;
    for (int m = 0; m < 256; m++) SCALE_LOG[m] = (int32_t)floor(32 * log2(1 + (m + 0.5) / 256) + 0.5);
}
