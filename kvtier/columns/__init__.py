"""Compiled loops over the columns of the page table, of the policies and of free lists: `loops()` gives them, or None where the
extension was not built or does not load.

The state stays where it is, in NumPy columns and objects with one owner; the loops hold nothing but views of the columns, and keep the
interpreter's lock. Each does what a few lines of NumPy beside its caller do, to the same bits. One that meets anything unusual
(a row out of range, a copy that is not there, a full journal) answers False, None or -1 and has changed nothing: those lines then
do the work, or raise the error. Indices are checked, whatever columns and arguments hold; a wrong type is a TypeError.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from kvtier.extensions import load_extension

Numbers = NDArray[np.int64]
"""Rows, pages or keys `[n]`, of any stride."""
WHOLE = np.dtype(np.int64)
"""What their items are, made once: for a new array NumPy takes a third less time than with `np.int64`."""
Column = NDArray[Any]
Reals = NDArray[np.float64]


class RowIndex(Protocol):
    """Rows by page key: of a dict, what page tables need. Keys are bytes, rows whole numbers from 0 to below 2**32."""

    @overload
    def get(self, key: bytes, /) -> int | None: ...

    @overload
    def get(self, key: bytes, default: int, /) -> int: ...

    def __setitem__(self, key: bytes, row: int, /) -> None: ...

    def __delitem__(self, key: bytes, /) -> None: ...

    def __contains__(self, key: object, /) -> bool: ...

    def __len__(self) -> int: ...

    def items(self) -> Iterable[tuple[bytes, int]]:
        """Keys with their rows, in any order."""


class TableLoops(Protocol):
    """Loops over one page table's columns, until it grows: methods of `kvtier.pages.PageTable`, named alike.

    They count rows that come and go, and note that one stays hollow, in the last of the columns.
    """

    def find(self, row_of: RowIndex, keys: Sequence[bytes], out: Numbers, /) -> int:
        """Rows of the visible prefix of `keys` into `out`; how many."""

    def claim(self, row_of: RowIndex, keys: Sequence[bytes], out: Numbers, /) -> int:
        """`find`, and one more holder and use of each."""

    def names(self, rows: Numbers, out: Numbers, /) -> bool:
        """The first 8 bytes of the keys of `rows` into `out`."""

    def warmest(self, rows: Numbers, out: Numbers, /) -> bool:
        """The warmest tier with a READY copy of each row into `out`, NO_TIER where there is none."""

    def links(self, rows: Numbers, parents: Numbers, depths: Numbers, /) -> int:
        """Parents and depths of `rows` into the other two; whether attention was reported for any (-1: not done)."""

    def add_chain(self, row_of: RowIndex, keys: Sequence[bytes], before: bytes, depth: int, parent: int, out: Numbers, /) -> int:
        """Rows of all keys into `out`, of those after the known ones from the free list and then fresh ones; how many were known.

        -1, and nothing done, where links have to be made, a known key follows an unknown one, or there is no room.
        """

    def settle_chain(
        self,
        row_of: RowIndex,
        keys: Sequence[bytes],
        before: bytes,
        depth: int,
        parent: int,
        tier: int,
        slots: Sequence[int],
        rows: Numbers,
        parents: Numbers,
        depths: Numbers,
        /,
    ) -> bool:
        """`add_chain`, `settle` and `links` of pages of which none is known."""

    def begin(self, rows: Numbers, tier: int, slots: Sequence[int], /) -> bool:
        """Absent copies become WRITING ones."""

    def settle(self, rows: Numbers, tier: int, slots: Sequence[int], /) -> bool:
        """Absent copies become READY ones, each leased and used once more."""

    def commit(self, rows: Numbers, tier: int, /) -> bool:
        """WRITING copies become READY ones."""

    def drop(self, rows: Numbers, tier: int, row_of: RowIndex, /) -> list[int] | None:
        """Copies that nobody reads go, and rows with them; their slots."""

    def lease(self, rows: Numbers, /) -> bool:
        """One more holder of each."""

    def use(self, rows: Numbers, /) -> bool:
        """One more use of each."""

    def release(self, rows: Numbers, row_of: RowIndex, /) -> bool:
        """One holder less of each, none of which is an open page."""

    def protect(self, rows: Numbers, tier: int, out: NDArray[np.bool_], /) -> bool:
        """Into `out` which of these are leased (where that counts) or being read in `tier`."""


NewChain = tuple[TableLoops, RowIndex, Sequence[bytes], bytes, int, int, int, Sequence[int]]
"""What `settle` of a policy's loops has to know of a page table, and of the pages that are to settle there: its first arguments."""


