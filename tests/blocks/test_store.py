"""The block store: what was put comes back or is a miss, whatever happens to the process, the file or the room."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.blocks import BlockStore, Chain, Presence
from kvtier.engines.settings import store_config
from kvtier.errors import Closed, ConfigError, LayoutError, StoreError, StoreLocked
from kvtier.layout import PageLayout
from kvtier.tiers.disk.record import record_bytes
from kvtier.tiers.lent import BlockLayout

SIZE = 6000
OPAQUE = BlockLayout.opaque(SIZE)
FACTS = {"model": "m", "rank": 0}
RECORD = record_bytes(SIZE)
ROOT = Path(__file__).parents[2]


def block(number: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, size, np.uint8)


def key(number: int) -> bytes:
    return f"key {number}".encode()


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def open_store(path: Path, records: int = 16, blocks: BlockLayout = OPAQUE, facts: dict[str, object] = FACTS, **more: object) -> BlockStore:
    given = {"disk.path": str(path), "disk.capacity_bytes": records * RECORD, "disk.format": "raw", "mover.staging_bytes": "1MiB"}
    return BlockStore(store_config(given | {name.replace("__", "."): value for name, value in more.items()}), blocks, facts)


def put(store: BlockStore, *numbers: int, chain: Chain | None = None) -> list[bool]:
    return store.put(keys(*numbers), [block(number) for number in numbers], chain)


def get(store: BlockStore, *numbers: int) -> list[bool]:
    """Which came; those that did have to be right."""
    memory = [np.zeros(SIZE, np.uint8) for _ in numbers]
    came = store.get(keys(*numbers), memory)
    for number, found, here in zip(numbers, memory, came, strict=True):
        if here:
            np.testing.assert_array_equal(found, block(number))
    return came


def damage(path: Path, number: int) -> None:
    """Flip a bit in the record of a block, as it is on disk."""
    segment = next(path.glob("segment-*.kvt"))
    at = segment.read_bytes().index(block(number).tobytes()) + 100
    with segment.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("format", ["raw", "raw+lz4", "raw+zstd"])
def test_what_was_put_comes_back_to_the_bit_and_after_a_restart(tmp_path, format):
    with open_store(tmp_path, disk__format=format) as store:
        assert put(store, 1, 2, 3) == [True] * 3
        assert store.exists(keys(1, 9, 3)) == [True, False, True]
        assert get(store, 3, 9, 1) == [True, False, True]
        store.check_integrity()
    with open_store(tmp_path, disk__format=format) as store:
        assert get(store, 1, 2, 3, 4) == [True, True, True, False]
        assert store.stats()["recovered"] == 3
        store.check_integrity()


def test_blocks_in_several_pieces_of_memory(tmp_path):
    with open_store(tmp_path) as store:
        assert store.put(keys(1), [[block(1)[:1000], block(1).data[1000:]]]) == [True]
        halves = [bytearray(SIZE // 2), bytearray(SIZE // 2)]
        assert store.get(keys(1), [halves]) == [True]
        assert b"".join(halves) == block(1).tobytes()


def test_inside_known_formats_may_lose_bits_and_orders_are_undone(tmp_path):
    page = PageLayout(layers=2, planes=2, page_tokens=128, kv_heads=2, head_dim=64, dtype="bf16")
    numbers = torch.randn(page.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    cpu_order = torch.cat([numbers[:, 0].permute(0, 2, 3, 1).flatten(2), numbers[:, 1].permute(0, 2, 1, 3).flatten(2)], 2).contiguous()
    given = cpu_order.view(torch.uint8).numpy().reshape(-1)
    with open_store(tmp_path, 64, BlockLayout(page, "LHPDT", "LHPTD"), disk__format="q8") as store:
        assert store.put(keys(1), [given], Chain(None, 0)) == [True]
        found = np.zeros_like(given)
        assert store.get(keys(1), [found]) == [True]
        error = (torch.from_numpy(found).view(torch.bfloat16).float() - torch.from_numpy(given).view(torch.bfloat16).float()).abs().max()
        assert 0 < error < 0.05
        assert store.stats()["disk"]["bytes_used"] < 0.6 * page.page_bytes
    with open_store(tmp_path, 64, BlockLayout(page), disk__format="q8") as store:  # the same blocks, for an engine with other orders
        plain = np.zeros_like(given)
        assert store.get(keys(1), [plain]) == [True]
        worst = (torch.from_numpy(plain).view(torch.bfloat16).reshape(page.shape).float() - numbers.float()).abs().max()
        assert worst < 0.05


# -- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["q8", "q4", "raw/q8", "fp8+zstd"])
def test_a_format_that_loses_bits_of_opaque_blocks_is_refused(tmp_path, format):
    with pytest.raises(ConfigError, match="opaque bytes; use a format without loss"):
        open_store(tmp_path, disk__format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "disk.path is missing"),
        ({"disk.pth": "/x"}, "the nearest known key is disk.path"),
        ({"disk.capacity_bytes": "1GiB"}, "disk.path is missing"),
        ({"disk.path": "x", "disk.pth": "y"}, "nearest known key is disk.path"),
        ({"disk.path": "x", "disk": None}, "disk is null"),
        ({"disk.path": "x", "disk.capacity_bytes": "many"}, "disk.capacity_bytes is 'many'"),
        ({"config": 7}, "path of a YAML file"),
        ({"config": "nowhere.yaml"}, "no such configuration file"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(given, says):
    with pytest.raises(ConfigError, match=says) as error:
        store_config(given)
    assert "\n" not in str(error.value)


def test_opaque_blocks_are_kept_without_loss_unless_somebody_says_otherwise(tmp_path):
    file = tmp_path / "kvtier.yaml"
    file.write_text(f"disk:\n  path: {tmp_path / 'store'}\n  format: raw+zstd\n")
    given = ({"disk.path": "x"}, {"config": str(file)}, {"config": str(file), "disk.format": "raw"})
    disks = [store_config(settings).disk for settings in given]
    assert [disk and disk.format for disk in disks] == ["raw+lz4", "raw+zstd", "raw"]


def test_a_bad_batch_starts_nothing(tmp_path):
    with open_store(tmp_path) as store:
        for wrong, says in (
            (lambda: store.put(keys(1, 2), [block(1)]), "2 keys and 1 blocks"),
            (lambda: store.put(keys(1, 1), [block(1), block(1)]), "named twice"),
            (lambda: store.put(keys(1, 2), [block(1), block(2, 10)]), "10 bytes; expected 6000"),
            (lambda: store.get(keys(1), [bytes(SIZE)]), "read-only"),
            (lambda: store.put(keys(1), [block(1)], Chain(None, 3)), "chain"),
            (lambda: store.put(keys(1), [block(1)], Chain(key(0), 0)), "chain"),
        ):
            with pytest.raises(LayoutError, match=says):
                wrong()
        assert store.exists(keys(1, 2)) == [False, False]
        assert store.put([], []) == store.get([], []) == store.exists([]) == []
        store.check_integrity()
    with pytest.raises(Closed):
        put(store, 1)
    store.close()


def test_a_store_of_another_model_layout_or_format_is_refused(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1)
    with pytest.raises(StoreError, match="another model"):
        open_store(tmp_path, facts=FACTS | {"model": "other"})
    with pytest.raises(LayoutError, match="holds pages of"):
        open_store(tmp_path, blocks=BlockLayout.opaque(SIZE + 2))
    with pytest.raises(StoreError, match="another format"):
        open_store(tmp_path, disk__format="raw+zstd")
    with open_store(tmp_path) as store:
        assert get(store, 1) == [True]


def test_a_second_process_on_one_store_is_refused_and_told_who_has_it(tmp_path):
    script = f"""
