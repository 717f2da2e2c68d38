"""A²CR against the contract, and what its score promises: better than LRU where there is something to learn, never far behind it."""

from __future__ import annotations

from kvtier.policy import A2CR
from kvtier.testing.policy import PolicyContract


class TestContract(PolicyContract):
    exact_score = False

    def make_policy(self) -> A2CR:
        return A2CR()
