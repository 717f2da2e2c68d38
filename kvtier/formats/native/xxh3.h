/* Constants of XXH3 and the end of a digest, the same for every instruction set; `digest` in far.h is the loop. */
#ifndef KVTIER_XXH3_H
#define KVTIER_XXH3_H

#include <stdint.h>

#define XXH3_PRIME32_1 0x9E3779B1u
#define XXH3_PRIME32_2 0x85EBCA77u
#define XXH3_PRIME32_3 0xC2B2AE3Du
#define XXH3_PRIME64_1 0x9E3779B185EBCA87u
#define XXH3_PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define XXH3_PRIME64_3 0x165667B19E3779F9u
#define XXH3_PRIME64_4 0x85EBCA77C2B2AE63u
#define XXH3_PRIME64_5 0x27D4EB2F165667C5u
#define XXH3_PRIME_MIX 0x165667919E3779F9u

enum { XXH3_SECRET_BYTES = 192, XXH3_LEAST_BYTES = 241 };

extern const uint8_t XXH3_SECRET[XXH3_SECRET_BYTES];

/* A half of a digest from the 8 sums, with the secret's words from `secret` on. */
uint64_t xxh3_merge(const uint64_t sums[8], const uint8_t *secret, uint64_t start);

#endif
