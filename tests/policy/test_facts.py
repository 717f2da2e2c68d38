"""What ghosts keep of a page is what was known of it, or makes no difference."""

from __future__ import annotations

import math

import numpy as np

from kvtier.policy.facts import CALL, COHORT, FACTS, GENERATION, KIND, USES, WORDS, packed, unpacked
from kvtier.policy.guard import UNKNOWN_CALL
from kvtier.policy.kinds import COUNT_OF, FEATURES, MOST_GENERATIONS
from kvtier.policy.memory import Memory, records


def test_facts_come_out_of_their_words_as_they_went_in():
    facts = np.zeros((4, len(FACTS)), np.int64)
    facts[:, CALL] = (UNKNOWN_CALL, 0, 12345, 2**47 - 1)
    facts[:, KIND] = (0, 1, math.prod(FEATURES) - 1, 2**16 - 1)
    facts[:, COHORT] = (2**47 - 1, 0, 511, 512)
    facts[:, USES] = (1, 255, 2, 3)
    facts[:, GENERATION] = (MOST_GENERATIONS, 0, 1, 255)
    assert packed(facts).shape == (4, WORDS)
    assert np.array_equal(unpacked(packed(facts)), facts)


def test_what_does_not_fit_is_taken_for_the_most_there_is_and_leaves_the_rest_alone():
    facts = np.zeros((1, len(FACTS)), np.int64)
    facts[0, [KIND, COHORT, USES, GENERATION, CALL]] = 7, 2**60, 2**40, 3, 2**61
    assert unpacked(packed(facts))[0, [KIND, COHORT, USES, GENERATION, CALL]].tolist() == [7, 2**47 - 1, 255, 3, 2**47 - 1]


def test_a_ghost_has_room_for_every_kind_and_uses_beyond_it_make_no_other():
    assert math.prod(FEATURES) <= 1 << 16
    assert MOST_GENERATIONS < 1 << 8
    assert (COUNT_OF[255:] == COUNT_OF[-1]).all()


def test_the_two_cells_of_a_name_are_one_cache_line():
    memory = Memory(WORDS)
    assert memory.records.strides[0] == 32
    assert memory.records.ctypes.data % 64 == records(3, 8).ctypes.data % 64 == 0
