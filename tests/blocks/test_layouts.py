"""Blocks in a caller's memory: every order of axes is read and written as the page it is, and what fits none is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.errors import IntegrityError, LayoutError
from kvtier.layout import PageLayout
from kvtier.tiers.lent import BlockLayout, LentBlocks, parts_of

PAGE = PageLayout(layers=3, planes=2, page_tokens=4, kv_heads=2, head_dim=8, dtype="bf16")
ORDERS = [("LPTHD", "LPTHD"), ("PLTHD", "PLTHD"), ("PTLHD", "PTLHD"), ("LHPDT", "LHPTD"), ("THLDP", "THLDP")]


def numbered() -> torch.Tensor:
    """A page whose numbers all differ."""
    return torch.arange(PAGE.values, dtype=torch.int16).view(torch.bfloat16).reshape(PAGE.shape)


def block_of(page: torch.Tensor, keys: str, values: str) -> np.ndarray:
    """The page as a block of these orders, number by number."""
    bits = page.view(torch.int16).numpy()
    sizes = dict(zip("LPTHD", PAGE.shape, strict=True))
    whole = {order: np.zeros([sizes[axis] for axis in order], np.int16) for order in (keys, values)}
    flat = np.zeros(PAGE.values, np.int16)
    for plane, order in ((0, keys), (1, values)):
        strides = np.array(whole[order].strides) // 2
        for index in np.ndindex(*PAGE.shape):
            if index[1] == plane:
                at = dict(zip("LPTHD", index, strict=True))
                flat[sum(at[axis] * stride for axis, stride in zip(order, strides, strict=True))] = bits[index]
    return flat.view(np.uint8)


@pytest.mark.parametrize(("keys", "values"), ORDERS)
@pytest.mark.parametrize("pieces", [1, 3])
def test_every_order_is_gathered_and_scattered_as_the_page_it_is(keys, values, pieces):
    page, lent = numbered(), LentBlocks(BlockLayout(PAGE, keys, values))
    block = block_of(page, keys, values)
    cuts = np.array_split(block, pieces)
    slots = lent.lend([parts_of([piece.copy() for piece in cuts], PAGE.page_bytes, writable=True)])
    assert torch.equal(lent.gather(slots).view(torch.int16), page[None].view(torch.int16))
    target = np.zeros(PAGE.page_bytes, np.uint8)
    into = lent.lend([parts_of(np.array_split(target, pieces), PAGE.page_bytes, writable=True)])
    lent.scatter(into, page[None])
    np.testing.assert_array_equal(target, block)
    lent.free([*slots, *into])
    assert lent.bytes_used == 0


def test_layers_are_scattered_apart():
    page, lent = numbered(), LentBlocks(BlockLayout(PAGE, "PLTHD", "PLTHD"))
    target = np.zeros(PAGE.page_bytes, np.uint8)
    slots = lent.lend([parts_of(target, PAGE.page_bytes, writable=True)])
    for layer in range(PAGE.layers):
        lent.scatter(slots, page[None, layer : layer + 1], slice(layer, layer + 1))
    np.testing.assert_array_equal(target, block_of(page, "PLTHD", "PLTHD"))


def test_latent_blocks_have_one_plane():
    page = PageLayout(layers=2, planes=1, page_tokens=4, kv_heads=1, head_dim=16, dtype="fp32")
    lent = LentBlocks(BlockLayout(page, "TLPHD", "TLPHD"))
    block = np.random.default_rng(1).integers(0, 255, page.page_bytes, np.uint8)
    found = lent.gather(lent.lend([parts_of(block, page.page_bytes, writable=False)]))
    expected = block.view(np.int32).reshape(4, 2, 16).transpose(1, 0, 2)
    np.testing.assert_array_equal(found.view(torch.int32).numpy()[0, :, 0, :, 0], expected)


@pytest.mark.parametrize("orders", [("LPTH", "LPTH"), ("LPTHDD", "LPTHDD"), ("LPTHD", "PLTHD"), ("abcde", "abcde")])
def test_orders_that_are_none_are_refused(orders):
    with pytest.raises(LayoutError):
        BlockLayout(PAGE, *orders)


@pytest.mark.parametrize(("size", "number"), [(0, 2), (-2, 2), (7, 2), (6, 4), (8, 1), (8, 3)])
def test_opaque_sizes_that_are_none_are_refused(size, number):
    with pytest.raises(LayoutError, match="multiple"):
        BlockLayout.opaque(size, number)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (bytes(7), "7 bytes; expected 8"),
        ([bytes(4), bytes(8)], "12 bytes"),
        ("text", "str"),
        (7, "int"),
        (np.zeros((4, 4), np.uint8)[:, :2], "not contiguous"),
    ],
)
def test_memory_that_does_not_fit_is_refused(block, says):
    with pytest.raises(LayoutError, match=says):
        parts_of(block, 8, writable=False)


def test_read_only_memory_is_refused_only_where_it_is_written():
    assert parts_of(bytes(8), 8, writable=False)[0].nbytes == 8
    with pytest.raises(LayoutError, match="read-only"):
        parts_of(bytes(8), 8, writable=True)


def test_a_slot_nobody_lent_is_not_given_back():
    with pytest.raises(IntegrityError):
        LentBlocks(BlockLayout(PAGE)).free([3])
