"""How fast pages cross each link between tiers, in transfers of one page to 64 MiB of pages, and how fast a long prefix comes off the disk.

Every transfer is one that a real cache makes, timed from the caller's side: down, `flush` of a sequence just put; up, `acquire` and `wait`
of one that is not on the device. Gather, encode, checksum, store and all bookkeeping are in it. Per link and size, medians over all:

- `links.LINK.SIZE.encoded`: GB/s of what crossed the link. Ceiling: one thread's copy of as many bytes between the same memories; for the
  disk, a bare pool of threads around the system calls, with as many requests under way, on a file beside the store.
- `links.LINK.SIZE.page`: GB/s of the engine's own bytes, beside a copy of those.
- `.p50`, `.p99`: microseconds of one transfer, beside the same percentile of the ceiling of `.encoded`; less is better. The p99 of fewer
  than 100 transfers is the slowest of them.

`restore.disk->device`: a 2,048-token prefix that is only on the disk, cold, until it is verified and decoded on the device, in GB/s of
encoded bytes, beside fio (else the bare pool) reading as many bytes in blocks of 256 KiB, or of a page's copy if that is larger, 8 at once.
All read into memory of one kind (`fio.py`). `.bare`: the bare pool beside fio. `.ms`: how long one prefix takes, beside a copy of as many
bytes as its pages have. Of the default format; `restore.disk->device.FORMAT`, `.FORMAT.bare` and `.FORMAT.ms` are the same of others, each
beside fio reading its own bytes: where that is near, the disk is what a restore waits for, else the decoding.

Ceilings take turns with what they are compared to. No cache ever copies from disk to host, so there is no such link.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from kvtier.cache import TieredKVCache
from kvtier.errors import KVTierError
from kvtier.layout import PageLayout

from .measure import Row, Run, percentile
from .rig import (
    Ids,
    PlainCopy,
    PlainFile,
    Room,
    check_room,
    forget_files,
    layout_named,
    link_bytes,
    made_kv,
    open_cache,
    plain_file,
    restore,
    store_bytes,
    timed,
    token_ids,
)

MiB = 1 << 20
SIZES_BYTES = (0, MiB, 4 * MiB, 16 * MiB, 64 * MiB)
"""Page bytes of one transfer; 0: a single page."""
TINY_SIZES_BYTES = (0, MiB)
PREFIX_TOKENS, TINY_PREFIX_TOKENS = 2048, 256
RESTORED = ("q4", "q8", "raw")
"""Formats of the disk tier that a prefix is restored from: the default, whose rows bear no name of a format, and others."""
PREFIXES = 8
"""So many lie on the disk and are restored in turn, while the device holds one: were there room for more, a policy would keep pages of
several, and those that come next would not all come from the disk."""
LEAST_BLOCK_BYTES = 256 << 10
ENOUGH_TRANSFERS = 256
"""Of one size over one link; large ones are as many as the repeats give."""


@dataclass
class Turns:
    """What one link took for transfers of one size, in seconds, and what the plain ways took beside it."""

    page_bytes: int
    encoded_bytes: int
    transfers: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)

    def rows(self, name: str) -> list[Row]:
        """The four rows of this link and size."""
        took, plain, copy = (statistics.median(each) for each in (self.transfers, self.plain, self.copies))
        rows = [
            Row(f"{name}.encoded", self.encoded_bytes / took / 1e9, "GB/s", self.encoded_bytes / plain / 1e9),
            Row(f"{name}.page", self.page_bytes / took / 1e9, "GB/s", self.page_bytes / copy / 1e9),
        ]
        for title, share in (("p50", 0.5), ("p99", 0.99)):
            rows.append(Row(f"{name}.{title}", percentile(self.transfers, share) * 1e6, "us", percentile(self.plain, share) * 1e6))
        return rows


def measure(run: Run, layout: str = "smollm2", path: Path | None = None) -> list[Row]:
    """The rows for pages of a layout of LAYOUTS; files go into the directory `path` (the system's temporary one).

    KVTierError for an unknown layout, if fio is there but fails, and if the directory has no room for the files, before any is written.
    """
    pages_of = layout_named(layout, run.tiny)
    counts = sorted({max(1, size // pages_of.page_bytes) for size in (TINY_SIZES_BYTES if run.tiny else SIZES_BYTES)})
    run.expect(3 * len(counts) + len(RESTORED) * (run.repeats + 1))
    most = counts[-1]
    # A plain file beside the store has as many blocks as one round, or all prefixes, have pages, at most.
    rounds = store_bytes(pages_of, 4 * most) + max(store_bytes(pages_of, _sequences(most, count) * count) for count in counts)
    prefix_pages = _prefix_tokens(run) // pages_of.page_tokens
    prefixes = max(sum(store_bytes(pages_of, more * prefix_pages, form) for more in (PREFIXES + 1, PREFIXES)) for form in RESTORED)
    check_room(path, max(rounds, prefixes))
    rows = []
    # In the last one pages are written through to the host, and `flush` copies on from there. The host is the smaller one, or `flush` would
    # copy what the disk had let go, too.
    for room, links in (
        (Room(most, host=4 * most), ("device->host", "host->device")),
        (Room(most, disk=4 * most), ("device->disk", "disk->device")),
        (Room(most, host=2 * most, disk=4 * most), ("host->disk",)),
    ):
        down, up = links[0], links[1] if len(links) > 1 else None
        options: dict[str, object] = {"host__write_policy": "write_through"} if down == "host->disk" else {}
        with open_cache(pages_of, room, path, **options) as cache:
            for count in counts:
                run.step(f"{_size(count, pages_of)} {' and '.join(links)}")
                rows += _measure_pair(run, cache, count, most, down, up, path)
    for form in RESTORED:
        rows += _measure_restore(run, pages_of, path, form)
    return rows


def _measure_pair(run: Run, cache: TieredKVCache, pages: int, device_pages: int, down: str, up: str | None, path: Path | None) -> list[Row]:
    """Rounds of sequences of `pages` pages: each is put and flushed, then all are restored in the same order.

    They are twice what the device holds, so that each has left it by then.
    """
    layout = cache.layout
    tokens = pages * layout.page_tokens
    kv = made_kv(layout, tokens)
    sequences = _sequences(device_pages, pages)
    sample, page_bytes = token_ids(-pages & 0xFFFFFFFF, tokens), pages * layout.page_bytes
    before = link_bytes(cache, down)
    _put(cache, sample, kv)
    cache.flush()
    encoded_bytes = link_bytes(cache, down) - before
    turns = {link: Turns(page_bytes, encoded_bytes) for link in (down, up) if link}
    copies = {link: PlainCopy(page_bytes, *link.split("->")) for link in turns}
    block_bytes = min(encoded_bytes, max(encoded_bytes // pages, LEAST_BLOCK_BYTES))
    blocks = max(1, encoded_bytes // block_bytes)
    with plain_file(path, block_bytes, max(blocks, sequences * blocks if "disk" in down else 1)) as file:
        for number in range(min(run.repeats, -(-ENOUGH_TRANSFERS // sequences))):
            round_of = [token_ids((pages * run.repeats + number) * 10_000 + index, tokens) for index in range(sequences)]
            for ids in round_of:
                _put(cache, ids, kv)
                _time(turns[down], cache.flush, _plain(down, file, blocks, copies[down], encoded_bytes), copies[down])
            for ids in round_of if up else ():
                forget_files(cache)
                file.forget()
                _time(
                    turns[up or ""],
                    partial(restore, cache, ids),
                    _plain(up or "", file, blocks, copies[up or ""], encoded_bytes),
                    copies[up or ""],
                )
    return [row for link in turns for row in turns[link].rows(f"links.{link}.{_size(pages, layout)}")]


def _time(turns: Turns, transfer: Callable[[], object], plain: Callable[[], object], copy: PlainCopy) -> None:
    turns.transfers.append(timed(transfer))
    turns.plain.append(timed(plain))
    turns.copies.append(timed(partial(copy, turns.page_bytes)))


def _plain(link: str, file: PlainFile, blocks: int, copy: PlainCopy, size_bytes: int) -> Callable[[], object]:
    """The ceiling of one transfer of `size_bytes` encoded bytes over a link."""
    if link.endswith("disk"):
        return partial(file.write, blocks)
    return partial(file.read, blocks) if link.startswith("disk") else partial(copy, size_bytes)


def _put(cache: TieredKVCache, ids: Ids, kv: torch.Tensor) -> None:
    """Put, and wait for what is written through: it is not what is measured."""
    cache.put(ids, kv)
    cache.settle()


def _measure_restore(run: Run, layout: PageLayout, path: Path | None, form: str) -> list[Row]:
    run.step(f"writing prefixes in {form} to the disk")
    tokens = _prefix_tokens(run)
    pages = tokens // layout.page_tokens
    kv, prefixes = made_kv(layout, tokens), [token_ids(index, tokens) for index in range(PREFIXES)]
    copy = PlainCopy(pages * layout.page_bytes, "disk", "device")
    with open_cache(layout, Room(pages, disk=(PREFIXES + 1) * pages, disk_format=form), path) as cache:
        for ids in prefixes:
            cache.put(ids, kv)
            cache.flush()
        encoded_bytes = link_bytes(cache, "device->disk") // PREFIXES
        block_bytes = min(encoded_bytes, max(encoded_bytes // pages, LEAST_BLOCK_BYTES))
        blocks = max(1, encoded_bytes // block_bytes)
        with plain_file(path, block_bytes, PREFIXES * blocks) as file:
            took = _restores(run, cache, prefixes, encoded_bytes, file, blocks, copy)
    restored, bare, copied = (statistics.median(took[name]) for name in ("restore", "bare", "copy"))
    bare_speed = blocks * file.block_bytes / bare / 1e9
    fio_speed = statistics.median(took["fio"]) / 1e9 if took["fio"] else None
    name = "restore.disk->device" + ("" if form == RESTORED[0] else f".{form}")
    return [
        Row(name, encoded_bytes / restored / 1e9, "GB/s", bare_speed if fio_speed is None else fio_speed),
        Row(f"{name}.bare", bare_speed, "GB/s", fio_speed),
        Row(f"{name}.ms", restored * 1e3, "ms", copied * 1e3),
    ]


def _restores(
    run: Run, cache: TieredKVCache, prefixes: Sequence[Ids], encoded_bytes: int, file: PlainFile, blocks: int, copy: PlainCopy
) -> dict[str, list[float]]:
    """Each repeat restores every prefix once. Seconds per prefix, and what fio says of bytes per second, all taking turns.

    KVTierError if any of it did not come from the disk.
    """
    took: dict[str, list[float]] = {"restore": [], "bare": [], "copy": [], "fio": []}
    order = random.Random(0)
    page_bytes = len(prefixes[0]) // cache.layout.page_tokens * cache.layout.page_bytes
    for ids in prefixes:  # the first time, workers and memory are cold
        restore(cache, ids)
    before = link_bytes(cache, "disk->device")
    for _ in range(run.repeats):
        run.step("restoring prefixes from the disk")
        for ids in prefixes:
            works: dict[str, Callable[[], float | None]] = {
                "restore": partial(timed, partial(restore, cache, ids)),
                "bare": partial(timed, partial(file.read, blocks)),
                "copy": partial(timed, partial(copy, page_bytes)),
                "fio": file.fio_read,
            }
            for name in order.sample(list(works), len(works)):  # so that none always has the burst another left over
                forget_files(cache)
                file.forget()
                if (taken := works[name]()) is not None:
                    took[name].append(taken)
    came = link_bytes(cache, "disk->device") - before
    if came != run.repeats * len(prefixes) * encoded_bytes:
        raise KVTierError(
            f"{came} bytes came from the disk, not {run.repeats} times {len(prefixes)} times {encoded_bytes}: a fault of kvtier's"
        )
    return took


def _sequences(device_pages: int, pages: int) -> int:
    """How many of `pages` pages each are twice what the device holds, to the next whole one."""
    return -(-2 * device_pages // pages)


def _prefix_tokens(run: Run) -> int:
    return TINY_PREFIX_TOKENS if run.tiny else PREFIX_TOKENS


def _size(pages: int, layout: PageLayout) -> str:
    """As in the names of rows: 1page, 64MiB (to the next MiB below)."""
    return "1page" if pages == 1 else f"{round(pages * layout.page_bytes / MiB)}MiB"
