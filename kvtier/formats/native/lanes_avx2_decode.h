/* From codes to numbers in AVX2 registers. Hadamard blocks of 64 and more in spans of 64 numbers, which are the codes of two registers and
   the floats of eight.

   Bit k of a number's index decides about step k of the transform, and whole numbers may take its steps in any order: each where it is
   cheapest. Adjacent bytes and, in the end, adjacent 16-bit numbers meet in one multiply-add each, which widens them, too. What lies in two
   registers meets at once; what has to meet inside of registers gets into two of them first. That moves numbers about; reading the codes
   in the right order in the first place brings every number to its place. The last step is that of neighbours: its sums are the even
   numbers of a line and its differences the odd ones, which are the halves of 32 bits. */

#define WITH_SPANS

enum { SPAN = 64, SPAN_SHORTS = SPAN / 16 };

/* Two registers: what lies in their lower and what in their upper halves; or in even and in odd parts of 64 or 32 bits. */
static inline void exchange_lanes(Shorts *a, Shorts *b) {
    const Shorts low = _mm256_permute2x128_si256(*a, *b, 0x20);
    *b = _mm256_permute2x128_si256(*a, *b, 0x31), *a = low;
}

static inline void exchange_quarters(Shorts *a, Shorts *b) {
    const Shorts low = _mm256_unpacklo_epi64(*a, *b);
    *b = _mm256_unpackhi_epi64(*a, *b), *a = low;
}

static inline void exchange_adjacent(Shorts *a, Shorts *b) {
    const __m256 first = _mm256_castsi256_ps(*a), second = _mm256_castsi256_ps(*b);
    *a = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), *b = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xDD));
}

static inline void meet_shorts(Shorts *a, Shorts *b) {
    const Shorts sum = shorts_add(*a, *b);
    *b = shorts_sub(*a, *b), *a = sum;
}

/* All steps of a span but the first: register i holds numbers 16 * i to 16 * i + 15 in their order then. */
static inline void span_rotate_codes(Shorts whole[SPAN_SHORTS], const int8_t *codes) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15));
    const __m256i ones = _mm256_set1_epi8(1), signs = _mm256_set1_epi16((int16_t)0xFF01), offset = _mm256_set1_epi8(-128);
    Shorts sums[2], differences[2];
    for (int half = 0; half < 2; half++) {
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_loadu_si256((const void *)(codes + 32 * half)), order);
        sums[half] = _mm256_maddubs_epi16(ones, bytes);
        differences[half] = _mm256_maddubs_epi16(_mm256_xor_si256(bytes, offset), signs);
    }
    meet_shorts(&sums[0], &sums[1]), meet_shorts(&differences[0], &differences[1]);
    for (int half = 0; half < 2; half++) {
        Shorts a = sums[half], b = differences[half];
        exchange_quarters(&a, &b), meet_shorts(&a, &b);
        exchange_adjacent(&a, &b), meet_shorts(&a, &b);
        exchange_lanes(&a, &b), meet_shorts(&a, &b);
        whole[2 * half] = a, whole[2 * half + 1] = b;
    }
}

/* Upper halves of 8 finite floats, rounded to the nearest, in their place. */
static inline __m256i upper_halves(Floats a) {
    const __m256i bits = _mm256_castps_si256(a), odd = _mm256_slli_epi32(bits, 15);
    const Floats below = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFF)), half = _mm256_castsi256_ps(_mm256_set1_epi32(0x8000));
    return _mm256_add_epi32(bits, _mm256_castps_si256(_mm256_blendv_ps(below, half, _mm256_castsi256_ps(odd))));
}

/* Those of even and of odd numbers, as a line of 16. */
static inline __m256i bf16_pairs(Floats even, Floats odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(upper_halves(even), 16), upper_halves(odd), 0xAA);
}

static inline __m128i fp16_of(Floats a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

/* Infinite fp16 numbers become the largest finite ones: positive numbers are signed whole numbers in the order of what they stand for,
   negative ones come last among unsigned whole numbers, in the order of magnitude. */
static inline __m256i fp16_finite(__m256i a) {
    return _mm256_min_epu16(_mm256_min_epi16(a, _mm256_set1_epi16(0x7BFF)), _mm256_set1_epi16((int16_t)0xFBFF));
}

static inline __m256i fp16_pairs(Floats even, Floats odd) {
    const __m128i low = fp16_of(even), high = fp16_of(odd);
    return fp16_finite(_mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high)));
}

