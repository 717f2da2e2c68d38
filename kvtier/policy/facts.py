"""What A²CR knows about a page beside its last use: a record of one cache line, and what ghosts keep of it, five facts in two words.

A ghost is looked for whenever a page comes and written whenever one leaves, mostly in memory that no cache holds: so it is kept small.
"""

from __future__ import annotations

import numpy as np

from kvtier.columns import Numbers

FACTS = KIND, COHORT, USES, GENERATION, CALL = range(5)
"""Kind, the cohort in which the spell of its last use began, uses, generation, number of the call that used it last."""
RECORD = 8
"""Numbers in a record."""
COMBINED, NAME, SCORED = range(len(FACTS), RECORD)
"""What a record has beside the facts: the page's features as one number in mixed radix, its name, the scoring that its score is of."""
WORDS = 2
"""Numbers that a ghost's facts take."""
_BITS = np.array(16)
"""Of a word, for smaller facts: a kind (below 2 ** 16), or uses and a generation, each half of that. The rest is a call or a cohort."""
_MOST = np.array((1 << 47) - 1)
"""Calls and cohorts beyond that (a million a second: after four years) are taken for this one: too long ago to matter."""
_MOST_USES = np.array(255)
"""More make no other kind (`kvtier.policy.kinds`)."""
_LOW, _BYTE, _BYTE_BITS = np.array((1 << 16) - 1), np.array(255), np.array(8)


def packed(facts: Numbers) -> Numbers:
    """Facts `[pages, 5]` as words `[pages, 2]`."""
    words = np.empty((len(facts), WORDS), np.int64)
    words[:, 0] = np.minimum(facts[:, CALL], _MOST) << _BITS | facts[:, KIND]
    small = np.minimum(facts[:, USES], _MOST_USES) << _BYTE_BITS | facts[:, GENERATION]
    words[:, 1] = np.minimum(facts[:, COHORT], _MOST) << _BITS | small
    return words


def unpacked(words: Numbers) -> Numbers:
    """The facts `[pages, 5]` of words `[pages, 2]`."""
    facts = np.empty((len(words), len(FACTS)), np.int64)
    facts[:, CALL], facts[:, COHORT] = words[:, 0] >> _BITS, words[:, 1] >> _BITS
    facts[:, KIND] = words[:, 0] & _LOW
    facts[:, USES], facts[:, GENERATION] = words[:, 1] >> _BYTE_BITS & _BYTE, words[:, 1] & _BYTE
    return facts
