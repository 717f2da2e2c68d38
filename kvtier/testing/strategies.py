"""Hypothesis strategies for page layouts and pages: small, and full of what real and hostile pages contain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from kvtier.layout import DTYPE_BYTES, PageLayout

PAGE_KINDS = ("gaussian", "outlier channels", "special", "bits")


def layouts(
    *,
    planes: Sequence[int] = (1, 2),
    dtypes: Sequence[str] = tuple(DTYPE_BYTES),
    head_dims: Sequence[int] = (64, 80, 96, 128),
    block_multiple: int = 1,
) -> st.SearchStrategy[PageLayout]:
    """Layouts of at most 3 layers, 5 tokens and 3 heads; more tokens where tokens * heads * head_dim must be a multiple."""

    def layout(layers: int, plane_count: int, tokens: int, heads: int, head_dim: int, dtype: str) -> PageLayout:
        tokens *= block_multiple // math.gcd(block_multiple, heads * head_dim)
        return PageLayout(layers, plane_count, tokens, heads, head_dim, dtype)

    return st.builds(
        layout,
        st.integers(1, 3),
        st.sampled_from(planes),
        st.integers(1, 5),
        st.integers(1, 3),
        st.sampled_from(head_dims),
        st.sampled_from(dtypes),
    )


@st.composite
def pages(draw: st.DrawFn, layout: PageLayout, *, kinds: Sequence[str] = PAGE_KINDS, max_pages: int = 3) -> torch.Tensor:
    """One to `max_pages` pages `[n, *layout.shape]` of one of the `kinds`, see `make_pages`."""
    return make_pages(layout, draw(st.sampled_from(kinds)), draw(st.integers(1, max_pages)), seed=draw(st.integers(0, 2**32 - 1)))


def make_pages(layout: PageLayout, kind: str, count: int, *, seed: int) -> torch.Tensor:
    """`count` pages of one kind.

    "gaussian": independent unit numbers. "outlier channels": like real keys, a few channels have a large constant mean, and the first
    token (an attention sink) is small and has none. "special": Gaussian with NaN, infinities, zeros, subnormals, extremes and whole
    vectors that are zero, tiny or huge. "bits": any bit pattern.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (count, *layout.shape)
    if kind == "bits":
        data = torch.randint(0, 256, (count, layout.page_bytes), generator=random, dtype=torch.uint8)
        return data.view(layout.torch_dtype).view(shape)
    numbers = torch.randn(shape, generator=random)
    if kind == "outlier channels":
        means = torch.randn(layout.layers, layout.planes, 1, layout.kv_heads, layout.head_dim, generator=random)
        numbers += torch.where(means.abs() > 1.8, 8 * means, means)
        numbers[:, :, :, 0] = 0.3 * torch.randn(numbers[:, :, :, 0].shape, generator=random)
    pages = numbers.to(layout.torch_dtype)
    if kind == "special":
        limits = torch.finfo(layout.torch_dtype)
        rows = pages.view(-1, layout.head_dim)
        vectors = torch.tensor([0.0, 1e-30, 1e-7, 1e4, limits.smallest_normal / 4, limits.max, -limits.max])
        which = torch.randint(0, 2 * len(vectors), (len(rows), 1), generator=random)
        scales = torch.cat([vectors, torch.ones(len(vectors))])[which].to(layout.torch_dtype)
        rows.mul_(scales)
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, limits.smallest_normal / 2, limits.max, limits.min])
        chosen = odd.to(layout.torch_dtype)[torch.randint(0, len(odd), shape, generator=random)]
        pages = torch.where(torch.rand(shape, generator=random) < 0.05, chosen, pages)
    return pages
