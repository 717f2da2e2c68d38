/* q4 in columns, for registers of 16 numbers: a register holds one dimension of 16 tokens of a head. Nothing is summed across a register
   then, the steps of the rotation need no exchange of lanes, and the mean of a key is one number for all of them. Rows of bf16 and fp16 pay
   for that with one transposition of their pairs. For whole pages of usual numbers; encode_gaussian does the others. */

enum { COLUMN_TOKENS = 16, LINE_BYTES = 64, LINE_VALUES = 32, MAX_COLUMNS = 128 };

static bool suits_columns(const Shape *shape) {
    const bool usual = shape->dtype != FP32 && (shape->head_dim == 64 || shape->head_dim == MAX_COLUMNS);
    const int batches = (shape->tokens + COLUMN_TOKENS - 1) / COLUMN_TOKENS;
    return usual && shape->tokens >= COLUMN_TOKENS / 2 && batches * shape->heads <= KEPT_SCALES / COLUMN_TOKENS;
}

/* 16 rows of 32 bits each to 16 columns. */
INLINE void to_columns(__m512i lines[16]) {
    __m512i twos[16], fours[16], halves[16];
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]), twos[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    }
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 4; j++) {
            halves[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0x88);
            halves[i + j + 4] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0xDD);
        }
    }
    for (int i = 0; i < 8; i++) {
        lines[i] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0x88), lines[i + 8] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0xDD);
    }
}

/* One step of the rotation, between columns that are `distance` apart, a constant. */
INLINE void meet_columns(Floats *columns, int count, int distance) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; i++) {
        const int at = i / distance * 2 * distance + i % distance;
        meet_both(&columns[at], &columns[at + distance]);
    }
}

/* Of the numbers of 16 tokens: the sum of their squares, and of what is left of them without their mean. */
typedef struct { Floats whole[2], rest[2]; } Energies;

/* Half of what becomes of 16 pairs of neighbours, in steps up to 16 apart: their sums or, if `odd`, their differences. */
INLINE void rotate_pairs(Floats *columns, Energies *energies, const __m512i pairs[16], const float *mean, bool odd, bool keys, int dtype) {
    Floats met[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) met[i] = met_pair(pairs[i], odd, dtype);
    meet_columns(met, 16, 1), meet_columns(met, 16, 2), meet_columns(met, 16, 4), meet_columns(met, 16, 8);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        columns[2 * i + odd] = met[i];
        energies->whole[i % 2] = floats_fused(met[i], met[i], energies->whole[i % 2]);
        if (!keys) continue;
        const Floats less = floats_sub(met[i], floats_all(mean[2 * i + odd]));
        energies->rest[i % 2] = floats_fused(less, less, energies->rest[i % 2]);
    }
}

/* All steps but those between lines of a row. `columns` [32 * lines]; `mean` the same, if `keys`. The energies are those after all steps,
   for each step doubles them. */
INLINE void load_columns_of(Floats *columns, Floats *whole, Floats *rest, const char *const rows[16], const float *mean, int lines, bool keys,
    int dtype) {
    Energies energies = {{floats_all(0), floats_all(0)}, {floats_all(0), floats_all(0)}};
#pragma GCC unroll 1
    for (int line = 0; line < lines; line++) {
        __m512i pairs[16];
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) pairs[row] = _mm512_loadu_si512(rows[row] + line * LINE_BYTES);
        to_columns(pairs);
        rotate_pairs(columns + line * LINE_VALUES, &energies, pairs, mean + line * LINE_VALUES, false, keys, dtype);
        rotate_pairs(columns + line * LINE_VALUES, &energies, pairs, mean + line * LINE_VALUES, true, keys, dtype);
    }
    *whole = floats_mul(floats_add(energies.whole[0], energies.whole[1]), floats_all((float)lines));
    *rest = floats_mul(floats_add(energies.rest[0], energies.rest[1]), floats_all((float)lines));
}

/* Not inlined, as all loops here are not unrolled: the whole has to fit the CPU's cache of instructions. */
static __attribute__((noinline)) void load_columns(Floats *columns, Floats *whole, Floats *rest, const char *const rows[16],
    const float *mean, bool keys, int lines, int dtype) {
    switch (dtype * 2 + keys) {
    case BF16 * 2: load_columns_of(columns, whole, rest, rows, mean, lines, false, BF16); break;
    case FP16 * 2: load_columns_of(columns, whole, rest, rows, mean, lines, false, FP16); break;
    case BF16 * 2 + 1: load_columns_of(columns, whole, rest, rows, mean, lines, true, BF16); break;
    case FP16 * 2 + 1: load_columns_of(columns, whole, rest, rows, mean, lines, true, FP16); break;
    }
    for (int i = 0; i < LINE_VALUES && lines == 4; i++) {
        meet_both(&columns[i], &columns[i + LINE_VALUES]);
        meet_both(&columns[i + 2 * LINE_VALUES], &columns[i + 3 * LINE_VALUES]);
    }
}

