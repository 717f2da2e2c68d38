"""Who is in which tier, and how that changes: where policies and mover meet.

`residency.py` owns the one lock and the parts: how tiers are opened and found again (`opening.py`), what leaves and for whom
(`eviction.py`, `protection.py`, all of it: `clearing.py`), what goes down and comes up (`copying.py`), what hints bring (`prefetch.py`,
`hinted.py`), what is done ahead of demand (`housekeeping.py`, `node_moves.py`), how much the device tier could hold (`fitting.py`) and how
it changes its size (`resizing.py`), what is counted (`metrics.py`).
"""

from kvtier.residency.residency import Residency

__all__ = ["Residency"]
