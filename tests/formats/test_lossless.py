from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from kvtier.errors import LayoutError
from kvtier.formats import LZ4, get_format
from kvtier.layout import PageLayout
from kvtier.testing.strategies import make_pages

LAYOUT = PageLayout(2, 2, 16, 2, 64, "bf16")


@pytest.mark.parametrize(("name", "element"), [("raw", 2), ("fp8", 1), ("q8", 1), ("q4", 1)])
def test_what_does_not_shrink_is_stored(name: str, element: int) -> None:
    page = make_pages(LAYOUT, "bits" if name == "raw" else "gaussian", 1, seed=0)
    packed = get_format(f"{name}+lz4").encode(page, LAYOUT)[0]
    inner = get_format(name).encode(page, LAYOUT)[0]
    assert len(packed) == get_format(f"{name}+lz4").payload_bytes(LAYOUT) == 8 + len(inner)
    assert packed[:8].tobytes() == struct.pack("<BBHI", 0, element, 0, len(inner))
    assert packed[8:].tobytes() == inner.reshape(-1, element).T.tobytes()


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.9), ("fp32", 0.95)])
def test_raw_shrinks_because_its_bytes_are_split_into_planes(dtype: str, most: float) -> None:
    layout = PageLayout(4, 2, 16, 3, 64, dtype)
    packed = get_format("raw+lz4").encode(make_pages(layout, "gaussian", 1, seed=0), layout)[0]
    assert packed[0] == 1
    assert len(packed) < most * layout.page_bytes


@pytest.mark.parametrize("name", ["raw+lz4", "q8+lz4", "q4+lz4"])
def test_constant_pages_shrink_to_almost_nothing_and_come_back(name: str) -> None:
    format, page = get_format(name), torch.zeros(1, *LAYOUT.shape, dtype=torch.bfloat16)
    packed = format.encode(page, LAYOUT)
    assert len(packed[0]) < 0.02 * format.payload_bytes(LAYOUT)
    assert torch.equal(format.decode(format.unpack(packed, LAYOUT), LAYOUT), page)


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 2), (0, 0), (1, 1), (2, 1), (3, 255), (4, 1), (7, 255)],
    ids=["unknown flag", "compressed read as stored", "element", "reserved", "reserved", "length", "huge length"],
)
def test_a_wrong_prefix_is_refused(place: int, value: int) -> None:
    packed = get_format("raw+lz4").encode(torch.zeros(1, *LAYOUT.shape, dtype=torch.bfloat16), LAYOUT)[0]
    assert packed[0] == 1
    packed[place] = value
    with pytest.raises(ValueError, match="lz4 payload"):
        get_format("raw+lz4").unpack([packed], LAYOUT)


def test_a_block_of_another_size_is_refused_without_allocating_it() -> None:
    """A block that would grow to 64 MiB, and one that ends early, both with a prefix that fits."""
    import lz4.block

    inner = get_format("raw").payload_bytes(LAYOUT)
    for size in (1 << 26, inner - 2, 0):
        body = lz4.block.compress(bytes(size), store_size=False)
        packed = np.frombuffer(struct.pack("<BBHI", 1, 2, 0, inner) + body, np.uint8)
        with pytest.raises(ValueError, match="lz4 payload"):
            get_format("raw+lz4").unpack([packed], LAYOUT)


def test_stored_read_as_compressed_is_refused() -> None:
    packed = get_format("q8+lz4").encode(make_pages(LAYOUT, "gaussian", 1, seed=0), LAYOUT)[0]
    assert packed[0] == 0
    packed[0] = 1
    with pytest.raises(ValueError, match="flag 1"):
        get_format("q8+lz4").unpack([packed], LAYOUT)


def test_stages_do_not_stack_and_pages_beyond_lz4_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed size"):
        LZ4(get_format("raw+lz4"))
    with pytest.raises(LayoutError, match="LZ4 takes at most"):
        get_format("raw+lz4").payload_bytes(PageLayout(128, 2, 4096, 32, 128, "fp32"))