/* Means of heads as they are before the steps between lines. */
static void apart(float *before, const float *means, int heads, int head_dim) {
    const int lines = head_dim / LINE_VALUES;
    for (int head = 0; head < heads; head++, means += head_dim, before += head_dim) {
        for (int i = 0; i < LINE_VALUES; i += LANES) {
            Floats met[4];
            for (int line = 0; line < lines; line++) met[line] = floats_load(means + line * LINE_VALUES + i);
            meet_columns(met, lines, 1);
            if (lines == 4) meet_columns(met, lines, 2);
            for (int line = 0; line < lines; line++) {
                floats_store(before + line * LINE_VALUES + i, floats_mul(met[line], floats_all(1 / (float)lines)));
            }
        }
    }
}

static const int CODED_TOGETHER[4] = {0, 1, 4, 5};

/* Numbers are rounded down to whole ones, as the boundaries between levels are, and for their inner product with the levels to whole
   parts of that. Both fit 16 bits, and the sums of products of a row of MAX_COLUMNS numbers 32: no number is larger than the whole
   vector, sqrt(MAX_COLUMNS) * PER_RMS4, and a level no more than 6 larger than what it stands for. */
enum { FINER_BITS = 4, FINER = 1 << FINER_BITS, ALONG_PARTS = FINER * 256 };

/* `sums` and the products of each two neighbours. */
static inline __m512i add_products(__m512i sums, __m512i a, __m512i b) {
#if defined(WITH_AVX512_BF16)
    return _mm512_dpwssd_epi32(sums, a, b);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}

/* What the columns of one head are coded with. */
typedef struct {
    const Floats *columns;
    const float *mean;
    __mmask16 reduced;
    Floats factor;
    __m512i along[2]; /* inner products with the levels, in parts of 1 / (ALONG_PARTS * factor) */
} Column;

/* Codes of dimensions `place`, + 1, + 4 and + 5: those of a token side by side in 16 bits; the first two of four tokens, the others of
   the same tokens, then so on for the next four tokens. */
INLINE __m512i column_codes(Column *column, const Floats numbers[4], int place, bool keys) {
    const __m512i lows = _mm512_set_epi16(62, 30, 60, 28, 58, 26, 56, 24, 54, 22, 52, 20, 50, 18, 48, 16, 46, 14, 44, 12, 42, 10, 40, 8, 38,
        6, 36, 4, 34, 2, 32, 0);
    const Floats factor = floats_mul(column->factor, floats_all(FINER));
    Floats whole[4];
    for (int i = 0; i < 4; i++) {
        const Floats mean = floats_all(keys ? column->mean[place + CODED_TOGETHER[i]] : 0);
        const Floats number = keys ? _mm512_mask_sub_ps(numbers[i], column->reduced, numbers[i], mean) : numbers[i];
        whole[i] = _mm512_fmadd_round_ps(number, factor, floats_all(WHOLE), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    }
    const __m512i first = _mm512_permutex2var_epi16(_mm512_castps_si512(whole[0]), lows, _mm512_castps_si512(whole[1]));
    const __m512i last = _mm512_permutex2var_epi16(_mm512_castps_si512(whole[2]), lows, _mm512_castps_si512(whole[3]));
    const __m512i codes = codes_of(_mm512_packs_epi16(_mm512_srai_epi16(first, FINER_BITS), _mm512_srai_epi16(last, FINER_BITS)), &LEVELS4);
    const __m512i values = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)LEVELS4.values)), codes);
    const __m512i none = _mm512_setzero_si512(); /* before a value, which makes it 256 times as large */
    column->along[0] = add_products(column->along[0], first, _mm512_unpacklo_epi8(none, values));
    column->along[1] = add_products(column->along[1], last, _mm512_unpackhi_epi8(none, values));
    return codes;
}

