"""Laws checked: a digest made on a GPU is bit for bit that of xxhash, which the records of the disk tier carry; nothing else is written;
what does not fit is refused before anything is queued.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.formats import checksums
from kvtier.formats.proof import LEAST_BYTES
from kvtier.tiers.disk import record
from tests.compiled import DEVICE, found_by, needs_triton


def ranges_of(count: int, length: int, seed: int, spare: int = 0) -> torch.Tensor:
    """`[count, length]` random bytes whose rows lie `spare` words further apart than they need."""
    row_bytes = -(-length // 8) * 8 + 8 * spare
    room = np.random.default_rng(seed).integers(0, 256, (count, row_bytes), np.uint8)
    return torch.from_numpy(room).to(DEVICE)[:, :length]


def by_kernels(ranges: torch.Tensor) -> torch.Tensor:
    """Digests `[n, 2]`, with a row before and one behind that must stay as they are."""
    out = torch.full((len(ranges) + 2, 2), 7, dtype=torch.int64, device=ranges.device)
    checksums.launch(ranges, out[1:-1])
    assert bool((out[[0, -1]] == 7).all())
    return out[1:-1].cpu()


@needs_triton
@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(1, 3), length=st.integers(LEAST_BYTES, 20_000), seed=st.integers(0, 1000), spare=st.integers(0, 3))
@example(count=1, length=241, seed=0, spare=0)
@example(count=2, length=1024, seed=1, spare=1)  # the last block is whole, and not scrambled
@example(count=2, length=1025, seed=2, spare=0)  # the last block has only its overlapping stripe
@example(count=1, length=1024 * 8 * 2 + 1, seed=3, spare=0)  # a whole number of turns
@example(count=1, length=1024 * 16 + 1, seed=4, spare=0)  # a whole number of programs, and a block
def test_the_kernels_digest_every_length_as_xxhash_does(count, length, seed, spare):
    ranges = ranges_of(count, length, seed, spare)
    found = by_kernels(ranges)
    payloads = [row.tobytes() for row in ranges.cpu().numpy()]
    assert checksums.digest_bytes(found.numpy()) == [xxhash.xxh3_128_digest(payload) for payload in payloads]
    assert found.numpy().view(np.uint64)[:, 0].tolist() == [xxhash.xxh3_64_intdigest(payload) for payload in payloads]


@needs_triton
@pytest.mark.parametrize("fill", [0, 0xFF])
def test_bytes_that_are_all_alike_carry_over_every_word(fill):
    ranges = torch.full((1, 5000), fill, dtype=torch.uint8, device=DEVICE)
    assert checksums.digest_bytes(by_kernels(ranges).numpy()) == [xxhash.xxh3_128_digest(bytes([fill]) * 5000)]


@needs_triton
@pytest.mark.parametrize("length", [241, 1088, 3000])
def test_every_single_bit_that_flips_is_seen(length):
    whole = ranges_of(1, length, 5)
    ranges = whole.repeat(60, 1)[:, :length]
    ranges = torch.nn.functional.pad(ranges, (0, -length % 8))[:, :length]
    for row, place in enumerate(np.linspace(0, length - 1, 60, dtype=int)):
        ranges[row, place] ^= 1 << (row % 8)
    digests = checksums.digest_bytes(by_kernels(ranges).numpy())
    assert len({*digests, *checksums.digest_bytes(by_kernels(whole).numpy())}) == 61


def test_what_a_record_says_is_what_the_digest_gives():
    """In CPU memory, where no kernel is needed, as on a GPU."""
    payloads = ranges_of(4, 777, 1, 2)
    out = torch.zeros((4, 2), dtype=torch.int64, device=DEVICE)
    checksums.xxh3_128(payloads, out)
    expected = [record.payload_checksum(np.ascontiguousarray(row)) for row in payloads.cpu().numpy()]
    assert checksums.digest_bytes(out.cpu().numpy()) == expected
    checksums.xxh3_128(payloads[:0], out[:0])


def test_what_does_not_fit_is_refused_and_nothing_is_written():
    good, out = ranges_of(2, 256, 0, 1), torch.zeros((2, 2), dtype=torch.int64, device=DEVICE)
    crooked = torch.zeros(2 * 300, dtype=torch.uint8, device=DEVICE).view(2, 300)[:, :256]
    with pytest.raises(LayoutError, match=r"expected uint8 \[n, at least 241\]"):
        checksums.xxh3_128(good[:, :240], out)
    with pytest.raises(LayoutError, match="300 bytes apart; expected multiples of 8"):
        checksums.xxh3_128(crooked, out)
    with pytest.raises(LayoutError, match=r"expected contiguous int64 \[2, 2\]"):
        checksums.xxh3_128(good, out[:1])
    meta = torch.zeros((2, 256), dtype=torch.uint8, device="meta")
    with pytest.raises(LayoutError, match="cannot be digested there"):
        checksums.xxh3_128(meta, torch.zeros((2, 2), dtype=torch.int64, device="meta"))
    assert not out.any()


@needs_triton
@pytest.mark.slow
def test_compiled_for_a_gpu_the_kernels_read_wide_and_spill_nothing(tmp_path):
    """Needs no GPU: Triton compiles for one all the same."""
    found = found_by(Path(__file__).with_name("compile_checksums.py"), tmp_path)
    assert set(found) == {"block_sums", "digest"}
    assert "ld.global.v2.b64" in found["block_sums"]["instructions"], "16 bytes a load"
    assert "mul.hi.u64" in found["digest"]["instructions"]
    for kernel in found.values():
        assert kernel["local_bytes"] == 0
        assert not [name for name in kernel["instructions"] if name.startswith(("call", "ld.local", "st.local"))]
