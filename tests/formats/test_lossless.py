from __future__ import annotations

import struct
import tracemalloc

import lz4.block
import numpy as np
import pytest
import torch
import zstandard
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.formats import Staged, get_format
from kvtier.layout import PageLayout
from kvtier.testing.strategies import make_pages

LAYOUT = PageLayout(2, 2, 16, 2, 64, "bf16")
STAGES = ["lz4", "zstd"]


def staged(name: str) -> Staged:
    format = get_format(name)
    assert isinstance(format, Staged)
    return format


def decompress(stage: str, body: bytes, length: int) -> bytes:
    if stage == "lz4":
        return bytes(lz4.block.decompress(body, uncompressed_size=length))
    return zstandard.ZstdDecompressor().decompress(body)


def parts_of(stage: str, packed: NDArray[np.uint8], lengths: list[int]) -> list[NDArray[np.uint8]]:
    """The parts of a payload by the layout in the file's head, in code of its own."""
    number, count, reserved, _ = struct.unpack_from("<BBHI", packed.tobytes())
    assert (number, count, reserved) == ({"lz4": 1, "zstd": 2}[stage], len(lengths), 0)
    table = list(struct.iter_unpack("<II", packed[8 : 8 + 8 * count].tobytes()))
    parts, start = [], 8 + 8 * count
    for (coding, size), length in zip(table, lengths, strict=True):
        body = packed[start : start + size].tobytes()
        parts.append(np.frombuffer(body if coding == 0 else decompress(stage, body, length), np.uint8))
        assert len(parts[-1]) == length
        start += size
    assert start == len(packed)
    return parts


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("dtype", "sign", "exponent"), [("bf16", 15, 7), ("fp16", 15, 7), ("fp32", 31, 23)])
def test_an_independent_reader_finds_the_exponents_apart(stage: str, dtype: str, sign: int, exponent: int) -> None:
    """Keys then values; in each, bytes of equal significance, the first of them the 8 bits below the sign (bf16, fp32: the exponent)."""
    layout = PageLayout(4, 2, 16, 3, 64, dtype)
    # Few bits in the mantissa, so that fp16 shrinks as well.
    page = (make_pages(layout, "gaussian", 1, seed=0) * 4).round().mul(0.25)
    packed = get_format(f"raw+{stage}").encode(page, layout)[0]
    size = sign // 8 + 1
    numbers = page[0].view(torch.uint8).numpy().view(f"<u{size}").astype(np.uint64)
    parts = parts_of(stage, packed, [layout.values // 2] * (2 * size))
    for plane in (0, 1):
        bits = numbers[:, plane].reshape(-1)
        first, *others = parts[plane * size : (plane + 1) * size]
        assert np.array_equal(first, (bits >> (sign - 8)) & 255)
        assert np.array_equal(others[-1], (bits & 127) << 1 | bits >> sign)


@pytest.mark.parametrize("name", ["raw+lz4", "raw+zstd", "fp8+lz4", "q8+lz4", "q8/q4+lz4", "q4_k+lz4"])
def test_what_does_not_shrink_is_stored_whole(name: str) -> None:
    page = make_pages(LAYOUT, "bits" if name.startswith("raw") else "gaussian", 1, seed=0)
    inner = staged(name).inner.encode(page, LAYOUT)[0]
    packed = staged(name).encode(page, LAYOUT)[0]
    assert len(packed) == staged(name).payload_bytes(LAYOUT) == 8 + len(inner)
    assert packed[:8].tobytes() == struct.pack("<BBHI", 0, 0, 0, len(inner))
    assert np.array_equal(packed[8:], inner)
    assert np.shares_memory(staged(name).unpack([packed], LAYOUT)[0], packed)


@pytest.mark.parametrize(("name", "most"), [("raw+lz4", 0.92), ("raw+zstd", 0.69)])
def test_bf16_shrinks_because_exponents_are_apart(name: str, most: float) -> None:
    layout = PageLayout(4, 2, 16, 3, 64, "bf16")
    packed = get_format(name).encode(make_pages(layout, "gaussian", 1, seed=0), layout)[0]
    assert len(packed) < most * layout.page_bytes
    coded = [coding for coding, _ in struct.iter_unpack("<II", packed[8 : 8 + 4 * 8].tobytes())]
    assert coded == [1, 0, 1, 0], "exponents compressed, signs and mantissas stored, for keys and for values"


@pytest.mark.parametrize(("name", "most"), [("raw+lz4", 0.96), ("raw+zstd", 0.85)])
def test_fp32_shrinks_too(name: str, most: float) -> None:
    layout = PageLayout(4, 2, 16, 3, 64, "fp32")
    assert len(get_format(name).encode(make_pages(layout, "gaussian", 1, seed=0), layout)[0]) < most * layout.page_bytes


def test_each_part_is_stored_or_compressed_by_itself() -> None:
    """Of keys that are all zero and values that are noise, only the keys shrink; bytes of q8 are one part per plane."""
    page = make_pages(LAYOUT, "bits", 1, seed=0)
    page[:, :, 0] = 0
    for name, expected in (("raw+zstd", [1, 1, 0, 0]), ("q8/raw+zstd", [1, 0, 0]), ("q8/raw+lz4", [1, 0, 0])):
        packed = get_format(name).encode(page, LAYOUT)[0]
        assert packed[1] == len(expected)
        assert [coding for coding, _ in struct.iter_unpack("<II", packed[8 : 8 + 8 * len(expected)].tobytes())] == expected


@pytest.mark.parametrize("name", ["raw+lz4", "raw+zstd", "q8+lz4", "q4+zstd", "q8/raw;0:fp8+zstd"])
def test_constant_pages_shrink_to_almost_nothing_and_come_back(name: str) -> None:
    format, page = get_format(name), torch.zeros(1, *LAYOUT.shape, dtype=torch.bfloat16)
    packed = format.encode(page, LAYOUT)
    assert len(packed[0]) < 0.05 * format.payload_bytes(LAYOUT)
    assert torch.equal(format.decode(format.unpack(packed, LAYOUT), LAYOUT), page)


@pytest.mark.parametrize("name", ["raw+lz4", "raw+zstd", "q8/q4+zstd"])
def test_stored_on_request_is_read_like_any_other(name: str) -> None:
    format, pages = staged(name), make_pages(LAYOUT, "gaussian", 3, seed=0)
    pages[1] = 0
    stored = format.encode(pages, LAYOUT, compress=False)
    assert [len(payload) for payload in stored] == [format.payload_bytes(LAYOUT)] * 3
    mixed = [stored[0], format.encode(pages, LAYOUT)[1], stored[2]]
    assert torch.equal(format.decode(format.unpack(mixed, LAYOUT), LAYOUT), format.decode(format.unpack(stored, LAYOUT), LAYOUT))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 0), (0, 3), (0, 9), (1, 0), (1, 3), (1, 255), (2, 1), (3, 255), (4, 1), (7, 255), (8, 0), (8, 2), (11, 1), (12, 255), (15, 255)],
)
def test_a_wrong_prefix_or_table_is_refused(stage: str, place: int, value: int) -> None:
    packed = get_format(f"raw+{stage}").encode(torch.zeros(1, *LAYOUT.shape, dtype=torch.bfloat16), LAYOUT)[0]
    assert packed[place] != value
    packed[place] = value
    with pytest.raises(ValueError, match=f"{stage} payload"):
        get_format(f"raw+{stage}").unpack([packed], LAYOUT)


