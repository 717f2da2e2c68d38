"""What a format may ask of memory: strides, addresses, room that is given, and that nothing else is written.

Part of `FormatContract` (`formats.py`). Needs pytest and Hypothesis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.formats import Payload
from kvtier.layout import PageLayout
from kvtier.testing.format_numbers import FormatNumbers, law, relative_error, same_bits, same_payloads
from kvtier.testing.strategies import make_pages, pages

GUARD = 0xA5
"""What memory holds that must not be written."""
_NO_ROWS: list[Any] = [np.array([0, 1]), torch.tensor([0, 1]), [0.0, 1.0], "01", 2]
"""Of which none is a sequence of whole numbers."""


class FormatMemory(FormatNumbers):
    """As `FormatNumbers`, which is part of this."""

    @law
    @given(st.data())
    def test_strides_make_no_difference_beyond_rounding(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout, kinds=("gaussian", "outlier channels")))
        heads_first = batch.transpose(3, 4).contiguous().transpose(3, 4)
        plain, strided = self.round_trip(batch, layout), self.round_trip(heads_first, layout)
        assert relative_error(strided, plain) <= self.outlier_error / 4
        assert format.lossless <= same_bits(strided, plain)

    @law
    @given(st.data())
    def test_encode_writes_its_payloads_into_out_and_nothing_else(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout))
        rows = data.draw(st.lists(st.integers(0, len(batch) - 1), max_size=4))
        room = format.payload_bytes(layout) + data.draw(st.integers(0, 9))
        memory = np.full((len(rows) + 1, room + 2), GUARD, np.uint8)
        payloads = format.encode(batch, layout, rows, [row[1:-1] for row in memory])
        assert same_payloads(payloads, format.encode(batch, layout, rows))
        for payload, row in zip(payloads, memory, strict=False):
            assert np.array_equal(row[1 : 1 + len(payload)], payload)
            assert np.shares_memory(payload, row)
            assert row[0] == GUARD
            assert (row[1 + len(payload) :] == GUARD).all()
        assert (memory[len(rows)] == GUARD).all()

    def test_out_that_cannot_take_the_payloads_is_refused_before_anything_is_written(self) -> None:
        format, layout = self.make_format(), PageLayout(2, 2, 16, 2, self.head_dims[0])
        batch, size = make_pages(layout, "gaussian", 2, seed=0), format.payload_bytes(layout)
        good = np.full((2, size), GUARD, np.uint8)
        read_only = np.full(size, GUARD, np.uint8)
        read_only.flags.writeable = False
        wrong = [np.zeros(size - 1, np.uint8), np.zeros(size, np.int8), np.zeros((size, 1), np.uint8), np.zeros(2 * size, np.uint8)[::2]]
        no_arrays: list[Any] = [bytes(size), torch.zeros(size, dtype=torch.uint8), None]
        for out in ([], [good[0]], *([good[0], each] for each in [*wrong, read_only, *no_arrays])):
            with pytest.raises(LayoutError, match="out"):
                format.encode(batch, layout, out=out)
        for rows in ([0, 2], [-1, 0], *_NO_ROWS):
            with pytest.raises(LayoutError, match="rows"):
                format.encode(batch, layout, rows, list(good))
        assert (good == GUARD).all()

    @law
    @given(st.data())
    def test_decode_writes_the_rows_and_layers_of_out_and_nothing_else(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        payloads = format.unpack(format.encode(data.draw(pages(layout)), layout), layout)
        first = data.draw(st.integers(0, layout.layers - 1))
        layers = slice(first, data.draw(st.integers(first, layout.layers)))
        rows = data.draw(st.permutations(range(len(payloads) + 2)))[: len(payloads)]
        pool = torch.full((len(payloads) + 2, layout.page_bytes), GUARD, dtype=torch.uint8).view(layout.torch_dtype).view(-1, *layout.shape)
        expected = pool.clone()
        expected[rows, layers] = format.decode(payloads, layout, layers)
        out = pool[:, layers]
        assert format.decode(payloads, layout, layers, out, rows) is out
        assert same_bits(pool, expected)
        expected[: len(payloads), layers] = format.decode(payloads, layout, layers)
        format.decode(payloads, layout, layers, pool[:, layers])
        assert same_bits(pool, expected)

    def test_out_that_cannot_take_the_pages_is_refused_before_anything_is_written(self) -> None:
        format, layout = self.make_format(), PageLayout(3, 2, 16, 2, self.head_dims[0])
        payloads = format.unpack(format.encode(make_pages(layout, "gaussian", 2, seed=0), layout), layout)
        guard = float(torch.full((2,), GUARD, dtype=torch.uint8).view(torch.bfloat16).float())
        good = torch.full((4, *layout.shape), guard, dtype=torch.bfloat16)
        strided = good.transpose(3, 4).contiguous().transpose(3, 4)
        for out in (good.float(), good[:, :2], good[..., :-1], strided, good[:1], good.flatten(4), good.to("meta")):
            with pytest.raises(LayoutError, match="decode"):
                format.decode(payloads, layout, out=out)
        for rows in ([0], [0, 1, 2], [0, 4], [-1, 0], [], *_NO_ROWS):
            with pytest.raises(LayoutError, match="rows"):
                format.decode(payloads, layout, out=good, rows=rows)
        with pytest.raises(LayoutError, match="rows without out"):
            format.decode(payloads, layout, rows=[0, 1])
        assert bool((good == guard).all())

    def test_payloads_that_are_not_contiguous_are_refused(self) -> None:
        format, layout = self.make_format(), PageLayout(2, 2, 16, 2, self.head_dims[0])
        payload = format.encode(make_pages(layout, "gaussian", 1, seed=0), layout)[0]
        unpacked = format.unpack([payload], layout)[0]
        with pytest.raises(ValueError, match="expected contiguous"):
            format.decode(format.unpack([_apart(payload)], layout), layout)
        for out in (None, torch.empty((1, *layout.shape), dtype=layout.torch_dtype)):
            with pytest.raises(ValueError, match="expected contiguous"):
                format.decode([_apart(unpacked)], layout, out=out)

    def test_payloads_that_are_no_arrays_are_refused(self) -> None:
        format, layout = self.make_format(), PageLayout(2, 2, 16, 2, self.head_dims[0])
        payload = format.encode(make_pages(layout, "gaussian", 1, seed=0), layout)[0]
        strange: list[Any] = [payload.tobytes(), torch.from_numpy(payload.copy()), None]
        for each in strange:
            with pytest.raises(ValueError, match="expected contiguous"):
                format.decode(format.unpack([each], layout), layout)

    def test_payloads_may_be_at_any_address(self) -> None:
        format, layout = self.make_format(), PageLayout(2, 2, 16, 2, self.head_dims[0])
        batch = make_pages(layout, "gaussian", 2, seed=0)
        payloads = format.encode(batch, layout)
        pages = format.decode(format.unpack(payloads, layout), layout)
        for offset in range(1, 9):
            room = [shifted(np.zeros(format.payload_bytes(layout), np.uint8), offset) for _ in batch]
            assert same_payloads(format.encode(batch, layout, out=room), payloads)
            moved = [shifted(payload, offset) for payload in payloads]
            assert same_bits(format.decode(format.unpack(moved, layout), layout, out=torch.zeros_like(batch)), pages)

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_numbers_that_begin_inside_one_are_refused_before_anything_is_written(self, dtype: str) -> None:
        format, layout = self.make_format(), PageLayout(2, 2, 16, 2, self.head_dims[0], dtype)
        batch = make_pages(layout, "gaussian", 2, seed=0)
        payloads = format.unpack(format.encode(batch, layout), layout)
        room = np.full((2, format.payload_bytes(layout)), GUARD, np.uint8)
        for offset in range(1, batch.element_size()):
            memory = shifted(batch.flatten().view(torch.uint8).numpy(), offset)
            before = memory.copy()
            odd = torch.frombuffer(memory, dtype=batch.dtype).view(batch.shape)
            for rows in (None, [1, 0]):
                for encode in (format.encode, format.encode_with_digests):
                    with pytest.raises(LayoutError, match="address"):
                        encode(odd, layout, rows, list(room))
                with pytest.raises(LayoutError, match="address"):
                    format.decode(payloads, layout, out=odd, rows=rows)
            assert np.array_equal(memory, before)
        assert (room == GUARD).all()


def _apart(payload: Payload) -> Payload:
    """The same bytes, every second one in memory."""
    return np.repeat(payload, 2)[::2]


def shifted(payload: Payload, offset: int) -> Payload:
    """The same bytes, `offset` bytes behind a multiple of 64."""
    memory = np.zeros(len(payload) + 64 + offset, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    memory[start : start + len(payload)] = payload
    return memory[start : start + len(payload)]
