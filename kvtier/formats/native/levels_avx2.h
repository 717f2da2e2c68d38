/* Gaussian levels in AVX2 registers: 32 codes at once, and inner products with the levels in whole numbers. */

/* Numbers times their factor become whole ones with so many bits behind the point that the largest that may be, sqrt(head_dim) times the
   level of one rms, fits 16 bits. Those before the point are the cell that tables.h has codes of. */
INLINE int finer_bits(double per_rms, int head_dim) {
    const double room = INT16_MAX / per_rms * (INT16_MAX / per_rms) / head_dim;
    return room >= 1 << 14 ? 7 : room >= 1 << 12 ? 6 : room >= 1 << 10 ? 5 : room >= 1 << 8 ? 4 : 3;
}

/* 16 numbers rounded down, in the order in which registers are packed. */
static inline __m256i finer_numbers(const float *row, Floats finer) {
    const Floats half = floats_all(-0.5f);
    const __m256i low = _mm256_cvtps_epi32(_mm256_fmadd_ps(floats_load(row), finer, half));
    return _mm256_packs_epi32(low, _mm256_cvtps_epi32(_mm256_fmadd_ps(floats_load(row + 8), finer, half)));
}

static inline __m256i looked_up(const void *table, __m256i at) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), at);
}

/* Sums over numbers of a row: their products with the levels, in whole numbers rounded down, and the levels, half of which is what rounding
   down takes away. */
typedef struct {
    __m256i products, levels;
} Along;

/* Codes of 32 numbers from each of `count` places, or of 16 numbers from one place if `half`, in the order in which registers are packed.
   Each step is taken for all of them before the next one: the CPU does not see far enough ahead to do that by itself. At most one boundary
   between levels is in any sixteen cells. */
INLINE void add_levels(__m256i *codes, Along *along, const float *const *places, int count, Floats finer, int bits, const LevelTable *levels,
    bool ordered, bool half) {
    const __m256i none = _mm256_setzero_si256(), low_bits = _mm256_set1_epi8(15);
    __m256i first[2], last[2], cells[2], sixteens[2], lasts[2], values[2];
    for (int i = 0; i < count; i++) {
        first[i] = finer_numbers(places[i], finer), last[i] = half ? none : finer_numbers(places[i] + 16, finer);
    }
    for (int i = 0; i < count; i++) cells[i] = _mm256_packs_epi16(_mm256_srai_epi16(first[i], bits), _mm256_srai_epi16(last[i], bits));
    for (int i = 0; i < count; i++) sixteens[i] = _mm256_and_si256(_mm256_srli_epi16(cells[i], 4), low_bits);
    for (int i = 0; i < count; i++) lasts[i] = looked_up(levels->lasts, sixteens[i]), codes[i] = looked_up(levels->ranks, sixteens[i]);
    for (int i = 0; i < count; i++) codes[i] = _mm256_sub_epi8(codes[i], _mm256_cmpgt_epi8(cells[i], lasts[i]));
    for (int i = 0; i < count && !ordered; i++) codes[i] = looked_up(levels->ordered, codes[i]);
    for (int i = 0; i < count; i++) values[i] = looked_up(levels->values, codes[i]);
    for (int i = 0; i < count; i++) {
        const __m256i signs = _mm256_cmpgt_epi8(none, values[i]);
        const __m256i before = _mm256_unpacklo_epi8(values[i], signs), after = half ? none : _mm256_unpackhi_epi8(values[i], signs);
        const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(first[i], before), _mm256_madd_epi16(last[i], after));
        along->products = _mm256_add_epi32(along->products, products);
        along->levels = _mm256_add_epi16(along->levels, _mm256_add_epi16(before, after));
    }
}

/* Twice the inner products. */
static inline Floats along_floats(Along along) {
    const __m256i lost = _mm256_madd_epi16(along.levels, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(along.products, along.products), lost));
}

/* Codes of a row whose numbers times `finer` are its levels with finer_bits more; what sums up to their inner product with the levels,
   times 2 * `finer`. `ordered`: whether the codes of these levels are in order. */
INLINE Floats row_levels(uint8_t *codes, const float *row, float finer, int bits, int head_dim, const LevelTable *levels, bool ordered) {
    Along along = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < head_dim; i += 64) {
        const int left = head_dim - i;
        const float *const places[2] = {row + i, row + i + 32};
        __m256i some[2];
        if (left >= 64) add_levels(some, &along, places, 2, floats_all(finer), bits, levels, ordered, false);
        else if (left >= 32) add_levels(some, &along, places, 1, floats_all(finer), bits, levels, ordered, false);
        if (left >= 32) _mm256_storeu_si256((void *)(codes + i), in_order(some[0]));
        if (left >= 64) _mm256_storeu_si256((void *)(codes + i + 32), in_order(some[1]));
    }
    if (head_dim % 32) {
        const float *const place = row + head_dim - 16;
        __m256i some;
        add_levels(&some, &along, &place, 1, floats_all(finer), bits, levels, ordered, true);
        _mm_storeu_si128((void *)(codes + head_dim - 16), _mm256_castsi256_si128(in_order(some)));
    }
    return along_floats(along);
}

/* The same for codes of LEVELS4 as pack_nibbles has them; head_dim is a multiple of 64. */
INLINE Floats row_nibbles(uint8_t *packed, const float *row, float finer, int bits, int head_dim) {
    Along along = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < head_dim / 2; i += 32) {
        const float *const places[2] = {row + i, row + head_dim / 2 + i};
        __m256i some[2];
        add_levels(some, &along, places, 2, floats_all(finer), bits, &LEVELS4, true, false);
        _mm256_storeu_si256((void *)(packed + i), in_order(_mm256_or_si256(some[0], _mm256_slli_epi16(some[1], 4))));
    }
    return along_floats(along);
}

/* The inner product of a row with the levels of its codes, as exact as floats are. */
INLINE Floats row_along(const uint8_t *codes, const float *row, int head_dim, const LevelTable *levels) {
    Floats sums[PARTS] = {floats_all(0), floats_all(0)}, values[PARTS];
    for (int i = 0; i < head_dim; i += GROUP) {
        group_values(values, codes + i, levels);
        for (int part = 0; part < PARTS; part++) sums[part] = floats_fused(values[part], floats_load(row + i + part * 8), sums[part]);
    }
    return floats_add(sums[0], sums[1]);
}