from tests.blocks.test_store import *
try:
    open_store(Path({str(tmp_path)!r}))
except StoreLocked as error:
    print(error)
"""
    with open_store(tmp_path) as store:
        put(store, 1)
        with pytest.raises(StoreLocked):
            open_store(tmp_path)
        said = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        ).stdout
        assert f"in use by process {os.getpid()}" in said
        assert get(store, 1) == [True]


# -- bad days ---------------------------------------------------------------------------------------------------------------


def test_after_kill_9_in_the_middle_of_writing_every_block_is_whole_or_a_miss(tmp_path):
    script = f"""
from tests.blocks.test_store import *
store = open_store(Path({str(tmp_path)!r}), 400)
put(store, 0)
print("ready", flush=True)
for number in range(1, 10**6):
    store.submit_put(keys(number), [block(number)])
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with open_store(tmp_path, 400) as store:
        found = [number for number in range(3000) if store.exists(keys(number)) == [True]]
        assert found
        assert all(get(store, *found))
        assert put(store, 10**7) == [True]
        store.check_integrity()


def test_a_corrupted_record_is_a_miss_and_can_be_put_again(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1, 2)
        damage(tmp_path, 1)
        assert get(store, 1, 2) == [False, True]
        assert store.exists(keys(1, 2)) == [False, True]
        assert store.stats()["refused: checksum"] == 1
        assert put(store, 1) == [True]
        assert get(store, 1) == [True]
        store.check_integrity()


