"""Page keys: chained content hashes. Equal key => equal namespace, tenant and tokens from the start => equal KV.

A key is 32 bytes of BLAKE2b over (parent key, the page's token ids as little-endian int64). The chain starts at a root made of
the namespace (model, revision, layout fingerprint) and the tenant's salt, so two models, two layouts or two tenants never share
a page. Keys depend on nothing else: they are the same in every process, on every run, on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.layout import PageLayout

KEY_BYTES = 32
PageKey = bytes
TokenIds = Sequence[int] | NDArray[np.integer]


def namespace(model: str, revision: str, layout: PageLayout) -> bytes:
    """Name of everything that must be equal for KV to be interchangeable: model, revision of its weights, page layout."""
    return _join(b"kvtier namespace 1", model.encode(), revision.encode(), layout.fingerprint)


def root_key(namespace: bytes, salt: str = "") -> PageKey:
    """The parent of every first page of tenant `salt` in `namespace`. LayoutError for a salt that is no string."""
    if not isinstance(salt, str):
        raise LayoutError(f"salt is a {type(salt).__name__}; expected the tenant's name as a string, '' for none")
    return _join(b"kvtier root 1", namespace, salt.encode())


def token_array(token_ids: TokenIds) -> NDArray[np.int64]:
    """Token ids as a contiguous int64 array `[tokens]`. LayoutError unless they are one flat sequence of whole numbers in int64."""
    try:
        array = np.asarray(token_ids)
    except (TypeError, ValueError, OverflowError):
        array = np.array(None)
    if array.ndim == 1 and not array.size:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.dtype == np.uint64 and int(array.max()) >= 2**63):
        raise LayoutError(f"token ids are {array.dtype} {list(array.shape)}; expected one flat sequence of whole numbers that fit in int64")
    return np.ascontiguousarray(array, dtype="<i8")


def page_keys(token_ids: TokenIds, page_tokens: int, parent: PageKey) -> list[PageKey]:
    """Keys of the full pages of `token_ids`, in order; a last, partial page has none.

    `parent` is `root_key(...)` or the key of the page just before the first token. Token ids must fit in int64.
    """
    tokens = token_array(token_ids)
    pages = len(tokens) // page_tokens
    data = tokens[: pages * page_tokens].tobytes()
    step = page_tokens * 8
    keys, blake2b = [], hashlib.blake2b
    for start in range(0, pages * step, step):
        parent = blake2b(parent + data[start : start + step], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys


def _join(*parts: bytes) -> bytes:
    """Hash of the parts, each preceded by its length so that no two lists of parts collide."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
