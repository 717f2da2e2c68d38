"""Any order of operations on a tier, beside a model of it: the search that `TierContract` ends with."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.testing.copies import get, holds, page_id, payload
from kvtier.tiers.base import Refused, Tier


class TierOperations(RuleBasedStateMachine):
    """Random operations on a tier, beside a model: page number per reserved slot, None before a copy is stored."""

    def __init__(self, tier: Tier) -> None:
        super().__init__()
        self.tier = tier
        self.model: dict[int, int | None] = {}
        self.next_number = 0

    def pick(self, data: st.DataObject, stored: bool) -> int | None:
        slots = sorted(slot for slot, number in self.model.items() if (number is not None) == stored)
        return data.draw(st.sampled_from(slots)) if slots else None

    @rule(count=st.integers(0, 9))
    def reserve(self, count: int) -> None:
        free = self.tier.free_slots
        slots = self.tier.reserve(count)
        assert (slots is not None) == (count <= free)
        for slot in slots or []:
            assert slot not in self.model
            self.model[slot] = None

    @precondition(lambda self: None in self.model.values())
    @rule(count=st.integers(1, 5))
    def store(self, count: int) -> None:
        slots = [slot for slot, number in self.model.items() if number is None][:count]
        numbers = range(self.next_number, self.next_number + len(slots))
        self.next_number += len(slots)
        stored = self.tier.store(slots, [page_id(n) for n in numbers], [payload(self.tier, n) for n in numbers])
        assert stored == [None] * len(slots)
        self.model.update(zip(slots, numbers, strict=True))

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        slot = self.pick(data, stored=True)
        if slot is not None:
            number = self.model[slot]
            assert number is not None
            assert holds(self.tier, slot, number)
            assert get(self.tier, slot, page_id(number + 1).key) == Refused("key")

    @rule(data=st.data(), stored=st.booleans())
    def free(self, data: st.DataObject, stored: bool) -> None:
        slot = self.pick(data, stored)
        if slot is not None:
            number = self.model.pop(slot)
            self.tier.free([slot])
            if number is not None:
                assert isinstance(get(self.tier, slot, page_id(number).key), Refused)

    @rule()
    def tidy(self) -> None:
        self.tier.tidy()

    @rule()
    def checkpoint(self) -> None:
        assert self.tier.checkpoint()

    @invariant()
    def is_whole_and_bounded(self) -> None:
        self.tier.check_integrity()
        assert 0 <= self.tier.bytes_used <= self.tier.capacity_bytes
        assert bool(self.model) == (self.tier.bytes_used > 0)
        assert self.tier.used_slots == len(self.model)

    def teardown(self) -> None:
        try:
            for slot, number in self.model.items():
                assert number is None or holds(self.tier, slot, number)
        finally:
            self.tier.close()