/* 16 bytes of each token from `place` on: lane i of `rows[j]` is token 4 * i + j. */
INLINE void column_bytes(__m512i rows[4], Column *column, int place, bool keys, int head_dim) {
    __m512i packed[4], pairs[4];
    for (int i = 0; i < 4; i++) {
        const int from = place + i / 2 * 8 + i % 2 * 2;
        Floats first[4], last[4]; /* numbers that meet in the last step */
        for (int j = 0; j < 4; j++) {
            first[j] = column->columns[from + CODED_TOGETHER[j]], last[j] = column->columns[from + CODED_TOGETHER[j] + head_dim / 2];
            meet_both(&first[j], &last[j]);
        }
        const __m512i low = column_codes(column, first, from, keys), high = column_codes(column, last, from + head_dim / 2, keys);
        packed[i] = _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
    }
    for (int i = 0; i < 4; i += 2) {
        const __m512i fours = _mm512_unpacklo_epi16(packed[i], packed[i + 1]), next = _mm512_unpackhi_epi16(packed[i], packed[i + 1]);
        pairs[i] = _mm512_unpacklo_epi32(fours, next), pairs[i + 1] = _mm512_unpackhi_epi32(fours, next);
    }
    for (int i = 0; i < 2; i++) {
        rows[2 * i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]), rows[2 * i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    }
}

/* The codes of up to 16 tokens, the first at `packed`, the next ones `stride` bytes apart. */
INLINE void code_columns_of(Column *column, uint8_t *packed, size_t stride, int count, bool keys, int head_dim) {
    Column own = *column;
#pragma GCC unroll 1
    for (int place = 0; place < head_dim / 2; place += 32) {
        __m512i rows[2][4];
#pragma GCC unroll 1
        for (int half = 0; half < 2; half++) column_bytes(rows[half], &own, place + 16 * half, keys, head_dim);
        for (int i = 0; i < 4; i++) {
            const __m512i first = _mm512_permutex2var_epi64(rows[0][i], _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), rows[1][i]);
            const __m512i last = _mm512_permutex2var_epi64(rows[0][i], _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), rows[1][i]);
            const __m256i bytes[4] = {_mm512_castsi512_si256(first), _mm512_extracti64x4_epi64(first, 1), _mm512_castsi512_si256(last),
                _mm512_extracti64x4_epi64(last, 1)};
            for (int lane = 0; lane < 4; lane++) {
                if (4 * lane + i < count) _mm256_storeu_si256((void *)(packed + (4 * lane + i) * stride + place), bytes[lane]);
            }
        }
    }
    *column = own;
}

static __attribute__((noinline)) void code_columns(Column *column, uint8_t *packed, size_t stride, int count, bool keys, int head_dim) {
    if (keys) code_columns_of(column, packed, stride, count, true, head_dim);
    else code_columns_of(column, packed, stride, count, false, head_dim);
}

/* Steps of scales below the largest of their head, from the bits of the ratio, as in scale_bytes. */
INLINE __m128i column_steps(Floats scales, Floats super, __mmask16 reduced) {
    const __m512i bits = _mm512_castps_si512(floats_at_most(floats_div(scales, super), floats_all(1)));
    const __m512i part = _mm512_and_si512(_mm512_srli_epi32(bits, 15), _mm512_set1_epi32(255));
    const __m512i octaves = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), _mm512_srli_epi32(bits, 23)), 5);
    const __m512i step = _mm512_sub_epi32(octaves, _mm512_i32gather_epi32(part, SCALE_LOG, 4)), zero = _mm512_setzero_si512();
    const __mmask16 lost = _mm512_cmpgt_epi32_mask(step, _mm512_set1_epi32(SMALLEST_SCALE + STEPS_PER_OCTAVE));
    const __mmask16 none = _mm512_cmp_ps_mask(floats_mul(scales, super), floats_all(0), _CMP_EQ_OQ);
    const __m512i nearest = _mm512_min_epi32(_mm512_max_epi32(step, zero), _mm512_set1_epi32(SMALLEST_SCALE));
    const __m512i found = _mm512_mask_mov_epi32(nearest, lost | none, _mm512_set1_epi32(NO_SCALE));
    return _mm512_cvtepi32_epi8(_mm512_mask_or_epi32(found, reduced, found, _mm512_set1_epi32(128)));
}

/* Up to 16 tokens of one head, ready to be coded. */
typedef struct {
    Floats columns[MAX_COLUMNS], energies;
    Column column;
    int first, count; /* the first one's place among the vectors of the block */
} Columns;

