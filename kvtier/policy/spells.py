"""What A²CR knows about the pages of a tier: which kind each is of, when the spell of its use began, what it is worth.

`kvtier.policy.a2cr` lets pages leave; `kvtier.policy.kinds` is what makes a kind, `kvtier.policy.reuse` what each is worth at every age.
Where the compiled loops of `kvtier.columns` are, they do the usual calls, to the same bits; scores are then found when a page queues.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvtier import columns
from kvtier.policy.ages import EDGES, age_bins
from kvtier.policy.base import ROOT, EvictionPolicy, Pages
from kvtier.policy.facts import CALL, COHORT, COMBINED, FACTS, GENERATION, KIND, NAME, RECORD, SCORED, USES, WORDS, packed, unpacked
from kvtier.policy.guard import BASE_USES, MOST_DOUBLINGS, UNKNOWN_CALL, Guard
from kvtier.policy.kinds import ATTENTION, COUNT_OF, END_STEP, FEATURES, GENERATION_OF, MOST_GENERATIONS, MOST_USES, NEW, NEW_STEP
from kvtier.policy.memory import Facts, Memory, records
from kvtier.policy.ranking import Ranking
from kvtier.policy.reuse import ReuseModel

RECENT_REQUESTS = 64
"""Uses that may still turn out to be the beginning of a request that goes on with new pages."""

_MOST_USES = np.array(MOST_USES)
RESCORED_SHARE = 8
"""All pages are scored again after an eighth of them left; in between, scores are those of the page's last use or the last time."""
_STEPS = np.array([END_STEP, NEW_STEP, ATTENTION, NEW, BASE_USES, MOST_DOUBLINGS, RESCORED_SHARE])

_COUNTS = CALL_NUMBER, SCORING, GONE = range(3)
"""Cells of `_counts`: the number of the next call that uses pages, how often all pages were scored, and how many left since."""
_CLOCK = LATEST, SCORED_AT = range(2)
"""Cells of `_clock`, seconds: the latest time seen, and when all pages were scored last."""
UNUSUAL, UNKNOWN_KINDS, COHORT_DUE, ORDER_CHANGED = -1, -2, 1, 2
"""Answers of compiled loops: nothing done, for other pages than usual or kinds to meet; or due at the end: a new cohort, scores anew."""
MOST_MISSING = 1024
"""More kinds than the pages of one call can be of."""