def test_a_corrupted_record_that_is_still_being_read_is_not_taken_for_stored(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1)
        damage(tmp_path, 1)
        rows = store._contents.find(keys(1))
        store._contents.table.hold(rows, 0)
        assert get(store, 1) == [False]
        assert put(store, 1) == [False]
        assert store.exists(keys(1)) == [False]
        store._contents.unhold(rows)
        assert put(store, 1) == [True]
        assert get(store, 1) == [True]
        store.check_integrity()


def test_other_facts_make_other_keys(tmp_path):
    with open_store(tmp_path / "a") as one, open_store(tmp_path / "b", facts=FACTS | {"rank": 1}) as other:
        assert set(one._contents._names(keys(*range(9)))).isdisjoint(other._contents._names(keys(*range(9))))
        assert one._contents._names(keys(1)) == one._contents._names(keys(1))


def test_a_full_store_lets_blocks_go_and_never_exceeds_its_room(tmp_path):
    with open_store(tmp_path, 8) as store:
        for number in range(40):
            assert put(store, number) == [True]
            assert store.stats()["disk"]["bytes_used"] <= 8 * RECORD
        here = store.exists(keys(*range(40)))
        assert sum(here) == 8
        assert here[39]
        assert store.stats()["evicted"] == 32
        store.check_integrity()


def test_a_batch_larger_than_the_store_keeps_its_beginning(tmp_path):
    with open_store(tmp_path, 4) as store:
        assert put(store, *range(10)) == [True] * 4 + [False] * 6
        assert store.stats()["no room"] == 6
        store.check_integrity()


def test_sequences_go_from_their_ends(tmp_path):
    with open_store(tmp_path, 8, policy__name="lru") as store:
        put(store, 1, 2, 3, chain=Chain(None, 0))
        put(store, 4, 5, chain=Chain(key(3), 3))
        put(store, 11, 12, 13)
        put(store, 21, 22)
        assert store.exists(keys(1, 2, 3, 4, 5)) == [True, True, True, False, False]
        store.check_integrity()


def test_a_chain_may_begin_after_what_is_unknown_or_already_stored_alone(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 5, chain=Chain(key(4), 4))
        table = store._contents.table
        assert sorted(table.depth[: table.rows].tolist()) == [3, 4]
        put(store, 4)
        put(store, 3, 4, 5, 6, chain=Chain(key(2), 2))
        assert get(store, 3, 4, 5, 6) == [True] * 4
        store.check_integrity()
        assert store.delete(keys(4, 9)) == 1
        put(store, 4, chain=Chain(key(3), 3))
        store.check_integrity()
    with open_store(tmp_path) as store:
        assert get(store, 3, 4, 5, 6) == [True] * 4
        store.check_integrity()


def test_what_was_deleted_stays_away_after_a_restart(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1, 2, 3)
        assert store.delete(keys(2, 7)) == 1
        assert store.exists(keys(1, 2, 3)) == [True, False, True]
    with open_store(tmp_path) as store:
        assert store.exists(keys(1, 2, 3)) == [True, False, True]
        assert store.clear() == 2
        assert get(store, 1, 3) == [False, False]
        store.check_integrity()


