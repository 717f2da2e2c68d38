"""How fast pages move between the tiers of this machine, beside a plain copy and a plain file of as many bytes, measured in the same run.

Every transfer goes through a real TieredKVCache: gather, encode, checksum, store, and back. "page" counts bytes the engine wrote, against a
copy of as many between the same memories; "encoded" counts what crossed the link, against a copy of that or, for the disk, against a file
written and synced, or read with a cold cache. The cache's own disk figures include the sync, or start cold, as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvtier.cache import TieredKVCache
from kvtier.cli.output import check_json_target, human_console, write_json
from kvtier.config import load_config
from kvtier.errors import KVTierError, MissingExtra
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.machine import describe_machine

LAYOUTS = {
    "Llama-3-8B": PageLayout(layers=32, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16"),
    "SmolLM2-135M": PageLayout(layers=30, planes=2, page_tokens=16, kv_heads=3, head_dim=64, dtype="fp32"),
}
TINY = {"tiny": PageLayout(layers=2, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="bf16")}
LINKS = ("device->host", "host->device", "host->disk", "disk->device")
Row = dict[str, Any]
Sample = tuple[str, float, int]  # link, seconds, encoded bytes


def main() -> int:
    """The command line; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE|-", help="write machine and rows as JSON; - is standard output")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the rows (.svg, .png, .pdf)")
    parser.add_argument("--pages", metavar="N", type=int, default=64, help="pages per transfer (default 64: 128 MiB of Llama-3-8B)")
    parser.add_argument("--repeats", metavar="R", type=int, default=3, help="repeats of each transfer; the median counts (default 3)")
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML with formats and mover; capacities follow from --pages")
    parser.add_argument("--tiny", action="store_true", help="a very small model: shows that it works, its figures say nothing")
    options = parser.parse_args()
    if min(options.pages, options.repeats) < 1:
        parser.error("--pages and --repeats must be at least 1")
    try:
        check_json_target(options.json)
        console = human_console(options.json)
        rows = measure(TINY if options.tiny else LAYOUTS, options.pages, options.repeats, options.config, console)
        machine = describe_machine()
        show(console, rows, f"{machine['cpu']}, {machine['cores']} cores; {options.pages} pages, medians of {options.repeats} repeats")
        write_json({"machine": machine, "pages": options.pages, "repeats": options.repeats, "rows": rows}, options.json)
        if options.plot:
            plot(rows, options.plot)
    except (KVTierError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(layouts: dict[str, PageLayout], pages: int, repeats: int, config: Path | None, console: Console) -> list[Row]:
    """Two rows per layout and link: page bytes and encoded bytes per second. The disk tier is in the temporary directory (TMPDIR)."""
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress, tempfile.TemporaryDirectory(prefix="kvtier-tiers-") as folder:
        task = progress.add_task("", total=len(layouts) * (6 * repeats + len(LINKS)))
        for name, layout in layouts.items():
            samples: dict[str, list[Sample]] = defaultdict(list)
            for links in (memory_links, disk_links):
                for sample in links(layout, pages, repeats, config, Path(folder) / name):
                    samples[sample[0]].append(sample)
                    progress.update(task, description=f"{name} {sample[0]}", advance=1)
            for link in LINKS:
                progress.update(task, description=f"{name} ceilings", advance=1)
                seconds, encoded, whole = statistics.median(s[1] for s in samples[link]), samples[link][0][2], pages * layout.page_bytes
                best = plain_file(encoded, Path(folder), link) if "disk" in link else plain_copy(encoded, link)
                for what, count, least in (("page", whole, plain_copy(whole, link)), ("encoded", encoded, best)):
                    speeds = {"value": count / seconds / 1e9, "unit": "GB/s", "ceiling": count / least / 1e9, "ratio": least / seconds}
                    rows.append({"name": f"{name} {link} {what}"} | speeds)
    return rows


def memory_links(layout: PageLayout, pages: int, repeats: int, config: Path | None, _: Path) -> Iterator[Sample]:
    """Two sequences of which the device holds one at a time, and the host both."""
    kv, tokens = _kv(layout, pages), pages * layout.page_tokens
    with _open(layout, pages, config, None) as cache:
        for _repeat in range(repeats):
            for ids in (np.arange(tokens), -np.arange(1, tokens + 1)):
                cache.put(ids, kv)
                yield _timed(cache, "device->host", cache.flush)
            for ids in (np.arange(tokens), -np.arange(1, tokens + 1)):
                yield _timed(cache, "host->device", _restore, cache, ids)
            cache.clear()


def disk_links(layout: PageLayout, pages: int, repeats: int, config: Path | None, path: Path) -> Iterator[Sample]:
    """Pages written through to the host, flushed to the disk, and found there by a second cache whose memory is empty."""
    kv, ids = _kv(layout, pages), np.arange(pages * layout.page_tokens)
    for _repeat in range(repeats):
        with _open(layout, pages, config, path) as cache:
            cache.clear()
            cache.put(ids, kv)
            cache.settle()
            link, seconds, encoded = _timed(cache, "host->disk", cache.flush)
            yield link, seconds + _seconds(_sync, path), encoded
        with _open(layout, pages, config, path) as cache:
            _sync(path, forget=True)
            yield _timed(cache, "disk->device", _restore, cache, ids)


def _open(layout: PageLayout, pages: int, config: Path | None, path: Path | None) -> TieredKVCache:
    given = load_config(config)
    host, disk = given.host.format if given.host else "q8", given.disk.format if given.disk else "q4"
    changes: dict[str, object] = {"device.capacity_bytes": pages * layout.page_bytes, "pages.page_tokens": layout.page_tokens}
    changes |= {"host.format": host, "host.capacity_bytes": 2 * pages * get_format(host).payload_bytes(layout) + 2**16}
    changes |= {"host.write_policy": "write_through" if path else "write_back", "mover.queue_bytes": 4 * pages * layout.page_bytes}
    changes |= {"mover.clean_pressure": 1.0, "policy.cleanup_interval": 86400.0}  # nothing moves that is not asked for
    if path is None:
        return TieredKVCache(load_config(config, overrides={"disk": None, **changes}), layout)
    room = 2 * pages * (get_format(disk).payload_bytes(layout) + 8192) + 2**20
    changes |= {"disk.path": str(path), "disk.format": disk, "disk.capacity_bytes": room, "disk.write_policy": "write_back"}
    return TieredKVCache(load_config(config, overrides=changes), layout)


def _kv(layout: PageLayout, pages: int) -> torch.Tensor:
    shape = (layout.layers, layout.planes, pages * layout.page_tokens, layout.kv_heads, layout.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)


def _timed(cache: TieredKVCache, link: str, work: Callable[..., object], *given: object) -> Sample:
    before: Any = cache.stats()["links"]
    seconds, after = _seconds(work, *given), cast(Any, cache.stats()["links"])
    return link, seconds, after[link]["bytes"] - before.get(link, {"bytes": 0})["bytes"]


def _seconds(work: Callable[..., object], *given: object) -> float:
    start = time.perf_counter()
    work(*given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _restore(cache: TieredKVCache, ids: np.ndarray[Any, Any]) -> None:
    with cache.acquire(cache.lookup(ids)) as lease:
        lease.wait()
        if lease.tokens != len(ids):
            raise KVTierError(f"only {lease.tokens} of {len(ids)} tokens came back; this configuration leaves no room for the benchmark")


def plain_copy(count: int, link: str) -> float:
    """Seconds to copy `count` bytes between the memories at the ends of the link, pinned where the device is a GPU."""
    host, other = (torch.ones(count, dtype=torch.uint8) for _ in range(2))
    if torch.cuda.is_available() and "device" in link:
        host, other = host.pin_memory(), other.cuda()
    source, target = (other, host) if link.startswith("device") else (host, other)
    return statistics.median(_seconds(target.copy_, source) for _ in range(5))


def plain_file(count: int, folder: Path, link: str) -> float:
    """Seconds to write `count` bytes to a file and sync it, or to read them from one of which the system remembers nothing."""
    path, data = folder / "plain", np.random.default_rng(0).integers(0, 256, count, np.uint8)
    writes, reads = [], []
    for _ in range(3):
        path.unlink(missing_ok=True)
        writes.append(_seconds(path.write_bytes, data.data) + _seconds(_sync, folder, False, "plain"))
        _sync(folder, forget=True, name="plain")
        with path.open("rb", buffering=0) as file:
            reads.append(_seconds(file.readinto, data.data))
    return statistics.median(writes if link.endswith("disk") else reads)


def _sync(folder: Path, forget: bool = False, name: str = "segment-*") -> None:
    for path in folder.glob(name):
        with path.open("rb+") as file:
            os.fdatasync(file.fileno())
            if forget:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(console: Console, rows: list[Row], note: str) -> None:
    """One line per link: both speeds in GB/s, each with its ceiling and the ratio."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    for title in ("GB/s", "page", "copy", "ratio", "encoded", "ceiling", "ratio"):
        table.add_column(title, justify="left" if title == "GB/s" else "right", no_wrap=True)
    for page, encoded in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{row[key]:{spec}}" for row in (page, encoded) for key, spec in (("value", ".3f"), ("ceiling", ".2f"), ("ratio", ".1%"))]
        table.add_row(page["name"].removesuffix(" page"), *cells)
    console.print(table)
    console.print(note, style="dim")


def plot(rows: list[Row], path: Path) -> None:
    """Each row and its ceiling on one line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("--plot needs matplotlib; pip install 'kvtier[report]'") from None
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes, places = figure.subplots(), range(len(rows))
    speeds, ceilings = ([row[key] for row in rows] for key in ("value", "ceiling"))
    axes.hlines(places, speeds, ceilings, color="#c4c9cf", linewidth=3)
    axes.plot(speeds, places, "o", color="#0072b2", label="kvtier")
    axes.plot(ceilings, places, "s", color="#c75000", label="ceiling")
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set(xscale="log", xlabel="GB/s, logarithmic", ylim=(len(rows) - 0.4, -0.6))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