def test_the_other_stage_is_refused() -> None:
    page = torch.zeros(1, *LAYOUT.shape, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="zstd payload says stage 1"):
        get_format("raw+zstd").unpack(get_format("raw+lz4").encode(page, LAYOUT), LAYOUT)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [1 << 24, 1 << 16, 1, 0])
def test_a_part_that_grows_to_another_size_is_refused_without_allocating_it(stage: str, size: int) -> None:
    """A bomb of 16 MiB, and parts that end early, in a payload of 512 KiB whose every other field is right."""
    layout = PageLayout(8, 2, 32, 8, 64, "bf16")
    length = layout.values // 2
    data = bytes(size)
    bomb = lz4.block.compress(data, store_size=False) if stage == "lz4" else zstandard.ZstdCompressor().compress(data)
    assert len(bomb) < length
    inner = get_format("raw").payload_bytes(layout)
    table = struct.pack("<8I", 1, len(bomb), *(0, length) * 3)
    packed = np.frombuffer(struct.pack("<BBHI", {"lz4": 1, "zstd": 2}[stage], 4, 0, inner) + table + bomb + bytes(3 * length), np.uint8)
    del data
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{stage} payload"):
        get_format(f"raw+{stage}").unpack([packed], layout)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_zstd_frame_that_hides_its_size_or_is_followed_by_another_is_refused() -> None:
    length, inner = LAYOUT.values // 2, get_format("raw").payload_bytes(LAYOUT)
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(length))
    two = zstandard.ZstdCompressor().compress(bytes(length)) * 2
    for frame in (hidden, two, b"", b"\x28\xb5\x2f\xfd"):
        table = struct.pack("<8I", 1, len(frame), *(0, length) * 3)
        packed = np.frombuffer(struct.pack("<BBHI", 2, 4, 0, inner) + table + frame + bytes(3 * length), np.uint8)
        with pytest.raises(ValueError, match="zstd payload"):
            get_format("raw+zstd").unpack([packed], LAYOUT)


def test_stages_do_not_stack_and_pages_beyond_their_limit_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed size"):
        Staged(get_format("raw+lz4"), "lz4")
    with pytest.raises(LayoutError, match="the stage takes at most"):
        get_format("raw+zstd").payload_bytes(PageLayout(128, 2, 4096, 32, 128, "fp32"))
