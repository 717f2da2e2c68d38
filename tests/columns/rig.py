"""Twins: the same calls on an object with the compiled loops and on one without, whose answers, errors and state must be the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvtier import columns
from kvtier.pages import PageTable
from kvtier.pages.columns import COLUMNS, UNUSED
from kvtier.policy import A2CR, LRU
from kvtier.policy.ranking import Ranking
from kvtier.policy.spells import SCORED_AT, SCORING

needs_loops = pytest.mark.skipif(columns.loops() is None, reason=f"compiled loops: {columns.why_missing()}")


class PlainTable(PageTable):
    """A page table without compiled loops."""

    def attach(self) -> None:
        return None


class PlainLRU(LRU):
    """An LRU order without compiled loops."""

    def attach(self) -> None:
        return None


class PlainRanking(Ranking):
    """A ranking without compiled loops."""

    def attach(self) -> None:
        return None


class PlainA2CR(A2CR):
    """A²CR without compiled loops."""

    def __init__(self) -> None:
        super().__init__()
        self._ranking = PlainRanking()

    def attach(self) -> None:
        return None


def table_state(table: PageTable) -> dict[str, Any]:
    """Everything a table holds, as it is in memory."""
    state = {name: getattr(table, name) for name in COLUMNS}
    plain = {name: column.tolist() if column.dtype == object else column.tobytes() for name, column in state.items()}
    free = table._free[: table.counts[UNUSED]].tolist()
    return plain | {"free": free, "index": dict(table._row_of.items()), "numbers": (*table.counts, table.pinned_until)}


def order_state(policy: LRU) -> dict[str, Any]:
    """Everything an order holds that is ever looked at, as it is in memory. A heap may hold the same in several orders."""
    names = ("_key", "_parent", "_children", "_last", "_unqueued")
    journal = (policy._keys[: policy._tail].tobytes(), policy._times[: policy._tail].tobytes(), len(policy._keys))
    numbers = (policy._latest, policy._count, policy._front, policy._head, policy._sorted, policy._tail)
    columns_ = {name: getattr(policy, name).tobytes() for name in names}
    return columns_ | {"journal": journal, "numbers": numbers, "late": sorted(policy._late)}


def a2cr_state(policy: A2CR) -> dict[str, Any]:
    """Everything A²CR holds, as it is in memory, but for the queue, whose order follows from the scores."""
    ranking, model, memory = policy._ranking, policy._model, policy._memory
    pages = np.flatnonzero(ranking.here)
    state = {name: getattr(ranking, name)[pages].tobytes() for name in ("parent", "depth", "last")}
    leaves = pages[ranking.children[pages] == 0]
    # Compiled loops score others when they become leaves, and leaves that wait beside the queue when they queue again.
    waiting = policy._scored[leaves] != policy._counts[SCORING]
    assert not waiting.any() or ranking._loops is not None
    scores = ranking.score[leaves]
    scores[waiting] = 0.0 if policy._guard.follows_lru else policy._worth(leaves[waiting], policy._clock[SCORED_AT])
    state["score"] = scores.tobytes()
    state |= {name: getattr(policy, name)[pages].tobytes() for name in ("_combined", "_facts", "_name")}
    state |= {"counts": policy._counts.tobytes(), "recent": dict(policy._recent)}
    learned = ("kind_of", "worth", "chance", "hits", "change", "alive", "counted", "period", "_exposed", "_factors")
    state |= {name: getattr(model, name).tobytes() for name in learned}
    state |= {f"ghosts' {name}": getattr(memory, name).tobytes() for name in ("names", "last", "facts")}
    state |= {name: getattr(policy._guard, name).tobytes() for name in ("state", "ring")}
    numbers = (
        len(ranking),
        policy._latest,
        model.fits,
        model.cohort,
        len(model),
    )
    return state | {"here": pages.tobytes(), "children": ranking.children[pages].tobytes(), "numbers": numbers}


@dataclass(frozen=True)
class Order:
    """A policy with compiled loops, the same without, and everything either holds."""

    name: str
    native: Callable[[], Any]
    plain: Callable[[], Any]
    state: Callable[[Any], dict[str, Any]]


ORDERS = (Order("lru", LRU, PlainLRU, order_state), Order("a2cr", A2CR, PlainA2CR, a2cr_state))


class Twins:
    """`native` and `plain` as one object. Attributes are those of `native`; a call goes to both."""

    def __init__(self, native: Any, plain: Any, state: Callable[[Any], dict[str, Any]]) -> None:
        assert native.attach() is not None
        assert plain.attach() is None
        self._native, self._plain, self._state = native, plain, state

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        return (lambda *given, **named: self._both(name, given, named)) if callable(found) else found

    def __len__(self) -> int:
        return int(self._both("__len__", (), {}))

    def __contains__(self, page: object) -> bool:
        answers = [page in self._native, page in self._plain]  # asked for every page after every step: too often to look at everything
        assert answers[0] == answers[1]
        return answers[0]

    def _both(self, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        again = copy.deepcopy(given)
        answers = [_outcome(getattr(self._native, name), given, named), _outcome(getattr(self._plain, name), again, named)]
        assert _comparable(answers[0]) == _comparable(answers[1]), name
        ours, theirs = self._state(self._native), self._state(self._plain)
        for part, held in ours.items():
            assert held == theirs[part], f"{part} after {name}{given}"
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]


def _outcome(call: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    try:
        return call(*given, **named)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other twin must say the same
        return error


def _comparable(answer: Any) -> Any:
    if isinstance(answer, Exception):
        return type(answer), str(answer)
    if isinstance(answer, tuple | list):
        return [_comparable(part) for part in answer]
    return (answer.dtype, answer.tolist()) if isinstance(answer, np.ndarray) else answer
