"""Copies that the disk tier verifies and decodes at once: never a wrong page, and what is refused is refused as by `load`."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.formats import get_format, native
from kvtier.io.files import page_aligned
from kvtier.layout import PageLayout
from kvtier.testing.tiers import page_id, staging
from kvtier.tiers.base import Refused
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.record import HEADER_BYTES
from tests.tiers.disk import flip, open_disk, segment

LAYOUT = PageLayout(layers=3, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="bf16")
Q4 = get_format("q4")
PAGES = 12
UNTOUCHED = 2.5
needs_native = pytest.mark.skipif(native.codecs() is None, reason=f"native codecs: {native.why_missing()}")


def pages() -> torch.Tensor:
    return torch.randn((PAGES, *LAYOUT.shape), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.fixture
def tier(tmp_path):
    made = open_disk(tmp_path / "store", layout=LAYOUT, format=Q4, capacity=1 << 20)
    slots = made.reserve(PAGES)
    assert slots == list(range(PAGES))
    assert made.store(slots, [page_id(n) for n in slots], Q4.encode(pages(), LAYOUT)) == [None] * PAGES
    yield made
    made.close()


def placed(tier: DiskTier, numbers: list[int], keys: list[int] | None = None) -> tuple[dict[int, Any], torch.Tensor]:
    """What came of slots `numbers`, page i into row i, and the rows."""
    memory = torch.full((PAGES, *LAYOUT.shape), UNTOUCHED, dtype=torch.bfloat16)
    wanted = [page_id(n).key for n in keys or numbers]
    groups = tier.place_some(numbers, wanted, staging(tier, len(numbers)), memory, list(range(len(numbers))))
    return dict(each for group in groups for each in group), memory


def check(found: dict[int, Any], memory: torch.Tensor, numbers: list[int], refused: dict[int, str]) -> None:
    """These are refused, their rows as they were; all others are decoded."""
    assert {index: copy.reason for index, copy in found.items() if isinstance(copy, Refused)} == refused
    assert sorted(found) == list(range(len(numbers)))
    decoded = Q4.decode(Q4.encode(pages(), LAYOUT), LAYOUT)
    for index, number in enumerate(numbers):
        if index in refused:
            assert (memory[index] == UNTOUCHED).all()
        else:
            assert found[index] == Q4.payload_bytes(LAYOUT)
            assert torch.equal(memory[index], decoded[number])
    assert (memory[len(numbers) :] == UNTOUCHED).all()


@needs_native
def test_pages_in_any_order_are_decoded_where_they_belong(tier):
    for numbers in (list(range(PAGES)), list(reversed(range(PAGES))), [7, 2, 3, 4, 11], [5]):
        check(*placed(tier, numbers), numbers, {})
    assert placed(tier, [])[0] == {}


@needs_native
@pytest.mark.parametrize("offset", [0, 30, 200, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5000])
def test_law_1_a_damaged_page_amid_others_is_refused_and_they_are_placed(tier, offset):
    flip(segment(tier._directory.path), 5 * tier.slot_bytes + offset, 3)
    check(*placed(tier, list(range(PAGES))), list(range(PAGES)), {5: "checksum"})
    assert tier.counters["refused: checksum"] == 1


@needs_native
def test_law_1_another_page_no_page_and_a_missing_end_are_refused_and_the_others_placed(tier):
    tier.free([3])
    os.truncate(segment(tier._directory.path), (PAGES - 1) * tier.slot_bytes + 100)
    numbers = list(range(PAGES))
    check(*placed(tier, numbers, [0, 1, 2, 3, 9, *range(5, PAGES)]), numbers, {3: "key", 4: "key", PAGES - 1: "truncated"})
    refused = {reason: count for reason, count in tier.counters.items() if reason.startswith("refused")}
    assert refused == {"refused: key": 2, "refused: truncated": 1}


@needs_native
def test_law_1_a_record_of_another_format_or_layout_is_refused(tier, tmp_path):
    other_layout = PageLayout(layers=3, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="fp16")
    other = open_disk(tmp_path / "other", layout=other_layout, format=Q4, capacity=1 << 20)
    assert other.slot_bytes == tier.slot_bytes
    assert other.reserve(1) == [0]
    assert other.store([0], [page_id(4)], Q4.encode(pages()[:1].half(), other_layout)) == [None]
    record = segment(other._directory.path).read_bytes()
    other.close()
    with segment(tier._directory.path).open("r+b") as file:
        file.seek(4 * tier.slot_bytes)
        file.write(record[: tier.slot_bytes])
    check(*placed(tier, list(range(PAGES))), list(range(PAGES)), {4: "format"})


@needs_native
def test_reads_that_fail_are_refused_and_the_others_placed(tier, monkeypatch):
    read_then = type(tier._segments.engine).read_then

    def failing(requests, *others):
        nowhere = 1 << 20  # no file has this number
        return read_then(tier._segments.engine, [each._replace(file=nowhere) if each.offset == 0 else each for each in requests], *others)

    monkeypatch.setattr(tier._segments.engine, "read_then", failing)
    numbers = [0, 7, 8, 2]
    check(*placed(tier, numbers), numbers, {0: f"io: {os.strerror(errno.EBADF)}"})


@needs_native
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_after_it_was_left_early_nobody_writes_into_staging_or_memory(tier, ahead, taken):
    memory, rows = torch.full((PAGES, *LAYOUT.shape), UNTOUCHED, dtype=torch.bfloat16), page_aligned(PAGES * tier.slot_bytes)
    room = rows.reshape(PAGES, tier.slot_bytes)
    place = tier.place_ahead if ahead else tier.place_some
    some = place(list(range(PAGES)), [page_id(n).key for n in range(PAGES)], room, memory, list(range(PAGES)))
    for _ in range(taken):
        next(some)
    some.close()
    memory[:], rows[:] = UNTOUCHED, 0xEE
    check(*placed(tier, list(range(PAGES))), list(range(PAGES)), {})
    assert (memory == UNTOUCHED).all()
    assert (rows == 0xEE).all()
    tier.close()


@needs_native
def test_what_was_begun_ahead_goes_on_by_itself_and_gives_the_same(tier):
    tier.free([3])
    flip(segment(tier._directory.path), 5 * tier.slot_bytes + 1000, 3)
    memory, numbers = torch.full((PAGES, *LAYOUT.shape), UNTOUCHED, dtype=torch.bfloat16), list(range(PAGES))
    room = page_aligned(PAGES * tier.slot_bytes).reshape(PAGES, tier.slot_bytes)
    some = tier.place_ahead(numbers, [page_id(n).key for n in numbers], room, memory, numbers)
    deadline = time.monotonic() + 10
    while (memory[[n for n in numbers if n not in (3, 5)]] == UNTOUCHED).any() and time.monotonic() < deadline:
        time.sleep(0.001)
    found = dict(each for group in some for each in group)
    check(found, memory, numbers, {3: "key", 5: "checksum"})


@pytest.mark.parametrize("why", ["kernels", "threads", "file"])
def test_nothing_is_begun_ahead_where_that_might_wait(tier, monkeypatch, why):
    if why == "kernels":
        monkeypatch.setattr(type(Q4), "receiver", lambda *_: None)
    elif why == "threads":
        tier._segments.engine.reads_ahead = False
    else:
        monkeypatch.setattr(tier._segments, "_files", {})
        monkeypatch.setattr(tier._segments, "file", lambda _: pytest.fail("opened"))
    memory = torch.full((PAGES, *LAYOUT.shape), UNTOUCHED, dtype=torch.bfloat16)
    assert tier.place_ahead([0, 1], [page_id(n).key for n in (0, 1)], staging(tier, 2), memory, [0, 1]) is None
    assert (memory == UNTOUCHED).all()
    monkeypatch.undo()


def test_without_compiled_kernels_payloads_are_given_to_be_decoded(tier, monkeypatch):
    monkeypatch.setattr(type(Q4), "receiver", lambda *_: None)
    found, memory = placed(tier, [3, 1])
    payloads = Q4.encode(pages(), LAYOUT)
    assert np.array_equal(found[0], payloads[3])
    assert np.array_equal(found[1], payloads[1])
    assert (memory == UNTOUCHED).all()


def test_a_closed_tier_refuses_all(tier):
    tier.close()
    found, memory = placed(tier, [0, 1])
    assert found == {0: Refused("closed"), 1: Refused("closed")}
    assert (memory == UNTOUCHED).all()
