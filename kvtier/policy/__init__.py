"""Eviction policies: which page of a tier leaves. Plain data in, page ids out; no tensors, no I/O, no clock."""

from __future__ import annotations

from kvtier.errors import ConfigError
from kvtier.policy.a2cr import A2CR
from kvtier.policy.a2cr_classic import A2CRClassic, A2CRParameters
from kvtier.policy.base import ROOT, EvictionPolicy, Mask, Names, Pages, Protection, by_id, nothing_protected
from kvtier.policy.ghosts import Ghosts
from kvtier.policy.lru import LRU
from kvtier.policy.pressure import PressureBand, PressureBands, SmoothedPressure

POLICIES: tuple[str, ...] = (LRU.name, A2CR.name, A2CRClassic.name)
"""Names that `make_policy` knows."""


def make_policy(name: str, parameters: A2CRParameters | None = None) -> EvictionPolicy:
    """A new policy for one tier. `parameters` are for `a2cr-classic`, others take none. ConfigError for an unknown name."""
    if name == LRU.name:
        return LRU()
    if name == A2CR.name:
        return A2CR()
    if name == A2CRClassic.name:
        return A2CRClassic(parameters)
    raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(POLICIES)}")


__all__ = [
    "A2CR",
    "LRU",
    "POLICIES",
    "ROOT",
    "A2CRClassic",
    "A2CRParameters",
    "EvictionPolicy",
    "Ghosts",
    "Mask",
    "Names",
    "Pages",
    "PressureBand",
    "PressureBands",
    "Protection",
    "SmoothedPressure",
    "by_id",
    "make_policy",
    "nothing_protected",
]
