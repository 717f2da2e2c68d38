/* fp16 scales of one vector each, 16 at a time, and the factors they stand for. */

#define FP16_MAX 65504.0f

static float norm_of(const Shape *shape) { return (float)(1 / sqrt(hadamard_block(shape))); }

/* Numbers of one register. */
enum { LANES = GROUP / PARTS };

/* 0 where the number has no finite inverse, so that such a vector codes as zeros. */
static inline float inverse(float number) {
    const float inverted = 1 / number; /* always divided, so that loops over this need no branch */
    return number >= FLT_MIN ? inverted : 0;
}

static inline Floats inverses(Floats a) { return floats_zero_below(floats_div(floats_all(1), a), a, FLT_MIN); }

static inline float at_most(float number, float most) { return number < most ? number : most; }

static inline int fewer(int a, int b) { return a < b ? a : b; }

/* Sixteen numbers, as many at once as a register holds: compilers leave such loops to one number at a time. */
#define SIXTEEN(to, expression) \
    for (int i = 0; i < 16; i += LANES) floats_store((to) + i, (expression))

/* Rounded to fp16 and back; scales beyond fp16 saturate. */
static inline void round_scales(uint16_t halves[16], float scales[16]) {
    SIXTEEN(scales, floats_at_most(floats_load(scales + i), floats_all(FP16_MAX)));
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
