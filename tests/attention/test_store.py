"""Laws checked: a digest is found by its row and only under its key, and the store never holds more than it has room for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.attention.digest import digest_page_bytes
from kvtier.attention.store import DigestStore
from kvtier.errors import ConfigError
from kvtier.layout import PageLayout
from kvtier.testing.accelerator import LateAccelerator

LAYOUT = PageLayout(2, 2, 4, 1, 8, "fp32")


def make_store(pages: int) -> DigestStore:
    return DigestStore(LAYOUT, pages * digest_page_bytes(LAYOUT))


def digest_of(key: bytes, store: DigestStore) -> torch.Tensor:
    return torch.full((1, LAYOUT.layers, LAYOUT.kv_heads, store.shape.digest_bytes), key[0], dtype=torch.uint8)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 9), st.sampled_from([b"a", b"b", b"c"])),
            st.tuples(st.just("get"), st.integers(0, 9), st.sampled_from([b"a", b"b", b"c"])),
            st.tuples(st.just("drop"), st.integers(0, 9), st.just(b"")),
        ),
        max_size=60,
    )
)
def test_what_comes_back_is_what_was_put_last_least_recently_used_first_out(steps):
    store = make_store(4)
    model: dict[int, bytes] = {}
    for step, row, key in steps:
        if step == "put":
            model.pop(row, None)
            if len(model) == 4:
                del model[next(iter(model))]
            model[row] = key
            store.put([row], [key], digest_of(key, store))
        elif step == "drop":
            model.pop(row, None)
            store.drop([row])
        else:
            known = model.pop(row, None)
            found, digests = store.get([row], [key])
            assert found == ([0] if known == key else [])
            if known == key:
                model[row] = key
                assert torch.equal(digests, digest_of(key, store))
        assert len(store) == len(model) <= store.capacity_pages


def test_of_too_many_the_last_are_kept():
    store = make_store(2)
    keys = [b"a", b"b", b"c"]
    store.put([1, 2, 3], keys, torch.cat([digest_of(key, store) for key in keys]))
    found, digests = store.get([1, 2, 3], keys)
    assert found == [1, 2]
    assert torch.equal(digests, torch.cat([digest_of(key, store) for key in keys[1:]]))


def test_room_for_not_even_one_page_is_refused():
    with pytest.raises(ConfigError, match=r"attention\.digest_bytes is 3, but the digests of one page of this model take \d+ bytes"):
        DigestStore(LAYOUT, 3)


def test_room_that_a_gpu_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"attention\.digest_bytes: 4096 bytes cannot be allocated on cpu: out of memory"):
        DigestStore(LAYOUT, 4096, LateAccelerator(total_bytes=1024))


def test_on_a_gpu_digests_are_read_after_they_were_written_and_written_after_they_were_read(monkeypatch):
    gpu = LateAccelerator()
    store = DigestStore(LAYOUT, digest_page_bytes(LAYOUT), gpu)
    gpu.engine = first = gpu.new_stream()
    store.put([1], [b"a"], digest_of(b"a", store))
    assert first.pending, "the thread does not wait"
    gpu.engine = second = gpu.new_stream()
    found, digests = store.get([1], [b"a"])
    assert found == [0]
    assert torch.equal(digests, digest_of(b"a", store))
    read: list[torch.Tensor] = []

    def later(work: Callable[[], torch.Tensor]) -> torch.Tensor:
        second.run(lambda: read.append(work()))
        return torch.empty(0)

    monkeypatch.setattr(second, "result", later)
    store.get([1], [b"a"])
    gpu.engine = first
    store.put([2], [b"b"], digest_of(b"b", store))
    first.record().wait()
    assert torch.equal(read[0], digest_of(b"a", store))
