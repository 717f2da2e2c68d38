"""Records proven and decoded as they are read: digests are xxhash's, only what proves itself is decoded, bad input is refused at once."""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.formats import get_format, native
from kvtier.formats.base import Payload
from kvtier.formats.blocks import BlockFormat, Receive
from kvtier.formats.digests import digest_address, short_digest
from kvtier.formats.proof import LEAST_BYTES, Proof
from kvtier.layout import PageLayout

LAYOUT = PageLayout(layers=2, planes=2, page_tokens=16, kv_heads=1, head_dim=64, dtype="bf16")
HEAD_BYTES, KEY_AT, DIGEST_AT, CHECKED_BYTES = 256, 24, 136, 248
MAGIC = b"a kind of head"
KEYS = [bytes([number]) * 32 for number in range(5)]
UNTOUCHED = 2.5
loaded = native.codecs()
INSTRUCTION_SETS = loaded.available() if loaded else []
pytestmark = pytest.mark.skipif(loaded is None, reason=f"native codecs: {native.why_missing()}")


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def features(request):
    """Runs on each instruction set of this machine."""
    assert loaded is not None
    chosen = loaded.features()
    loaded.use(request.param)
    yield request.param
    loaded.use(chosen)


def proof_of(head_bytes=HEAD_BYTES, checked_bytes=CHECKED_BYTES) -> Proof:
    known = len(MAGIC)
    return Proof(MAGIC + bytes(head_bytes - known), b"\xff" * known + bytes(head_bytes - known), KEY_AT, DIGEST_AT, checked_bytes)


def record_of(payload: Payload, key: bytes, head_bytes=HEAD_BYTES, checked_bytes=CHECKED_BYTES, seed=0) -> Payload:
    """With arbitrary bytes wherever nothing is expected, and some behind."""
    record: Payload = np.random.default_rng(seed).integers(0, 256, head_bytes + len(payload) + 7, dtype=np.uint8)
    head = bytearray(record[:head_bytes].tobytes())
    head[: len(MAGIC)] = MAGIC
    head[KEY_AT : KEY_AT + len(key)] = key
    head[DIGEST_AT : DIGEST_AT + 16] = xxhash.xxh3_128_digest(payload.data)
    head[checked_bytes : checked_bytes + 8] = xxhash.xxh3_64_intdigest(bytes(head[:checked_bytes])).to_bytes(8, "little")
    record[:head_bytes] = np.frombuffer(bytes(head), np.uint8)
    record[head_bytes : head_bytes + len(payload)] = payload
    return record


def payloads_of(form: BlockFormat, layout: PageLayout, count: int) -> list[Payload]:
    numbers = torch.randn((count, *layout.shape), generator=torch.Generator().manual_seed(7))
    return form.encode(numbers.to(layout.torch_dtype), layout)


def memory_of(layout: PageLayout, pages: int) -> torch.Tensor:
    return torch.full((pages, *layout.shape), UNTOUCHED, dtype=layout.torch_dtype)


def form_of(name: str) -> BlockFormat:
    form = get_format(name)
    assert isinstance(form, BlockFormat)
    return form


def prove(receive: Receive, records: list[Any], keys: list[bytes], rows: list[int]) -> bytes:
    """Which of these, which are of one size, are placed, each read alone and whole."""
    arrivals = receive(len(records[0]), [1] * len(records), keys, rows)
    for index, record in enumerate(records):
        arrivals.take(index, len(record), record)
    return arrivals.placed()


@given(payload=st.binary(max_size=600))
def test_the_short_digest_of_any_payload_is_that_of_xxhash(payload):
    array = np.frombuffer(payload, np.uint8)
    assert short_digest(array, xxhash.xxh3_128_digest(payload)) == short_digest(array, None) == xxhash.xxh3_64_intdigest(payload)


