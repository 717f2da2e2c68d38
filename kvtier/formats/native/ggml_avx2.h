/* ggml blocks of 32 numbers with AVX2; what it stands in for is in ggml.h. */

#define WITH_BLOCKS

enum { BLOCK_PARTS = 4 };

static inline void block_load(Floats block[BLOCK_PARTS], const void *numbers, int dtype) {
    for (int half = 0; half < 2; half++) group_load(block + 2 * half, (const char *)numbers + half * 16 * (dtype == FP32 ? 4 : 2), dtype);
}

/* -- from numbers to codes --------------------------------------------------------------------------------------------------------- */

/* Across 16 registers of 16 numbers at once, like ACROSS: each lane holds what one register had. */
#define ACROSS_SHORTS(name, combine) \
    static inline Shorts name(const Shorts rows[16]) { \
        Shorts pairs[8], fours[4], eights[2]; \
        for (int i = 0; i < 8; i++) { \
            const Shorts a = rows[2 * i], b = rows[2 * i + 1]; \
            pairs[i] = combine(_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)); \
        } \
        for (int i = 0; i < 4; i++) { \
            const Shorts a = pairs[2 * i], b = pairs[2 * i + 1]; \
            fours[i] = combine(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); \
        } \
        for (int i = 0; i < 2; i++) { \
            const Shorts a = fours[2 * i], b = fours[2 * i + 1]; \
            eights[i] = combine(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)); \
        } \
        return combine(_mm256_permute2x128_si256(eights[0], eights[1], 0x20), _mm256_permute2x128_si256(eights[0], eights[1], 0x31)); \
    }

ACROSS_SHORTS(shorts_largest, _mm256_max_epi16)
ACROSS_SHORTS(shorts_largest_unsigned, _mm256_max_epu16)

/* The first of a block's 16-bit numbers of this magnitude. */
static __attribute__((noinline)) uint16_t first_of_magnitude(const uint16_t numbers[32], uint16_t magnitude) {
    int first = 0;
    while (first < 31 && (numbers[first] & 0x7FFF) != magnitude) first++;
    return numbers[first];
}

/* The bits of bf16 and fp16 numbers are ordered like their magnitudes. As whole numbers with a sign the largest is the largest of the
   positive ones, as whole numbers without that of the negative ones, each if there is one. Which of both came first matters only if they
   are equally large. Signs are not kept unless asked for. */
INLINE void halves_extremes(float extremes[16], const char *numbers, int count, int dtype, bool with_sign) {
    const Shorts magnitude = _mm256_set1_epi16(0x7FFF);
    Shorts largest[16], unsigned_largest[16], extreme;
    for (unsigned block = (unsigned)count; block < 16; block++) largest[block] = unsigned_largest[block] = _mm256_setzero_si256();
    for (int block = 0; block < count; block++) {
        const __m256i *const from = (const __m256i *)numbers + 2 * block;
        Shorts a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
        if (with_sign) unsigned_largest[block] = _mm256_max_epu16(a, b);
        else a = _mm256_and_si256(a, magnitude), b = _mm256_and_si256(b, magnitude);
        largest[block] = _mm256_max_epi16(a, b);
    }
    extreme = shorts_largest(largest);
    if (with_sign) {
        const Shorts other = shorts_largest_unsigned(unsigned_largest);
        const Shorts size = _mm256_and_si256(extreme, magnitude), other_size = _mm256_and_si256(other, magnitude);
        const Shorts equal = _mm256_andnot_si256(_mm256_cmpeq_epi16(extreme, other), _mm256_cmpeq_epi16(size, other_size));
        uint16_t bits[16];
        extreme = _mm256_blendv_epi8(extreme, other, _mm256_cmpgt_epi16(other_size, size));
        _mm256_storeu_si256((void *)bits, extreme);
        for (uint32_t left = (uint32_t)_mm256_movemask_epi8(equal); left; left &= left - 1, left &= left - 1) {
            const int block = __builtin_ctz(left) / 2;
            bits[block] = first_of_magnitude((const uint16_t *)numbers + 32 * block, bits[block] & 0x7FFF);
        }
        extreme = _mm256_loadu_si256((const void *)bits);
    }
    const __m128i halves[2] = {_mm256_castsi256_si128(extreme), _mm256_extracti128_si256(extreme, 1)};
    for (int half = 0; half < 2; half++) {
        const Floats wide = dtype == FP16 ? _mm256_cvtph_ps(halves[half])
            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves[half]), 16));
        floats_store(extremes + 8 * half, wide);
    }
}