/* Tokens of a head from `token` on; false if a number is none or too large. */
INLINE bool open_columns(Columns *columns, const Shape *shape, const char *numbers, const float *means, const float *means_apart, int head,
    int token) {
    const int heads = shape->heads, head_dim = shape->head_dim, mean = shape->keys ? head * head_dim : 0;
    const size_t vector_bytes = head_dim * value_bytes(shape->dtype);
    const Floats size = floats_all((float)head_dim);
    const char *rows[16];
    Floats energies, shorter;
    columns->first = token * heads + head, columns->count = fewer(shape->tokens - token, COLUMN_TOKENS);
    for (int row = 0; row < 16; row++) {
        rows[row] = numbers + (columns->first + (size_t)fewer(row, columns->count - 1) * heads) * vector_bytes;
    }
    load_columns(columns->columns, &energies, &shorter, rows, means_apart + mean, shape->keys, head_dim / LINE_VALUES, shape->dtype);
    if (_mm512_cmp_ps_mask(energies, floats_mul(size, floats_all(FP16_MAX * FP16_MAX)), _CMP_LT_OQ) != 0xFFFF) return false;
    columns->column = (Column){.columns = columns->columns, .mean = means + mean};
    if (shape->keys) {
        columns->column.reduced = _mm512_cmp_ps_mask(shorter, energies, _CMP_LT_OQ);
        energies = floats_at_most(shorter, energies);
    }
    columns->energies = energies;
    columns->column.factor = floats_mul(inverses(floats_root(floats_div(energies, size))), floats_all((float)PER_RMS4));
    return true;
}

/* Supers and steps of all heads, from [heads, batches] scales of 16 tokens. */
INLINE void encode_sizes(const Shape *shape, uint8_t *supers, uint8_t *steps, const Floats *scales, const __mmask16 *reduced) {
    const int heads = shape->heads, batches = (shape->tokens + COLUMN_TOKENS - 1) / COLUMN_TOKENS;
    for (int head = 0; head < heads; head++, scales += batches, reduced += batches) {
        Floats largest = floats_all(0);
        for (int batch = 0; batch < batches; batch++) largest = keys_max(largest, scales[batch]);
        const __m128 most = _mm_set1_ps(at_most(_mm512_reduce_max_ps(largest), FP16_MAX));
        const __m128i rounded = _mm_cvtps_ph(most, _MM_FROUND_TO_NEAREST_INT);
        const uint16_t half = (uint16_t)_mm_cvtsi128_si32(rounded);
        memcpy(supers + 2 * head, &half, sizeof half);
        for (int batch = 0, token = 0; batch < batches; batch++) {
            uint8_t some[16];
            _mm_storeu_si128((void *)some, column_steps(scales[batch], _mm512_broadcastss_ps(_mm_cvtph_ps(rounded)), reduced[batch]));
            for (int row = 0; row < fewer(shape->tokens - batch * COLUMN_TOKENS, COLUMN_TOKENS); row++, token++) {
                steps[token * heads + head] = some[row];
            }
        }
    }
}

/* A whole block behind the mean; false, and nothing of use written, if a number is none or too large. `means` [heads, head_dim] if keys.
   The CPU gets the next columns to load before the codes of those that wait for roots and quotients. */
static bool encode_columns(const Shape *shape, const char *numbers, uint8_t *supers, uint8_t *steps, uint8_t *packed, const float *means) {
    const int heads = shape->heads, batches = (shape->tokens + COLUMN_TOKENS - 1) / COLUMN_TOKENS;
    const size_t packed_bytes = (size_t)shape->head_dim / 2;
    const Floats unit = floats_all((float)(PER_RMS4 * ALONG_PARTS) * norm_of(shape));
    float means_apart[MAX_HEADS_TIMES_DIM];
    Columns columns[2];
    Floats scales[KEPT_SCALES / COLUMN_TOKENS];
    __mmask16 reduced[KEPT_SCALES / COLUMN_TOKENS];
    if (shape->keys) apart(means_apart, means, heads, shape->head_dim);
    for (int next = 0; next <= heads * batches; next++) {
        Columns *const ready = &columns[next % 2], *const own = &columns[1 - next % 2];
        const int head = next / batches, token = next % batches * COLUMN_TOKENS;
        if (next < heads * batches && !open_columns(ready, shape, numbers, means, means_apart, head, token)) return false;
        if (next == 0) continue;
        code_columns(&own->column, packed + own->first * packed_bytes, heads * packed_bytes, own->count, shape->keys, shape->head_dim);
        const Floats along = _mm512_cvtepi32_ps(_mm512_add_epi32(own->column.along[0], own->column.along[1]));
        const Floats sized = floats_mul(floats_mul(own->energies, own->column.factor), unit);
        scales[next - 1] = floats_mul(sized, inverses(along)), reduced[next - 1] = own->column.reduced;
    }
    encode_sizes(shape, supers, steps, scales, reduced);
    return true;
}