@pytest.mark.parametrize("name", ["raw", "q8", "q4"])
@pytest.mark.parametrize("known", [True, False])
def test_digests_made_while_encoding_are_those_of_the_payloads(features, monkeypatch, name, known):
    if not known:
        monkeypatch.setattr("kvtier.formats.blocks.digest_address", lambda: 0)
    form = form_of(name)
    pages = torch.randn((3, *LAYOUT.shape), generator=torch.Generator().manual_seed(7)).to(LAYOUT.torch_dtype)
    room = list(np.zeros((3, form.payload_bytes(LAYOUT)), np.uint8))
    for rows, out, first in ((None, room, ()), (None, room, (1,)), (None, None, ()), ([2, 0], None, (1,)), ([], None, ())):
        payloads, digests = form.encode_with_digests(pages, LAYOUT, rows, out, first)
        assert digests == [xxhash.xxh3_128_digest(payload.data) for payload in payloads], features
        expected = form.encode(pages, LAYOUT, rows, None, first)
        assert all(np.array_equal(a, b) for a, b in zip(payloads, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["raw", "q8", "q6", "q4"]),
    tokens=st.integers(8, 70),
    heads=st.integers(1, 3),
    layers=st.integers(1, 5),
    checked_bytes=st.integers(LEAST_BYTES, 5000),
    seed=st.integers(0, 100),
)
def test_digests_of_any_length_are_those_of_xxhash(features, name, tokens, heads, layers, checked_bytes, seed):
    layout = PageLayout(layers=layers, planes=1, page_tokens=tokens, kv_heads=heads, head_dim=64, dtype="bf16")
    form, head_bytes = form_of(name), checked_bytes + 8
    payloads = payloads_of(form, layout, 2)
    sizes = {"head_bytes": head_bytes, "checked_bytes": checked_bytes}
    memory = memory_of(layout, 2)
    receive = form.receiver(layout, proof_of(**sizes), memory)
    assert receive is not None
    assert prove(receive, [record_of(each, KEYS[0], **sizes, seed=seed) for each in payloads], KEYS[:1] * 2, [1, 0]) == b"\1\1", features
    assert torch.equal(memory[[1, 0]].view(torch.uint8), form.decode(payloads, layout).view(torch.uint8))


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(["q4", "raw"]))
def test_law_1_a_flipped_bit_anywhere_leaves_that_record_alone_undecoded(features, where, bit, name):
    form = form_of(name)
    payloads = payloads_of(form, LAYOUT, 5)
    records = [record_of(payload, key) for payload, key in zip(payloads, KEYS, strict=True)]
    records[2][int(where * (HEAD_BYTES + len(payloads[2])))] ^= 1 << bit
    memory, rows = memory_of(LAYOUT, 6), [4, 0, 2, 5, 3]
    receive = form.receiver(LAYOUT, proof_of(), memory)
    assert receive is not None
    offset = int(where * (HEAD_BYTES + len(payloads[2])))
    # Behind the head's digest nothing is covered, nor expected to be anything.
    means_nothing = CHECKED_BYTES + 8 <= offset < HEAD_BYTES
    assert prove(receive, records, KEYS, rows) == bytes([1, 1, means_nothing, 1, 1]), features
    expected = memory_of(LAYOUT, 6)
    good = [place for place in range(5) if place != 2 or means_nothing]
    expected[[rows[place] for place in good]] = form.decode([payloads[place] for place in good], LAYOUT)
    assert torch.equal(memory.view(torch.uint8), expected.view(torch.uint8))


def test_law_1_a_sound_record_of_another_page_or_kind_is_not_decoded(features):
    form = form_of("q4")
    payload = payloads_of(form, LAYOUT, 1)[0]
    other_kind = record_of(payload, KEYS[0])
    other_kind[0] ^= 1
    digest = xxhash.xxh3_64_intdigest(other_kind[:CHECKED_BYTES].data)
    other_kind[CHECKED_BYTES : CHECKED_BYTES + 8] = np.frombuffer(digest.to_bytes(8, "little"), np.uint8)
    memory = memory_of(LAYOUT, 2)
    receive = form.receiver(LAYOUT, proof_of(), memory)
    assert receive is not None
    assert prove(receive, [record_of(payload, KEYS[1]), other_kind], KEYS[:1] * 2, [0, 1]) == b"\0\0", features
    assert (memory == UNTOUCHED).all()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (16, 3), (256, 8)])