/* Of 16 bf16 numbers, which are the halves of 32 bits, those at even places come first. */
INLINE void block_load_split(Floats block[BLOCK_PARTS], const char *numbers, int dtype) {
    if (dtype != BF16) block_load(block, numbers, dtype);
    for (int half = 0; half < 2 && dtype == BF16; half++) {
        split_pairs(block + 2 * half, _mm256_loadu_si256((const __m256i *)numbers + half));
    }
}

/* To the nearest, halves away from zero, of magnitude up to 127. */
INLINE void encode_block_q8_0(int8_t codes[32], const char *numbers, float factor, int dtype) {
    const Floats half = floats_all(0x1.fffffep-2f), less = floats_all(-0x1.fffffep-2f);
    Floats block[BLOCK_PARTS];
    __m256i whole[BLOCK_PARTS];
    block_load_split(block, numbers, dtype);
    for (int part = 0; part < BLOCK_PARTS; part++) {
        const Floats scaled = floats_mul(block[part], floats_all(factor));
        whole[part] = _mm256_cvttps_epi32(floats_add(scaled, _mm256_blendv_ps(half, less, block[part])));
    }
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    if (dtype == BF16) {
        const __m256i places = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
        bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, places), 0xD8);
    } else {
        bytes = in_order(bytes);
    }
    _mm256_storeu_si256((void *)codes, bytes);
}

/* Plus 8.5, cut to 0..15; a byte holds a number and the one 16 places on. */
INLINE void encode_block_q4_0(uint8_t packed[16], const char *numbers, float factor, int dtype) {
    const __m128i from_bf16 = _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    const __m128i from_others = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    Floats block[BLOCK_PARTS];
    __m256i whole[BLOCK_PARTS];
    block_load_split(block, numbers, dtype);
    for (int part = 0; part < BLOCK_PARTS; part++) {
        whole[part] = _mm256_cvttps_epi32(floats_add(floats_mul(block[part], floats_all(factor)), floats_all(8.5f)));
    }
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    const __m256i nibbles = _mm256_min_epu8(bytes, _mm256_set1_epi8(15));
    const __m256i beside = _mm256_shuffle_epi8(nibbles, _mm256_broadcastsi128_si256(dtype == BF16 ? from_bf16 : from_others));
    const __m256i both = _mm256_maddubs_epi16(beside, _mm256_set1_epi16(0x1001));
    __m128i low = _mm256_castsi256_si128(both), high = _mm256_extracti128_si256(both, 1);
    if (dtype != BF16) {
        const __m128i fours = _mm_unpacklo_epi64(low, high);
        high = _mm_unpackhi_epi64(low, high), low = fours;
    }
    _mm_storeu_si128((void *)packed, _mm_packus_epi16(low, high));
}

/* -- from codes to numbers --------------------------------------------------------------------------------------------------------- */

/* 16 fp16 numbers that are `stride` bytes apart; what would be stored one by one could not be loaded as a whole at once. */
INLINE void apart_load(float numbers[16], const uint8_t *halves, int stride) {
    for (int part = 0; part < 2; part++, halves += 8 * stride) {
        uint16_t own[8];
        for (int i = 0; i < 8; i++) memcpy(own + i, halves + i * stride, sizeof *own);
        const __m128i eight = _mm_setr_epi16((short)own[0], (short)own[1], (short)own[2], (short)own[3], (short)own[4], (short)own[5],
            (short)own[6], (short)own[7]);
        floats_store(numbers + 8 * part, _mm256_cvtph_ps(eight));
    }
}