Exit = tuple[TableLoops, RowIndex, int, float, list[bytes] | None, bool]
"""What `give_way` of a policy's loops has to know of a page table and the tier that pages leave: its first arguments (`PageTable.exit`)."""


class OrderLoops(Protocol):
    """Loops over one LRU order's columns and journal, until one of them grows: see `kvtier.policy.recency`."""

    def arrive(self, pages: Numbers, parents: Numbers, depths: Numbers, /) -> bool:
        """Keys, links and child counts of pages that are not here yet."""

    def queue(self, pages: Numbers, tail: int, time: float, /) -> bool:
        """Entries from `tail` on for pages that are here and were used at `time`."""

    def settle(self, *chain_out_tail_time: *tuple[*NewChain, Numbers, int, float]) -> bool:
        """`TableLoops.settle_chain`, whose rows go into `out`, and `arrive` and `queue` of these. Not done means done in neither."""

    def moment(self, start: int, tail: int, /) -> tuple[int, int]:
        """Sorts the living entries of the moment that begins at `start`, each once, and moves them to its end: (the first, the end).

        What comes before them repeats the first.
        """

    def give_way(
        self, *exit_out_journal_late: *tuple[*Exit, Numbers, int, int, int, float, list[tuple[float, int]]]
    ) -> tuple[int, int, float, list[int]] | None:
        """The next pages that may leave order and table do, into the array, by the journal, whose moment `front` is sorted in
        [head, stop) and which ends at `tail`, and the heap `late`.

        What head, stop and front are then, and the pages' slots, those of the last one first; `late` is the heap of now. None: not done
        but for sorting and for what waits for its children, as `moment` and `step_over`: fewer may leave, or one of them has not the colder
        copy that it needs.
        """

    def leaving(self, head: int, stop: int, time: float, keys: Numbers, pages: Numbers, /) -> tuple[int, int]:
        """Into `keys` and `pages` what in [head, stop) was last used at `time`: (how many, how many of these could leave one by one)."""

    def step_over(self, keys: Numbers, /) -> int:
        """How many of the first pages have children; from now on they wait for them."""

    def chain(self, page: int, before_time: float, before_key: int, keys: Numbers, times: NDArray[np.float64], /) -> int:
        """Into `keys` and `times` a page and, one after the other, the pages before it that only wait for it and come before an entry."""

    def leave(self, pages: Numbers, /) -> int:
        """Pages are not here any more; the parent of the last, if it waited for its children, else -1. ValueError for unknown pages."""


class RankingLoops(Protocol):
    """Loops over one ranking's columns, until it grows: see `kvtier.policy.ranking`. False: not done, a page is not what it should be."""

    def arrive(self, pages: Numbers, parents: Numbers, depths: Numbers, /) -> bool:
        """Pages that are not here come, with these links, and queue if they are leaves."""

    def leave(self, pages: Numbers, /) -> bool:
        """Pages that are here go; parents that so become leaves queue."""

    def restore(self, pages: Numbers, /) -> bool:
        """Pages that left come back, the last first."""

    def rescored(self, pages: Numbers, /) -> bool:
        """Leaves among these pages, which are here and do not queue, queue by what stands in the columns now."""

    def withdraw(self, pages: Numbers, /) -> bool:
        """Pages that are here do not queue until they are rescored. To be called before their scores change, or the heap is none."""

    def pop(self, out: Numbers, /) -> int:
        """The first pages leave, one after the other, into `out`; how many."""

    def choose(self, *exit_out: *tuple[*Exit, Numbers]) -> int:
        """The first pages that may leave the ranking do, into `out`, and stay in the table; how many (-1: not done).

        Those whose copy is to be brought down first may, too.
        """

    def rebuild(self) -> None:
        """All leaves queue, by the scores that stand in the column now."""


