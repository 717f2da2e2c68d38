"""How fast page formats code on the CPU, beside one thread's plain copy of as many bytes of pages.

Rows: `q8.encode`, `q8.decode`, ... in GB/s of the page's own bf16 bytes, one thread, over a working set far larger than the caches, through
the formats as tiers use them (native kernels where they are built). The ceiling is a copy of the same bytes in the same rounds.
`.2threads`: two threads at once, beside twice one thread; `.2threads.copy`: the same beside the copy of two threads, which is what the
memory can do; `.2threads.compute`: the same beside one thread times what two CPUs gain where no memory slows them down (encoding one page
in the cache again and again). All in the same rounds. `threads.compute` and `threads.copy`, once for all formats: how many times as fast
as one thread two are at either, the most that this machine's CPUs and memory give.
`.1page`: microseconds for one page of 64 KiB that is in the cache, beside its copy; less is better. `.1page.cold`: the same
for pages that are not. Formats that name a layer which so small a page has not are without both. `.torch`: the torch reference, of
formats without byte stage, which is the same with and without torch. `q8.encode+checksum`: encoded, each payload digested (xxh3-128) as
soon as it is made, as for tiers; `.share`: what that takes of the time, of calls with and without it that alternate. Formats are named as
in the configuration: `q8/q4`, `q4;0-1:q8`, `raw+zstd`; payloads with a byte stage are unpacked before they are decoded, within the time.
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

from kvtier.errors import KVTierError, LayoutError
from kvtier.formats import BlockCodec, BlockFormat, BlockShape, Format, Payload, get_format
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
LINE_BYTES = 64
"""Payloads begin at multiples of it, as the slots of host memory do."""
COLD_BYTES = 64 << 20
"""So many bytes of small pages, one after the other, are in no cache when their turn comes again."""
TORCH_BYTES = 16 << 20
"""How much of the pages the torch reference codes."""
SPARE_BYTES = 8 * TORCH_BYTES
"""Beside pages and payloads: what torch holds meanwhile, pages in float32 among it."""
FORMATS = ("q8", "q4", "q6", "q3", "q8_0", "q4_0")
Work = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Pages, room for their payloads, their payloads in it, and room to decode into."""

    layout: PageLayout
    format: Format
    pages: torch.Tensor
    room: Sequence[Payload]
    payloads: Sequence[Payload]
    target: torch.Tensor

    def part(self, first: int, stop: int) -> Bench:
        """The same for pages `first` to `stop`."""
        some = slice(first, stop)
        return Bench(self.layout, self.format, self.pages[some], self.room[some], self.payloads[some], self.target[some])

    def copy(self) -> None:
        """What no codec can beat by much: every byte once."""
        np.copyto(self.target.view(torch.uint8).numpy(), self.pages.view(torch.uint8).numpy())

    def encode(self) -> None:
        """All pages."""
        self.format.encode(self.pages, self.layout, out=self.room)

    def decode(self) -> None:
        """All payloads."""
        payloads = self.payloads if self.format.fixed_size else self.format.unpack(self.payloads, self.layout)
        self.format.decode(payloads, self.layout, out=self.target)

    def hash(self) -> None:
        """All payloads, for the result's sake."""
        for payload in self.payloads:
            xxhash.xxh3_128_intdigest(payload.data)

    def encode_and_hash(self) -> None:
        """All pages, and what proves the payloads."""
        self.format.encode_with_digests(self.pages, self.layout, out=self.room)

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
    """Rows of all `formats` on a layout of LAYOUTS, over `size_bytes` of pages. KVTierError for an unknown layout or format, for one that
    cannot hold such pages, and for fewer than two pages or more than memory can be had for, before any is taken."""
    if layout not in LAYOUTS:
        raise KVTierError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    formats = _checked(formats, chosen)
    if size_bytes < 2 * chosen.page_bytes:
        least = f"two threads take a page each, {2 * chosen.page_bytes} bytes of {layout}"
        raise KVTierError(f"--size-bytes {size_bytes}: {least}; give at least that, better more than the caches hold")
    count = max(2, (1 << 20 if run.tiny else size_bytes) // chosen.page_bytes)
    _check_memory(size_bytes, count, chosen, formats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run.expect(4 * len(formats) + 1)
        pages = make_pages(chosen, count)
        target = torch.zeros_like(pages)
        computing = _computing(run)
        rows = [row for name in formats for row in _rows_of(run, name, chosen, pages, target, computing)]
        return rows + _two_threads_at_best(run, computing, _bench(formats[0], chosen, pages, target))
    finally:
        torch.set_num_threads(threads)


def _checked(names: Sequence[str], layout: PageLayout) -> list[str]:
    """The canonical names of formats, each once. KVTierError for one that is none, or cannot hold pages of `layout`."""
    checked: dict[str, None] = {}
    for name in names:
        try:
            format = get_format(name.strip())
            format.payload_bytes(layout)
        except KVTierError as error:
            raise KVTierError(f"--formats: {error}") from None
        checked[format.name] = None
    return list(checked)


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


def _rows_of(run: Run, name: str, layout: PageLayout, pages: torch.Tensor, target: torch.Tensor, computing: Sequence[Work]) -> list[Row]:
    bench = _bench(name, layout, pages, target)
    count = pages.numel() * pages.element_size()
    rows = []
    run.step(f"{name} on one thread and on two")
    works = [bench.encode, bench.decode, bench.copy, *(_on_two_threads(bench, what) for what in ("encode", "decode", "copy")), *computing]
    encode, decode, copy, encodes, decodes, copies, alone, together = side_by_side(works, run.repeats)
    for what, one in (("encode", encode), ("decode", decode)):
        rows.append(Row(f"{name}.{what}", count / one / 1e9, "GB/s", count / copy / 1e9))
    for what, one, both in (("encode", encode, encodes), ("decode", decode, decodes)):
        ceilings = {"": 2 * count / one, ".copy": count / copies, ".compute": 2 * alone / together * count / one}
        rows += [Row(f"{name}.{what}.2threads{kind}", count / both / 1e9, "GB/s", most / 1e9) for kind, most in ceilings.items()]
    run.step(f"{name} and checksum")
    hashed, hashes = side_by_side([bench.encode_and_hash, bench.hash], run.repeats)
    share = statistics.median(bench.share_of_hash(turn) for turn in range(run.repeats))
    rows.append(Row(f"{name}.encode+checksum", count / hashed / 1e9, "GB/s", count / copy / 1e9))
    rows.append(Row(f"{name}.encode+checksum.share", share, "of the time"))
    rows.append(Row(f"{name}.checksum", sum(map(len, bench.payloads)) / hashes / 1e9, "GB/s of payload"))
    run.step(f"{name} of one page")
    rows += _one_page(run, name)
    run.step(f"{name} in torch")
    return rows + _in_torch(run, name, layout, pages[: max(1, TORCH_BYTES // layout.page_bytes)], count / copy / 1e9)


def _bench(name: str, layout: PageLayout, pages: torch.Tensor, target: torch.Tensor) -> Bench:
    format = get_format(name)
    room = _room(len(pages), format.payload_bytes(layout))
    return Bench(layout, format, pages, room, format.encode(pages, layout, out=room), target)


def _room(count: int, payload_bytes: int) -> list[Payload]:
    stride = -(-payload_bytes // LINE_BYTES) * LINE_BYTES
    memory = np.zeros(count * stride + LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    return list(memory[first : first + count * stride].reshape(count, stride)[:, :payload_bytes])


def _on_two_threads(bench: Bench, what: str) -> Work:
    half = len(bench.pages) // 2
    parts = [bench.part(0, half), bench.part(half, len(bench.pages))]

    def work() -> None:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(getattr(part, what)) for part in parts]:
                done.result()

    return work


def _computing(run: Run) -> list[Work]:
    """What one thread computes, and as much on each of two at once: each codes its own page, which stays in its CPU's cache, in one call
    without the interpreter's lock."""
    times = 4 if run.tiny else 2000
    pages = make_pages(SMALL, 2)
    small = [_bench("q8", SMALL, pages, pages).part(row, row + 1) for row in range(2)]

    def compute(which: int) -> None:
        own = small[which]
        own.format.encode(own.pages, SMALL, [0] * times, [own.room[0]] * times)

    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compute, range(2)))

    return [partial(compute, 0), both]


def _two_threads_at_best(run: Run, computing: Sequence[Work], bench: Bench) -> list[Row]:
    """How many times as fast as one thread two are."""
    run.step("two threads at best")
    alone, together, copy, copies = side_by_side([*computing, bench.copy, _on_two_threads(bench, "copy")], run.repeats)
    return [Row("threads.compute", 2 * alone / together, "x", 2.0), Row("threads.copy", copy / copies, "x", 2.0)]


def _one_page(run: Run, name: str) -> list[Row]:
    try:
        get_format(name).payload_bytes(SMALL)
    except LayoutError:  # it names a layer that so small a page has not
        return []
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
    format = get_format(name)
    if not isinstance(format, BlockFormat):
        return []
    alike: dict[tuple[BlockCodec, BlockShape, int], list[int]] = {}
    for layer, row in enumerate(format.places(layout)):
        for plane, place in enumerate(row):
            alike.setdefault((place.codec, place.shape, plane), []).append(layer)
    planes = {key: pages[:, layers, key[2]].flatten(0, 1) for key, layers in alike.items()}
    blocks = {key: [plane[first : first + 64] for first in range(0, len(plane), 64)] for key, plane in planes.items()}
    coded = {(codec, shape, plane): [codec.encode(some, shape) for some in each] for (codec, shape, plane), each in blocks.items()}

    def encode() -> None:
        for (codec, shape, _), each in blocks.items():
            for some in each:
                codec.encode(some, shape)

    def decode() -> None:
        for (codec, shape, _), each in coded.items():
            for some in each:
                codec.decode(some, shape)

    count = pages.numel() * pages.element_size()
    both = side_by_side([encode, decode], min(run.repeats, 3))
    return [
        Row(f"{name}.{what}.torch", count / seconds / 1e9, "GB/s", ceiling)
        for what, seconds in zip(("encode", "decode"), both, strict=True)
    ]
