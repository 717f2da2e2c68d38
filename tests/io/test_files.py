"""The memory of file I/O."""

from __future__ import annotations

from kvtier.io.files import BLOCK_BYTES, address_of, page_aligned


def test_page_aligned_memory_is_aligned():
    for size in (1, 4096, 12345):
        buffer = page_aligned(size)
        assert (buffer.nbytes, address_of(buffer) % BLOCK_BYTES) == (size, 0)
        assert address_of(buffer) == buffer.ctypes.data
        assert buffer.flags.writeable
