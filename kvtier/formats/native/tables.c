/* Fills the tables of tables.h, in double precision, so that every build holds the same numbers as the torch reference. */
#include "tables.h"

#include <math.h>
#include <string.h>

/* LEVELS3 is not in order: its third bit is the sign. */
LevelTable LEVELS4 = {.values = {-122, -92, -72, -56, -42, -30, -18, -6, 6, 18, 30, 42, 56, 72, 92, 122}};
LevelTable LEVELS3 = {.values = {14, 42, 76, 120, -14, -42, -76, -120}};
LevelTable LEVELS2 = {.values = {-120, -36, 36, 120}};
uint8_t SCALE_LOG[256];
float SCALE_STEP[128];

static int nearest(const int8_t *values, int count, double number) {
    int best = 0;
    for (int code = 1; code < count; code++) {
        if (fabs(values[code] - number) < fabs(values[best] - number)) best = code;
    }
    return best;
}

static uint8_t rank_of(const LevelTable *levels, int count, int code) {
    uint8_t below = 0;
    for (int other = 0; other < count; other++) below += levels->values[other] < levels->values[code];
    return below;
}

static void fill(LevelTable *levels, int count) {
    for (int code = 0; code < 16; code++) {
        const float value = levels->values[code];
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        levels->bf16_low[code] = (uint8_t)(bits >> 16);
        levels->bf16_high[code] = (uint8_t)(bits >> 24);
    }
    for (int cell = -128; cell < 128; cell++) levels->codes[cell & 255] = (uint8_t)nearest(levels->values, count, cell + 0.5);
    for (int code = 0; code < count; code++) levels->ordered[rank_of(levels, count, code)] = (uint8_t)code;
    for (int first = -128; first < 128; first += 16) {
        const int code = levels->codes[first & 255], at = first >> 4 & 15;
        int last = first;
        while (last < first + 15 && levels->codes[(last + 1) & 255] == code) last++;
        levels->ranks[at] = rank_of(levels, count, code), levels->lasts[at] = (int8_t)last;
    }
}

void tables_fill(void) {
    fill(&LEVELS4, 16);
    fill(&LEVELS3, 8);
    fill(&LEVELS2, 4);
    for (int code = 0; code < 127; code++) SCALE_STEP[code] = (float)exp2(-code / 32.0);
    SCALE_STEP[127] = 0;
    for (int m = 0; m < 256; m++) SCALE_LOG[m] = (uint8_t)floor(32 * log2(1 + (m + 0.5) / 256) + 0.5);
}