@pytest.mark.parametrize(
    ("name", "dtype"), [("q8", "fp32"), ("q4", "bf16"), ("q6", "fp16"), ("q3", "bf16"), ("q4_0", "bf16"), ("raw", "fp16")]
)
def test_targets_and_blocks_of_any_size_and_alignment_get_every_byte_and_nothing_beside_them(features, shift, tokens, heads, name, dtype):
    layout = PageLayout(layers=2, planes=2, page_tokens=tokens, kv_heads=heads, head_dim=128, dtype=dtype)
    form = form_of(name)
    payloads = payloads_of(form, layout, 2)
    size, values = layout.torch_dtype.itemsize, 3 * layout.values
    room = torch.full((values + 64,), UNTOUCHED, dtype=layout.torch_dtype)
    start = (-room.data_ptr() % 64) // size + shift
    memory = room[start : start + values].view(3, *layout.shape)
    receive = form.receiver(layout, proof_of(), memory)
    assert receive is not None
    assert prove(receive, [record_of(payload, KEYS[0]) for payload in payloads], KEYS[:1] * 2, [2, 0]) == b"\1\1", features
    assert torch.equal(memory[[2, 0]], form.decode(payloads, layout))
    assert (memory[1] == UNTOUCHED).all()
    assert (room[:start] == UNTOUCHED).all()
    assert (room[start + memory.numel() :] == UNTOUCHED).all()


@pytest.mark.parametrize("read", [-1, 0, 1, "one less", "two", "two and a bit", "all"])
def test_law_1_of_records_read_together_only_those_that_are_whole_are_decoded(features, read):
    form = form_of("q4")
    payloads = payloads_of(form, LAYOUT, 4)
    room = np.concatenate([record_of(payload, key) for payload, key in zip(payloads, KEYS[:4], strict=True)])
    size = len(room) // 4
    memory, rows = memory_of(LAYOUT, 4), [3, 1, 0, 2]
    receive = form.receiver(LAYOUT, proof_of(), memory)
    assert receive is not None
    arrivals = receive(size, [3, 1], KEYS[:4], rows)
    names = {"one less": size - 1, "two": 2 * size, "two and a bit": 2 * size + 1, "all": 3 * size}
    whole = {"two": 2, "two and a bit": 2, "all": 3}.get(read, 0)
    arrivals.take(0, names.get(read, read), room)
    expected = memory_of(LAYOUT, 4)
    expected[rows[:whole]] = form.decode(payloads[:whole], LAYOUT)
    assert arrivals.placed() == bytes([*[1] * whole, *[0] * (4 - whole)]), features
    assert torch.equal(memory.view(torch.uint8), expected.view(torch.uint8))
    arrivals.take(1, size, room[3 * size :])
    assert arrivals.placed()[3] == 1
    assert torch.equal(memory[2], form.decode(payloads[3:], LAYOUT)[0])


@pytest.mark.parametrize("counts", [[], [1], [3], [2, 1], [1, 1, -1, 1], [1, 2]])
def test_groups_that_do_not_make_the_records_are_refused(counts):
    form = form_of("q4")
    record, memory = record_of(payloads_of(form, LAYOUT, 1)[0], KEYS[0]), memory_of(LAYOUT, 2)
    receive = form.receiver(LAYOUT, proof_of(), memory)
    assert receive is not None
    with pytest.raises(ValueError, match="2 records"):
        receive(len(record), counts, KEYS[:1] * 2, [0, 1])
    whole, text = receive(len(record), [0, 2, 0], KEYS[:1] * 2, [0, 1]), cast(Any, "text")
    for group in (-1, 3):
        with pytest.raises(IndexError):
            whole.take(group, len(record), record)
    with pytest.raises(ValueError, match="were read into memory of"):
        whole.take(1, len(record) + 1, record)
    with pytest.raises(TypeError):
        whole.take(1, len(record), text)
    assert whole.placed() == b"\0\0"
    assert (memory == UNTOUCHED).all()


