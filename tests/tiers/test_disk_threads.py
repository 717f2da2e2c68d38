"""What of the disk tier may happen at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtier.testing.tiers import holds, page_id, payload, put
from tests.tiers.disk import open_disk
from tests.tiers.faults import GatedEngine


@pytest.fixture
def gated(tmp_path):
    """A tier with page 0 stored and synced, whose next write or punch waits until its gate is opened."""
    engine = GatedEngine()
    tier = open_disk(tmp_path / "store", engine=engine)
    put(tier, [0])
    assert tier.checkpoint()
    with ThreadPoolExecutor(2) as pool:
        yield tier, engine, pool
        engine.gate.set()
    tier.close()


def test_a_checkpoint_does_not_vouch_for_a_store_in_progress(gated):
    tier, engine, pool = gated
    synced = tier.report()["synced_sequence"]
    engine.gate.clear()
    storing = pool.submit(put, tier, [1])
    engine.waiting.wait()
    assert tier.checkpoint()
    assert tier.report()["synced_sequence"] == synced
    engine.gate.set()
    storing.result()
    syncs = engine.syncs
    assert tier.checkpoint()
    assert tier.report()["synced_sequence"] == synced + 1
    assert engine.syncs == syncs + 1, "what was written after the first checkpoint began is synced by the second"


def test_close_waits_for_a_store_in_progress(gated):
    tier, engine, pool = gated
    engine.gate.clear()
    storing = pool.submit(put, tier, [1])
    engine.waiting.wait()
    closing = pool.submit(tier.close)
    with pytest.raises(TimeoutError):
        closing.result(timeout=0.2)
    engine.gate.set()
    storing.result()
    closing.result(timeout=10)
    again = open_disk(tier._directory.path)
    assert [page for _, page in again.recover()] == [page_id(0), page_id(1)]
    again.close()


def test_a_slot_being_tidied_is_nobody_elses(gated):
    tier, engine, pool = gated
    slots = put(tier, range(1, 5))
    tier.free(slots)
    engine.gate.clear()
    tidying = pool.submit(tier.tidy)
    engine.waiting.wait()
    tier.check_integrity()
    taken = tier.reserve(tier.free_slots)
    assert taken is not None
    assert slots[0] not in taken
    engine.gate.set()
    tidying.result()
    assert tier.store(taken, [page_id(n) for n in taken], [payload(tier, n) for n in taken]) == [None] * len(taken)
    tier.tidy()
    assert all(holds(tier, slot, slot) for slot in taken)
