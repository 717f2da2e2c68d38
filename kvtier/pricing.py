"""Restore or recompute: what bringing pages back takes, what computing them again would, and where to cut a prefix between the two.

Both are learned from what they took so far: seconds as sums of a few non-negative terms, fitted to the relative error of recent
observations (exponential forgetting, so that a busier disk or a faster model is noticed). How little observations say counts against
giving up a restore: from short prefills alone nobody knows what a long one takes. Plain numbers, no clock; state belongs to the cache's
lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

FORGET = 0.93
"""Weight that an observation keeps at each later one: half is left after ten."""
LEAST_OBSERVATIONS = 3
"""Fewer say too little to give up a restore for."""
OUTLIER = 4.0
"""What took more times longer than foreseen counts as so many times longer: one stall must not hide ten restores."""
EXPLORE_SHARE = 0.02
"""This much of the time that declined restores take to compute is spent on restores that do not seem to pay: links change, and only
restores show how."""

GUESSED_ERROR, GUESSES = 0.1, 4.0
"""Relative error expected of observations before there are any, and how many observed ones that weighs."""
LESSER_SHARE = 0.5
"""What any term but the first is believed to make of a piece of work, at most, as one standard deviation, until observations tell."""

DISTINCT = 1e-6
"""Share of a term's squares that the terms before it must not account for: observations that differ by less, a thousandth, do not tell them
apart."""
ROUNDING = 1e-9
"""A term more that explains no more than this explains nothing."""

Amounts = Sequence[float] | NDArray[np.int64]
"""Encoded bytes by tier."""
Floats = NDArray[np.float64]


class CostModel:
    """Seconds as the sum of `terms` times weights, weights 0 or more; `terms` are what a piece of work consists of, such as (1, bytes).

    Plain Python: a few numbers, at moments when an engine waits and NumPy's code is in no cache.
    """

    def __init__(self, terms: int) -> None:
        self.observations = 0
        self.weights = [0.0] * terms
        self._remembered = 0.0
        """Observations, each as far as it is not forgotten."""
        self._seen = [False] * terms
        self._gram = [[0.0] * terms for _ in range(terms)]
        self._moment = [0.0] * terms

    def seconds(self, terms: Sequence[float]) -> float | None:
        """What that work takes; None while a term it has was never seen."""
        if any(term > 0 and not seen for term, seen in zip(terms, self._seen, strict=True)):
            return None
        return sum(term * weight for term, weight in zip(terms, self.weights, strict=True))

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """Work of these terms took so long. ValueError unless terms and seconds are finite, 0 or more, and not all 0."""
        if not (all(0 <= term < math.inf for term in terms) and any(terms) and 0 < seconds < math.inf):
            raise ValueError(f"work of {list(terms)} took {seconds} s; expected terms of 0 or more, one above 0, and a positive time")
        foreseen = self.seconds(terms)
        if foreseen and self.observations >= LEAST_OBSERVATIONS:
            seconds = min(seconds, OUTLIER * foreseen)
        for i, term in enumerate(terms):
            self._seen[i] = self._seen[i] or term > 0
            self._moment[i] = FORGET * self._moment[i] + term / seconds
            for j, other in enumerate(terms):
                self._gram[i][j] = FORGET * self._gram[i][j] + term / seconds * other / seconds
        self._remembered = FORGET * self._remembered + 1.0
        self.observations += 1
        self._fit()

    def covariance(self) -> Floats:
        """How far the weights may be off, `[terms, terms]`, from how well they explain what was seen and what that tells apart.

        A standard error of foreseen seconds is the root of `terms @ covariance @ terms`. Needs an observation with every term.
        """
        gram, moment, weights = np.array(self._gram), np.array(self._moment), np.array(self.weights)
        squares = max(0.0, self._remembered - 2 * weights @ moment + weights @ gram @ weights)
        freedom = max(0.0, self._remembered - len(weights))
        variance = (squares + GUESSES * GUESSED_ERROR**2) / (freedom + GUESSES)
        scale = np.sqrt(np.diag(gram))
        believed = np.full(len(weights), variance / LESSER_SHARE**2 / self._remembered)
        believed[0] = 0.0
        scales: Floats = np.outer(scale, scale)
        found: Floats = variance * np.linalg.inv(gram / scales + np.diag(believed)) / scales
        return found

    def _fit(self) -> None:
        """The least squares of non-negative weights: of all choices of terms whose own least squares is not negative, the best.

        There are few choices of few terms, and this runs while an engine waits: it has to take microseconds, whatever was observed. Where
        observations cannot tell terms apart, the first one takes all.
        """
        seen = [i for i, row in enumerate(self._gram) if row[i]]
        most, best = 0.0, dict[int, float]()
        for used in chain.from_iterable(combinations(seen, count) for count in range(1, len(seen) + 1)):
            weights = self._least_squares(used)
            if weights and all(0 <= weight < math.inf for weight in weights):
                explained = sum(self._moment[i] * weight for i, weight in zip(used, weights, strict=True))
                if explained > most * (1 + ROUNDING):
                    most, best = explained, dict(zip(used, weights, strict=True))
        self.weights = [best.get(i, 0.0) for i in range(len(self._gram))]

    def _least_squares(self, used: Sequence[int]) -> list[float]:
        """The best weights of these terms alone, of any sign; none if observations do not tell them apart."""
        rows = [[*(self._gram[i][j] for j in used), self._moment[i]] for i in used]
        for at, row in enumerate(rows):
            if not row[at] > DISTINCT * self._gram[used[at]][used[at]]:
                return []
            for below in rows[at + 1 :]:
                factor = below[at] / row[at]
                for column in range(at, len(row)):
                    below[column] -= factor * row[column]
        weights = [0.0] * len(rows)
        for at in range(len(rows) - 1, -1, -1):
            row = rows[at]
            weights[at] = (row[-1] - sum(row[later] * weights[later] for later in range(at + 1, len(rows)))) / row[at]
        return weights


class Prices:
    """What a cache with `tiers` tiers knows of both ways. Tier 0 is the device, whose pages cost nothing."""

    def __init__(self, tiers: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.restoring = CostModel(tiers)
        """Terms: encoded bytes from each colder tier, then 1."""
        self.computing = CostModel(3)
        """Terms: tokens, tokens times the mean number of tokens they attend to, 1."""
        self._explore_s = 0.0
        """Seconds saved up for exploring."""
        self._tiers = tiers

    def restored(self, bytes_by_tier: Amounts, seconds: float) -> None:
        """Bringing up so many encoded bytes of each colder tier (index 0 is ignored) took so long, from asking to the last page."""
        self.restoring.observe([*map(float, bytes_by_tier[1:]), 1.0], seconds)

    def computed(self, start: int, tokens: int, seconds: float) -> None:
        """Computing the KV of `tokens` tokens in one go, after `start` others, took so long."""
        self.computing.observe(_prefill_terms(start, tokens), seconds)

    def restore_s(self, bytes_by_tier: Amounts) -> float | None:
        """Seconds to bring so many encoded bytes of each tier to the device (index 0 is free); None if that was never measured."""
        if not any(bytes_by_tier[1:]):
            return 0.0
        return self.restoring.seconds([*map(float, bytes_by_tier[1:]), 1.0])

    def recompute_s(self, start: int, tokens: int) -> float | None:
        """Seconds that computing `tokens` tokens after `start` others adds to a prefill that is needed anyway; None if never measured."""
        if self.computing.observations == 0:
            return None
        return self.computing.seconds([*_prefill_terms(start, tokens)[:2], 0.0])

    def recompute_doubt_s(self, starts: Sequence[float] | Floats, tokens: Sequence[float] | Floats) -> Floats:
        """The standard error of `recompute_s`, for pieces `[n]` of work. Needs an observation."""
        counts = np.asarray(tokens, np.float64)
        terms = np.stack((counts, counts * (np.asarray(starts, np.float64) + counts / 2)), axis=1)
        squares: Floats = np.einsum("ni,ij,nj->n", terms, self.computing.covariance()[:2, :2], terms)
        return np.sqrt(np.maximum(squares, 0.0))

    def pages_to_restore(self, homes: NDArray[np.intp], page_bytes: NDArray[np.int64]) -> int:
        """How many of a prefix's first pages to bring up so that restoring them and computing the rest of the prefix is fastest, if
        computing takes what it may take at most.

        `homes[i]`: the warmest tier of page i; `page_bytes[tier]`: encoded bytes of a page there. All of them while one side was measured
        too little, and now and then to measure again. More rather than fewer where it makes no difference.
        """
        pages = len(homes)
        if not homes.any() or min(self.restoring.observations, self.computing.observations) < LEAST_OBSERVATIONS:
            return pages
        if self.restore_s(np.bincount(homes, minlength=self._tiers)) is None:
            return pages
        *per_byte, fixed = self.restoring.weights
        seconds = np.array([0.0, *per_byte])[homes] * page_bytes[homes]
        restore = np.concatenate(([0.0], np.cumsum(seconds) + fixed * (np.cumsum(homes > 0) > 0)))
        starts: Floats = np.arange(pages + 1, dtype=np.float64) * self.page_tokens
        left: Floats = pages * self.page_tokens - starts
        recompute = self.computing.weights[0] * left + self.computing.weights[1] * left * (starts + left / 2)
        total: Floats = restore + recompute
        at_most = total + self.recompute_doubt_s(starts, left)
        cut = pages - int(np.argmin(at_most[::-1]))
        if cut == pages or not homes[cut:].any():
            return pages
        self._explore_s += EXPLORE_SHARE * float(total[cut])
        if self._explore_s < total[pages] - total[cut]:
            return cut
        self._explore_s = 0.0
        return pages

    def as_json(self) -> dict[str, object]:
        """What was learned, for `stats()`: seconds per restore and per gigabyte of each colder tier, and of computing 1,000 tokens."""
        thousand = self.recompute_s(0, 1000)
        return {
            "restores_observed": self.restoring.observations,
            "restore_fixed_s": self.restoring.weights[-1],
            "restore_s_per_gb": [weight * 1e9 for weight in self.restoring.weights[:-1]],
            "prefills_observed": self.computing.observations,
            "recompute_s_per_1000_tokens": thousand,
        }


def _prefill_terms(start: int, tokens: int) -> list[float]:
    return [float(tokens), tokens * (start + tokens / 2), 1.0]