class SpellLoops(Protocol):
    """Loops over the columns of one A²CR policy and its ranking, until one of them grows: see `kvtier.policy.spells`.

    `touch` and `insert` answer with what is due at their end, 0 for nothing; -1: not done, for a page that is not what it should be; -2:
    not done, for kinds that are not known yet, named in the column for that. As long as there are such loops, the ranking's loops score
    pages by them as they begin to queue.
    """

    def touch(self, pages: Numbers, now: float, /) -> int:
        """Pages that are here are used: their spells end, new ones begin, they queue anew."""

    def insert(self, pages: Numbers, parents: Numbers, depths: Numbers, names: Numbers, now: float, /) -> int:
        """Pages come, of which some are ghosts, and those that the same request used before are of another kind from now on."""

    def settle(self, *chain_out_now: *tuple[*NewChain, Numbers, float]) -> int:
        """`TableLoops.settle_chain`, whose rows go into `out`, and `insert` of these by the names that the table gives.

        Answers as `insert`; not done means done in neither.
        """

    def remember(self, pages: Numbers, /) -> bool:
        """Pages become ghosts. False: not done."""

    def give_way(self, *exit_out_now: *tuple[*Exit, Numbers, float]) -> list[int] | None:
        """The first pages that may leave ranking and table do, into the array, and become ghosts. All are scored before, if due.

        Their slots, those of the last one first. None: not done, for fewer may leave, or one of them has not the colder copy that it needs.
        """

    def score_all(self) -> None:
        """The pages that queue are scored for the last scoring, and all others when they begin to."""


class Loops(Protocol):
    """What the extension offers."""

    def Index(self) -> RowIndex:
        """An empty index, the only one that a table's loops take: less than a dict to look into, and for them half the work of one."""

    def Table(self, *columns: Column | array[int]) -> TableLoops:
        """Loops over these columns, in the order of `PageTable.attach`. ValueError if their sizes do not fit each other."""

    def Order(self, *columns: Column) -> OrderLoops:
        """Loops over these columns, in the order of `Recency.attach`. ValueError if their sizes do not fit each other."""

    def Ranking(self, seats: Numbers, heap: Numbers, numbers: array[int], /) -> RankingLoops:
        """Loops over these columns, as `Ranking.attach` names them. ValueError if their sizes do not fit each other."""

    def Spells(self, ranking: RankingLoops, recent: dict[int, bytes], *columns: Column) -> SpellLoops:
        """Loops over these, in the order of `Spells.attach`. ValueError if their sizes do not fit each other."""

    def take_slots(self, free: list[int], taken: bytearray, count: int, /) -> list[int]:
        """The last `count` of `free`, last first, marked as taken. ValueError, and none, if there are fewer."""

    def expose(
        self,
        began: Reals,
        counted: Numbers,
        alive: Numbers,
        change: Numbers,
        hits: Numbers,
        all_exposed: Reals,
        all_hits: Reals,
        cohort: int,
        now: float,
        /,
    ) -> None:
        """As `ReuseModel._expose`, of cohorts before `cohort`; `alive` may have room for more kinds.

        This and what follows raise ValueError for arrays that do not fit each other.
        """

    def learn(
        self,
        hits: Reals,
        exposed: Reals,
        expected: Reals,
        features: Numbers,
        firsts: Numbers,
        factors: Reals,
        smoothing: Reals,
        level: Reals,
        seen: Reals,
        due: Reals,
        fade: float,
        prior: float,
        least_exposure: float,
        least_hazard: float,
        most_hazard: float,
        /,
    ) -> None:
        """As `Hazards._learn`. `expected` `[kinds, ages]`, `seen` and `due` `[values, ages]` are room for it: what was there is lost."""

    def appraise(
        self,
        level: Reals,
        features: Numbers,
        factors: Reals,
        widths: Reals,
        worth: Reals,
        chance: Reals,
        last: int,
        most_hazard: float,
        least_run: float,
        least_density: float,
        /,
    ) -> None:
        """As `Hazards._appraise`: into `worth` `[kinds, ages]` and `chance`; nobody is used from age `last` on."""

    def give_slots(self, free: list[int], taken: bytearray, slots: Sequence[int], /) -> bool:
        """Slots back onto `free`; False, and none, if one is not marked as taken."""


def loops() -> Loops | None:
    """The compiled loops, or None; `why_missing()` then says why."""
    return _load()[0]


def why_missing() -> str:
    """One line: why there are no compiled loops and what to do; empty if there are."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[Loops | None, str]:
    return load_extension("kvtier.columns._loops", "NumPy does the work, a few times slower")
