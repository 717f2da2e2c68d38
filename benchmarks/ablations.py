"""A²CR with one of its parts left out, for the table of docs/eviction.md: what is each part worth?

Nothing of this is in the policy: a part goes by a subclass, another model, or another constant while `left_out` lasts. Not for use beside
other threads that run the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from kvtier.policy import A2CR, Pages, hazards, spells
from kvtier.policy.ages import WIDTHS
from kvtier.policy.hazards import LEAST_DENSITY
from kvtier.policy.kinds import COUNT_OF, END_STEP, GENERATION_OF
from kvtier.policy.reuse import ReuseModel


class WithoutGhosts(A2CR):
    """Forgets pages when they leave."""

    def _remember(self, pages: Pages) -> None:
        pass


class WithoutEnds(A2CR):
    """Does not know which page was the last of its request."""

    def insert(self, pages: Pages, parents: Pages, depths: Pages, now: float) -> None:
        super().insert(pages, parents, depths, now)
        if len(pages):
            last = pages[depths.argmax()][None]
            self._change(last, self._combined[last] - END_STEP)


class HazardNow(ReuseModel):
    """Worth is the chance of a use within the age a page is at, per second: no looking ahead."""

    def _appraise(self, kinds: slice) -> None:
        super()._appraise(kinds)
        hazard = self._hazards(self._features[kinds])
        hazard[:, -1] = 0.0
        self.worth[kinds] = np.log(np.maximum(hazard / (WIDTHS * (1.0 - hazard / 2)), LEAST_DENSITY))


class ChanceOfReuse(ReuseModel):
    """Worth is the chance of any use still to come: how long that takes does not count."""

    def _appraise(self, kinds: slice) -> None:
        super()._appraise(kinds)
        self.worth[kinds] = np.log(np.maximum(self.chance[kinds], LEAST_DENSITY))


def _modelled(model: type[ReuseModel]) -> Callable[[], A2CR]:
    def make() -> A2CR:
        policy = A2CR()
        policy._model = model(policy._model.sizes)
        return policy

    return make


PARTS: dict[str, tuple[Callable[[], A2CR], tuple[tuple[object, str, object], ...]]] = {
    "nothing": (A2CR, ()),
    "uses": (A2CR, ((spells, "COUNT_OF", np.zeros_like(COUNT_OF)),)),
    "ghosts": (WithoutGhosts, ()),
    "end-of-request": (WithoutEnds, ()),
    "generations": (A2CR, ((spells, "GENERATION_OF", np.zeros_like(GENERATION_OF)),)),
    # One value is left of this feature, so that everything has the same.
    "new-pages": (A2CR, ((spells, "NEW", 1), (spells, "_STEPS", np.append(spells._STEPS[:-1], 1)))),
    "best-horizon": (_modelled(HazardNow), ()),
    "time": (_modelled(ChanceOfReuse), ()),
    "smoothing": (A2CR, ((hazards, "SMOOTHING", np.ones(1)),)),
    "fading": (A2CR, ((hazards, "FADE", 1.0),)),
}
"""What is left out: how to make the policy, and constants of its modules that are others meanwhile."""


@contextmanager
def left_out(part: str) -> Iterator[A2CR]:
    """A new policy without this part of PARTS, to be used within the block."""
    make, constants = PARTS[part]
    with ExitStack() as stack:
        for module, name, value in constants:
            stack.enter_context(patch.object(module, name, value))
        yield make()
