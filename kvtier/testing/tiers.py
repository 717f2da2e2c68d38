"""The suite every tier below the device must pass, ours or a third party's: subclass `TierContract` and name it `Test...`.

    class TestMyTier(TierContract):
        def make_tier(self, tmp_path, layout):
            return MyTier(layout, get_format("raw"), capacity_bytes=...)      # empty, room for 8 to 64 copies

Needs pytest and Hypothesis (`pip install kvtier[test]`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.errors import IntegrityError
from kvtier.formats.digests import digests_of
from kvtier.layout import PageLayout
from kvtier.testing.copies import LAYOUT, get, holds, page_id, payload, put, staging
from kvtier.testing.tier_operations import TierOperations
from kvtier.tiers.base import Refused, Tier

__all__ = ["LAYOUT", "TierContract", "get", "holds", "page_id", "payload", "put", "staging"]


class TierContract:
    """Law 1 (never a wrong page), law 2 (staged commit) and law 6 (bounded) for one tier, and that its bookkeeping is exact."""

    @abstractmethod
    def make_tier(self, tmp_path: Path, layout: PageLayout) -> Tier:
        """A new empty tier with room for 8 to 64 copies of `layout`; `tmp_path` is an empty directory of its own."""

    def corrupt(self, tier: Tier, slot: int) -> None:  # noqa: ARG002
        """Flip one bit of the copy in `slot` behind the tier's back. Tests that need it are skipped where it is not overridden."""
        pytest.skip("this tier names no way to corrupt a copy")

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Tier]:
        """A new tier, checked and closed at the end."""
        tier = self.make_tier(directory, LAYOUT)
        try:
            yield tier
            tier.check_integrity()
        finally:
            tier.close()

    def test_a_new_tier_is_empty_and_says_what_it_is(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            assert tier.layout == LAYOUT
            assert list(tier.recover()) == []
            assert tier.bytes_used == 0
            assert tier.slot_bytes >= tier.format.payload_bytes(LAYOUT)
            assert 8 <= tier.capacity_slots <= 64
            assert tier.capacity_slots * tier.slot_bytes <= tier.capacity_bytes
            assert tier.free_slots == tier.capacity_slots
            assert isinstance(tier.report(), dict)

    def test_reserve_is_all_or_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            free = tier.free_slots
            assert tier.reserve(free + 1) is None
            assert (tier.free_slots, tier.bytes_used) == (free, 0)
            assert tier.reserve(0) == []
            slots = tier.reserve(free)
            assert slots is not None
            assert len(set(slots)) == free
            assert tier.free_slots == 0
            assert 0 < tier.bytes_used <= tier.capacity_bytes
            assert tier.reserve(1) is None
            tier.check_integrity()
            tier.free(slots)
            assert (tier.free_slots, tier.bytes_used) == (free, 0)

    def test_no_slot_is_handed_out_twice(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            seen: set[int] = set()
            while (slots := tier.reserve(1)) is not None:
                assert slots[0] not in seen
                seen.update(slots)
            given_back = sorted(seen)[::2]
            tier.free(given_back)
            again = tier.reserve(len(given_back))
            assert again is not None
            assert not set(again) & (seen - set(given_back))

    def test_what_is_stored_ahead_is_there_at_its_end_and_was_not_kept_by_reference(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            begun = []
            for number in range(6):
                slots, data = tier.reserve(1), payload(tier, number).copy()
                assert slots is not None
                begun.append((slots[0], tier.begin_store(slots, [page_id(number)], [data])))
                data[:] = 0xEE
            assert [finish() for _, finish in begun] == [[None]] * 6
            assert all(holds(tier, slot, number) for number, (slot, _) in enumerate(begun))

    def test_stored_bytes_come_back(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            numbers = list(range(tier.capacity_slots))
            slots = put(tier, numbers)
            tier.check_integrity()
            assert tier.bytes_used <= tier.capacity_bytes
            loaded = tier.load(slots, [page_id(n).key for n in numbers], staging(tier, len(slots)))
            for number, found in zip(numbers, loaded, strict=True):
                assert not isinstance(found, Refused)
                np.testing.assert_array_equal(found, payload(tier, number))

    def test_load_each_gives_what_load_gives_every_copy_once(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, range(7))
            keys = [page_id(n).key for n in (0, 1, 2, 99, 4, 5, 6)]
            found = list(tier.load_each(slots, keys, staging(tier, 7)))
            assert sorted(index for index, _ in found) == list(range(7))
            for index, data in found:
                if index == 3:
                    assert data == Refused("key")
                else:
                    assert not isinstance(data, Refused)
                    np.testing.assert_array_equal(data, payload(tier, index))
            assert list(tier.load_each([], [], staging(tier, 0))) == []

    def test_place_some_gives_what_load_each_gives_or_has_decoded_it_where_it_belongs(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, range(7))
            keys = [page_id(n).key for n in (0, 1, 2, 99, 4, 5, 6)]
            rows, untouched = [5, 0, 7, 2, 6, 3, 1], 2.5
            memory = torch.full((8, *LAYOUT.shape), untouched, dtype=LAYOUT.torch_dtype)
            found = dict(each for group in tier.place_some(slots, keys, staging(tier, 7), memory, rows) for each in group)
            assert sorted(found) == list(range(7))
            assert found[3] == Refused("key")
            for index, copy in found.items():
                expected = torch.full(LAYOUT.shape, untouched, dtype=LAYOUT.torch_dtype)
                if isinstance(copy, int):
                    assert copy == len(payload(tier, index))
                    expected = tier.format.decode([payload(tier, index)], LAYOUT)[0]
                elif not isinstance(copy, Refused):
                    np.testing.assert_array_equal(copy, payload(tier, index))
                assert torch.equal(memory[rows[index]].view(torch.uint8), expected.view(torch.uint8))
            assert (memory[4] == untouched).all()
            assert [*chain.from_iterable(tier.place_some([], [], staging(tier, 0), memory, []))] == []

    def test_what_load_each_gave_stays_right_while_the_next_are_read(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, range(tier.capacity_slots))
            keys = [page_id(n).key for n in range(len(slots))]
            backwards = list(reversed(range(len(slots))))
            for order in (list(range(len(slots))), backwards):
                rows = staging(tier, len(slots))
                found = dict(tier.load_each([slots[n] for n in order], [keys[n] for n in order], rows))
                for index, data in found.items():
                    assert not isinstance(data, Refused)
                    np.testing.assert_array_equal(data, payload(tier, order[index]))

    def test_after_load_each_was_left_early_the_staging_is_the_callers_again(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, range(tier.capacity_slots))
            rows = staging(tier, len(slots))
            each = tier.load_each(slots, [page_id(n).key for n in range(len(slots))], rows)
            index, data = next(each)
            assert not isinstance(data, Refused)
            np.testing.assert_array_equal(data, payload(tier, index))
            each.close()
            rows[:] = 0xEE
            assert all(holds(tier, slot, n) for n, slot in enumerate(slots))
            assert (rows == 0xEE).all()

    def test_staging_may_be_larger_and_anywhere_in_memory(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, range(5))
            keys = [page_id(n).key for n in range(5)]
            memory = np.zeros(8 * (tier.slot_bytes + 100), dtype=np.uint8)
            wide = memory[3 : 3 + 7 * (tier.slot_bytes + 100)].reshape(7, -1)
            dense = memory[1 : 1 + 6 * tier.slot_bytes].reshape(6, -1)
            for rows in (wide, dense):
                for number, found in enumerate(tier.load(slots, keys, rows)):
                    assert not isinstance(found, Refused)
                    np.testing.assert_array_equal(found, payload(tier, number))

    def test_payloads_are_copied_not_kept(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = tier.reserve(1)
            assert slots is not None
            data = payload(tier, 1)
            assert tier.store(slots, [page_id(1)], [data]) == [None]
            data[:] ^= 0xFF
            assert holds(tier, slots[0], 1)

    def test_threads_on_different_slots_do_not_meet(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = tier.reserve(tier.capacity_slots)
            assert slots is not None

            def work(start: int) -> list[bool]:
                mine = slots[start::4]
                outcome = []
                for turn in range(5):
                    numbers = [1000 * turn + slot for slot in mine]
                    if turn == 0:
                        stored = tier.store(mine, [page_id(n) for n in numbers], [payload(tier, n) for n in numbers])
                        assert stored == [None] * len(mine)
                    outcome += [holds(tier, slot, slot) for slot in mine]
                    tier.tidy()
                return outcome

            with ThreadPoolExecutor(4) as pool:
                assert all(all(outcome) for outcome in pool.map(work, range(4)))

    def test_churn_by_several_threads_keeps_every_copy_right(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            share = tier.capacity_slots // 4
            batches: list[list[int]] = []
            for _ in range(4):
                slots = tier.reserve(share)
                assert slots is not None
                batches.append(slots)

            def rewrite(batch: int, turn: int) -> bool:
                slots, numbers = batches[batch], [turn * 100 + batch * 20 + i for i in range(share)]
                stored = tier.store(slots, [page_id(n) for n in numbers], [payload(tier, n) for n in numbers])
                tier.tidy()
                tier.checkpoint()
                return stored == [None] * share and all(holds(tier, slot, n) for slot, n in zip(slots, numbers, strict=True))

            with ThreadPoolExecutor(4) as pool:
                for turn in range(4):
                    assert all(pool.map(lambda batch, turn=turn: rewrite(batch, turn), range(4)))
                    tier.check_integrity()
                    # The bookkeeping is one thread's, as under the cache's lock; all is given back, so all can be had again.
                    tidying = pool.submit(tier.tidy)
                    for batch in range(4):
                        tier.free(batches[batch])
                    tidying.result()
                    for batch in range(4):
                        slots = tier.reserve(share)
                        assert slots is not None
                        batches[batch] = slots

    def test_a_wrong_key_is_refused(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            first, second = put(tier, [1, 2])
            assert get(tier, first, page_id(2).key) == Refused("key")
            assert get(tier, second, page_id(3).key) == Refused("key")
            assert holds(tier, first, 1)

    def test_a_slot_without_a_copy_is_refused(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = tier.reserve(1)
            assert slots is not None
            assert isinstance(get(tier, slots[0], page_id(1).key), Refused)
            assert isinstance(get(tier, 10**6, page_id(1).key), Refused)

    def test_a_corrupted_copy_is_refused(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            first, second = put(tier, [1, 2])
            self.corrupt(tier, first)
            assert isinstance(get(tier, first, page_id(1).key), Refused)
            assert holds(tier, second, 2)

    def test_a_payload_of_impossible_size_is_refused_and_harms_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            other = put(tier, [2])[0]
            slots = tier.reserve(1)
            assert slots is not None
            too_long = np.zeros(tier.format.payload_bytes(LAYOUT) + 1, dtype=np.uint8)
            assert tier.store(slots, [page_id(1)], [too_long]) == [Refused("format")]
            assert isinstance(get(tier, slots[0], page_id(1).key), Refused)
            tier.check_integrity()
            assert tier.store(slots, [page_id(1)], [payload(tier, 1)]) == [None]
            assert holds(tier, slots[0], 1)
            assert holds(tier, other, 2)

    def test_copies_stored_with_their_digests_come_back(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = tier.reserve(3)
            assert slots is not None
            data = [payload(tier, number) for number in (1, 2, 3)]
            digests = digests_of(data)
            assert tier.store(slots[:1], [page_id(1)], data[:1], digests[:1]) == [None]
            assert tier.begin_store(slots[1:], [page_id(2), page_id(3)], data[1:], digests[1:])() == [None, None]
            assert all(holds(tier, slot, number) for slot, number in zip(slots, (1, 2, 3), strict=True))

    def test_freed_copies_are_gone_and_their_slots_serve_again(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            put(tier, range(tier.free_slots))
            while tier.free_slots:  # formats of variable size leave room for more than `capacity_slots`
                put(tier, [5000 + tier.free_slots])
            assert tier.reserve(1) is None
        with self.opened(tmp_path / "second") as tier:
            slots = put(tier, range(tier.capacity_slots))
            tier.free(slots)
            tier.check_integrity()
            assert tier.bytes_used == 0
            assert all(isinstance(get(tier, slot, page_id(n).key), Refused) for n, slot in enumerate(slots))
            for turn in range(3):
                again = put(tier, range(100 * turn, 100 * turn + len(slots)))
                assert all(holds(tier, slot, 100 * turn + i) for i, slot in enumerate(again))
                tier.free(again)
                tier.tidy()
                tier.check_integrity()

    def test_freeing_what_is_not_reserved_is_an_integrity_error_and_frees_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            first, second, third = put(tier, [1, 2, 3])
            tier.free([first])
            used = tier.bytes_used
            for slots in ([first], [second, first], [second, second], [-1], [10**6]):
                with pytest.raises(IntegrityError):
                    tier.free(slots)
                assert tier.bytes_used == used
                tier.check_integrity()
            assert holds(tier, second, 2)
            assert holds(tier, third, 3)

    def test_storing_into_what_is_not_reserved_is_an_integrity_error(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, [1])
            tier.free(slots)
            with pytest.raises(IntegrityError):
                tier.store(slots, [page_id(2)], [payload(tier, 2)])

    def test_storing_over_a_copy_is_an_integrity_error(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            slots = put(tier, [1])
            with pytest.raises(IntegrityError):
                tier.store(slots, [page_id(2)], [payload(tier, 2)])
            assert holds(tier, slots[0], 1)

    def test_close_twice_and_refuse_afterwards(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path, LAYOUT)
        slots = put(tier, [1, 2])
        tier.close()
        tier.close()
        assert isinstance(get(tier, slots[0], page_id(1).key), Refused)
        assert isinstance(tier.store(slots[:1], [page_id(1)], [payload(tier, 1)])[0], Refused)
        assert [isinstance(found, Refused) for _, found in tier.load_each(slots, [page_id(1).key] * 2, staging(tier, 2))] == [True] * 2
        assert tier.reserve(1) is None
        assert tier.free_slots == 0

    def test_any_order_of_operations(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """A model-based search over sequences of operations; the model is a dict of slots."""

        make_tier = self.make_tier

        class Operations(TierOperations):
            def __init__(self) -> None:
                super().__init__(make_tier(tmp_path_factory.mktemp("tier"), LAYOUT))

        quiet = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
        run_state_machine_as_test(Operations, settings=quiet)
