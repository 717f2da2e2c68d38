"""Law checked: KvtierL2 leaves nothing open that it opened while it was being closed. The rest of it is tested with LMCache itself."""

from __future__ import annotations

import threading

import pytest

from kvtier.engines import lmcache
from kvtier.engines.lmcache import KvtierL2
from kvtier.errors import Closed
from tests.cache.rig import kvtier_threads


def test_a_store_that_is_asked_for_while_the_adapter_closes_is_not_left_open(tmp_path, monkeypatch):
    monkeypatch.setattr(lmcache, "require_engine", lambda package: "")
    settings = {"disk.path": str(tmp_path / "store"), "disk.capacity_bytes": "1MiB"}
    adapter = KvtierL2(**settings)
    reached, go_on = threading.Event(), threading.Event()
    find = adapter._ready_store

    def slow(memory, opening):
        reached.set()
        assert go_on.wait(20)
        return find(memory, opening)

    monkeypatch.setattr(adapter, "_ready_store", slow)
    writer = threading.Thread(target=adapter.submit_batch_set, args=(["a"], [memoryview(bytearray(8192))]))
    writer.start()
    assert reached.wait(20)
    adapter.close()
    go_on.set()
    writer.join(20)
    assert [good for _, good, _, _ in adapter.drain_completions()] == [False]
    assert kvtier_threads() == []
    with pytest.raises(Closed):
        adapter.submit_batch_set(["b"], [memoryview(bytearray(8192))])
    KvtierL2(**settings).close()
