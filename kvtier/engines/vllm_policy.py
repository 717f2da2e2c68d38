"""kvtier's eviction policies in vLLM's own CPU offloading, named in its configuration; vLLM is not patched.

    {"cpu_bytes_to_use": ..., "eviction_policy": "A2CR", "cache_policy_module_path": "kvtier.engines.vllm_policy"}

vLLM counts, pins and moves its chunks itself and only asks who leaves. A policy object belongs to the one manager that made it and is
called in the scheduler's thread. Written for vLLM 0.32 (`vllm.v1.kv_offload`, which vLLM calls experimental).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtier.engines.versions import require_engine
from kvtier.policy import ROOT, EvictionPolicy, Mask, Pages, make_policy

require_engine("vllm")

from vllm.v1.kv_offload.base import OffloadKey, ReqContext  # noqa: E402  # after the check
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus  # noqa: E402

from kvtier.engines.vllm_requests import chunks_before  # noqa: E402


class KvtierPolicy(CachePolicy):  # type: ignore[misc]  # vLLM is not there when types are checked
    """One of kvtier's policies (`policy_name`) over vLLM's chunks; subclasses name others, and vLLM's configuration names the class.

    Chunks of one request and KV group follow each other, so a request's first chunks stay while later ones are here. `evict` is atomic and
    leaves alone what vLLM protects, reads or has not finished writing.
    """

    policy_name: ClassVar[str] = "a2cr"

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._page_of: dict[OffloadKey, int] = {}
        self._keys: list[OffloadKey | None] = []
        """By page, None for pages not in use."""
        self._names: NDArray[np.int64] = np.empty(0, np.int64)
        self._free: list[int] = []
        self._parent: list[int] = []
        self._children: list[int] = []
        """By page, its children that are in use: while there are any, the page's number is not given to another chunk."""
        self._depth: list[int] = []
        self._new: dict[OffloadKey, None] = {}
        """Chunks that came since the policy was last asked or told anything: together, they are one request's."""
        self._before: dict[OffloadKey, OffloadKey | None] = {}
        """The chunk before each that is to come, where its request told, first ones first."""
        self._policy = self._make()

    def _make(self) -> EvictionPolicy:
        policy = make_policy(self.policy_name)
        policy.names = self._names_of
        return policy

    def _names_of(self, pages: Pages) -> Pages:
        names: Pages = self._names[pages]
        return names

    # -- what vLLM calls -------------------------------------------------------------------------------------------------------

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        self._new[key] = None

    def remove(self, key: OffloadKey) -> None:
        del self._chunks[key]
        if key in self._new:
            del self._new[key]
            self._before.pop(key, None)
            return
        page = self._page_of.pop(key)
        self._policy.remove(np.array([page]))
        self._give_back([page])

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        self._settle()
        pages = [page for key in dict.fromkeys(keys) if (page := self._page_of.get(key)) is not None]
        if pages:
            self._policy.touch(np.array(pages), time.monotonic())

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """What a request stores next: how its chunks hang together. A miss is no use of anything that is here."""
        self._settle()
        before, coming = chunks_before(req_context), set(keys)
        self._before = {key: before[key] for key in before if key in coming}

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """A request's uses count once, at its end; chunks it only brought in had their first use when they came."""
        self.touch([key for group in key_groups for key in group if key in reused_keys], req_context)

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        self._settle()
        if n == 0:
            return []

        def stays(pages: Pages) -> Mask:
            keys = [self._keys[page] for page in pages.tolist()]
            return np.array([key in protected or key is None or self._chunks[key].ref_cnt != 0 for key in keys], np.bool_)

        pressure = min(1.0, len(self._chunks) / self.cache_capacity)
        victims = self._policy.evict(n, stays, time.monotonic(), pressure)
        if victims is None:
            return None
        evicted = []
        for page in victims.tolist():
            key = self._keys[page]
            assert key is not None  # pages in the policy are in use
            del self._page_of[key]
            evicted.append((key, self._chunks.pop(key)))
        self._give_back(victims.tolist())
        return evicted

    def clear(self) -> None:
        self._chunks.clear()
        self._page_of.clear()
        self._keys.clear()
        self._parent.clear()
        self._children.clear()
        self._depth.clear()
        self._free.clear()
        self._new.clear()
        self._before.clear()
        self._policy = self._make()

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Tell the policy of the chunks that came, all at once: vLLM inserts one by one what one request stores."""
        if not self._new:
            return
        new, before = self._new, self._before
        self._new, self._before = {}, {}
        keys = [*(key for key in before if key in new), *(key for key in new if key not in before)]
        pages = [self._take(key, before.get(key)) for key in keys]
        parents, depths = ([column[page] for page in pages] for column in (self._parent, self._depth))
        self._policy.insert(np.array(pages), np.array(parents), np.array(depths), time.monotonic())

    def _take(self, key: OffloadKey, before: OffloadKey | None) -> int:
        """A page for a new chunk."""
        parent = ROOT if before is None else self._page_of.get(before, ROOT)
        depth = 0 if parent == ROOT else self._depth[parent] + 1
        page = self._free.pop() if self._free else len(self._keys)
        if page == len(self._keys):
            self._keys.append(None)
            self._parent.append(ROOT)
            self._children.append(0)
            self._depth.append(0)
        if page >= len(self._names):
            larger = np.zeros(max(256, 2 * page), np.int64)
            larger[: len(self._names)] = self._names
            self._names = larger
        self._keys[page], self._parent[page], self._depth[page] = key, parent, depth
        self._names[page] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
        self._page_of[key] = page
        if parent != ROOT:
            self._children[parent] += 1
        return page

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._keys[page] = None
            parent = self._parent[page]
            if not self._children[page]:
                self._free.append(page)
            if parent != ROOT:
                self._children[parent] -= 1
                if not self._children[parent] and self._keys[parent] is None:
                    self._free.append(parent)


class A2CR(KvtierPolicy):
    """kvtier's default: what promises the least reuse per second of residence leaves first (docs/eviction.md)."""

    policy_name = "a2cr"
