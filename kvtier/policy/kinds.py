"""What makes a page's kind: features of few values each, told together by one number in mixed radix.

Pages of one kind are taken to be in the same situation (`kvtier.policy.reuse`). In the order of the radix: how often a page was used,
whether it was the end of its request, how many requests its prefix was built by, how many pages of the request that used it last were new,
how much attention it got.
"""

from __future__ import annotations

import math

import numpy as np

COUNTS, ENDS, GENERATIONS, NEW, ATTENTION = 16, 2, 6, 8, 4
"""How many values each feature of a page's kind has."""
FEATURES = (COUNTS, ENDS, GENERATIONS, NEW, ATTENTION)
_COUNT_STEP = ENDS * GENERATIONS * NEW * ATTENTION
END_STEP = GENERATIONS * NEW * ATTENTION
_GENERATION_STEP = NEW * ATTENTION
NEW_STEP = ATTENTION

MOST_USES = 256
COUNT_OF = np.array([0] + [min(uses - 1 if uses <= 4 else int(2 * math.log2(uses)), COUNTS - 1) for uses in range(1, MOST_USES + 1)])
COUNT_OF *= _COUNT_STEP
"""By uses up to MOST_USES: one by one up to four, then in half octaves; the feature's part in the number of a kind."""
MOST_GENERATIONS = 16
GENERATION_OF = np.array([0, 0, 1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5]) * _GENERATION_STEP
