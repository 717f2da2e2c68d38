/* Codes of 2, 3, 4 and 6 bits to bytes and back; the layout is that of kvtier/formats/bits.py. One vector at a time. Compilers make vector
   instructions of the plain loops for nibbles by themselves; parts of other sizes are eight bytes in one word: no CPU shifts single bytes, but
   bits that a shift takes into the next one are masked away anyway. */

/* `number` in each byte of a word. */
#define EACH_BYTE(number) (UINT64_C(0x0101010101010101) * (number))

enum { WORD_BYTES = 8 };

/* Places of words in a row of bytes; the last one may be shorter. */
#define EACH_WORD(at, size, bytes) for (int at = 0, size; size = fewer((bytes) - at, WORD_BYTES), at < (bytes); at += WORD_BYTES)

INLINE uint64_t load_word(const uint8_t *from, int size) {
    uint64_t word = 0;
    if (size == WORD_BYTES) memcpy(&word, from, WORD_BYTES);
    else memcpy(&word, from, (size_t)size);
    return word;
}

INLINE void store_word(uint8_t *to, uint64_t word, int size) {
    if (size == WORD_BYTES) memcpy(to, &word, WORD_BYTES);
    else memcpy(to, &word, (size_t)size);
}

INLINE void pack_nibbles(uint8_t *restrict packed, const uint8_t *restrict codes, int head_dim) {
    for (int i = 0; i < head_dim / 2; i++) packed[i] = (uint8_t)((codes[i] & 15) | codes[i + head_dim / 2] << 4);
}

INLINE void unpack_nibbles(uint8_t *restrict codes, const uint8_t *restrict packed, int head_dim) {
    for (int i = 0; i < head_dim / 2; i++) codes[i] = packed[i] & 15;
    for (int i = 0; i < head_dim / 2; i++) codes[i + head_dim / 2] = packed[i] >> 4;
}

/* Two bits of each code, from bit `shift` on. */
INLINE void pack_pairs(uint8_t *restrict packed, const uint8_t *restrict codes, int head_dim, int shift) {
    const int part = head_dim / 4;
    EACH_WORD(at, size, part) {
        uint64_t word = 0;
        for (int k = 0; k < 4; k++) word |= (load_word(codes + k * part + at, size) >> shift & EACH_BYTE(3)) << 2 * k;
        store_word(packed + at, word, size);
    }
}

INLINE void unpack_pairs(uint8_t *restrict codes, const uint8_t *restrict packed, int head_dim) {
    const int part = head_dim / 4;
    EACH_WORD(at, size, part) {
        const uint64_t word = load_word(packed + at, size);
        for (int k = 0; k < 4; k++) store_word(codes + k * part + at, word >> 2 * k & EACH_BYTE(3), size);
    }
}

INLINE void pack_6(uint8_t *restrict packed, const uint8_t *restrict codes, int head_dim) {
    pack_nibbles(packed, codes, head_dim);
    pack_pairs(packed + head_dim / 2, codes, head_dim, 4);
}

INLINE void unpack_6(uint8_t *restrict codes, const uint8_t *restrict packed, int head_dim) {
    const int part = head_dim / 4;
    EACH_WORD(at, size, part) {
        const uint64_t first = load_word(packed + at, size), second = load_word(packed + part + at, size);
        const uint64_t pairs = load_word(packed + 2 * part + at, size);
        store_word(codes + at, (first & EACH_BYTE(15)) | (pairs << 4 & EACH_BYTE(48)), size);
        store_word(codes + part + at, (second & EACH_BYTE(15)) | (pairs << 2 & EACH_BYTE(48)), size);
        store_word(codes + 2 * part + at, (first >> 4 & EACH_BYTE(15)) | (pairs & EACH_BYTE(48)), size);
        store_word(codes + 3 * part + at, (second >> 4 & EACH_BYTE(15)) | (pairs >> 2 & EACH_BYTE(48)), size);
    }
}

/* The third bit of each code. */
INLINE void pack_thirds(uint8_t *restrict third, const uint8_t *restrict codes, int head_dim) {
    const int part = head_dim / 8;
    EACH_WORD(at, size, part) {
        uint64_t word = 0;
        for (int k = 0; k < 8; k++) word |= (load_word(codes + k * part + at, size) >> 2 & EACH_BYTE(1)) << k;
        store_word(third + at, word, size);
    }
}

INLINE void unpack_thirds(uint8_t *restrict codes, const uint8_t *restrict third, int head_dim) {
    const int part = head_dim / 8;
    EACH_WORD(at, size, part) {
        const uint64_t word = load_word(third + at, size);
        for (int k = 0; k < 8; k++) {
            uint8_t *const to = codes + k * part + at;
            store_word(to, load_word(to, size) | (word >> k & EACH_BYTE(1)) << 2, size);
        }
    }
}

/* Vector `index` of `count` with codes of 2, 3 or 4 bits, which stand there plane by plane. */
INLINE void pack_codes(uint8_t *packed, const uint8_t *codes, size_t index, size_t count, int head_dim, int bits) {
    const size_t pair_bytes = (size_t)head_dim / 4, third_bytes = (size_t)head_dim / 8;
    if (bits == 4) pack_nibbles(packed + index * (head_dim / 2), codes, head_dim);
    else pack_pairs(packed + index * pair_bytes, codes, head_dim, 0);
    if (bits == 3) pack_thirds(packed + count * pair_bytes + index * third_bytes, codes, head_dim);
}

INLINE void unpack_codes(uint8_t *codes, const uint8_t *packed, size_t index, size_t count, int head_dim, int bits) {
    const size_t pair_bytes = (size_t)head_dim / 4, third_bytes = (size_t)head_dim / 8;
    if (bits == 4) unpack_nibbles(codes, packed + index * (head_dim / 2), head_dim);
    else unpack_pairs(codes, packed + index * pair_bytes, head_dim);
    if (bits == 3) unpack_thirds(codes, packed + count * pair_bytes + index * third_bytes, head_dim);
}

/* Lanes with spans unpack vectors of some sizes on their own, straight to whole numbers: the levels that codes stand for, codes of 6 bits
   less 32. */
#if !defined(WITH_SPANS)
#define unpacks_spans(head_dim) false
#define unpack_levels(values, packed, index, count, head_dim, bits, table) ((void)0)
#define unpack_signed_6(values, packed, head_dim) ((void)0)
#endif
