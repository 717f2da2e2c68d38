/* Gaussian levels in AVX2 registers: 32 codes at once, and inner products with the levels in whole numbers. */

/* Numbers times their factor become whole ones of FINER_BITS bits less than what 16 bits hold of the largest that may be, sqrt(head_dim) times
   the level of one rms. The upper bits are the cell that tables.h has codes of. */
INLINE int finer_bits(int head_dim) { return head_dim <= 128 ? 5 : head_dim <= 512 ? 4 : 3; }

/* 16 numbers rounded down, in the order in which registers are packed. */
static inline __m256i finer_numbers(const float *row, Floats finer) {
    const Floats half = floats_all(-0.5f);
    const __m256i low = _mm256_cvtps_epi32(_mm256_fmadd_ps(floats_load(row), finer, half));
    return _mm256_packs_epi32(low, _mm256_cvtps_epi32(_mm256_fmadd_ps(floats_load(row + 8), finer, half)));
}

static inline __m256i looked_up(const void *table, __m256i at) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), at);
}

/* Codes of 32 cells: at most one boundary between levels is in any sixteen cells. */
INLINE __m256i codes_of(__m256i cells, const LevelTable *levels) {
    const __m256i sixteens = _mm256_and_si256(_mm256_srli_epi16(cells, 4), _mm256_set1_epi8(15));
    const __m256i above = _mm256_cmpgt_epi8(cells, looked_up(levels->lasts, sixteens));
    const __m256i ranks = _mm256_sub_epi8(looked_up(levels->ranks, sixteens), above);
    return levels == &LEVELS3 ? looked_up(levels->ordered, ranks) : ranks; /* the only ones that are not in order */
}

/* Codes of 32 numbers, or of the first 16 of them if `half`; `along` and their products with the levels. */
INLINE __m256i add_levels(uint8_t *codes, __m256i along, const float *row, Floats finer, int bits, const LevelTable *levels, bool half) {
    const __m256i first = finer_numbers(row, finer), last = half ? _mm256_setzero_si256() : finer_numbers(row + 16, finer);
    const __m256i own = codes_of(_mm256_packs_epi16(_mm256_srai_epi16(first, bits), _mm256_srai_epi16(last, bits)), levels);
    const __m256i values = looked_up(levels->values, own), signs = _mm256_cmpgt_epi8(_mm256_setzero_si256(), values);
    const __m256i in_order = _mm256_permutevar8x32_epi32(own, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (half) _mm_storeu_si128((void *)codes, _mm256_castsi256_si128(in_order));
    else _mm256_storeu_si256((void *)codes, in_order);
    along = _mm256_add_epi32(along, _mm256_madd_epi16(first, _mm256_unpacklo_epi8(values, signs)));
    return _mm256_add_epi32(along, _mm256_madd_epi16(last, _mm256_unpackhi_epi8(values, signs)));
}

/* Codes of a row whose numbers times `factor` are its levels; what sums up to their inner product with the levels, in parts of
   1 / (factor << finer_bits). */
INLINE Floats row_levels(uint8_t *codes, const float *row, float factor, int head_dim, const LevelTable *levels) {
    const int bits = finer_bits(head_dim), halves = head_dim % 32;
    const Floats finer = floats_all(factor * (float)(1 << bits));
    __m256i along = _mm256_setzero_si256();
    for (int i = 0; i < head_dim - halves; i += 32) along = add_levels(codes + i, along, row + i, finer, bits, levels, false);
    if (halves) along = add_levels(codes + head_dim - 16, along, row + head_dim - 16, finer, bits, levels, true);
    return _mm256_cvtepi32_ps(along);
}
