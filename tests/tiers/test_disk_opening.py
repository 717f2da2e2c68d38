"""What keeps a store from opening: one clear error each, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier.errors import ConfigError, LayoutError, StoreError, StoreLocked
from kvtier.formats import get_format
from kvtier.testing.tiers import LAYOUT, page_id, put
from kvtier.tiers.disk import DiskTier
from tests.tiers.disk import CAPACITY, NAMESPACE, RAW, SLOT, VARIABLE, open_disk


@pytest.fixture
def store(tmp_path):
    """The path of a closed store with one page."""
    tier = open_disk(tmp_path / "store")
    put(tier, [1])
    tier.close()
    return tmp_path / "store"


def edit(store: Path, **fields) -> None:
    description = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(description | fields))


def test_a_second_store_object_is_refused_naming_path_and_process(store):
    tier = open_disk(store)
    with pytest.raises(StoreLocked, match=rf"{store} is open in this process already; close\(\) what has it first"):
        open_disk(store)
    holder = "import sys, time; from tests.tiers.disk import *; open_disk(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    tier.close()
    with subprocess.Popen([sys.executable, "-c", holder, str(store)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StoreLocked, match=rf"{store}.*process {other.pid}; stop it"):
            open_disk(store)
        other.kill()
    open_disk(store).close()


def test_another_layout_is_refused_naming_both(store):
    other = replace(LAYOUT, layers=3)
    with pytest.raises(LayoutError) as caught:
        open_disk(store, layout=other, capacity=4 * CAPACITY)
    assert str(LAYOUT) in str(caught.value)
    assert str(other) in str(caught.value)


def test_another_format_is_refused(store):
    with pytest.raises(StoreError, match=r"another format: raw there, raw\+lz4 here; use another disk.path, or delete"):
        open_disk(store, format=VARIABLE)


def test_another_namespace_is_refused(store):
    with pytest.raises(StoreError, match=r"another model or revision.*use another disk.path, or delete"):
        open_disk(store, namespace=bytes(32))


@pytest.mark.parametrize("capacity", [1, SLOT - 1])
def test_capacity_below_one_record_is_refused_with_both_numbers(tmp_path, capacity):
    with pytest.raises(ConfigError, match=rf"disk\.capacity_bytes is {capacity}, .* {SLOT} bytes"):
        open_disk(tmp_path, capacity=capacity)
    assert list(tmp_path.iterdir()) == []


def test_capacity_beyond_the_file_system_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ConfigError, match=rf"disk\.capacity_bytes is {1 << 60}, .* \d+ bytes are available"):
        open_disk(tmp_path, capacity=1 << 60)


def test_what_the_store_holds_counts_as_available(small_disk):
    tier = open_disk(small_disk, capacity=100 * SLOT)
    put(tier, range(100))
    tier.close()
    again = open_disk(small_disk, capacity=100 * SLOT)
    assert len(list(again.recover())) == 100
    again.close()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"no disk store and not empty \(thesis.tex\)"):
        open_disk(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"magic": "x", "version": 1, "layout_fingerprint": ""}', "\x00" * 500])
def test_a_damaged_description_is_refused(store, text):
    (store / "store.json").write_text(text)
    with pytest.raises(StoreError, match=r"store\.json.*use another disk.path, or delete"):
        open_disk(store)


@pytest.mark.parametrize(
    "fields",
    [
        {"slot_bytes": -1},
        {"segment_slots": 0},
        {"capacity_bytes": "many"},
        {"clean": 1},
        {"synced_sequence": True},
        {"layout_fingerprint": "00"},
        {"layout": {"layers": 0}},
        {"layout": [1]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_description_with_impossible_fields_is_refused(store, fields):
    edit(store, **fields)
    with pytest.raises(StoreError, match=r"store\.json"):
        open_disk(store)


def test_a_newer_store_is_refused(store):
    edit(store, version=2)
    with pytest.raises(StoreError, match="version 2, written by a newer kvtier"):
        open_disk(store)


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/kvtier")):
        with pytest.raises(ConfigError, match=r"disk\.path .* cannot be created or written"):
            open_disk(path)


def test_an_unknown_durability_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"disk\.durability is 'eternal'"):
        open_disk(tmp_path, durability="eternal")


def without_room(path: Path) -> os.statvfs_result:
    """As a full file system answers."""
    return os.statvfs_result((4096, 4096, 1, *[0] * 8))


def test_a_file_system_that_gives_no_size_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, *[0] * 9)))  # a ramfs, some network file systems
    open_disk(tmp_path).close()


def failing_description(*_: Any) -> None:
    raise OSError(errno.EIO, "as from a broken disk")


@pytest.mark.parametrize(
    ("broken", "with_", "error"),
    [("os.statvfs", without_room, ConfigError), ("kvtier.tiers.disk.directory.os.rename", failing_description, StoreError)],
)
def test_a_refused_opening_leaves_only_what_was_there_before(tmp_path, monkeypatch, broken, with_, error):
    (tmp_path / "there").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "lock").write_text("of an earlier process")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(broken, with_)
        for path in (tmp_path / "new" / "deep", tmp_path / "there", tmp_path / "there" / "below", tmp_path / "locked"):
            with pytest.raises(error):
                open_disk(path)
            assert sorted(tmp_path.rglob("*")) == before
    open_disk(tmp_path / "new" / "deep").close()
    open_disk(tmp_path / "locked").close()


def test_a_refused_opening_takes_nothing_of_a_store_that_was_there(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", without_room)
        with pytest.raises(ConfigError, match="lower it"):
            open_disk(store, capacity=1 << 40)
    tier = open_disk(store)
    assert [page for _, page in tier.recover()] == [page_id(1)]
    tier.close()


def test_a_lock_that_was_given_up_meanwhile_locks_nothing(tmp_path, monkeypatch):
    flock = fcntl.flock

    def late(file: int, operation: int) -> None:
        (tmp_path / "lock").unlink(missing_ok=True)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreLocked, match="given up by somebody else, with its lock; try again"):
        open_disk(tmp_path)


def test_a_failed_opening_leaves_the_store_unlocked(store):
    with pytest.raises(StoreError):
        open_disk(store, namespace=bytes(32))
    tier = open_disk(store)
    assert [page for _, page in tier.recover()] == [page_id(1)]
    tier.close()


def test_segment_files_that_somebody_removed_are_told(tmp_path, caplog):
    store = tmp_path / "store"
    tier = open_disk(store)
    tier.free(put(tier, [1]))
    tier.checkpoint()
    tier.close()
    assert not list(open_again(store))
    assert "segment files" not in caplog.text
    for file in store.glob("segment-*"):
        file.unlink()
    assert not list(open_again(store))
    assert f"disk store {store}: all segment files are gone" in caplog.text


def open_again(store: Path) -> list[int]:
    tier = open_disk(store)
    found = [slot for slot, _ in tier.recover()]
    tier.close()
    return found


def test_a_disk_that_cannot_be_is_found_before_it_is_made(tmp_path):
    store = tmp_path / "store"
    with pytest.raises(ConfigError, match="lower it, or free"):
        DiskTier.check(store, LAYOUT, RAW, 1 << 60, bytes(32))
    with pytest.raises(ConfigError, match="one raw page of this layout takes"):
        DiskTier.check(store, LAYOUT, RAW, 1, bytes(32))
    DiskTier.check(store, LAYOUT, RAW, CAPACITY, bytes(32))
    assert not store.exists()
    open_disk(store).close()
    with pytest.raises(ConfigError, match="lower it, or free"):
        DiskTier.check(store, LAYOUT, RAW, 1 << 60, NAMESPACE)
    with pytest.raises(StoreError, match="another format"):
        DiskTier.check(store, LAYOUT, get_format("q8"), CAPACITY, NAMESPACE)
    open_disk(store).close()