def test_a_full_queue_turns_writes_away_and_reads_still_come(tmp_path):
    with open_store(tmp_path, 64, mover__queue_bytes=2 * SIZE) as store:
        put(store, 1)
        gate = threading.Event()
        for _ in range(2):
            store._mover.workers.submit(None, gate.wait)
        waiting = [store.submit_put(keys(number), [block(number)]) for number in range(10, 20)]
        read = store.submit_get(keys(1), [np.zeros(SIZE, np.uint8)])
        assert Presence.COMING in store.lookup(keys(*range(10, 20)))
        gate.set()
        assert read.result(60) == [True]
        stored = [future.result(60)[0] for future in waiting]
        assert 0 < sum(stored) < 10
        assert store.exists(keys(*range(10, 20))) == stored
        assert store.stats()["turned away"] == stored.count(False)
        store.check_integrity()


def test_deleting_what_is_being_written_or_read_waits_for_the_end(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1)
        gate = threading.Event()
        for _ in range(2):
            store._mover.workers.submit(None, gate.wait)
        memory = np.zeros(SIZE, np.uint8)
        reading, writing = store.submit_get(keys(1), [memory]), store.submit_put(keys(2), [block(2)])
        assert store.delete(keys(1, 2)) == 2
        assert store.lookup(keys(1, 2)) == [Presence.ABSENT] * 2
        gate.set()
        assert reading.result(60) == [True]
        np.testing.assert_array_equal(memory, block(1))
        writing.result(60)
        store.drain(60)
        assert store.exists(keys(1, 2)) == [False, False]
        assert store.stats()["blocks"] == 0
        store.check_integrity()


def test_closing_ends_what_runs_and_answers_everybody(tmp_path):
    store = open_store(tmp_path, 200)
    futures = [store.submit_put(keys(number), [block(number)]) for number in range(100)]
    store.close()
    stored = [future.result(60)[0] for future in futures]
    with open_store(tmp_path, 200) as store:
        assert store.exists(keys(*range(100))) == stored
        assert all(get(store, *(number for number, here in enumerate(stored) if here)))


def test_many_threads_at_once_get_what_was_put(tmp_path):
    with open_store(tmp_path, 40, mover__workers=3) as store:

        def work(seed: int) -> int:
            choose = np.random.default_rng(seed)
            came = 0
            for _ in range(60):
                numbers = [int(number) for number in choose.choice(60, 5, replace=False)]
                match choose.integers(4):
                    case 0:
                        store.delete(keys(numbers[0]))
                    case 1:
                        put(store, *numbers)
                    case _:
                        came += sum(get(store, *numbers))
            return came

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) > 0
        store.drain()
        store.check_integrity()


class AgainstADict(RuleBasedStateMachine):
    """With room for all: whatever is put, deleted, read and restarted, the store says what a dict would."""

    numbers = st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True)

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.path = Path(tempfile.mkdtemp(prefix="kvtier-blocks-"))
        self.store = open_store(self.path, 12)
        self.here: set[int] = set()

    @rule(numbers=numbers, after=st.none() | st.integers(0, 11), depth=st.integers(1, 3))
    def put(self, numbers, after, depth):
        chain = Chain(key(after), depth) if after is not None and after not in numbers else None
        assert all(put(self.store, *numbers, chain=chain))
        self.here |= set(numbers)

    @rule(numbers=numbers)
    def get(self, numbers):
        assert get(self.store, *numbers) == [number in self.here for number in numbers]

    @rule(numbers=numbers)
    def delete(self, numbers):
        assert self.store.delete(keys(*numbers)) == len(self.here & set(numbers))
        self.here -= set(numbers)

    @rule()
    def restart(self):
        self.store.close()
        self.store = open_store(self.path, 12)

    @invariant()
    def agrees(self):
        assert self.store.exists(keys(*range(12))) == [number in self.here for number in range(12)]

    def teardown(self):
        import shutil

        self.store.close()
        shutil.rmtree(self.path)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=25, stateful_step_count=20)
