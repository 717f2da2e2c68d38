"""How fast page formats code on the CPU, beside one thread's plain copy of as many bytes of pages.

Rows: `q8.encode`, `q8.decode`, ... in GB/s of the page's own bf16 bytes, one thread, over a working set far larger than the caches, through
the formats as tiers use them (native kernels where they are built). The ceiling is a copy of the same bytes in the same rounds.
`.2threads`: two threads at once, beside twice one thread; `.2threads.copy`: the same beside the copy of two threads, which is what the
memory can do. `threads.compute` and `threads.copy`, once for all formats: how many times as fast as one thread two are at what no memory
slows down (encoding one page in the cache again and again) and at copying: the most that this machine's CPUs and memory give.
`.1page`: microseconds for one page of 64 KiB that is in the cache, beside its copy; less is better. `.1page.cold`: the same
for pages that are not. `.torch`: the torch reference. `q8.encode+checksum`: encoded, each payload digested (xxh3-128) as soon as it is
made, as for tiers; `.share`: what that takes of the time, of calls with and without it that alternate. A format may be mixed, such as
`q8/q4`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash

from kvtier.errors import KVTierError
from kvtier.formats import BLOCK_CODECS, Format, Payload, get_format
from kvtier.formats.blocks import BlockShape
from kvtier.formats.native import codecs as native_codecs
from kvtier.formats.native import why_missing
from kvtier.layout import PageLayout
from kvtier.memory.limits import available_memory

from .measure import Row, Run, side_by_side
from .measure import seconds as seconds_of

LAYOUTS = {
    "smollm2": PageLayout(layers=30, planes=2, page_tokens=16, kv_heads=3, head_dim=64, dtype="bf16"),
    "llama": PageLayout(layers=32, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16"),
}
SMALL = PageLayout(layers=4, planes=2, page_tokens=16, kv_heads=4, head_dim=64, dtype="bf16")
"""A page of 64 KiB."""
HASHED_TOGETHER = 8
"""Pages of each call with or without digests: few, so that what the machine does meanwhile meets both."""
COLD_BYTES = 64 << 20
"""So many bytes of small pages, one after the other, are in no cache when their turn comes again."""
TORCH_BYTES = 16 << 20
"""How much of the pages the torch reference codes."""
SPARE_BYTES = 8 * TORCH_BYTES
"""Beside pages and payloads: what torch holds meanwhile, pages in float32 among it."""
FORMATS = ("q8", "q4", "q6", "q3", "q8_0", "q4_0")


@dataclass(frozen=True)
class Bench:
    """Pages, room for their payloads and room to decode into."""

    layout: PageLayout
    format: Format
    pages: torch.Tensor
    payloads: Sequence[Payload]
    target: torch.Tensor

    def part(self, first: int, stop: int) -> Bench:
        """The same for pages `first` to `stop`."""
        return Bench(self.layout, self.format, self.pages[first:stop], self.payloads[first:stop], self.target[first:stop])

    def copy(self) -> None:
        """What no codec can beat by much: every byte once."""
        np.copyto(self.target.view(torch.uint8).numpy(), self.pages.view(torch.uint8).numpy())

    def encode(self) -> None:
        """All pages."""
        self.format.encode(self.pages, self.layout, out=self.payloads)

    def decode(self) -> None:
        """All payloads."""
        self.format.decode(self.payloads, self.layout, out=self.target)

    def hash(self) -> None:
        """All payloads, for the result's sake."""
        for payload in self.payloads:
            xxhash.xxh3_128_intdigest(payload.data)

    def encode_and_hash(self) -> None:
        """All pages, and what proves the payloads."""
        self.format.encode_with_digests(self.pages, self.layout, out=self.payloads)

    def share_of_hash(self, turn: int) -> float:
        """The part of the time of `encode_and_hash` that is not that of `encode`: medians of calls that alternate, from one `turn` to the
        next the other way round."""
        together = min(HASHED_TOGETHER, len(self.pages) // 2)
        taken: list[list[float]] = [[], []]
        for first in range(0, len(self.pages) // together * together, together):
            some, hashed = self.part(first, first + together), (first // together + turn) % 2
            taken[hashed].append(seconds_of(some.encode_and_hash if hashed else some.encode))
        alone, both = map(statistics.median, taken)
        return (both - alone) / both


def note() -> str:
    """What to know beside the figures."""
    native = native_codecs()
    return f"native codecs: {native.features()}" if native else f"native codecs: {why_missing()}"


def measure(run: Run, layout: str = "smollm2", formats: Sequence[str] = FORMATS, size_bytes: int = 512 << 20) -> list[Row]:
    """Rows of all `formats` on a layout of LAYOUTS, over `size_bytes` of pages. KVTierError for an unknown layout or format,
    and for fewer than two pages or more than memory can be had for, before any is taken."""
    if layout not in LAYOUTS:
        raise KVTierError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if not any(formats):
        raise KVTierError(f"--formats is empty: no format was named; choose from {', '.join(BLOCK_CODECS)}")
    unknown = [repr(name) for name in formats if not set(name.split("/", 1)) <= set(BLOCK_CODECS)]
    if unknown:
        known = ", ".join(BLOCK_CODECS)
        raise KVTierError(f"--formats: unknown formats {', '.join(unknown)}; choose from {known}, or two of them as KEYS/VALUES")
    chosen = LAYOUTS[layout]
    if size_bytes < 2 * chosen.page_bytes:
        least = f"two threads take a page each, {2 * chosen.page_bytes} bytes of {layout}"
        raise KVTierError(f"--size-bytes {size_bytes}: {least}; give at least that, better more than the caches hold")
    count = max(2, (1 << 20 if run.tiny else size_bytes) // chosen.page_bytes)
    _check_memory(size_bytes, count, chosen, formats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run.expect(5 * len(formats) + 1)
        pages = make_pages(chosen, count)
        target = torch.zeros_like(pages)
        rows = [row for name in formats for row in _rows_of(run, name, chosen, pages, target)]
        return rows + _two_threads_at_best(run, _bench(formats[0], chosen, pages, target))
    finally:
        torch.set_num_threads(threads)


def _check_memory(size_bytes: int, count: int, layout: PageLayout, formats: Sequence[str]) -> None:
    """KVTierError unless pages, as many to decode into and the largest payloads can be had, before any of them is taken."""
    each = 2 * layout.page_bytes + max(get_format(name).payload_bytes(layout) for name in formats)
    room, needed = available_memory(), count * each + SPARE_BYTES
    if needed > room.bytes:
        most = max(0, room.bytes - SPARE_BYTES) // each * layout.page_bytes
        had = f"{needed} bytes of memory are needed for them and what they are coded to, {room.bytes} can be had ({room.why})"
        raise KVTierError(f"--size-bytes {size_bytes}: {had}; give at most {most}, or end what else holds memory")


def make_pages(layout: PageLayout, count: int) -> torch.Tensor:
    """`count` pages of noise whose keys share a mean, as real keys do; a few different ones, again and again."""
    few = min(count, 16)
    pages = torch.randn((few, *layout.shape), generator=torch.Generator().manual_seed(0))
    pages[:, :, 0] += 2 * torch.randn((1, layout.layers, 1, layout.kv_heads, layout.head_dim), generator=torch.Generator().manual_seed(1))
    return pages.to(layout.torch_dtype)[torch.arange(count) % few]


def _rows_of(run: Run, name: str, layout: PageLayout, pages: torch.Tensor, target: torch.Tensor) -> list[Row]:
    bench = _bench(name, layout, pages, target)
    count = pages.numel() * pages.element_size()
    rows = []
    run.step(f"{name} encode and decode")
    copy, encode, decode = side_by_side([bench.copy, bench.encode, bench.decode], run.repeats)
    for what, seconds in (("encode", encode), ("decode", decode)):
        rows.append(Row(f"{name}.{what}", count / seconds / 1e9, "GB/s", count / copy / 1e9))
    run.step(f"{name} on two threads")
    works = [_on_two_threads(bench, what) for what in ("encode", "decode", "copy")]
    *coded, copies = side_by_side(works, run.repeats)
    for what, both, one in zip(("encode", "decode"), coded, (encode, decode), strict=True):
        rows.append(Row(f"{name}.{what}.2threads", count / both / 1e9, "GB/s", 2 * count / one / 1e9))
        rows.append(Row(f"{name}.{what}.2threads.copy", count / both / 1e9, "GB/s", count / copies / 1e9))
    run.step(f"{name} and checksum")
    hashed, alone = side_by_side([bench.encode_and_hash, bench.hash], run.repeats)
    share = statistics.median(bench.share_of_hash(turn) for turn in range(run.repeats))
    rows.append(Row(f"{name}.encode+checksum", count / hashed / 1e9, "GB/s", count / copy / 1e9))
    rows.append(Row(f"{name}.encode+checksum.share", share, "of the time"))
    rows.append(Row(f"{name}.checksum", sum(map(len, bench.payloads)) / alone / 1e9, "GB/s of payload"))
    run.step(f"{name} of one page")
    rows += _one_page(run, name)
    run.step(f"{name} in torch")
    return rows + _in_torch(run, name, layout, pages[: max(1, TORCH_BYTES // layout.page_bytes)], count / copy / 1e9)


def _bench(name: str, layout: PageLayout, pages: torch.Tensor, target: torch.Tensor) -> Bench:
    format = get_format(name)
    payloads = list(np.zeros((len(pages), format.payload_bytes(layout)), np.uint8))
    return Bench(layout, format, pages, payloads, target)


def _on_two_threads(bench: Bench, what: str) -> Callable[[], object]:
    half = len(bench.pages) // 2
    parts = [bench.part(0, half), bench.part(half, len(bench.pages))]

    def work() -> None:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(getattr(part, what)) for part in parts]:
                done.result()

    return work


def _two_threads_at_best(run: Run, bench: Bench) -> list[Row]:
    """How many times as fast as one thread two are; each codes its own page, which stays in its CPU's cache, in one call without the
    interpreter's lock."""
    times = 4 if run.tiny else 2000
    pages = make_pages(SMALL, 2)
    small = [_bench("q8", SMALL, pages, pages).part(row, row + 1) for row in range(2)]

    def compute(which: int) -> None:
        own = small[which]
        own.format.encode(own.pages, SMALL, [0] * times, [own.payloads[0]] * times)

    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compute, range(2)))

    run.step("two threads at best")
    alone, together, copy, copies = side_by_side([lambda: compute(0), both, bench.copy, _on_two_threads(bench, "copy")], run.repeats)
    return [Row("threads.compute", 2 * alone / together, "x", 2.0), Row("threads.copy", copy / copies, "x", 2.0)]


def _one_page(run: Run, name: str) -> list[Row]:
    rows = []
    for suffix, count in (("", 1), (".cold", COLD_BYTES // SMALL.page_bytes)):
        pages = make_pages(SMALL, 2 if run.tiny and count > 1 else count)
        bench, times = _bench(name, SMALL, pages, torch.zeros_like(pages)), (10 if run.tiny else 1000) // len(pages) or 1
        parts = [bench.part(row, row + 1) for row in range(len(pages))]
        whats = {"copy": "copy", "encode": "encode", "encode+checksum": "encode_and_hash", "decode": "decode"}
        works = [partial(_often, [getattr(part, what) for part in parts], times) for what in whats.values()]
        copy, *coded = (taken / times / len(pages) * 1e6 for taken in side_by_side(works, run.repeats))
        rows += [Row(f"{name}.{what}.1page{suffix}", taken, "us", copy) for what, taken in zip(list(whats)[1:], coded, strict=True)]
    return rows


def _often(works: Sequence[Callable[[], None]], times: int) -> None:
    for _ in range(times):
        for work in works:
            work()


def _in_torch(run: Run, name: str, layout: PageLayout, pages: torch.Tensor, ceiling: float) -> list[Row]:
    keys, _, values = name.partition("/")
    codecs = [BLOCK_CODECS[keys], BLOCK_CODECS[values or keys]]
    shapes = [BlockShape(layout.page_tokens, layout.kv_heads, layout.head_dim, layout.dtype, plane == 0) for plane in range(layout.planes)]
    planes = [pages[:, :, plane].flatten(0, 1).contiguous() for plane in range(layout.planes)]
    blocks = [[plane[first : first + 64] for first in range(0, len(plane), 64)] for plane in planes]
    coded = [[codec.encode(some, shape) for some in each] for codec, each, shape in zip(codecs, blocks, shapes, strict=True)]

    def encode() -> None:
        for codec, each, shape in zip(codecs, blocks, shapes, strict=True):
            for some in each:
                codec.encode(some, shape)

    def decode() -> None:
        for codec, each, shape in zip(codecs, coded, shapes, strict=True):
            for some in each:
                codec.decode(some, shape)

    count = pages.numel() * pages.element_size()
    both = side_by_side([encode, decode], min(run.repeats, 3))
    return [
        Row(f"{name}.{what}.torch", count / seconds / 1e9, "GB/s", ceiling)
        for what, seconds in zip(("encode", "decode"), both, strict=True)
    ]
