"""Laws checked: vLLM's layouts are read as pages and written back to the same bytes, and only a reading that is right is taken."""

from __future__ import annotations

import pytest
import torch

from kvtier.engines.vllm.layouts import BlockPages, matching, readings
from kvtier.errors import LayoutError

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 3, 5, 2, 8, 4
ORDERS = {
    "LBHNC": (0, 1, 2, 3),
    "LBNHC": (0, 1, 3, 2),
    "LHBNC": (0, 2, 1, 3),
    "BLHNC": (1, 0, 2, 3),
    "BLNHC": (1, 0, 3, 2),
    "BHLNC": (1, 2, 0, 3),
}


def engine_blocks(order, content=2 * DIM):
    """vLLM's logical `[layers, blocks, heads, tokens, content]` over memory that lies in `order`, every number another one."""
    sizes = [LAYERS, BLOCKS, HEADS, TOKENS]
    memory = torch.arange(LAYERS * BLOCKS * HEADS * TOKENS * content, dtype=torch.float32).view(*[sizes[axis] for axis in order], content)
    return memory.permute(*[order.index(axis) for axis in range(4)], 4)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_side_by_side_keys_and_values_are_read_in_every_memory_order(order):
    blocks = engine_blocks(order)
    pages = BlockPages([readings(layer, DIM)["K and V side by side"] for layer in blocks])
    page = torch.empty(LAYERS, 2, TOKENS, HEADS, DIM)
    pages.read(3, page)
    assert torch.equal(page[:, 0], blocks[:, 3, :, :, :DIM].transpose(1, 2))
    assert torch.equal(page[:, 1], blocks[:, 3, :, :, DIM:].transpose(1, 2))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_what_is_written_into_a_block_is_read_back_and_other_blocks_stay(order):
    blocks = engine_blocks(order)
    before = blocks.clone()
    pages = BlockPages([readings(layer, DIM)["K and V side by side"] for layer in blocks])
    written, read = torch.randn(LAYERS, 2, TOKENS, HEADS, DIM), torch.empty(LAYERS, 2, TOKENS, HEADS, DIM)
    for layers in (slice(1, LAYERS), slice(0, 1)):
        pages.write(2, written[layers], layers)
    pages.read(2, read)
    assert torch.equal(read, written)
    assert torch.equal(blocks[:, [0, 1, 3, 4]], before[:, [0, 1, 3, 4]])


def test_layers_in_memory_of_their_own_are_read_too():
    layers = [layer.clone() for layer in engine_blocks(ORDERS["LBHNC"])]
    pages = BlockPages([readings(layer, DIM)["K, then V"] for layer in layers])
    page = torch.empty(LAYERS, 2, TOKENS, HEADS, DIM)
    pages.read(1, page)
    halves = torch.stack(layers)[:, 1].reshape(LAYERS, HEADS, 2, TOKENS, DIM)
    assert torch.equal(page, halves.permute(0, 2, 3, 1, 4))


def test_transposed_keys_are_read_token_by_token():
    keys, values = torch.randn(BLOCKS, TOKENS, HEADS, DIM), torch.randn(BLOCKS, TOKENS, HEADS, DIM)
    packed = torch.cat([keys.permute(0, 2, 3, 1).flatten(2), values.transpose(1, 2).flatten(2)], dim=2)
    block = packed.view(BLOCKS, HEADS, TOKENS, 2 * DIM)
    read_keys, read_values = readings(block, DIM)["K transposed, then V"]
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)


@pytest.mark.parametrize("name", ["K and V side by side", "K, then V", "K transposed, then V"])
def test_the_reading_that_matches_what_a_kernel_wrote_is_found(name):
    block = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM)
    keys, values = torch.randn(TOKENS, HEADS, DIM), torch.randn(TOKENS, HEADS, DIM)
    for view, numbers in zip(readings(block, DIM)[name], (keys, values), strict=True):
        view[2] = numbers
    assert matching(readings(block, DIM), 2, keys, values) == name


def test_an_unknown_order_inside_blocks_is_refused():
    block = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM)
    keys, values = torch.randn(TOKENS, HEADS, DIM), torch.randn(TOKENS, HEADS, DIM)
    block[1] = torch.cat([keys, values], dim=2).transpose(0, 1).flip(1)
    with pytest.raises(LayoutError, match="does not know on this machine"):
        matching(readings(block, DIM), 1, keys, values)


@pytest.mark.parametrize("shape", [(BLOCKS, HEADS, TOKENS, DIM), (2, BLOCKS, TOKENS, HEADS, DIM)])
def test_another_shape_is_refused(shape):
    with pytest.raises(LayoutError, match="kvtier knows"):
        readings(torch.zeros(shape), DIM)
