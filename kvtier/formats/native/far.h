/* What pages that come from far away are proven and written with: XXH3 of what came, and copies past the caches, since whoever reads a page
   that waited for a disk does so later. */

/* The lower and the upper half of the xxh3-128 of more than 240 bytes, without seed and with XXH3's own secret; the lower is also their
   xxh3-64. See https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. */
static void digest(const uint8_t *bytes, size_t count, uint64_t halves[2]) {
    static const uint64_t start[8] = {XXH3_PRIME32_3, XXH3_PRIME64_1, XXH3_PRIME64_2, XXH3_PRIME64_3, XXH3_PRIME64_4, XXH3_PRIME32_2,
        XXH3_PRIME64_5, XXH3_PRIME32_1};
    enum { STRIPE = 64, STRIPES = 16, BLOCK = STRIPE * STRIPES };
    const uint8_t *const last = bytes + count - STRIPE;
    Words sums = words_load(start);
    for (size_t block = (count - 1) / BLOCK; block > 0; block--, bytes += BLOCK) {
        for (int i = 0; i < STRIPES; i++) sums = words_take(sums, bytes + i * STRIPE, XXH3_SECRET + i * 8);
        sums = words_stir(sums, XXH3_SECRET + XXH3_SECRET_BYTES - STRIPE, XXH3_PRIME32_1);
    }
    for (int i = 0; bytes + i * STRIPE < last; i++) sums = words_take(sums, bytes + i * STRIPE, XXH3_SECRET + i * 8);
    sums = words_take(sums, last, XXH3_SECRET + XXH3_SECRET_BYTES - STRIPE - 7);
    uint64_t words[8];
    words_store(words, sums);
    halves[0] = xxh3_merge(words, XXH3_SECRET + 11, count * XXH3_PRIME64_1);
    halves[1] = xxh3_merge(words, XXH3_SECRET + XXH3_SECRET_BYTES - STRIPE - 11, ~(count * XXH3_PRIME64_2));
}

/* Lines of memory whole, if the target is made of them. `lines_arrive` makes sure that who is told next sees them. */
static void copy_far(char *to, const char *from, size_t count) {
    enum { LINE = 64 };
    if ((uintptr_t)to % LINE || count % LINE) {
        memcpy(to, from, count);
        return;
    }
    for (size_t i = 0; i < count; i += LINE) line_copy_far(to + i, from + i);
}
