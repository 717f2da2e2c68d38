"""Laws checked: the digest kernels give the reference's digests and logits but for rounding, from every engine layout, and fit a GPU.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.attention import on_device
from kvtier.attention.digest import DigestLayout, encode, page_logits
from kvtier.errors import LayoutError
from kvtier.formats.paged import PagedKV
from kvtier.layout import PageLayout
from tests.attention.test_digest import exact_logits, make_keys
from tests.compiled import DEVICE, ON_GPU, found_by, needs_triton

pytestmark = [pytest.mark.timeout(300), needs_triton]
OTHER_SIDE = 0.005
"""Share of bytes in which a number may be rounded to the other side; a byte holds two."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(on_device, "why_missing", lambda device: "")


def pool_of(keys: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    pool = torch.randn(len(keys), *layout.shape).to(layout.torch_dtype)
    pool[:, :, 0] = keys
    return pool.to(DEVICE)


def assert_nearly_equal(made: torch.Tensor, wanted: torch.Tensor) -> None:
    assert made.shape == wanted.shape
    assert made.dtype == torch.uint8
    differ = made.cpu() != wanted
    assert int(differ.sum()) <= max(2, OTHER_SIDE * differ.numel())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([4, 16, 37, 48, 64]),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([5, 16, 40, 64, 128]),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    planes=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_digests_are_the_references(tokens, heads, head_dim, dtype, planes, seed):
    layout = PageLayout(2, planes, tokens, heads, head_dim, dtype)
    keys = make_keys(3, 2, tokens, heads, head_dim, seed).to(layout.torch_dtype)
    paged = PagedKV.of_pool(pool_of(keys, layout), layout)
    assert_nearly_equal(on_device.encode_paged(paged, [2, 0]), encode(keys[[2, 0]]))


def test_numbers_that_are_none_count_as_zeros_and_silent_keys_make_silent_digests():
    layout = PageLayout(1, 2, 16, 1, 64, "fp32")
    keys = make_keys(2, 1, 16, 1, 64)
    keys[0, 0, 3, 0, 7], keys[0, 0, 4, 0, 8], keys[0, 0, 5, 0, 9] = float("nan"), float("inf"), -float("inf")
    keys[1] = 0
    made = on_device.encode_paged(PagedKV.of_pool(pool_of(keys, layout), layout), [0, 1])
    assert_nearly_equal(made, encode(keys))
    assert torch.equal(made[1].cpu(), encode(keys)[1])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("head_dim", [5, 64, 128])
def test_directions_that_nothing_lies_along_do_no_harm(head_dim, heads):
    """Of a single token nothing is left but the mean's rounding, one direction; the second is what rounding makes of nothing, so bytes
    differ. What they say of the keys does not get worse."""
    layout = PageLayout(1, 2, 1, heads, head_dim, "fp32")
    keys, shape = make_keys(12, 1, 1, heads, head_dim), DigestLayout.of(layout)
    made = on_device.encode_paged(PagedKV.of_pool(pool_of(keys, layout), layout), list(range(12))).cpu()
    queries = torch.randn(20, heads, head_dim, generator=torch.Generator().manual_seed(0))
    exact = exact_logits(keys[:, 0], queries)
    error, allowed = (float((page_logits(each[:, 0], queries, shape) - exact).abs().mean()) for each in (made, encode(keys)))
    assert error < 1.3 * allowed


@pytest.mark.parametrize("block_tokens", [16, 4])
def test_keys_are_read_from_engines_blocks_of_any_size(block_tokens):
    layout = PageLayout(2, 2, 16, 2, 64, "bf16")
    keys = make_keys(2, 2, 16, 2, 64).bfloat16()
    per_page = 16 // block_tokens
    caches = [torch.zeros((2, 3 * per_page, block_tokens, 2, 64), dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    paged = PagedKV.of_axes(caches, layout, "pbthd")
    order = torch.randperm(3 * per_page, generator=torch.Generator().manual_seed(0))[: 2 * per_page].view(2, per_page).to(DEVICE)
    paged.scatter(order, 0, pool_of(keys, layout))
    assert_nearly_equal(on_device.encode_paged(paged, order), encode(keys))
    with pytest.raises(LayoutError, match="there are"):
        on_device.encode_paged(paged, [[3 * per_page] * per_page])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    pages=st.sampled_from([1, 15, 33]),
    tokens=st.sampled_from([4, 37, 64]),
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([5, 64, 128]),
    asked=st.sampled_from([1, 7]),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_logits_are_the_references(pages, tokens, heads, group, head_dim, asked, scaling, seed):
    shape = DigestLayout(tokens, head_dim)
    digests = encode(make_keys(pages, 2, tokens, heads, head_dim, seed))[:, 1]
    queries = 2 * torch.randn(asked, heads * group, head_dim, generator=torch.Generator().manual_seed(seed))
    wanted = page_logits(digests, queries, shape, scaling)
    made = on_device.page_logits(digests.to(DEVICE), queries.to(DEVICE), shape, scaling)
    assert torch.allclose(made.cpu(), wanted, rtol=1e-5, atol=1e-4)


def test_no_pages_have_no_logits_and_what_does_not_go_together_is_refused():
    shape = DigestLayout(16, 64)
    digests, queries = encode(make_keys(3, 1))[:, 0].to(DEVICE), torch.randn(2, 6, 64, device=DEVICE)
    assert on_device.page_logits(digests[:0], queries, shape).shape == (2, 6, 0)
    with pytest.raises(LayoutError, match="digests have shape"):
        on_device.page_logits(digests[:, :, 1:], queries, shape)
    with pytest.raises(LayoutError, match="queries have shape"):
        on_device.page_logits(digests, queries[:, :5], shape)


def test_a_piece_that_no_program_holds_is_left_to_torch(monkeypatch):
    layout = PageLayout(1, 2, 67, 1, 16, "fp32")
    keys = make_keys(2, 1, 67, 1, 16)
    made = on_device.encode_paged(PagedKV.of_pool(pool_of(keys, layout), layout), [0, 1])
    if not ON_GPU:
        assert torch.equal(made, encode(keys))
    assert_nearly_equal(made, encode(keys))


@pytest.mark.slow
def test_compiled_for_a_gpu_they_fit_it(tmp_path):
    """Needs no GPU, as in `tests/formats/test_triton.py`."""
    found = found_by(Path(__file__).with_name("compile_kernels.py"), tmp_path)
    assert len(found) == 6
    for what, sizes in found.items():
        assert sizes["shared_bytes"] <= 99 << 10, f"{what}: more shared memory than an Ampere GPU gives a program"
        assert sizes["local"] == 0, f"{what}: arrays in local memory"
