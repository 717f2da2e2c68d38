"""What a format may do to numbers: nothing if it is lossless, else no more than its subclass of the contract states.

`FormatContract` is this, how a format is called (`formats.py`) and what it may ask of memory (`format_memory.py`). Needs pytest and
Hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.formats import Format, Payload, get_format
from kvtier.layout import PageLayout
from kvtier.testing.strategies import layouts, make_pages, pages

# The tests live in this base class and run once per subclass, which Hypothesis would otherwise take for a mistake.
law = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])

FULL_SIZE = [
    PageLayout(2, planes, 16, 2, head_dim, dtype)
    for planes in (1, 2)
    for head_dim in (64, 80, 96, 128)
    for dtype in ("bf16", "fp16", "fp32")
]


class FormatNumbers:
    """Set `format_name`, or override `make_format`; for a lossy format state its errors.

    `gaussian_error`, `outlier_error`: the largest relative rms error, |decoded - page| / |page|, on Gaussian pages and on pages with
    outlier channels (`kvtier.testing.strategies.make_pages`), rounding to the page's dtype included. `tiny`: the largest absolute error on
    vectors of magnitude 1.5e-5 and less, where fp16 scales run out. `head_dims`: those of 64, 80, 96 and 128 that it can code;
    `block_multiple`: what the numbers of one plane of one layer of a page must be a multiple of.
    """

    format_name: ClassVar[str] = ""
    gaussian_error: ClassVar[float] = 0.0
    outlier_error: ClassVar[float] = 0.0
    tiny: ClassVar[float] = 4e-5
    head_dims: ClassVar[Sequence[int]] = (64, 80, 96, 128)
    block_multiple: ClassVar[int] = 1

    def make_format(self) -> Format:
        return get_format(self.format_name)

    def layouts(self) -> st.SearchStrategy[PageLayout]:
        return layouts(head_dims=self.head_dims, block_multiple=self.block_multiple)

    def round_trip(self, page_batch: torch.Tensor, layout: PageLayout) -> torch.Tensor:
        format = self.make_format()
        return format.decode(format.unpack(format.encode(page_batch, layout), layout), layout)

    @law
    @given(st.data())
    def test_lossless_means_every_bit(self, data: st.DataObject) -> None:
        if not self.make_format().lossless:
            pytest.skip("lossy")
        layout = data.draw(self.layouts())
        batch = data.draw(pages(layout))
        assert same_bits(self.round_trip(batch, layout), batch)

    @settings(law, max_examples=5)  # each of them has 128 pages
    @given(st.data())
    def test_pages_that_begin_a_sequence_have_a_good_first_token_and_payloads_of_the_same_size(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        kind = data.draw(st.sampled_from(["gaussian", "outlier channels"]))
        batch = make_pages(layout, kind, 128, seed=data.draw(st.integers(0, 99)))
        begin = data.draw(st.sampled_from([0, 1]))
        payloads = format.encode(batch, layout, first=range(begin, 128, 2))
        assert format.fixed_size <= all(len(payload) == format.payload_bytes(layout) for payload in payloads)
        decoded, plain = format.decode(format.unpack(payloads, layout), layout), self.round_trip(batch, layout)
        # Of many, not of each: what a page's other tokens give up for its first one may cost that one more than it gains.
        first, others = slice(begin, None, 2), slice(1 - begin, None, 2)
        ours, before = (relative_error(each[first][:, :, :, :1], batch[first][:, :, :, :1]) for each in (decoded, plain))
        assert ours <= 1.01 * before
        assert relative_error(decoded[others], plain[others]) <= self.outlier_error / 4

    @law
    @given(st.data())
    def test_lossy_nan_counts_as_zero_and_infinity_as_the_largest(self, data: st.DataObject) -> None:
        format, layout = self.make_format(), data.draw(self.layouts())
        if format.lossless:
            pytest.skip("lossless")
        batch = data.draw(pages(layout, kinds=("special",)))
        limits = torch.finfo(batch.dtype)
        plain = batch.nan_to_num(nan=0.0, posinf=limits.max, neginf=limits.min)
        assert same_payloads(format.encode(batch, layout), format.encode(plain, layout))

    @law
    @given(st.data())
    def test_a_page_full_of_nan_is_a_page(self, data: st.DataObject) -> None:
        layout = data.draw(self.layouts())
        batch = torch.full((1, *layout.shape), torch.nan, dtype=layout.torch_dtype)
        decoded = self.round_trip(batch, layout)
        assert same_bits(decoded, batch) if self.make_format().lossless else bool((decoded == 0).all())

    @law
    @given(st.data())
    def test_infinity_comes_back_large_with_its_sign(self, data: st.DataObject) -> None:
        layout = data.draw(self.layouts())
        batch = torch.zeros(1, *layout.shape, dtype=layout.torch_dtype)
        channel = data.draw(st.integers(0, layout.head_dim - 1))
        batch[..., channel] = data.draw(st.sampled_from([torch.inf, -torch.inf]))
        decoded = self.round_trip(batch, layout)
        assert bool((decoded[..., channel].sign() == batch[..., channel].sign()).all())
        assert float(decoded[..., channel].abs().min()) > 3e4

    @law
    @given(st.data())
    def test_zeros_stay_zeros_and_tiny_numbers_tiny(self, data: st.DataObject) -> None:
        layout = data.draw(self.layouts())
        zeros = torch.zeros(1, *layout.shape, dtype=layout.torch_dtype)
        assert bool((self.round_trip(zeros, layout) == 0).all())
        magnitudes = torch.tensor([torch.finfo(layout.torch_dtype).smallest_normal / 2, 1e-38, 1e-20, 1e-7, 3e-6, 1e-5, 1.5e-5])
        numbers = make_pages(layout, "gaussian", 2, seed=1).float()
        batch = torch.cat([numbers * magnitude for magnitude in magnitudes]).to(layout.torch_dtype)
        assert float((self.round_trip(batch, layout).float() - batch.float()).abs().max()) <= self.tiny

    @pytest.mark.parametrize("layout", FULL_SIZE, ids=str)
    def test_error_stays_below_what_the_format_states(self, layout: PageLayout) -> None:
        self._needs(layout)
        for kind, stated in (("gaussian", self.gaussian_error), ("outlier channels", self.outlier_error)):
            numbers = make_pages(layout, kind, 2, seed=3).float()
            batch = torch.cat([numbers * scale for scale in (0.01, 1.0, 100.0)]).to(layout.torch_dtype)
            decoded = self.round_trip(batch, layout)
            for scaled in (slice(0, 2), slice(2, 4), slice(4, 6)):
                assert relative_error(decoded[scaled], batch[scaled]) <= stated, kind

    @pytest.mark.parametrize("layout", FULL_SIZE, ids=str)
    def test_coding_twice_adds_no_more_than_coding_once(self, layout: PageLayout) -> None:
        self._needs(layout)
        once = self.round_trip(make_pages(layout, "outlier channels", 2, seed=5), layout)
        assert relative_error(self.round_trip(once, layout), once) <= self.outlier_error

    def _needs(self, layout: PageLayout) -> None:
        if layout.head_dim not in self.head_dims:
            pytest.skip(f"does not code head_dim {layout.head_dim}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal down to the bits of what is not a number."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_payloads(a: Sequence[Payload], b: Sequence[Payload]) -> bool:
    """Whether two lists of payloads have the same bytes."""
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def relative_error(decoded: torch.Tensor, page_batch: torch.Tensor) -> float:
    """|decoded - pages| / |pages|, over all of them."""
    return float(torch.linalg.vector_norm(decoded.float() - page_batch.float()) / torch.linalg.vector_norm(page_batch.float()))
