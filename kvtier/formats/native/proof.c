/* Whether a record proves to be the copy that is wanted; see proof.h. */
#include "proof.h"

#include <string.h>

static uint64_t word_at(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

void put_digest(void *to, Digest digest) {
    const uint64_t halves[2] = {__builtin_bswap64(digest.high), __builtin_bswap64(digest.low)};
    memcpy(to, halves, sizeof halves);
}

const char *proof_open(Proof *proof, const void *bytes, size_t size) {
    int64_t numbers[4];
    if (size < sizeof numbers) return "proof: too short; expected 4 int64, an expected head and its mask";
    memcpy(numbers, bytes, sizeof numbers);
    for (int i = 0; i < 4; i++) {
        if (numbers[i] < 0 || numbers[i] > MOST_HEAD_BYTES) return "proof: a place outside of the head";
    }
    *proof = (Proof){(const uint8_t *)bytes + sizeof numbers, (size_t)numbers[0], (size_t)numbers[1], (size_t)numbers[2], (size_t)numbers[3]};
    if (size != sizeof numbers + 2 * proof->head_bytes) return "proof: expected a head and a mask as large as the head";
    if (proof->checked_bytes < LEAST_CHECKED_BYTES || proof->checked_bytes + 8 > proof->head_bytes) return "proof: no place for the head's digest";
    if (proof->digest_at + DIGEST_BYTES > proof->head_bytes) return "proof: no place for the payload's digest";
    return NULL;
}

static bool is_expected(const Proof *proof, const uint8_t *head) {
    const uint8_t *const mask = proof->expected + proof->head_bytes;
    unsigned wrong = 0;
    for (size_t i = 0; i < proof->head_bytes; i++) wrong |= (head[i] ^ proof->expected[i]) & mask[i];
    return !wrong;
}

bool proven(const Proof *proof, const uint8_t *record, const void *key, size_t key_bytes, size_t payload_bytes, DigestOf *digest_of) {
    if (digest_of(record, proof->checked_bytes).low != word_at(record + proof->checked_bytes)) return false;
    if (!is_expected(proof, record) || memcmp(record + proof->key_at, key, key_bytes) != 0) return false;
    uint8_t digest[DIGEST_BYTES];
    put_digest(digest, digest_of(record + proof->head_bytes, payload_bytes));
    return memcmp(digest, record + proof->digest_at, DIGEST_BYTES) == 0;
}
