"""Copies between an engine's blocks and pages where the two are laid out differently, on this thread alone. No state.

In C where that was built, or with NumPy, a few times slower: an engine that keeps keys transposed has every number of a page elsewhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtier.extensions import load_extension

Numbers = NDArray[np.integer[Any]]


class _Extension(Protocol):
    def copy(self, layers: list[Numbers], block: int, page: Numbers, into_page: bool, /) -> None:
        """As `copy_block`."""


def copy_block(layers: list[Numbers], block: int, page: Numbers, into_page: bool) -> None:
    """Copy one block of all layers into a page, or the page into the block.

    `layers`: each `[blocks, a, b, c]`; `page`: `[layers, a, b, c]`; all of any strides, and of numbers of 2 or 4 bytes. ValueError for
    shapes that do not fit each other.
    """
    if (extension := _extension()) is not None:
        extension.copy(layers, block, page, into_page)
        return
    alike = len(layers) == len(page) and all(layer.shape[1:] == page.shape[1:] and 0 <= block < len(layer) for layer in layers)
    if not alike or page.itemsize not in (2, 4):
        raise ValueError("expected as many layers [blocks, a, b, c] as the page [layers, a, b, c] has, of 2 or 4 bytes")
    for layer, part in zip(layers, page, strict=True):
        if into_page:
            np.copyto(part, layer[block])
        else:
            np.copyto(layer[block], part)


def why_missing() -> str:
    """One line: why NumPy does it, and what to do; empty if it does not."""
    return _load()[1]


def _extension() -> _Extension | None:
    return _load()[0]


@lru_cache(maxsize=1)
def _load() -> tuple[_Extension | None, str]:
    return load_extension("kvtier.memory._strided", "NumPy moves blocks of engines on CPUs, a few times slower")
