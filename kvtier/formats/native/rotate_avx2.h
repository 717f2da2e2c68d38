/* Rotation of whole vectors with AVX2: up to 64 numbers are in registers, and each step is taken for all of them before the next one,
   because the CPU does not see far enough ahead to do that by itself. Neighbours meet first, then numbers 2, 4, ... apart, as in the
   reference. */

#define WITH_ROW_ROTATION

/* Two registers become their sum and difference. */
static inline void meet_both(Floats *a, Floats *b) {
    const Floats sum = floats_add(*a, *b);
    *b = floats_sub(*a, *b), *a = sum;
}

/* The same; subtracting the product with 1 is as exact, and faster between steps that need no shuffles. */
static inline void meet_both_fused(Floats *a, Floats *b) {
    const Floats sum = floats_add(*a, *b);
    *b = _mm256_fnmadd_ps(*b, floats_all(1), *a), *a = sum;
}

/* Two registers: adjacent numbers get into different registers, meet, and stay there. */
static inline void meet_adjacent(Floats *a, Floats *b) {
    const Floats even = _mm256_shuffle_ps(*a, *b, 0x88);
    *b = _mm256_shuffle_ps(*a, *b, 0xDD), *a = even;
    meet_both(a, b);
}

static inline void meet_lanes(Floats *a, Floats *b) {
    const Floats low = _mm256_permute2f128_ps(*a, *b, 0x20);
    *b = _mm256_permute2f128_ps(*a, *b, 0x31), *a = low;
    meet_both(a, b);
}

/* In one register: lane i meets lane i ^ distance; `signs` is -1 where the lane is the upper one and becomes the difference. */
static inline Floats meet(Floats a, Floats other, Floats signs) { return _mm256_fmadd_ps(a, signs, other); }

/* `count` registers of numbers, rotated by 16. bf16 numbers are the halves of 32 bits, so neighbours are in different registers from the
   start; each step moves what met in the one before back between the lanes. */
INLINE void parts_load_rotated(Floats *parts, int count, const char *numbers, int dtype) {
    if (dtype == BF16) {
        for (int i = 0; i < count; i += 2) split_pairs(parts + i, _mm256_loadu_si256((const __m256i *)numbers + i / 2));
        for (int i = 0; i < count; i += 2) meet_both_fused(&parts[i], &parts[i + 1]);
        for (int i = 0; i < count; i += 2) meet_adjacent(&parts[i], &parts[i + 1]);
        for (int i = 0; i < count; i += 2) meet_adjacent(&parts[i], &parts[i + 1]);
        for (int i = 0; i < count; i += 2) meet_lanes(&parts[i], &parts[i + 1]);
    } else {
        for (int i = 0; i < count; i += 2) group_load(parts + i, numbers + i * 8 * value_bytes(dtype), dtype);
        const Floats ones = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), twos = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
        const Floats fours = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
        for (int i = 0; i < count; i++) parts[i] = meet(parts[i], _mm256_permute_ps(parts[i], 0xB1), ones);
        for (int i = 0; i < count; i++) parts[i] = meet(parts[i], _mm256_permute_ps(parts[i], 0x4E), twos);
        for (int i = 0; i < count; i++) parts[i] = meet(parts[i], _mm256_permute2f128_ps(parts[i], parts[i], 0x01), fours);
        for (int i = 0; i < count; i += 2) meet_both(&parts[i], &parts[i + 1]);
    }
}

/* `found`, which is the largest magnitudes or the sums of squares, with that of rotated numbers. */
INLINE Floats find_in(Floats found, Floats a, bool squares) { return squares ? floats_fused(a, a, found) : magnitude_max(found, a); }

/* `count` numbers rotated by blocks, both constants; `found` takes in what they are in the end. What meets 64 numbers earlier does so
   before it is stored. */
INLINE void some_rotate(float *to, Floats *found, const char *numbers, int count, int dtype, int block, bool second, bool squares) {
    const int within = block < 64 ? block / 8 : 8;
    Floats parts[8];
    parts_load_rotated(parts, count / 8, numbers, dtype);
    for (int distance = 2; distance < within; distance *= 2) {
        for (int i = 0; i < count / 8; i++) {
            if (!(i & distance)) meet_both_fused(&parts[i], &parts[i + distance]);
        }
    }
    for (int i = 0; i < count / 8; i++) {
        if (second) {
            Floats first = floats_load(to + 8 * i - 64);
            meet_both_fused(&first, &parts[i]);
            floats_store(to + 8 * i - 64, first);
            if (block == 128) *found = find_in(*found, first, squares);
        }
        floats_store(to + 8 * i, parts[i]);
        if (block <= 64 || (block == 128 && second)) *found = find_in(*found, parts[i], squares);
    }
}

/* Rotated by blocks, which are a constant; returns the largest magnitudes, or sums of squares. */
INLINE Floats row_rotate(float *row, const char *numbers, int head_dim, int dtype, int block, bool squares) {
    Floats found = floats_all(0);
    int start = 0;
    for (; start + 64 <= head_dim; start += 64) {
        const bool second = block > 64 && start & 64;
        some_rotate(row + start, &found, numbers + start * value_bytes(dtype), 64, dtype, block, second, squares);
    }
    for (; start < head_dim && block < 64; start += block) {
        some_rotate(row + start, &found, numbers + start * value_bytes(dtype), block, dtype, block, false, squares);
    }
    for (int i = 0; i < head_dim && block == 256; i += 8) {
        if (i & 128) continue;
        Floats a = floats_load(row + i), b = floats_load(row + i + 128);
        meet_both_fused(&a, &b);
        floats_store(row + i, a), floats_store(row + i + 128, b);
        found = find_in(find_in(found, a, squares), b, squares);
    }
    return found;
}
