/* From numbers of a page to rotated vectors: a tile of rows in fp32, with the largest magnitude of each. Numbers meet in the
   order of the reference (hadamard.py), so their sums are its sums, bit by bit.

   The transform of a vector that holds a NaN or an infinity holds one in every number of the block, and one of its finite numbers is at
   least as large as the vector's largest. So the magnitudes, which scales need anyway, tell which rows to clean, and clean pages pay
   nothing for it. */

enum { TILE_ROWS = 16, TILE_VALUES = TILE_ROWS * MAX_HEAD_DIM };

typedef struct {
    float rows[TILE_VALUES] __attribute__((aligned(64)));
    float largest[TILE_ROWS] __attribute__((aligned(64)));
} Tile;

enum { LINE_BYTES = 64, FETCHED_AHEAD = 1 << 15 };

/* Has memory brought nearer that is likely to be encoded next: the strides in which means and columns read it are not what CPUs foresee. */
static inline const char *fetch_ahead(const char *from, size_t count) {
    for (size_t at = 0; at < count; at += LINE_BYTES) __builtin_prefetch(from + at, 0, 2);
    return from + count;
}

/* The same by vectors, for lanes that fetch: what lies in the next block where these lie in theirs, or nearer if blocks are large. */
static inline void fetch_next(const Shape *shape, const char *vectors, int count) {
#if defined(WITH_FETCHING)
    const size_t block = block_bytes(shape);
    fetch_ahead(vectors + (block < FETCHED_AHEAD ? block : FETCHED_AHEAD), count * shape->head_dim * value_bytes(shape->dtype));
#else
    (void)shape, (void)vectors, (void)count;
#endif
}

/* Whether the energies of rows are found while they are rotated. */
#if defined(WITH_ROW_ROTATION)
#define ENERGIES_FIRST 1

/* Up to 16 rows, and their largest magnitudes or the sums of their squares. */
INLINE void rotate_rows_of(float *rows, float found[16], const char *numbers, size_t stride, int count, int head_dim, int dtype, int block,
    bool squares) {
    Floats found_in[16], last = floats_all(0);
    for (int row = 0; row < count; row++) {
        found_in[row] = last = row_rotate(rows + row * head_dim, numbers + row * stride, head_dim, dtype, block, squares);
    }
    for (int row = count; row < 16; row++) found_in[row] = last; /* of zeros GCC makes an instruction that takes long to begin */
    if (squares) rows_sum(found, found_in);
    else rows_magnitude(found, found_in);
}
#else
#define ENERGIES_FIRST 0

/* Up to 16 rows, some side by side; the last ones are done twice rather than alone. Never asked for squares. */
INLINE void rotate_rows_of(float *rows, float largest_of[16], const char *numbers, size_t stride, int count, int head_dim, int dtype,
    int block, bool squares) {
    (void)squares;
    const int groups = block / GROUP, beside = GROUPS_AT_ONCE > groups ? GROUPS_AT_ONCE / groups : 1;
    Floats largest_in[16];
    for (unsigned row = (unsigned)count; row < 16; row++) largest_in[row] = floats_all(0);
    for (int first = 0; first < count; first += beside) {
        int at[GROUPS_AT_ONCE] = {0};
        Floats largest[GROUPS_AT_ONCE];
        for (int i = 0; i < beside; i++) at[i] = fewer(first + i, count - 1), largest[i] = floats_all(0);
        for (int start = 0; start < head_dim; start += block) {
            Floats whole[GROUPS_AT_ONCE + MAX_BLOCK / GROUP][PARTS];
            const char *from[GROUPS_AT_ONCE + MAX_BLOCK / GROUP];
            for (int i = 0; i < beside * groups; i++) {
                from[i] = numbers + at[i / groups] * stride + (size_t)(start + i % groups * GROUP) * value_bytes(dtype);
            }
            groups_load_rotated(whole, from, beside * groups, dtype);
            for (int distance = 1; distance < groups; distance *= 2) {
                for (int group = 0; group < beside * groups; group++) {
                    if (group & distance) continue;
                    for (int part = 0; part < PARTS; part++) {
                        const Floats a = whole[group][part], b = whole[group + distance][part];
                        whole[group][part] = floats_add(a, b), whole[group + distance][part] = floats_sub(a, b);
                    }
                }
            }
            for (int i = 0; i < beside * groups; i++) {
                float *const to = rows + at[i / groups] * head_dim + start + i % groups * GROUP;
                largest[i / groups] = keys_max(largest[i / groups], group_magnitude(whole[i]));
                for (int part = 0; part < PARTS; part++) floats_store(to + part * LANES, whole[i][part]);
            }
        }
        for (int i = 0; i < beside; i++) largest_in[at[i]] = largest[i];
    }
    rows_magnitude(largest_of, largest_in);
}
#endif

