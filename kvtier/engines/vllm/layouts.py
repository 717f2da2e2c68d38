"""How vLLM's KV blocks lie in memory, as strided views, and copying pages out of and into them.

A reading of a layer's block tensor gives one view of its keys and one of its values, `[blocks, block tokens, kv_heads, head_dim]`, without
copying. vLLM's logical shape is always `[blocks, kv_heads, block tokens, 2 * head_dim]`, with strides that say which of its layouts it is
(LBHNC, LBNHC, ...); but kernels may see more in a block than that: the CPU backend keeps all keys of a head before its values, and the
keys transposed. Which reading is right is not looked up but probed, with the engine's own kernel (`worker.py`).
Views only: the bytes are the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.memory.strided import copy_block

Views = tuple[torch.Tensor, torch.Tensor]
_BITS = {2: torch.int16, 4: torch.int32}


def readings(block: torch.Tensor, head_dim: int) -> dict[str, Views]:
    """What a layer's tensor `[blocks, kv_heads, block tokens, 2 * head_dim]` may mean: (keys, values) by the reading's name.

    LayoutError for another shape.
    """
    if block.ndim != 4 or block.shape[3] != 2 * head_dim:
        raise LayoutError(
            f"vLLM's KV blocks of one layer have shape {list(block.shape)}; kvtier knows [blocks, kv_heads, block tokens, 2 * {head_dim}]"
        )
    blocks, heads, tokens, _ = block.shape
    found = {"K and V side by side": (block[..., :head_dim].transpose(1, 2), block[..., head_dim:].transpose(1, 2))}
    per_block, per_head = block.stride()[:2]
    if block.stride()[2:] == (2 * head_dim, 1):  # a head's part of a block is one piece, which a kernel may divide as it likes
        shape, start = (blocks, tokens, heads, head_dim), block.storage_offset()
        values = block.as_strided(shape, (per_block, head_dim, per_head, 1), start + tokens * head_dim)
        found["K, then V"] = (block.as_strided(shape, (per_block, head_dim, per_head, 1), start), values)
        found["K transposed, then V"] = (block.as_strided(shape, (per_block, 1, per_head, tokens), start), values)
    return found


class BlockPages:
    """The blocks of all layers, read as pages `[layers, 2, block tokens, kv_heads, head_dim]`.

    `layers`: each layer's (keys, values), `[blocks, block tokens, kv_heads, head_dim]`, all of one shape, dtype and device.
    """

    def __init__(self, layers: Sequence[Views]) -> None:
        self.device = layers[0][0].device
        planes = [[views[plane] for views in layers] for plane in (0, 1)]
        self._here = [[_bits(layer) for layer in plane] for plane in planes] if self.device.type == "cpu" else None
        """In CPU memory, copied on this thread alone: torch would wake threads that the engine needs."""
        self._there = [] if self._here is not None else [_stacked(plane) for plane in planes]

    def read(self, block: int, page: torch.Tensor) -> None:
        """Copy one block into `page` `[layers, 2, block tokens, kv_heads, head_dim]`, in CPU memory."""
        if self._here is not None:
            self._copy_here(block, page, into_page=True)
            return
        for plane, stack in enumerate(self._there):
            if isinstance(stack, list):
                for layer, views in enumerate(stack):
                    page[layer, plane].copy_(views[block])
            else:
                page[:, plane].copy_(stack[block])

    def write(self, block: int, page: torch.Tensor, layers: slice) -> None:
        """Copy these layers of a page, `page` `[len(layers), 2, block tokens, kv_heads, head_dim]`, into one block."""
        if self._here is not None:
            self._copy_here(block, page, into_page=False, layers=layers)
            return
        for plane, stack in enumerate(self._there):
            if isinstance(stack, list):
                for layer, views in enumerate(stack[layers]):
                    views[block].copy_(page[layer, plane])
            else:
                stack[block, layers].copy_(page[:, plane])

    def _copy_here(self, block: int, page: torch.Tensor, into_page: bool, layers: slice = slice(None)) -> None:
        bits = _bits(page)
        for plane, stack in enumerate(self._here or ()):
            copy_block(stack[layers], block, bits[:, plane], into_page)


def _stacked(layers: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """All layers as one view `[blocks, layers, ...]` if they are equal steps apart in one piece of memory, else as they are."""
    first, strides = layers[0], layers[0].stride()
    offsets = [layer.storage_offset() for layer in layers]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    together = all(
        layer.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and layer.stride() == strides for layer in layers
    )
    if not together or step < 0 or offsets != [offsets[0] + step * index for index in range(len(offsets))]:
        return list(layers)
    return first.as_strided((first.shape[0], len(layers), *first.shape[1:]), (strides[0], step, *strides[1:]), offsets[0])


def _bits(tensor: torch.Tensor) -> NDArray[np.integer]:
    bits: NDArray[np.integer] = tensor.detach().view(_BITS[tensor.element_size()]).numpy()
    return bits


def matching(candidates: Mapping[str, Views], block: int, keys: torch.Tensor, values: torch.Tensor) -> str:
    """The name of the one reading under which `block` holds exactly these keys and values, `[block tokens, kv_heads, head_dim]`.

    LayoutError if none does.
    """
    for name, (read_keys, read_values) in candidates.items():
        if torch.equal(read_keys[block], keys) and torch.equal(read_values[block], values):
            return name
    raise LayoutError(
        "vLLM's attention backend lays out keys and values inside a block in a way kvtier does not know on this machine (tried: "
        f"{', '.join(candidates)}); nothing can be stored safely, so run vLLM without the kvtier connector"
    )
