"""How a transfer is cut: pure functions of sizes, so that the working set of each step stays in the processor's last-level cache.

Reading, verifying, decoding and placing overlap when the pieces are smaller than the whole; pieces that fit the cache are decoded while
their bytes are still in it. Too small pieces would pay the fixed cost of a call for too few bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

SMALLEST_PIECE_BYTES = 256 << 10
"""Page bytes of a piece that is worth its calls: at 5 GB/s they take 50 us, the calls about 5."""

ARRIVAL_BYTES = 2 << 20
"""Page bytes to decode at once behind a disk: some 300 us of work, in which a fast one delivers as much."""

LEAST_WRITE_BYTES = 1 << 20
"""Encoded bytes that are worth a write behind the worker's back: smaller ones are written in less time than it takes to hand them over."""

PIECES_BEHIND = 8
"""A transfer that is large enough is written in so many pieces, all but the last of them while others are made."""

STRETCH_BYTES = 96 << 10
"""What to decode of a page before the next one: memory gives long stretches faster. In 12 KiB each, 64 MiB take 1.6 times as long as page
by page, in 60 KiB 1.25 times (8 bits, AVX2)."""

DECODE_BYTES = 1 << 20
"""Page bytes to decode at once for somebody who copies them elsewhere: they are still in a core's cache then."""


def pages_per_piece(encoded_bytes: int, page_bytes: int, cache_bytes: int, most_pages: int) -> int:
    """Pages to code at once: encoded and decoded form of all of them in half of the cache, but a piece that is worth its calls.

    Between 1 and `most_pages` (at least 1).
    """
    fitting = cache_bytes // 2 // (encoded_bytes + page_bytes)
    worthwhile = -(-SMALLEST_PIECE_BYTES // page_bytes)
    return max(1, min(most_pages, max(fitting, worthwhile)))


def pages_per_arrival(page_bytes: int, most_pages: int) -> int:
    """Pages to decode at once while others are being read: as few as are worth a call, since whoever waits for more leaves a core idle."""
    return max(1, min(most_pages, -(-ARRIVAL_BYTES // page_bytes)))


def pages_per_write(pages: int, encoded_bytes: int, most_pages: int) -> int:
    """Pages to make and write at once, of `pages` that go to where writing takes time: few enough that while one piece is written the next
    is made, but each piece worth a write of its own. Between 1 and `most_pages` (at least 1)."""
    worthwhile = -(-LEAST_WRITE_BYTES // encoded_bytes)
    return max(1, min(most_pages, max(worthwhile, -(-pages // PIECES_BEHIND))))


def pieces(pages: int, at_once: int) -> Iterator[slice]:
    """`pages` pages in pieces of `at_once`, the sizes differing by at most one."""
    count = -(-pages // at_once)
    for piece in range(count):
        yield slice(pages * piece // count, pages * (piece + 1) // count)


def layers_per_step(pages: int, layers: int, page_bytes: int) -> int:
    """Layers to decode at once for `pages` pages: as few as are worth a call and a turn to each page, so that the first one is early."""
    layer_bytes = max(1, page_bytes // layers)
    worthwhile = max(STRETCH_BYTES, SMALLEST_PIECE_BYTES // pages)
    return max(1, min(layers, -(-worthwhile // layer_bytes)))


def layers_per_decode(layers: int, page_bytes: int) -> int:
    """Layers of one page to decode before they are copied elsewhere, at least 1."""
    return max(1, min(layers, DECODE_BYTES * layers // page_bytes))
