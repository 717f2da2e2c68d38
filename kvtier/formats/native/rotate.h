/* From numbers of a page to rotated vectors: a tile of rows in fp32, with the largest magnitude of each.

   The transform of a vector that holds a NaN or an infinity holds one in every number of the block, and one of its finite numbers is at
   least as large as the vector's largest. So the magnitudes, which scales need anyway, tell which rows to clean, and clean pages pay
   nothing for it. */

enum { TILE_ROWS = 64, TILE_VALUES = 16 * MAX_HEAD_DIM };

typedef struct {
    float rows[TILE_VALUES] __attribute__((aligned(64)));
    float largest[TILE_ROWS] __attribute__((aligned(64)));
} Tile;

/* How many vectors fit: a multiple of 16. */
static int tile_rows(const Shape *shape) { return fewer(TILE_VALUES / shape->head_dim, TILE_ROWS) & -16; }

/* Up to 16 rows. */
INLINE void rotate_rows_of(float *rows, float largest_of[16], const char *numbers, size_t stride, int count, int head_dim, int dtype,
    int block) {
    const int groups = block / GROUP;
    Floats largest_in[16];
    for (int row = count; row < 16; row++) largest_in[row] = floats_all(0);
    for (int row = 0; row < count; row++) {
        Floats largest = floats_all(0);
        for (int start = 0; start < head_dim; start += block) {
            Floats whole[MAX_BLOCK / GROUP][PARTS];
            for (int group = 0; group < groups; group++) {
                group_load(whole[group], numbers + row * stride + (size_t)(start + group * GROUP) * value_bytes(dtype), dtype);
                group_rotate(whole[group]);
            }
            for (int distance = 1; distance < groups; distance *= 2) {
                for (int group = 0; group < groups; group++) {
                    if (group & distance) continue;
                    for (int part = 0; part < PARTS; part++) {
                        const Floats a = whole[group][part], b = whole[group + distance][part];
                        whole[group][part] = floats_add(a, b), whole[group + distance][part] = floats_sub(a, b);
                    }
                }
            }
            for (int group = 0; group < groups; group++) {
                for (int part = 0; part < PARTS; part++) {
                    largest = magnitude_max(largest, whole[group][part]);
                    floats_store(rows + row * head_dim + start + group * GROUP + part * (GROUP / PARTS), whole[group][part]);
                }
            }
        }
        largest_in[row] = largest;
    }
    rows_magnitude(largest_of, largest_in);
}

/* The block is a constant in each case, so that its loops unroll and the block stays in registers. */
INLINE void rotate_rows_as(float *rows, float largest[16], const char *numbers, size_t stride, int count, int head_dim, int dtype) {
    switch (head_dim & -head_dim) {
#if GROUP <= 16
    case 16: rotate_rows_of(rows, largest, numbers, stride, count, head_dim, dtype, 16); break;
    case 32: rotate_rows_of(rows, largest, numbers, stride, count, head_dim, dtype, 32); break;
#endif
    case 64: rotate_rows_of(rows, largest, numbers, stride, count, head_dim, dtype, 64); break;
    case 128: rotate_rows_of(rows, largest, numbers, stride, count, head_dim, dtype, 128); break;
    case 256: rotate_rows_of(rows, largest, numbers, stride, count, head_dim, dtype, 256); break;
    }
}

static void rotate_rows(float *rows, float largest[16], const char *numbers, size_t stride, int count, int head_dim, int dtype) {
    switch (dtype) {
    case BF16: rotate_rows_as(rows, largest, numbers, stride, count, head_dim, BF16); break;
    case FP16: rotate_rows_as(rows, largest, numbers, stride, count, head_dim, FP16); break;
    case FP32: rotate_rows_as(rows, largest, numbers, stride, count, head_dim, FP32); break;
    }
}

static float clean_number(float number, float limit) {
    if (number != number) return 0;
    return number > limit ? limit : number < -limit ? -limit : number;
}

/* NaN becomes 0, everything else is moved to within +-limit; then the row is rotated again. */
static __attribute__((noinline)) void clean_row(float *row, float *largest, const char *numbers, const Shape *shape, float limit) {
    const float most = shape->dtype == FP16 ? at_most(limit, FP16_MAX) : limit;
    float clean[MAX_HEAD_DIM], largest_of[16];
    for (int i = 0; i < shape->head_dim; i += GROUP) {
        Floats group[PARTS];
        group_load(group, numbers + (size_t)i * value_bytes(shape->dtype), shape->dtype);
        for (int part = 0; part < PARTS; part++) floats_store(clean + i + part * (GROUP / PARTS), group[part]);
    }
    for (int i = 0; i < shape->head_dim; i++) clean[i] = clean_number(clean[i], most);
    rotate_rows(row, largest_of, (const char *)clean, 0, 1, shape->head_dim, FP32);
    *largest = largest_of[0];
}

/* Vectors `stride` bytes apart. Where that skips other heads, the hardware does not see what comes next: the same vectors of the next
   block, which follows at once in a page (behind its last block nothing is read, only asked for). */
static void load_tile(Tile *tile, const Shape *shape, const char *numbers, size_t stride, int count, float limit) {
    const size_t vector_bytes = shape->head_dim * value_bytes(shape->dtype), next_block = block_bytes(shape);
    for (int first = 0; first < count; first += 16) {
        const int some = fewer(count - first, 16);
        float *const rows = tile->rows + first * shape->head_dim, *const largest = tile->largest + first;
        const char *const place = numbers + first * stride;
        rotate_rows(rows, largest, place, stride, some, shape->head_dim, shape->dtype);
        int clean = 1;
        for (int i = 0; i < 16; i++) clean &= largest[i] < limit / 2;
        for (int i = 0; i < some && !clean; i++) {
            if (!(largest[i] < limit / 2)) clean_row(rows + i * shape->head_dim, largest + i, place + i * stride, shape, limit);
        }
        for (int i = 0; i < some && stride != vector_bytes; i++) {
            for (size_t line = 0; line < vector_bytes; line += 64) __builtin_prefetch(place + i * stride + next_block + line, 0, 2);
        }
    }
}

INLINE void row_group(Floats group[PARTS], const float *row) {
    for (int part = 0; part < PARTS; part++) group[part] = floats_load(row + part * (GROUP / PARTS));
}

/* The group at `place` of a row without its mean, if there are means. */
INLINE void row_group_without(Floats group[PARTS], const float *row, const float *const *mean, int place) {
    row_group(group, row + place);
    if (!mean) return;
    for (int part = 0; part < PARTS; part++) group[part] = floats_sub(group[part], floats_load(*mean + place + part * (GROUP / PARTS)));
}

INLINE Floats parts_sum(const Floats sums[PARTS]) {
    Floats total = sums[0];
    for (int part = 1; part < PARTS; part++) total = floats_add(total, sums[part]);
    return total;
}
