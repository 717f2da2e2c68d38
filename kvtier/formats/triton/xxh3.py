"""XXH3 of byte ranges in a GPU's memory, 64 and 128 bits, as Yann Collet's xxHash 0.8 defines it for inputs of more than 240 bytes, seed 0.

A range is stripes of 64 bytes, 16 stripes a block of 1,024. Each stripe adds to eight lanes of 64 bits, and sums know no order:
`block_sums` does all blocks of all ranges at once and reads every byte but the last 64. Between blocks the lanes are scrambled, which is a
chain: `digest` walks it, one program a range, over a sixteenth of the bytes. All numbers that depend on nothing but the length are in a
table of the caller's (`checksums.py`), so that no kernel holds a constant of 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(8)
STRIPES: tl.constexpr = tl.constexpr(16)
PRIME32: tl.constexpr = tl.constexpr(0x9E3779B1)
AVALANCHE: tl.constexpr = tl.constexpr(0x165667919E3779F9)
# Where things are in the table, in words of 64 bits.
SCRAMBLE: tl.constexpr = tl.constexpr(16)
LAST: tl.constexpr = tl.constexpr(24)
MERGE: tl.constexpr = tl.constexpr(32)
START: tl.constexpr = tl.constexpr(48)
LENGTHS: tl.constexpr = tl.constexpr(56)


@triton.jit
def _product(words):
    """The lower half of each word times its upper half."""
    return (words & 0xFFFFFFFF) * (words >> 32)


@triton.jit
def _neighbours(words, ROWS: tl.constexpr):
    """`[ROWS, 8]`: lanes 0 and 1 exchanged, 2 and 3, and so on."""
    even, odd = tl.split(tl.reshape(words, [ROWS, LANES // 2, 2]))
    return tl.reshape(tl.join(odd, even), [ROWS, LANES])


@triton.jit(do_not_specialize=["blocks", "stripes"])
def block_sums(ranges, row_bytes, stripes, blocks, table, sums, BLOCKS: tl.constexpr):
    """Grid: ranges x ceil(blocks / BLOCKS). `sums` `[ranges, blocks, 8]`: what the stripes of each block add to the lanes.

    `ranges`: uint8 pointer to the first range, `row_bytes` before the next, both multiples of 8. `stripes`: those of a range, without the
    last, which overlaps the one before it.
    """
    groups = (blocks + BLOCKS - 1) // BLOCKS
    row = (tl.program_id(0) // groups).to(tl.int64)
    block = tl.program_id(0) % groups * BLOCKS + tl.arange(0, BLOCKS)
    stripe = tl.arange(0, STRIPES)[None, :, None]
    lane = tl.arange(0, LANES)
    number = block[:, None, None] * STRIPES + stripe
    words = (ranges + row * row_bytes).to(tl.pointer_type(tl.uint64))
    there = (number < stripes) & (lane[None, None, :] < LANES)
    data = tl.load(words + (number * LANES + lane[None, None, :]), there, 0)
    key = data ^ tl.load(table + (stripe + lane[None, None, :]))
    added = tl.sum(tl.where(there, _product(key), 0), 1) + _neighbours(tl.sum(data, 1), BLOCKS)
    place = sums + row * blocks * LANES + block[:, None] * LANES + lane[None, :]
    tl.store(place, added, block[:, None] < blocks)


@triton.jit
def _scrambled(lanes, keys):
    return (lanes ^ (lanes >> 47) ^ keys) * PRIME32


@triton.jit
def _merged(lanes, keys, start):
    """The lanes as one word."""
    first, second = tl.split(tl.reshape(lanes ^ keys, [LANES // 2, 2]))
    word = tl.sum(first * second ^ tl.umulhi(first, second), 0) + start
    word = (word ^ (word >> 37)) * AVALANCHE
    return word ^ (word >> 32)


@triton.jit(do_not_specialize=["length", "blocks"])
def digest(ranges, row_bytes, length, blocks, table, sums, out, TURNS: tl.constexpr, AHEAD: tl.constexpr):
    """Grid: ranges. `out` `[ranges, 2]`: the lower and the upper 64 bits.

    `blocks`: those of `sums`, of which the last is not scrambled; the others are at most TURNS * AHEAD.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    mine = sums + row * blocks * LANES + lane
    scramble = tl.load(table + SCRAMBLE + lane)
    lanes = tl.load(table + START + lane)
    for turn in range(TURNS):
        # No load depends on the lanes: those of a turn are under way together.
        for step in tl.static_range(AHEAD):
            block = turn * AHEAD + step
            whole = block < blocks - 1
            added = tl.load(mine + block * LANES, whole & (lane < LANES), 0)
            lanes = tl.where(whole, _scrambled(lanes + added, scramble), lanes)
    lanes += tl.load(mine + (blocks - 1) * LANES)
    # The last 64 bytes lie as they come: byte by byte.
    byte = tl.arange(0, 8)
    last = ranges + row * row_bytes + length - LANES * 8
    data = tl.sum(tl.load(last + (lane[:, None] * 8 + byte[None, :])).to(tl.uint64) << (byte[None, :] * 8).to(tl.uint64), 1)
    key = data ^ tl.load(table + LAST + lane)
    lanes += _product(key) + tl.reshape(_neighbours(tl.reshape(data, [1, LANES]), 1), [LANES])
    for half in tl.static_range(2):
        keys = tl.load(table + MERGE + half * LANES + lane)
        tl.store(out + row * 2 + half, _merged(lanes, keys, tl.load(table + LENGTHS + half)))