static inline void store_32(char *to, __m256i bytes, bool far) {
    if (far) _mm256_stream_si256((void *)to, bytes);
    else _mm256_storeu_si256((void *)to, bytes);
}

/* 16 numbers from the even and the odd ones. */
static inline void store_pairs(char *numbers, Floats even, Floats odd, int dtype, bool far) {
    if (dtype == FP32) {
        const Floats low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        store_32(numbers, _mm256_castps_si256(_mm256_permute2f128_ps(low, high, 0x20)), far);
        store_32(numbers + 32, _mm256_castps_si256(_mm256_permute2f128_ps(low, high, 0x31)), far);
    } else {
        store_32(numbers, dtype == BF16 ? bf16_pairs(even, odd) : fp16_pairs(even, odd), far);
    }
}

/* Numbers in their order. */
static inline void store_numbers(char *numbers, const Floats group[PARTS], int dtype, bool far) {
    if (dtype == FP32) {
        for (int part = 0; part < PARTS; part++) store_32(numbers + 32 * part, _mm256_castps_si256(group[part]), far);
    } else if (dtype == FP16) {
        store_32(numbers, fp16_finite(_mm256_set_m128i(fp16_of(group[1]), fp16_of(group[0]))), far);
    } else {
        const __m256i low = _mm256_srli_epi32(upper_halves(group[0]), 16), high = _mm256_srli_epi32(upper_halves(group[1]), 16);
        store_32(numbers, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8), far);
    }
}

static inline void group_store(void *numbers, const Floats group[PARTS], int dtype) { store_numbers(numbers, group, dtype, false); }
static inline void group_store_far(char *numbers, const Floats group[PARTS], int dtype) { store_numbers(numbers, group, dtype, true); }

/* The transform of a block but for its first step. */
INLINE void rotate_block(Shorts (*whole)[SPAN_SHORTS], const int8_t *codes, int spans) {
    for (int span = 0; span < spans; span++) span_rotate_codes(whole[span], codes + SPAN * span);
    for (int distance = 1; distance < spans; distance *= 2) {
        for (int span = 0; span < spans; span++) {
            if (span & distance) continue;
            for (int part = 0; part < SPAN_SHORTS; part++) meet_shorts(&whole[span][part], &whole[span + distance][part]);
        }
    }
}

/* 16 numbers of which neighbours have not met yet; a mean in the order of split_means. */
INLINE void finish_line(char *numbers, Shorts pairs, Floats factor, const float *mean, bool add_mean, int dtype, bool far) {
    Floats even = floats_mul(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))), factor);
    Floats odd = floats_mul(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi32((int32_t)0xFFFF0001))), factor);
    if (add_mean) even = floats_add(even, floats_load(mean)), odd = floats_add(odd, floats_load(mean + 8));
    store_pairs(numbers, even, odd, dtype, far);
}

/* Up to 16 vectors. All are rotated before the first is finished: the steps of one alone, each of which waits for the one before, fill what
   the CPU sees ahead, and it would do half as much again in the same time. */
INLINE void unrotate_spans(char *numbers, const int8_t *codes, const float *factors, const float *const *means, int count, int head_dim,
    int dtype, bool far, bool add_means, int block) {
    const int spans = block / SPAN;
    Shorts whole[16][MAX_BLOCK / SPAN][SPAN_SHORTS];
    for (int start = 0; start < head_dim; start += block) {
        for (int row = 0; row < count; row++) rotate_block(whole[row], codes + row * head_dim + start, spans);
        for (int row = 0; row < count; row++) {
            const Floats factor = floats_all(factors[row]);
            char *const to = numbers + (size_t)(row * head_dim + start) * value_bytes(dtype);
            for (int i = 0; i < block; i += 16) {
                const float *const mean = add_means ? means[row] + start + i : NULL;
                finish_line(to + i * value_bytes(dtype), whole[row][i / SPAN][i % SPAN / 16], factor, mean, add_means, dtype, far);
            }
        }
    }
}

/* Of each 16 numbers of means the even ones first, as unrotate_spans adds them. */
static inline void split_means(float *mean, int count) {
    for (int i = 0; i < count; i += 16) {
        const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7); /* what is shuffled stays in its half of a register */
        const Floats low = floats_load(mean + i), high = floats_load(mean + i + 8);
        floats_store(mean + i, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0x88), order));
        floats_store(mean + i + 8, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0xDD), order));
    }
}

/* -- codes of 2, 3, 4 and 6 bits, 32 at a time: what would be stored in smaller pieces could not be loaded again at once --------------- */

