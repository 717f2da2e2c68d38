"""What makes A²CR do in a short test what it does in a long time."""

from __future__ import annotations

import pytest

from kvtier.policy import memory as memory_module
from kvtier.policy import reuse as reuse_module


@pytest.fixture
def hasty(monkeypatch):
    """Fits and new cohorts after a few pages, few of them, and few ghosts."""
    monkeypatch.setattr(reuse_module, "PERIOD_SPELLS", 64)
    monkeypatch.setattr(reuse_module, "PERIOD_CALLS", 1)
    monkeypatch.setattr(memory_module, "FEW", 256)
