"""The block store: kvtier's disk tier as a keyed store of blocks in the caller's memory, for engines with memory tiers of their own.

`store.py` is its face, `contents.py` what is in it, `operations.py` the batches that move bytes.
"""

from kvtier.blocks.contents import Chain, Presence
from kvtier.blocks.store import BlockStore, loses_bits, require_lossless

__all__ = ["BlockStore", "Chain", "Presence", "loses_bits", "require_lossless"]