def test_bad_input_is_refused_before_anything_is_written():
    form = form_of("q4")
    payload = payloads_of(form, LAYOUT, 1)[0]
    record, memory = record_of(payload, KEYS[0]), memory_of(LAYOUT, 2)
    receive = form.receiver(LAYOUT, proof_of(), memory)
    assert receive is not None
    size = len(record)
    bad: list[tuple[Any, list[Any], list[int], type[Exception]]] = [
        (HEAD_BYTES + len(payload) - 1, KEYS[:1] * 2, [0, 1], ValueError),
        (sys.maxsize + 1, KEYS[:1] * 2, [0, 1], ValueError),
        (-1, KEYS[:1] * 2, [0, 1], OverflowError),
        ("text", KEYS[:1] * 2, [0, 1], TypeError),
        (size, KEYS[:1], [0, 1], ValueError),
        (size, KEYS[:1], [0], ValueError),
        (size, [KEYS[0], bytes(HEAD_BYTES)], [0, 1], ValueError),
        (size, [KEYS[0], "text"], [0, 1], TypeError),
        (size, KEYS[:1] * 2, [0, 2], LayoutError),
    ]
    for record_bytes, keys, rows, error in bad:
        with pytest.raises(error):
            receive(record_bytes, [1, 1], keys, rows)
    assert (memory == UNTOUCHED).all()
    with pytest.raises(LayoutError):
        form.receiver(LAYOUT, proof_of(), memory[:, :1])


def test_what_is_no_proof_is_refused():
    form, memory = form_of("q4"), memory_of(LAYOUT, 1)
    good = proof_of()
    for bad in (
        Proof(good.expected, good.mask[:-1], KEY_AT, DIGEST_AT, CHECKED_BYTES),
        Proof(good.expected, good.mask, -1, DIGEST_AT, CHECKED_BYTES),
        Proof(good.expected, good.mask, KEY_AT, HEAD_BYTES - 15, CHECKED_BYTES),
        Proof(good.expected, good.mask, KEY_AT, DIGEST_AT, LEAST_BYTES - 1),
        Proof(good.expected, good.mask, KEY_AT, DIGEST_AT, HEAD_BYTES - 7),
    ):
        receive = form.receiver(LAYOUT, bad, memory)
        assert receive is not None
        with pytest.raises(ValueError, match="proof"):
            receive(1 << 20, [], [], [])


def test_records_cannot_be_proven_without_a_function_that_digests():
    assert loaded is not None
    native_plan, memory = form_of("q4")._plan_of(LAYOUT).native, memory_of(LAYOUT, 1)
    assert native_plan is not None
    plan, record = native_plan[1], record_of(payloads_of(form_of("q4"), LAYOUT, 1)[0], KEYS[0])
    with pytest.raises(ValueError, match="digest"):
        loaded.arrivals(plan, proof_of().packed, len(record), [1], KEYS[:1], memory.data_ptr(), [0], LAYOUT.page_bytes, 0)
    assert (memory == UNTOUCHED).all()


def test_without_the_librarys_function_there_is_no_receiver(monkeypatch):
    monkeypatch.setattr("kvtier.formats.blocks.digest_address", lambda: 0)
    assert form_of("q4").receiver(LAYOUT, proof_of(), memory_of(LAYOUT, 1)) is None


def test_the_installed_xxhash_has_the_function():
    assert digest_address()


@pytest.mark.parametrize("names", [("no_such_name",), ("XXH32",)])
def test_what_is_not_there_or_another_function_is_not_called(monkeypatch, names):
    monkeypatch.setattr("kvtier.formats.digests._NAMES", names)
    assert digest_address.__wrapped__() == 0
