"""A²CR against the contract, and what its score promises: better than LRU where there is something to learn, never far behind it."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.policy import ROOT, A2CR, nothing_protected
from kvtier.testing.policy import PolicyContract, evicted, insert_one, pages_of


class TestContract(PolicyContract):
    exact_score = False

    def make_policy(self) -> A2CR:
        return A2CR()
