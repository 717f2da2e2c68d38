"""Where an engine keeps KV on a device: paged tensors of any order, described by one view per layer and plane. Holds references, no state.

Every layout in use is a view `[blocks, block_tokens, kv_heads, head_dim]` per layer and plane with strides of its own: vLLM's
`[2, blocks, tokens, heads, dim]` and `[blocks, 2, tokens, heads, dim]`, its HND variants (heads before tokens), keys and values side by
side in the last axis, SGLang's token pools `[slots, heads, dim]`, and kvtier's own page-first pool. So one description serves all, and one
kernel: base addresses per layer and plane, and three strides. An engine's block may be smaller than a page: a page is then several blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvtier.errors import LayoutError
from kvtier.formats.base import check_address
from kvtier.layout import PageLayout

AXES = "pbthd"
"""Plane (keys, values), block, token, head, dimension: how `PagedKV.of_axes` names the axes of an engine's tensor."""


@dataclass(frozen=True, eq=False)
class PagedKV:
    """The KV of an engine, `views[layer][plane]` each `[blocks, block_tokens, kv_heads, head_dim]` in the layout's dtype, on one device.

    All views have equal shapes and strides, and numbers of a vector lie side by side; views that are shorter than others are cut to the
    fewest blocks. Keeps the tensors alive. Raises LayoutError where tensors do not fit the layout, differ, or where a page is no whole
    number of blocks.
    """

    layout: PageLayout
    views: tuple[tuple[torch.Tensor, ...], ...]

    def __post_init__(self) -> None:
        layout, views = self.layout, self.views
        if len(views) != layout.layers or any(len(row) != layout.planes for row in views):
            raise LayoutError(
                f"paged KV: {len(views)} layers of {sorted({len(row) for row in views})} planes; "
                f"the page layout has {layout.layers} layers of {layout.planes}"
            )
        model = views[0][0]
        for layer, plane in ((layer, plane) for layer in range(layout.layers) for plane in range(layout.planes)):
            view = views[layer][plane]
            what = f"paged KV: layer {layer}, plane {plane}"
            if view.ndim != 4 or view.shape[2:] != (layout.kv_heads, layout.head_dim):
                raise LayoutError(f"{what} is {list(view.shape)}; expected [blocks, block tokens, {layout.kv_heads}, {layout.head_dim}]")
            if view.dtype != layout.torch_dtype:
                raise LayoutError(f"{what} is {view.dtype}; the page layout says {layout.torch_dtype}")
            if view.device != model.device:
                raise LayoutError(f"{what} is on {view.device}, others are on {model.device}; pages move within one device")
            if view.shape[1:] != model.shape[1:] or view.stride() != model.stride():
                raise LayoutError(
                    f"{what} has shape {list(view.shape)}, strides {list(view.stride())}; layer 0 has {list(model.shape)}, "
                    f"{list(model.stride())}; describe layers that differ by one PagedKV each"
                )
            check_address(view, layout, f"{what} begins")
            if view.stride(3) != 1 and layout.head_dim > 1:
                raise LayoutError(f"{what}: numbers of a vector are {view.stride(3)} apart; expected side by side")
        if not 1 <= self.block_tokens <= layout.page_tokens or layout.page_tokens % self.block_tokens:
            raise LayoutError(f"paged KV: blocks of {self.block_tokens} tokens; a page of {layout.page_tokens} is no whole number of them")

    @classmethod
    def of_pool(cls, pool: torch.Tensor, layout: PageLayout) -> PagedKV:
        """Of a page-first pool `[pages, layers, planes, page_tokens, kv_heads, head_dim]`, of any stride between pages."""
        if pool.shape[1:] != layout.shape:
            raise LayoutError(f"page pool is {list(pool.shape)}; expected [pages, {', '.join(map(str, layout.shape))}]")
        return cls(layout, tuple(tuple(pool[:, layer, plane] for plane in range(layout.planes)) for layer in range(layout.layers)))

    @classmethod
    def of_axes(cls, caches: Sequence[torch.Tensor], layout: PageLayout, axes: str) -> PagedKV:
        """Of one tensor per layer with the axes that `axes` names, each letter of "pbthd" once (without p for a single plane).

        vLLM: "pbthd" (`[2, blocks, tokens, heads, dim]`), "bpthd", and "pbhtd", "bphtd" for HND.
        """
        wanted = AXES if layout.planes == 2 else AXES[1:]
        if sorted(axes) != sorted(wanted):
            raise LayoutError(f"paged KV: axes {axes!r}; expected each letter of {wanted!r} once: plane, block, token, head, dimension")
        for layer, cache in enumerate(caches):
            if cache.ndim != len(axes) or (layout.planes == 2 and cache.shape[axes.index("p")] != 2):
                raise LayoutError(f"paged KV: layer {layer} is {list(cache.shape)}; axes {axes!r} need {len(axes)}, with 2 along p")
        ordered = [cache.permute([axes.index(letter) for letter in wanted]) for cache in caches]
        return cls(layout, tuple(tuple(each) if layout.planes == 2 else (each,) for each in ordered))

    @classmethod
    def of_token_pools(
        cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], layout: PageLayout, block_tokens: int = 1
    ) -> PagedKV:
        """Of SGLang's pools: per layer keys and values `[slots, kv_heads, head_dim]`; a block is `block_tokens` slots side by side.

        For a single plane (MLA) give it as `values` and no keys. Slots behind the last whole block cannot be named.
        """
        pools = [keys, values] if layout.planes == 2 else [values]
        if (layout.planes == 1 and keys) or any(len(pool) != layout.layers for pool in pools):
            raise LayoutError(f"paged KV: {len(keys)} pools of keys, {len(values)} of values for {layout}")
        if block_tokens < 1 or any(pool.ndim != 3 for pools_of in pools for pool in pools_of):
            raise LayoutError("paged KV: token pools are [slots, kv_heads, head_dim] each, blocks at least one token")
        views = [
            [pool[: len(pool) // block_tokens * block_tokens].view(-1, block_tokens, *pool.shape[1:]) for pool in pools_of]
            for pools_of in pools
        ]
        return cls(layout, tuple(zip(*views, strict=True)))

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.views[0][0].device

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.views[0][0].shape[1]

    @cached_property
    def blocks(self) -> int:
        """Blocks there are in every layer and plane."""
        return min(view.shape[0] for row in self.views for view in row)

    @property
    def page_blocks(self) -> int:
        """Blocks of a page."""
        return self.layout.page_tokens // self.block_tokens

    @property
    def strides(self) -> tuple[int, int, int]:
        """Numbers from one block, token and head to the next."""
        block, token, head, _ = self.views[0][0].stride()
        return block, token, head

    @cached_property
    def bases(self) -> torch.Tensor:
        """Addresses of the first number of each layer and plane, int64 `[layers, planes]` on the device."""
        return torch.tensor([[view.data_ptr() for view in row] for row in self.views], dtype=torch.int64).to(self.device)

    @cached_property
    def address_alignment(self) -> int:
        """The largest power of two up to 16 that divides every base address, in bytes."""
        return math.gcd(16, *(view.data_ptr() for row in self.views for view in row))

    def block_table(self, blocks: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
        """Blocks of some pages as int64 `[n, page_blocks]` on the device.

        A tensor on the device is taken as it is (looking at it would make the host wait): that its blocks exist is the caller's promise.
        Anything else is checked: LayoutError for blocks that do not exist or another shape.
        """
        table = blocks if isinstance(blocks, torch.Tensor) else torch.tensor(blocks, dtype=torch.int64)
        if table.ndim == 1 and self.page_blocks == 1:
            table = table[:, None]
        if table.numel() == 0:
            table = table.reshape(0, self.page_blocks)
        if table.ndim != 2 or table.shape[1] != self.page_blocks or table.dtype not in (torch.int64, torch.int32):
            raise LayoutError(f"blocks are {table.dtype} {list(table.shape)}; expected whole numbers [pages, {self.page_blocks}]")
        if table.is_cpu and table.numel() and not 0 <= int(table.min()) <= int(table.max()) < self.blocks:
            raise LayoutError(f"blocks from {int(table.min())} to {int(table.max())}; there are {self.blocks}")
        return table.to(self.device, torch.int64, non_blocking=True).contiguous()

    def gather(self, table: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Layers `first` to `stop` of the pages of a block table, `[n, layers, planes, page_tokens, kv_heads, head_dim]`, a copy."""
        layout, rows = self.layout, self.views[first:stop]
        pages = [torch.stack([view[table].flatten(1, 2) for view in row], 1) for row in rows]
        return torch.stack(pages, 1) if rows else torch.empty((len(table), 0, *layout.shape[1:]), dtype=layout.torch_dtype)

    def scatter(self, table: torch.Tensor, first: int, pages: torch.Tensor) -> None:
        """The inverse of `gather`: `pages` become layers `first` and following of these blocks."""
        for layer in range(pages.shape[1]):
            for plane, view in enumerate(self.views[first + layer]):
                view[table] = pages[:, layer, plane].reshape(len(pages), self.page_blocks, self.block_tokens, *pages.shape[4:])
