"""Without the extension everything works and says so."""

from __future__ import annotations

import subprocess
import sys

from kvtier import columns

WITHOUT = """
import sys
sys.modules["kvtier.columns._loops"] = None
import numpy as np
from kvtier import columns
from kvtier.pages import PageTable
from kvtier.policy import LRU
assert columns.loops() is None
assert "compiler" in columns.why_missing(), columns.why_missing()
table, policy = PageTable(1, 4), LRU()
rows = table.add_chain([b"a", b"b"], b"r", 0)
table.settle(rows, 0, [0, 1])
policy.insert(rows, *table.links(rows)[:2], 1.0)
assert policy.peek(2, lambda pages: np.zeros(len(pages), bool), 1.0, 0.0).tolist() == [1, 0]
"""


def test_without_the_extension_numpy_does_the_work_and_the_reason_is_told():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)


def test_there_are_loops_or_a_reason():
    assert (columns.loops() is None) == bool(columns.why_missing())