/* The block is a constant in each case, so that its loops unroll and the block stays in registers. */
INLINE void rotate_rows_as(float *rows, float found[16], const char *numbers, size_t stride, int count, int head_dim, int dtype,
    bool squares) {
#if defined(WITHOUT_CONSTANT_SIZES)
    rotate_rows_of(rows, found, numbers, stride, count, head_dim, dtype, head_dim & -head_dim, squares);
#else
    switch (head_dim & -head_dim) {
#if GROUP <= 16
    case 16: rotate_rows_of(rows, found, numbers, stride, count, head_dim, dtype, 16, squares); break;
    case 32: rotate_rows_of(rows, found, numbers, stride, count, head_dim, dtype, 32, squares); break;
#endif
    case 64: rotate_rows_of(rows, found, numbers, stride, count, head_dim, dtype, 64, squares); break;
    case 128: rotate_rows_of(rows, found, numbers, stride, count, head_dim, dtype, 128, squares); break;
    case 256: rotate_rows_of(rows, found, numbers, stride, count, head_dim, dtype, 256, squares); break;
    }
#endif
}

/* Groups side by side hide how long each step takes only if their instructions alternate. GCC does that where registers are scarce, too,
   but not by default. */
#if defined(__GNUC__) && !defined(__clang__)
#define ALTERNATING __attribute__((optimize("schedule-insns", "sched-pressure"), noclone))
#else
#define ALTERNATING
#endif

static ALTERNATING void rotate_rows(float *rows, float largest[16], const char *numbers, size_t stride, int count, int head_dim, int dtype) {
#define ROTATE_ROWS(dtype) rotate_rows_as(rows, largest, numbers, stride, count, head_dim, dtype, false)
    FOR_DTYPES(dtype, ROTATE_ROWS)
}

#if ENERGIES_FIRST
/* The same with the sums of their squares instead. */
static ALTERNATING void rotate_rows_energy(float *rows, float energies[16], const char *numbers, size_t stride, int count, int head_dim,
    int dtype) {
#define ROTATE_ROWS_ENERGY(dtype) rotate_rows_as(rows, energies, numbers, stride, count, head_dim, dtype, true)
    FOR_DTYPES(dtype, ROTATE_ROWS_ENERGY)
}
#endif

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

/* Up to 16 vectors, one after the other. */
static void load_tile(Tile *tile, const Shape *shape, const char *numbers, int count, float limit) {
    const size_t vector_bytes = shape->head_dim * value_bytes(shape->dtype);
    rotate_rows(tile->rows, tile->largest, numbers, vector_bytes, count, shape->head_dim, shape->dtype);
    int clean = 1;
    for (int i = 0; i < TILE_ROWS; i++) clean &= tile->largest[i] < limit / 2;
    for (int i = 0; i < count && !clean; i++) {
        if (tile->largest[i] < limit / 2) continue;
        clean_row(tile->rows + i * shape->head_dim, tile->largest + i, numbers + i * vector_bytes, shape, limit);
    }
}

INLINE void row_group(Floats group[PARTS], const float *row) {
    for (int part = 0; part < PARTS; part++) group[part] = floats_load(row + part * (GROUP / PARTS));
}

#if !defined(WITH_ROW_ROUNDING)
INLINE void row_round(int8_t *codes, const float *row, Floats factor, int head_dim, int largest) {
    for (int i = 0; i < head_dim; i += GROUP) {
        Floats group[PARTS];
        row_group(group, row + i);
        group_round(codes + i, group, factor, largest);
    }
}
#endif

INLINE Floats parts_sum(const Floats sums[PARTS]) {
    Floats total = sums[0];
    for (int part = 1; part < PARTS; part++) total = floats_add(total, sums[part]);
    return total;
}