/* For bf16 the even numbers of each 16, then the odd ones, else all in their order. */
static inline void block_from_bytes(Floats block[BLOCK_PARTS], const int8_t *bytes, int dtype) {
    for (int part = 0; part < BLOCK_PARTS && dtype != BF16; part++) {
        block[part] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(bytes + 8 * part))));
    }
    for (int part = 0; part < BLOCK_PARTS && dtype == BF16; part += 2) {
        const __m256i pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(bytes + 8 * part)));
        block[part] = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi32(1)));
        block[part + 1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 16));
    }
}

static inline void block_store(void *numbers, const Floats block[BLOCK_PARTS], int dtype) {
    for (int part = 0; part < BLOCK_PARTS; part += 2) {
        char *const to = (char *)numbers + 8 * part * value_bytes(dtype);
        if (dtype == BF16) store_pairs(to, block[part], block[part + 1], BF16, false);
        else store_numbers(to, block + part, dtype, false);
    }
}

/* Bytes can be looked up, 16-bit numbers not: their lower and upper bytes are looked up apart. Two blocks at a time, one in each half of
   registers. */
static inline void two_nibble_blocks(char *numbers, const uint8_t *first, const uint8_t *second, const float scales[2], int dtype) {
    const Floats scale = _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
    const __m256i codes = _mm256_set_m128i(_mm_loadu_si128((const void *)second), _mm_loadu_si128((const void *)first));
    const __m256i byte = _mm256_set1_epi16(255), nibble = _mm256_set1_epi8(15);
    __m256i table[2];
    for (int half = 0; half < 2; half++) {
        const float least = half ? 0 : -8;
        const Floats wholes = _mm256_setr_ps(least, least + 2, least + 4, least + 6, least, least + 2, least + 4, least + 6);
        const Floats even = floats_mul(scale, wholes), odd = floats_mul(scale, floats_add(wholes, floats_all(1)));
        table[half] = dtype == BF16 ? bf16_pairs(even, odd) : fp16_pairs(even, odd);
    }
    const __m256i lower = _mm256_packus_epi16(_mm256_and_si256(table[0], byte), _mm256_and_si256(table[1], byte));
    const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(table[0], 8), _mm256_srli_epi16(table[1], 8));
    for (int half = 0; half < 2; half++) {
        const __m256i own = _mm256_and_si256(half ? _mm256_srli_epi16(codes, 4) : codes, nibble);
        const __m256i low = _mm256_shuffle_epi8(lower, own), high = _mm256_shuffle_epi8(upper, own);
        const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        store_32(numbers + 32 * half, _mm256_permute2x128_si256(a, b, 0x20), false);
        store_32(numbers + 64 + 32 * half, _mm256_permute2x128_si256(a, b, 0x31), false);
    }
}

/* Up to 16 blocks of q4_0, each a scale of two bytes and 16 bytes of codes; the last one of an odd number is done twice. */
INLINE void nibble_blocks(char *numbers, const uint8_t *coded, const float scales[16], int count, int dtype) {
    const int with_scale = 18;
    for (int block = 0; block + 1 < count; block += 2) {
        const uint8_t *const codes = coded + block * with_scale + 2;
        two_nibble_blocks(numbers + 64 * block, codes, codes + with_scale, scales + block, dtype);
    }
    if (count % 2) {
        const uint8_t *const codes = coded + (count - 1) * with_scale + 2;
        char last[128];
        two_nibble_blocks(last, codes, codes, (const float[2]){scales[count - 1], scales[count - 1]}, dtype);
        memcpy(numbers + 64 * (count - 1), last, 64);
    }
}
