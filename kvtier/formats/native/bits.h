/* Codes of 2, 3, 4 and 6 bits to bytes and back; the layout is that of kvtier/formats/bits.py. One vector at a time; plain loops over
   bytes, which compilers turn into vector instructions by themselves where head_dim is a constant. */

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
    for (int i = 0; i < part; i++) {
        const int low = (codes[i] >> shift & 3) | (codes[i + part] >> shift & 3) << 2;
        packed[i] = (uint8_t)(low | (codes[i + 2 * part] >> shift & 3) << 4 | (codes[i + 3 * part] >> shift & 3) << 6);
    }
}

INLINE void unpack_pairs(uint8_t *restrict codes, const uint8_t *restrict packed, int head_dim) {
    const int part = head_dim / 4;
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < part; i++) codes[k * part + i] = packed[i] >> 2 * k & 3;
    }
}

INLINE void pack_6(uint8_t *restrict packed, const uint8_t *restrict codes, int head_dim) {
    pack_nibbles(packed, codes, head_dim);
    pack_pairs(packed + head_dim / 2, codes, head_dim, 4);
}

INLINE void unpack_6(uint8_t *restrict codes, const uint8_t *restrict packed, int head_dim) {
    const int half = head_dim / 2, part = head_dim / 4;
    unpack_nibbles(codes, packed, head_dim);
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < part; i++) codes[k * part + i] |= (uint8_t)((packed[half + i] >> 2 * k & 3) << 4);
    }
}

/* The third bit of each code. */
INLINE void pack_thirds(uint8_t *restrict third, const uint8_t *restrict codes, int head_dim) {
    const int part = head_dim / 8;
    for (int i = 0; i < part; i++) third[i] = 0;
    for (int k = 0; k < 8; k++) {
        for (int i = 0; i < part; i++) third[i] |= (uint8_t)((codes[k * part + i] >> 2 & 1) << k);
    }
}

INLINE void unpack_thirds(uint8_t *restrict codes, const uint8_t *restrict third, int head_dim) {
    const int part = head_dim / 8;
    for (int k = 0; k < 8; k++) {
        for (int i = 0; i < part; i++) codes[k * part + i] |= (uint8_t)((third[i] >> k & 1) << 2);
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
