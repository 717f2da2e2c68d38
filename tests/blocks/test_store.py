"""The block store: what was put comes back, bad input starts nothing, sequences go from their ends, and a restart changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.blocks import Chain
from kvtier.engines.settings import store_config
from kvtier.errors import Closed, ConfigError, LayoutError, StoreError, StoreLocked
from kvtier.layout import PageLayout
from kvtier.tiers.lent import BlockLayout
from tests.blocks.rig import FACTS, SIZE, block, get, key, keys, open_store, put


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
from kvtier.errors import StoreLocked
from tests.blocks.rig import *
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


# -- keys, sequences, restarts ----------------------------------------------------------------------------------------------


def test_other_facts_make_other_keys(tmp_path):
    with open_store(tmp_path / "a") as one, open_store(tmp_path / "b", facts=FACTS | {"rank": 1}) as other:
        assert set(one._contents._names(keys(*range(9)))).isdisjoint(other._contents._names(keys(*range(9))))
        assert one._contents._names(keys(1)) == one._contents._names(keys(1))


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