/* Sizes of vectors for which 32 codes have each bit in one place, or each 16 or 8 of them. */
static inline bool unpacks_spans(int head_dim) { return head_dim == SPAN || head_dim == 2 * SPAN || head_dim % (4 * SPAN) == 0; }

static inline __m256i load_32(const uint8_t *from) { return _mm256_loadu_si256((const void *)from); }
static inline __m256i load_16_twice(const uint8_t *from) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)from)); }

static inline int64_t load_8(const uint8_t *from) {
    int64_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

/* Of the 32 codes at `place`: bits 4 and 5. */
static inline __m256i high_pairs(const uint8_t *pairs, int place, int head_dim) {
    const __m256i mask = _mm256_set1_epi8(48);
    if (head_dim == SPAN) {
        const __m256i both = load_16_twice(pairs);
        return _mm256_and_si256(place ? _mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 2, 2)) :
            _mm256_sllv_epi64(both, _mm256_setr_epi64x(4, 4, 2, 2)), mask);
    }
    const int part = head_dim / 4, shift = 2 * (place / part);
    const __m256i some = load_32(pairs + place % part);
    return _mm256_and_si256(shift < 4 ? _mm256_slli_epi64(some, 4 - shift) : _mm256_srli_epi64(some, shift - 4), mask);
}

static inline __m256i nibbles(const uint8_t *packed, int place, int head_dim) {
    const __m256i some = load_32(packed + place % (head_dim / 2));
    return _mm256_and_si256(place < head_dim / 2 ? some : _mm256_srli_epi64(some, 4), _mm256_set1_epi8(15));
}

static inline __m256i low_pairs(const uint8_t *pairs, int place, int head_dim) {
    const __m256i mask = _mm256_set1_epi8(3);
    if (head_dim == SPAN) {
        const __m256i shifts = place ? _mm256_setr_epi64x(4, 4, 6, 6) : _mm256_setr_epi64x(0, 0, 2, 2);
        return _mm256_and_si256(_mm256_srlv_epi64(load_16_twice(pairs), shifts), mask);
    }
    const int part = head_dim / 4;
    return _mm256_and_si256(_mm256_srli_epi64(load_32(pairs + place % part), 2 * (place / part)), mask);
}

/* Bit 2. A part, which holds it for eighths of a vector, is 8 bytes, 16 or whole registers. */
static inline __m256i thirds(const uint8_t *third, int place, int head_dim) {
    const int part = head_dim / 8;
    const __m256i bit = _mm256_set1_epi8((char)(1 << place / part));
    __m256i bits, some;
    if (part == 8) {
        bits = _mm256_sllv_epi64(bit, _mm256_setr_epi64x(0, 1, 2, 3)), some = _mm256_set1_epi64x(load_8(third));
    } else if (part == 16) {
        bits = _mm256_sllv_epi64(bit, _mm256_setr_epi64x(0, 0, 1, 1)), some = load_16_twice(third);
    } else {
        bits = bit, some = load_32(third + place % part);
    }
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(some, bits), bits), _mm256_set1_epi8(4));
}

/* What the codes of vector `index` of `count` stand for; see unpack_codes. */
INLINE void unpack_levels(int8_t *values, const uint8_t *packed, size_t index, size_t count, int head_dim, int bits,
    const int8_t table[16]) {
    const size_t pair_bytes = (size_t)head_dim / 4, third_bytes = (size_t)head_dim / 8;
    const uint8_t *const pairs = packed + index * pair_bytes, *const third = packed + count * pair_bytes + index * third_bytes;
    const __m256i levels = load_16_twice((const uint8_t *)table);
    for (int place = 0; place < head_dim; place += 32) {
        __m256i codes;
        if (bits == 4) codes = nibbles(packed + index * (head_dim / 2), place, head_dim);
        else codes = low_pairs(pairs, place, head_dim);
        if (bits == 3) codes = _mm256_or_si256(codes, thirds(third, place, head_dim));
        _mm256_storeu_si256((void *)(values + place), _mm256_shuffle_epi8(levels, codes));
    }
}

/* Codes of 6 bits as they count from -32. */
INLINE void unpack_signed_6(int8_t *values, const uint8_t *packed, int head_dim) {
    for (int place = 0; place < head_dim; place += 32) {
        const __m256i codes = _mm256_or_si256(nibbles(packed, place, head_dim), high_pairs(packed + head_dim / 2, place, head_dim));
        _mm256_storeu_si256((void *)(values + place), _mm256_sub_epi8(codes, _mm256_set1_epi8(32)));
    }
}
