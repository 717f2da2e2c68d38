/* fp16 scales of one vector each, 16 at a time, and the factors they stand for. */

#define FP16_MAX 65504.0f

static float norm_of(const Shape *shape) { return (float)(1 / sqrt(hadamard_block(shape))); }

/* 0 where the number has no finite inverse, so that such a vector codes as zeros. */
static inline float inverse(float number) {
    const float inverted = 1 / number; /* always divided, so that loops over this need no branch */
    return number >= FLT_MIN ? inverted : 0;
}

static inline float at_most(float number, float most) { return number < most ? number : most; }

static inline int fewer(int a, int b) { return a < b ? a : b; }

/* Rounded to fp16 and back; scales beyond fp16 saturate. */
static void round_scales(uint16_t halves[16], float scales[16]) {
    for (int i = 0; i < 16; i++) scales[i] = at_most(scales[i], FP16_MAX);
    halves_store(halves, scales);
    halves_load(scales, halves);
}

/* Up to 16 halves. Nearly always all: then the copy is one instruction instead of a call. */
INLINE void copy_halves(void *to, const void *from, int count) {
    if (count == 16) memcpy(to, from, 32);
    else memcpy(to, from, (size_t)count * 2);
}

/* `count` of up to 16 numbers; the others are 0. */
INLINE void load_scales(float scales[16], const uint8_t *coded, int count) {
    uint16_t halves[16] = {0};
    copy_halves(halves, coded, count);
    halves_load(scales, halves);
}
