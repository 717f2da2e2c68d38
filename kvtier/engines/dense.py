"""The dense K and V that Hugging Face attention wants: one layer of a cache whose first columns come from leased pages.

The prefix is gathered when the model first gets to the layer, so that later layers may still be on their way. A batch is padded on the
left: all its rows end in the same column, and a row's restored tokens stand at the right of its padding. Layers with a sliding window
keep what is outside of it too, because a page holds all layers of its tokens; their masks leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.engines.stopwatch import Stopwatch
from kvtier.errors import LayoutError, ModelError, needing
from kvtier.layout import PageLayout
from kvtier.leases.lease import Lease

with needing("hf", "the Hugging Face engine", "transformers"):
    from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Prefix:
    """The restored columns of a batch: `tokens[i]` of each lease's tokens, at the right of `columns` columns."""

    leases: Sequence[Lease]
    tokens: Sequence[int]
    columns: int

    def gather(self, layer: int, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each `[prompts, kv_heads, columns, head_dim]`; zeros where there is padding."""
        pool = self.leases[0].layer(layer)
        device = device or pool.device
        if self.columns == self.tokens[0] and len(self.leases) == 1:
            planes = _planes(self.leases[0], layer, self.tokens[0]).to(device)
            return planes[0][None], planes[1][None]
        _, _, _, kv_heads, head_dim = pool.shape
        both = torch.zeros(2, len(self.leases), kv_heads, self.columns, head_dim, dtype=pool.dtype, device=device)
        for row, (lease, tokens) in enumerate(zip(self.leases, self.tokens, strict=True)):
            if tokens:
                both[:, row, :, self.columns - tokens :] = _planes(lease, layer, tokens).to(device)
        return both[0], both[1]


def _planes(lease: Lease, layer: int, tokens: int) -> torch.Tensor:
    """The first `tokens` tokens of a lease, `[2, kv_heads, tokens, head_dim]`."""
    pool = lease.layer(layer)
    pages = pool[torch.as_tensor(lease.slots()[: -(-tokens // pool.shape[2])], device=pool.device)]
    return pages.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, :tokens]


def check_kind(layout: PageLayout, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """ModelError where a layer's `[rows, kv_heads, tokens, head_dim]` are not what its pages hold."""
    expected = (layout.kv_heads, layout.head_dim)
    found = [(each.shape[1], each.shape[3]) if each.ndim == 4 else tuple(each.shape) for each in (keys, values)]
    if found != [expected] * layout.planes:
        raise ModelError(
            f"layer {layer} has keys and values of (kv_heads, head_dim) {found[0]} and {found[1]}, but pages hold {expected}: the cache is "
            "another model's (layout_of makes the right one), or this model's KV is not of one shape, which kvtier's cache cannot hold"
        )


class TieredLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: a leased prefix that is gathered when the model first gets here, then what the model adds."""

    def __init__(self, prefix: Prefix, index: int, stopwatch: Stopwatch, layout: PageLayout) -> None:
        super().__init__()
        self._unseen: PageLayout | None = layout
        self._prefix: Prefix | None = prefix if prefix.columns else None
        self._index = index
        self._stopwatch = stopwatch

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """New `[rows, kv_heads, new, head_dim]` in, all `[rows, kv_heads, total, head_dim]` out; rows may be so many of each prompt."""
        if self._unseen is not None:
            check_kind(self._unseen, self._index, key_states, value_states)
            self._unseen = None
        self._stopwatch.reached(self._index, self.get_seq_length(), key_states.shape[-2], key_states.device)
        with self._stopwatch.waiting():
            self._gather(key_states.device, len(key_states))
        both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return both

    def get_seq_length(self) -> int:
        """Tokens in this layer, the leased prefix included."""
        return self._prefix.columns if self._prefix is not None else int(super().get_seq_length())

    def get_max_cache_shape(self) -> int:
        """No bound. Transformers before 5.20 ask for it under this name."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        self._gather()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch axis."""
        self._gather()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat along the batch axis."""
        self._gather()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select along the batch axis."""
        self._gather()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything, the prefix too."""
        self._prefix = None
        super().reset()

    def _gather(self, device: torch.device | None = None, rows: int | None = None) -> None:
        """Build the dense prefix `[rows, kv_heads, columns, head_dim]` from device pages, once."""
        prefix = self._prefix
        if prefix is None:
            return
        times, left = (1, 0) if rows is None else divmod(rows, len(prefix.leases))
        if left or not times:
            raise LayoutError(
                f"the forward pass has {rows} sequences and its cache {len(prefix.leases)}; expected as many, or so many of each"
            )
        keys, values = prefix.gather(self._index, device)
        if times > 1:
            keys, values = keys.repeat_interleave(times, dim=0), values.repeat_interleave(times, dim=0)
        self._prefix = None
        self.dtype, self.device, self.keys, self.values = keys.dtype, keys.device, keys, values
        self.is_initialized = True
