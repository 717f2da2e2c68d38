/* The proof: what a caller expects of the head in front of a payload, as bytes: struct "<4q" bytes of the head, where the key is, where the
   xxh3-128 of the payload is (the upper half first, each half big-endian), how many first bytes of the head the xxh3-64 right behind them
   (little-endian) covers; then the head that is expected and a mask, 0xFF for each byte that has to be so. Little-endian machines only. */
#ifndef KVTIER_PROOF_H
#define KVTIER_PROOF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Of fewer bytes the lower half of the xxh3-128 is not the xxh3-64. */
enum { LEAST_CHECKED_BYTES = 241, MOST_HEAD_BYTES = 1 << 16, DIGEST_BYTES = 16 };

/* xxHash's own: XXH128_hash_t, and XXH3_128bits without a seed. */
typedef struct {
    uint64_t low, high;
} Digest;
typedef Digest DigestOf(const void *bytes, size_t count);

/* As xxhash.xxh3_128_digest gives it: the upper half first, each half big-endian. */
void put_digest(void *to, Digest digest);

typedef struct {
    const uint8_t *expected;
    size_t head_bytes, key_at, digest_at, checked_bytes;
} Proof;

/* NULL, or why these bytes are no proof. */
const char *proof_open(Proof *proof, const void *bytes, size_t size);

/* Whether a record of a head and a payload says that it is what is expected, with this key, and its digests agree. */
bool proven(const Proof *proof, const uint8_t *record, const void *key, size_t key_bytes, size_t payload_bytes, DigestOf *digest_of);

#endif