class Spells(EvictionPolicy):
    """Pages that come, are used and go, and their scores: the worth of a page at its age; while LRU is followed, the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self._ranking = Ranking()
        self._model = ReuseModel(FEATURES)
        self._memory = Memory(WORDS)
        self._guard = Guard()
        # One row a page, by id, and one more at the end for ROOT, as in the ranking.
        self._look_at(records(1, RECORD))
        self._attention: NDArray[np.float64] = np.zeros(1)
        """The moving average of a page's attention, where its kind says that there is one."""
        self._counts: Pages = np.zeros(len(_COUNTS), np.int64)
        self._clock: NDArray[np.float64] = np.full(len(_CLOCK), -math.inf)
        self._recent: dict[int, bytes] = {}
        """By the number of a call that used pages and may go on with new ones, these pages' ids in memory; the last RECENT_REQUESTS."""
        self._missing: Pages = np.zeros(1 + MOST_MISSING, np.int64)
        """How many kinds compiled loops did not know, and the features of each."""
        self._loops: columns.SpellLoops | None = None
        self._loops_over: tuple[object, ...] = ()

    def _look_at(self, pages: Pages) -> None:
        self._records = pages
        """`[pages, 8]`, what the following are views of: all that is known of a page is in one place."""
        self._facts: Facts = pages[:, : len(FACTS)]
        """What outlives eviction, `[pages, 5]`."""
        self._combined: Pages = pages[:, COMBINED]
        self._name: Pages = pages[:, NAME]
        self._scored: Pages = pages[:, SCORED]
        """The scoring that a page's score is of. Compiled loops score a page only when it queues, but as if it had been scored with all."""

    def attach(self) -> columns.SpellLoops | None:
        """The compiled loops over all columns as they are now; None where there are none."""
        loops, ranking, model = columns.loops(), self._ranking, self._model
        if loops is None or ranking.loops is None:
            return None
        kinds = (model.kind_of, model.worth, model.hits, model.change, model.alive, model.counted, model.period, EDGES)
        rest = (COUNT_OF, GENERATION_OF, _STEPS, self._guard.state, self._guard.ring, self._counts, self._clock)
        return loops.Spells(ranking.loops, self._recent, self._records, *kinds, self._memory.records, *rest, self._missing)

    def _fit_loops(self) -> columns.SpellLoops | None:
        """The compiled loops, over columns that may have grown: after anything but the loops themselves."""
        over = (self._ranking.here, self._model.worth, self._memory.records, self._guard.ring)
        if len(self._loops_over) != len(over) or any(held is not now for held, now in zip(self._loops_over, over, strict=True)):
            self._fit_columns()
            self._loops = self.attach()
            self._loops_over = over
        return self._loops

    def _meet_kinds(self) -> columns.SpellLoops | None:
        """The compiled loops, with the kinds that they did not know."""
        model, missing = self._model, self._missing[1 : 1 + self._missing[0]]
        missing.sort()
        held = model.worth
        model.meet(missing)
        return self._loops if model.worth is held else self._fit_loops()

    def insert(self, pages: Pages, parents: Pages, depths: Pages, now: float) -> None:
        if not len(pages):
            return
        names = self.names(pages)
        due = UNUSUAL if self._loops is None else self._loops.insert(pages, parents, depths, names, now)
        while due == UNKNOWN_KINDS and (loops := self._meet_kinds()) is not None:
            due = loops.insert(pages, parents, depths, names, now)
        if due < 0:
            due = self._insert(pages, parents, depths, names, now)
        if due:
            self._turn(due)

    def settle(self, chain: columns.NewChain, now: float) -> Pages | None:
        if self._loops is None:
            return None
        pages = np.empty(len(chain[2]), columns.WHOLE)
        due = self._loops.settle(*chain, pages, now)
        while due == UNKNOWN_KINDS and (loops := self._meet_kinds()) is not None:
            due = loops.settle(*chain, pages, now)
        if due < 0:
            return None
        if due:
            self._turn(due)
        return pages

    def touch(self, pages: Pages, now: float) -> None:
        due = UNUSUAL if self._loops is None else self._loops.touch(pages, now)
        while due == UNKNOWN_KINDS and (loops := self._meet_kinds()) is not None:
            due = loops.touch(pages, now)
        if due < 0:
            due = self._touch(pages, now)
        if due:
            self._turn(due)

    def remove(self, pages: Pages) -> None:
        self._ranking.require(pages)
        self._memory.fit(len(self._ranking))
        self._fit_loops()
        self._ranking.leave(pages)
        self._guard.removed(self._facts[pages, CALL])
        self._facts[pages, CALL] = UNKNOWN_CALL
        self._remember(pages)

    # -- a page's kind: as the compiled loops do it, where there are none or a kind is new -----------------------------------------

    @property
    def _latest(self) -> float:
        return float(self._clock[LATEST])

    def _touch(self, pages: Pages, now: float) -> int:
        ranking, call = self._ranking, int(self._counts[CALL_NUMBER])
        ranking.withdraw(pages)
        self._note(now)
        self._use(pages)
        ranking.rescored(pages)
        self._recent[call] = pages.tobytes()
        if len(self._recent) > RECENT_REQUESTS:
            del self._recent[next(iter(self._recent))]
        return self._end_call(len(pages))

    def _insert(self, pages: Pages, parents: Pages, depths: Pages, names: Pages, now: float) -> int:
        ranking = self._ranking
        ranking.arrive(pages, parents, depths)
        self._fit_columns()
        self._note(now)
        before = self._parent_of_all(pages, parents)
        here = before != ROOT and bool(ranking.here[before])
        generation = min(int(self._facts[before, GENERATION]) + 1, MOST_GENERATIONS) if here else 1
        new = self._come(pages, names, generation, int(depths.argmax()))
        ranking.rescored(pages)
        if here:
            self._go_on(before, new)
        return self._end_call(len(pages))

    def _end_call(self, spells: int) -> int:
        """A call that began so many spells is over: what is due now."""
        self._counts[CALL_NUMBER] += 1
        full, changed = self._model.count(spells), self._guard.settle(spells)
        self._fit_loops()
        return full * COHORT_DUE + changed * ORDER_CHANGED

    def _parent_of_all(self, pages: Pages, parents: Pages) -> int:
        """The page that these continue: the parent of the first, or of all that is not among them."""
        if len(pages) == 1 or np.array_equal(parents[1:], pages[:-1]):
            return int(parents[0])
        outside = parents[~np.isin(parents, pages)]
        return int(outside[0]) if len(outside) else ROOT

    def _come(self, pages: Pages, names: Pages, generation: int, deepest: int) -> int:
        """What is known about pages that come goes into the columns; how many were new, as a part of the number of a kind."""
        uses, generations = np.ones(len(pages), np.int64), np.full(len(pages), generation)
        known, last, words = self._memory.recall(names)
        if len(known):
            facts = unpacked(words)
            self._model.end(facts[:, KIND], facts[:, COHORT], age_bins(np.maximum(self._latest - last, 0.0)))
            self._guard.missed(facts[:, CALL])
            uses[known] += facts[:, USES]
            generations[known] = facts[:, GENERATION]
        new = min((len(pages) - len(known)).bit_length(), NEW - 1) * NEW_STEP
        combined = COUNT_OF[np.minimum(uses, _MOST_USES)] + GENERATION_OF[generations] + new
        combined[deepest] += END_STEP
        self._name[pages] = names
        self._facts[pages, USES] = uses
        self._facts[pages, GENERATION] = generations
        self._begin(pages, combined)
        return new

    def _use(self, pages: Pages) -> None:
        """Pages that are here are used."""
        facts = self._facts[pages]
        self._model.end(facts[:, KIND], facts[:, COHORT], age_bins(self._latest - self._ranking.last[pages]))
        self._guard.found(facts[:, CALL])
        uses = facts[:, USES] + 1
        self._facts[pages, USES] = uses
        combined = COUNT_OF[np.minimum(uses, _MOST_USES)] + GENERATION_OF[facts[:, GENERATION]]
        self._begin(pages, combined + self._combined[pages] % ATTENTION)

    def _begin(self, pages: Pages, combined: Pages) -> None:
        """Spells of these features begin now."""
        model, ranking, call = self._model, self._ranking, int(self._counts[CALL_NUMBER])
        kinds = model.kinds_of(combined)
        self._combined[pages] = combined
        self._facts[pages, KIND] = kinds
        self._facts[pages, COHORT] = model.cohort
        self._facts[pages, CALL] = call
        ranking.last[pages] = self._latest
        self._score(pages, model.worth[kinds, 0])
        model.begin(kinds)
        self._guard.count(len(pages), call)

    def _go_on(self, before: int, new: int) -> None:
        """If a request used this page last that may go on, it did, with new pages: all that it used are of another kind."""
        request = int(self._facts[before, CALL])
        if (note := self._recent.pop(request, None)) is None:
            return
        used = np.frombuffer(note, np.int64)
        pages = used[(self._facts[used, CALL] == request) & self._ranking.here[used]]
        combined = self._combined[pages]
        self._change(pages, combined + new - combined // NEW_STEP % NEW * NEW_STEP)

    def _change(self, pages: Pages, combined: Pages) -> None:
        """These pages turn out to be of another kind than they were taken for."""
        self._ranking.withdraw(pages)
        kinds = self._model.kinds_of(combined)
        self._model.move(self._facts[pages, KIND], kinds, self._facts[pages, COHORT])
        self._combined[pages] = combined
        self._facts[pages, KIND] = kinds
        self._score(pages, self._worth(pages, self._latest))
        self._ranking.rescored(pages)
        self._fit_loops()

    def _remember(self, pages: Pages) -> None:
        if self._loops is None or not self._loops.remember(pages):
            self._memory.leave(self._name[pages], self._ranking.last[pages], packed(self._facts[pages]))

    # -- scores ----------------------------------------------------------------------------------------------------------------

    def _worth(self, pages: Pages, now: float) -> NDArray[np.float64]:
        """The worth of these pages at their ages, between two ages in proportion."""
        ages = now - self._ranking.last[pages]
        bins = age_bins(ages)
        kinds = self._facts[pages, KIND]
        worth, following = self._model.worth[kinds, bins], self._model.worth[kinds, np.minimum(bins + 1, len(EDGES) - 2)]
        share = (ages - EDGES[bins]) / (EDGES[bins + 1] - EDGES[bins])
        share[bins == 0] = 0.0
        scores: NDArray[np.float64] = worth + (following - worth) * share
        return scores

    def _score(self, pages: Pages, worth: NDArray[np.float64]) -> None:
        """These pages have this worth. While LRU is followed all score the same: what was used longest ago leaves."""
        self._ranking.score[pages] = 0.0 if self._guard.follows_lru else worth
        self._scored[pages] = self._counts[SCORING]

    def _turn(self, due: int) -> None:
        changed = bool(due & ORDER_CHANGED)
        if due & COHORT_DUE:
            changed |= self._model.turn(self._latest)
        if changed:
            self._score_all(self._latest)

    def _score_all(self, now: float) -> None:
        self._counts[GONE] = 0
        self._counts[SCORING] += 1
        self._clock[SCORED_AT] = now
        if (loops := self._fit_loops()) is not None:
            loops.score_all()
            return
        pages = np.flatnonzero(self._ranking.here)
        self._score(pages, self._worth(pages, now))
        self._ranking.rebuild()

    def _note(self, now: float) -> None:
        if now > self._clock[LATEST]:
            self._clock[LATEST] = now

    def _fit_columns(self) -> None:
        rows, known = self._ranking.room + 1, len(self._records)
        if rows == known:
            return
        pages, attention = records(rows, RECORD), np.zeros(rows)
        pages[:known], attention[:known] = self._records, self._attention
        self._attention = attention
        self._look_at(pages)
