"""Ages in half octaves: the grid over which it is learned how soon pages are used again, and over which their worth is told.

Nothing that is learned has another time unit than the ends of this grid.
"""

from __future__ import annotations

import numpy as np

from kvtier.columns import Numbers, Reals

AGES = 56
"""Ages are told by power of two and half of it: bin 0 is below 1/16 s, the last above 97 days."""
_YOUNGEST_OCTAVE = -4
_BITS = np.array(51)
"""A float64 without these is its power of two and the first bit after that."""
_BELOW = np.array((1023 + _YOUNGEST_OCTAVE) * 2 - 1)
_FIRST, _LAST = np.array(0), np.array(AGES - 1)
EDGES: Reals = np.concatenate(([0.0], [2.0 ** (_YOUNGEST_OCTAVE + half // 2) * (1 + half % 2 / 2) for half in range(AGES)]))
"""Where ages begin, in seconds; one more than there are ages."""
WIDTHS: Reals = np.diff(EDGES)


def age_bins(ages: Reals) -> Numbers:
    """Which of the ages each of these (seconds, 0 or more) is."""
    bins: Numbers = (ages.view(np.int64) >> _BITS) - _BELOW
    np.maximum(bins, _FIRST, out=bins)
    np.minimum(bins, _LAST, out=bins)
    return bins
