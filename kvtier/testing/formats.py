"""The contract of `kvtier.formats.base.Format` as tests. Subclass it to prove a format:

class TestMyFormat(FormatContract):
    gaussian_error = 0.01
    outlier_error = 0.02

    def make_format(self):
        return MyFormat()
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.formats import Payload
from kvtier.layout import PageLayout
from kvtier.testing.format_memory import FormatMemory
from kvtier.testing.format_numbers import FULL_SIZE, law, same_bits, same_payloads
from kvtier.testing.strategies import make_pages, pages


class FormatContract(FormatMemory):
    """Set `format_name`, or override `make_format`; for a lossy format state its errors: see `FormatNumbers`, which is part of this."""

    @law
    @given(st.data())
    def test_payloads_have_the_promised_size_and_form(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout))
        payloads = format.encode(batch, layout)
        assert len(payloads) == len(batch)
        for payload in payloads:
            assert payload.dtype == np.uint8
            assert payload.ndim == 1
            assert payload.flags.c_contiguous
            assert len(payload) == format.payload_bytes(layout) if format.fixed_size else len(payload) <= format.payload_bytes(layout)
        assert format.bits_per_value(layout) == pytest.approx(format.payload_bytes(layout) * 8 / layout.values)

    @law
    @given(st.data())
    def test_decode_gives_pages_of_the_layout(self, data: st.DataObject) -> None:
        layout = data.draw(self.layouts())
        batch = data.draw(pages(layout))
        decoded = self.round_trip(batch, layout)
        assert decoded.shape == batch.shape
        assert decoded.dtype == layout.torch_dtype
        assert decoded.device.type == "cpu"
        assert self.make_format().lossless or bool(decoded.isfinite().all())

    @law
    @given(st.data())
    def test_slices_of_layers_and_single_pages_decode_to_the_same_numbers(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        payloads = format.unpack(format.encode(data.draw(pages(layout)), layout), layout)
        whole = format.decode(payloads, layout)
        first = data.draw(st.integers(0, layout.layers))
        last = data.draw(st.integers(first, layout.layers))
        assert same_bits(format.decode(payloads, layout, slice(first, last)), whole[:, first:last])
        assert same_bits(torch.cat([format.decode(payloads, layout, slice(i, i + 1)) for i in range(layout.layers)], 1), whole)
        assert same_bits(torch.cat([format.decode([payload], layout) for payload in payloads]), whole)

    def test_layouts_it_cannot_code_are_refused_and_all_others_taken(self) -> None:
        format = self.make_format()
        for layout in FULL_SIZE:
            if layout.head_dim in self.head_dims:
                assert format.payload_bytes(layout) > 0
            else:
                with pytest.raises(LayoutError, match="head_dim"):
                    format.payload_bytes(layout)
                with pytest.raises(LayoutError, match="head_dim"):
                    format.encode(torch.zeros(1, *layout.shape, dtype=layout.torch_dtype), layout)

    @pytest.mark.parametrize("layout", FULL_SIZE[::5], ids=str)
    def test_many_pages_at_once_decode_like_single_layers(self, layout: PageLayout) -> None:
        self._needs(layout)
        format = self.make_format()
        payloads = format.unpack(format.encode(make_pages(layout, "outlier channels", 70, seed=1), layout), layout)
        whole = format.decode(payloads, layout)
        for layer in range(layout.layers):
            assert same_bits(format.decode(payloads, layout, slice(layer, layer + 1)), whole[:, layer : layer + 1])
        assert same_bits(format.decode(payloads[-1:], layout), whole[-1:])

    def test_no_pages_are_a_batch_too(self) -> None:
        format, layout = self.make_format(), PageLayout(2, 2, 4, 1, 64)
        assert format.encode(torch.empty(0, *layout.shape, dtype=torch.bfloat16), layout) == []
        assert format.encode(torch.empty(3, *layout.shape, dtype=torch.bfloat16), layout, []) == []
        assert format.decode([], layout, slice(1, 2)).shape == (0, 1, 2, 4, 1, 64)

    @law
    @given(st.data())
    def test_encode_leaves_its_input_alone_and_repeats_itself(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout))
        before = batch.clone()
        payloads = format.encode(batch, layout)
        assert same_bits(batch, before)
        assert same_payloads(format.encode(batch, layout), payloads)

    @law
    @given(st.data())
    def test_rows_choose_the_pages_to_encode_and_their_order(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout, kinds=("gaussian", "outlier channels")))
        rows = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=4))
        assert same_payloads(format.encode(batch, layout, rows), format.encode(batch[rows], layout))

    @law
    @given(st.data())
    def test_digests_are_those_of_the_payloads_that_encode_gives(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout))
        rows = data.draw(st.none() | st.lists(st.integers(0, len(batch) - 1), max_size=4))
        first = range(data.draw(st.integers(0, 2)))
        count = len(batch) if rows is None else len(rows)
        out = list(np.zeros((count, format.payload_bytes(layout)), np.uint8)) if data.draw(st.booleans()) else None
        payloads, digests = format.encode_with_digests(batch, layout, rows, out, first)
        assert same_payloads(payloads, format.encode(batch, layout, rows, None, first))
        assert digests == [xxhash.xxh3_128_digest(payload.data) for payload in payloads]

    @law
    @given(st.data())
    def test_decode_leaves_its_input_alone_and_takes_read_only_bytes(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        payloads = [np.frombuffer(payload.tobytes(), np.uint8) for payload in format.encode(data.draw(pages(layout)), layout)]
        decoded = format.decode(format.unpack(payloads, layout), layout)
        kept = decoded.clone()
        decoded.zero_()
        assert same_bits(format.decode(format.unpack(payloads, layout), layout), kept)

    def test_threads_may_share_a_format(self) -> None:
        layout = PageLayout(3, 2, 16, 2, 64)
        batches = [make_pages(layout, "outlier channels", 3, seed=seed) for seed in range(8)]
        alone = [self.round_trip(batch, layout) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda batch: self.round_trip(batch, layout), batches))
        assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))

    @law
    @given(st.data())
    def test_pages_of_another_layout_are_refused(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout))
        other = torch.float64 if data.draw(st.booleans()) else next(t for t in (torch.float16, torch.float32) if t != batch.dtype)
        for wrong in (batch[0], batch[..., :-2], batch.repeat(1, 2, 1, 1, 1, 1), batch.to(other), batch.flatten(4)):
            with pytest.raises(LayoutError):
                format.encode(wrong, layout)

    @law
    @given(st.data())
    def test_payloads_of_another_size_are_refused(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        batch = data.draw(pages(layout))
        payloads = format.encode(batch, layout)
        unpacked = format.unpack(payloads, layout)
        for wrong in _resized(unpacked[-1]):
            with pytest.raises(ValueError, match=r"."):
                format.decode([*unpacked[:-1], wrong], layout)
        for wrong in _resized(payloads[-1]):
            with pytest.raises(ValueError, match=r"."):
                format.decode(format.unpack([*payloads[:-1], wrong], layout), layout)

    @law
    @given(st.data())
    def test_damaged_payloads_are_refused_or_decode_to_some_page(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        payload = format.encode(data.draw(pages(layout)), layout)[0]
        for _ in range(data.draw(st.integers(1, 8))):
            # Prefixes and headers are the fragile part of a payload, so half of the hits go there.
            end = len(payload) - 1 if data.draw(st.booleans()) else min(15, len(payload) - 1)
            payload[data.draw(st.integers(0, end))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            decoded = format.decode(format.unpack([payload], layout), layout)
        except ValueError:
            return
        assert decoded.shape == (1, *layout.shape)

    def test_equal_formats_compare_equal(self) -> None:
        assert self.make_format() == self.make_format()
        assert hash(self.make_format()) == hash(self.make_format())


def _resized(payload: Payload) -> list[Payload]:
    return [payload[:0], payload[:-1], payload[: len(payload) // 2], np.append(payload, np.uint8(0))]
