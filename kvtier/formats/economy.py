"""Does compressing pages for a tier pay? Plain arithmetic over what the mover measured; no clock, no tensors.

A byte stage is worth its time if the bytes it saves would have taken longer to write and to read again. Where they would not (a fast disk,
pages that do not shrink) the stage is told to store (`Staged.encode(..., compress=False)`), and tried again now and then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MEMORY = 0.9
"""What is left of an observation's weight after the next one: the last 20 or so count."""

BEFORE_JUDGING = 4
"""Observations before the first verdict; until then the stage compresses."""

MARGIN = 1.2
"""Hysteresis: off when time saved * MARGIN is below time spent, on again when time saved is above time spent * MARGIN."""

PROBE_EVERY = 64
"""While off, one batch in so many is compressed, to see whether it has begun to pay."""


@dataclass(frozen=True)
class StageEconomy:
    """Verdict over one tier's byte stage, and what it rests on. A value: `after` and `stored` give the next one.

    Whoever stores into the tier keeps the current one; two threads that replace it at once lose an observation, no more.
    """

    pays: bool = True
    saved_s: float = 0.0
    spent_s: float = 0.0
    observations: int = 0
    batches_stored: int = 0

    @property
    def compress_next(self) -> bool:
        """Whether to compress the next batch: because it pays, or to find out."""
        return self.pays or self.batches_stored >= PROBE_EVERY

    def after(self, bytes_in: int, bytes_out: int, seconds: float, bytes_per_s: float) -> StageEconomy:
        """After a batch was compressed: bytes before and after, time spent packing (and unpacking, where known), the tier's bandwidth.

        Each byte saved counts twice at `bytes_per_s`: once written, once read. ValueError unless `seconds` >= 0 and `bytes_per_s` > 0.
        """
        if seconds < 0 or bytes_per_s <= 0:
            raise ValueError(f"stage economy: {seconds} s at {bytes_per_s} bytes/s; expected a time of at least 0 and a bandwidth above 0")
        saved = self.saved_s * MEMORY + 2 * (bytes_in - bytes_out) / bytes_per_s
        spent = self.spent_s * MEMORY + seconds
        observations = self.observations + 1
        pays = self.pays
        if observations >= BEFORE_JUDGING:
            pays = saved * MARGIN >= spent if self.pays else saved > spent * MARGIN
        return StageEconomy(pays, saved, spent, observations)

    def stored(self) -> StageEconomy:
        """After a batch was stored without compressing it."""
        return replace(self, batches_stored=self.batches_stored + 1)
