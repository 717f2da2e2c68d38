"""Laws checked: a copy between layouts moves every number to its place and no other, compiled or not; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.memory import strided
from kvtier.memory.region import aligned_array

LAYERS, BLOCKS = 3, 4
SHAPES = [(16, 2, 8), (8, 1, 24), (10, 3, 8), (8, 2, 6), (1, 1, 1), (32, 2, 32), (64, 1, 40)]
"""Tokens, heads and numbers: some of whole tiles, some not, some of whole lines of memory."""
ORDERS = {"as the page": (0, 1, 2, 3), "by head": (0, 2, 1, 3), "transposed": (0, 2, 3, 1), "numbers far apart": (0, 3, 1, 2)}


@pytest.fixture(params=["compiled", "NumPy"])
def way(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(strided, "_extension", lambda: None)
    elif strided._extension() is None:
        pytest.skip("the extension is not built here")


def engine_layers(shape, order, dtype, offset_bytes=0):
    """Layers `[blocks, tokens, heads, numbers]` over memory that lies in `order`, every number another one, so far behind a whole page."""
    sizes = (BLOCKS, *shape)
    count = int(np.prod(sizes))
    back = [order.index(axis) for axis in range(4)]
    memory = [aligned_array(count * np.dtype(dtype).itemsize + offset_bytes)[offset_bytes:].view(dtype) for _ in range(LAYERS)]
    for layer, each in enumerate(memory):
        each[:] = np.arange(layer * count, (layer + 1) * count)
    return [each.reshape([sizes[axis] for axis in order]).transpose(back) for each in memory]


@pytest.mark.parametrize("offset_bytes", [0, 4])
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("way")
def test_a_block_becomes_a_page_and_a_page_a_block(shape, order, dtype, offset_bytes):
    layers = engine_layers(shape, order, dtype, offset_bytes)
    before = [layer.copy() for layer in layers]
    pages = np.full((LAYERS, 2, *shape), -1, dtype)
    strided.copy_block(layers, 2, pages[:, 1], True)
    assert np.array_equal(pages[:, 1], np.stack([layer[2] for layer in before]))
    assert (pages[:, 0] == -1).all()
    strided.copy_block(layers, 1, pages[:, 1], False)
    for layer, was in zip(layers, before, strict=True):
        was[1] = was[2]
        assert np.array_equal(layer, was)


@pytest.mark.parametrize("block", [-1, BLOCKS])
@pytest.mark.usefixtures("way")
def test_a_block_that_is_not_there_is_refused(block):
    with pytest.raises(ValueError, match="expected"):
        strided.copy_block(engine_layers((8, 2, 8), (0, 1, 2, 3), np.int16), block, np.zeros((LAYERS, 8, 2, 8), np.int16), True)


@pytest.mark.parametrize(
    "page",
    [np.zeros((LAYERS - 1, 8, 2, 8), np.int16), np.zeros((LAYERS, 8, 2, 4), np.int16), np.zeros((LAYERS, 8, 2, 8), np.int64)],
    ids=["layers", "shape", "size"],
)
@pytest.mark.usefixtures("way")
def test_a_page_of_another_shape_is_refused(page):
    with pytest.raises(ValueError, match="expected"):
        strided.copy_block(engine_layers((8, 2, 8), (0, 1, 2, 3), page.dtype), 0, page, True)
