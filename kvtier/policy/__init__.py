"""Eviction policies: which page of a tier leaves. Plain data in, page ids out; no tensors, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable

from kvtier.errors import ConfigError
from kvtier.policy.a2cr import A2CR
from kvtier.policy.a2cr_classic import A2CRClassic, A2CRParameters
from kvtier.policy.arc import ARC
from kvtier.policy.base import ROOT, EvictionPolicy, Mask, Names, Pages, Protection, by_id, nothing_protected
from kvtier.policy.depth_discounted import DepthDiscounted
from kvtier.policy.fifo import FIFO
from kvtier.policy.gdsf import GDSF, LFUDA
from kvtier.policy.ghosts import Ghosts
from kvtier.policy.lfu import LFU, InCacheLFU
from kvtier.policy.lru import LRU
from kvtier.policy.lru2 import LRU2
from kvtier.policy.marconi import Marconi
from kvtier.policy.pressure import PressureBand, PressureBands, SmoothedPressure
from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.reuse_probability import ReuseProbability
from kvtier.policy.s3fifo import S3FIFO
from kvtier.policy.sieve import SIEVE
from kvtier.policy.slru import SLRU
from kvtier.policy.wtinylfu import WTinyLFU

PAGE_TOKENS = 512
"""Tokens of a page where nobody says: those of the public traces."""

_PLAIN = (A2CR, LRU, FIFO, LRU2, LFU, InCacheLFU, LFUDA, DepthDiscounted, SLRU, ARC, S3FIFO, SIEVE, WTinyLFU)
"""Made without a word."""
_PRICED = (GDSF, Marconi, ReuseProbability)
"""Made with the tokens of a page: they weigh the work that stands before it."""

_MAKERS: dict[str, Callable[[A2CRParameters | None, int], EvictionPolicy]] = {
    **{policy.name: lambda _, __, policy=policy: policy() for policy in _PLAIN},  # type: ignore[misc]
    **{policy.name: lambda _, tokens, policy=policy: policy(tokens) for policy in _PRICED},  # type: ignore[misc]
    A2CRClassic.name: lambda parameters, _: A2CRClassic(parameters),
}

POLICIES: tuple[str, ...] = tuple(_MAKERS)
"""Names that `make_policy` knows; docs/policies.md says where they come from and when not to use them."""


def make_policy(name: str, parameters: A2CRParameters | None = None, page_tokens: int = PAGE_TOKENS) -> EvictionPolicy:
    """A new policy for one tier of pages of `page_tokens` tokens. `parameters` are for the A²CR family. ConfigError for an unknown name."""
    if name not in _MAKERS:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(POLICIES)}")
    return _MAKERS[name](parameters, page_tokens)


__all__ = [
    "A2CR",
    "ARC",
    "FIFO",
    "GDSF",
    "LFU",
    "LFUDA",
    "LRU",
    "LRU2",
    "POLICIES",
    "ROOT",
    "S3FIFO",
    "SIEVE",
    "SLRU",
    "A2CRClassic",
    "A2CRParameters",
    "DepthDiscounted",
    "EvictionPolicy",
    "Ghosts",
    "InCacheLFU",
    "Marconi",
    "Mask",
    "Names",
    "Pages",
    "PressureBand",
    "PressureBands",
    "Protection",
    "QueuedPolicy",
    "ReuseProbability",
    "SmoothedPressure",
    "WTinyLFU",
    "by_id",
    "make_policy",
    "nothing_protected",
]
