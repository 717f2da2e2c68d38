"""The adapter under LMCache: its own wrapper of native plugins, then a real server with a real vLLM engine, both restarted."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.engines.lmcache import KvtierL2
from kvtier.errors import ConfigError, StoreError, StoreLocked
from tests.engines_real.test_vllm_tier import PROMPT

SIZE = 8192
ROOT = Path(__file__).parents[2]


def chunk(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, SIZE, np.uint8)


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {"disk.path": str(path), "disk.capacity_bytes": "1MiB"} | more


def ended(adapter: KvtierL2, number: int) -> tuple[bool, str, list[bool] | None]:
    """Wait for the batch by the eventfd, as LMCache does."""
    assert select.select([adapter.event_fd()], [], [], 60)[0]
    ((found, ok, said, done),) = adapter.drain_completions()
    assert found == number
    assert not select.select([adapter.event_fd()], [], [], 0)[0]
    return ok, said, done


def test_batches_end_by_eventfd_and_chunks_come_back_after_a_restart(tmp_path):
    keys, chunks = ["m@0@a", "m@0@b"], [chunk(1), chunk(2)]
    adapter = KvtierL2(**settings(tmp_path))
    assert ended(adapter, adapter.submit_batch_exists(keys)) == (True, "", [False, False])
    assert ended(adapter, adapter.submit_batch_set(keys, [each.data for each in chunks])) == (True, "", [True, True])
    adapter.close()
    adapter.close()
    adapter = KvtierL2(**settings(tmp_path))
    assert ended(adapter, adapter.submit_batch_exists([*keys, "m@0@c"])) == (True, "", [True, True, False])
    memory = [np.zeros(SIZE, np.uint8) for _ in range(3)]
    assert ended(adapter, adapter.submit_batch_get(["m@0@c", *keys], [each.data for each in memory])) == (False, "", [False, True, True])
    np.testing.assert_array_equal(memory[1:], chunks)
    assert ended(adapter, adapter.submit_batch_delete([keys[0], "m@0@c"])) == (True, "", [True, False])
    assert ended(adapter, adapter.submit_batch_exists(keys)) == (True, "", [False, True])
    with pytest.raises(StoreLocked):
        KvtierL2(**settings(tmp_path))
    adapter.close()
    with pytest.raises(StoreError, match="another model"):
        KvtierL2(**settings(tmp_path), **{"model.revision": "2"})


def test_what_ends_while_the_adapter_closes_is_told_afterwards(tmp_path):
    adapter = KvtierL2(**settings(tmp_path))
    number = adapter.submit_batch_set(["a"], [chunk(1).data])
    adapter.close()
    assert adapter.drain_completions() == [(number, True, "", [True])]
    assert adapter.drain_completions() == []


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    for wrong, says in (({"disk.formt": "raw"}, "nearest known key"), ({"disk.path": ""}, "disk.path"), ({"disk.format": "q4"}, "opaque")):
        with pytest.raises(ConfigError, match=says):
            KvtierL2(**(settings(tmp_path) | wrong))
    adapter = KvtierL2(**settings(tmp_path))
    assert ended(adapter, adapter.submit_batch_set(["a"], [chunk(1).data]))[0]
    ok, said, done = ended(adapter, adapter.submit_batch_set(["b"], [chunk(2)[:100].data]))
    assert (ok, done) == (False, [False])
    assert "100 bytes in a store of chunks of 8192" in said
    adapter.close()


def test_a_store_that_cannot_be_is_told_at_once_and_nothing_is_left_there(tmp_path):
    (tmp_path / "file").write_text("somebody's")
    for path, wrong, says in (
        (tmp_path / "file" / "store", ConfigError, "cannot be created or written: Not a directory; name a writable directory"),
        (Path("/proc/store"), ConfigError, "disk.path /proc/store cannot be created or written: "),
        (tmp_path, StoreError, r"no disk store and not empty \(file\)"),
    ):
        with pytest.raises(wrong, match=says):
            KvtierL2(**settings(path))
    with pytest.raises(ConfigError, match=r"disk.capacity_bytes is .* lower it"):
        KvtierL2(**settings(tmp_path / "new", **{"disk.capacity_bytes": 1 << 60}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    KvtierL2(**settings(tmp_path / "new")).close()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_server_does_not_start_on_a_store_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    command, _ = server_command(tmp_path / "file" / "store")
    done = subprocess.run(command, env=os.environ | {"LMCACHE_TRACK_USAGE": "false"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cannot be created or written: Not a directory; name a writable directory" in (done.stdout + done.stderr).splitlines()[-1]


def l2_adapter(path: Path) -> dict[str, Any]:
    # --- docs/lmcache.md: --l2-adapter
    return {
        "type": "native_plugin",
        "module_path": "kvtier.engines.lmcache",
        "class_name": "KvtierL2",
        "adapter_params": {"disk.path": str(path), "disk.capacity_bytes": "2GiB", "disk.format": "raw+zstd"},
    }
    # ---


def server_command(path: Path) -> tuple[list[str], int]:
    """That starts an LMCache server with kvtier under it, and the port it will listen to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--host", "localhost", "--port", str(port), "--chunk-size", "256", "--l1-size-gb", "1", "--eviction-policy", "LRU"]
    options += ["--disable-observability", "--supported-transfer-mode", "engine_driven", "--l2-adapter", json.dumps(l2_adapter(path))]
    return [sys.executable, "-m", "lmcache.v1.multiprocess.server", *options], port


@contextlib.contextmanager
def server(path: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An LMCache server with kvtier under it, and its port."""
    command, port = server_command(path)
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"LMCACHE_TRACK_USAGE": "false"})
        try:
            for _ in range(600):
                assert child.poll() is None, log.read_text()[-2000:]
                if "Created native plugin L2 adapter" in log.read_text() and _listens(port):
                    break
                time.sleep(0.1)
            yield child, port
        finally:
            child.terminate()
            child.wait(60)


def _listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("localhost", port)) == 0


def ask(model_folder: Path, port: int) -> tuple[list[int], int]:
    """The answer's tokens and how many of the prompt's came from a cache, from an engine that is started for this and ends."""
    command = [sys.executable, "-m", "tests.engines_real.ask_with_lmcache", str(model_folder), str(port), PROMPT]
    variables = os.environ | {"LMCACHE_TRACK_USAGE": "false", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"')))  # among the engine's own lines
    return said["tokens"], said["cached"]


def written(path: Path) -> int:
    """Bytes on disk, once they grow no more."""
    before = -1
    for _ in range(60):
        now = sum(segment.stat().st_blocks for segment in path.glob("segment-*.kvt")) * 512
        if now == before > 0:
            return now
        before = now
        time.sleep(1)
    return before


@pytest.mark.timeout(900)  # two servers and two engines start
def test_a_server_and_an_engine_that_start_anew_find_the_chunks_on_disk(model_folder, tmp_path):
    path, log = tmp_path / "store", tmp_path / "server.log"
    with server(path, log) as (child, port):
        cold, cached = ask(model_folder, port)
        assert cached == 0
        assert written(path) > 1 << 20
        child.kill()
    with server(path, log) as (_, port):
        warm, cached = ask(model_folder, port)
        assert cached >= 512
        assert warm == cold
