"""Formats made of blocks: each plane of each layer of a page is coded by itself.

A payload is its blocks, layer by layer, keys before values, without header or padding, numbers little-endian. So a layer is one contiguous
stretch, keys and values may use different codecs, and so may layers. Nothing of one block depends on another, and decoding is exact
arithmetic up to one rounding per step, so layer by layer, page by page or all at once give the same numbers.

What codes a block is a `BlockCodec` (`codec.py`), the torch reference. Where `kvtier.formats.native` has compiled kernels for a layout they
do the work, from and into the caller's memory, without the interpreter's lock; pages on a GPU are coded there (`on_device.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from kvtier.errors import LayoutError
from kvtier.format_spec import FormatSpec
from kvtier.formats.base import UINT8, Format, Payload, Stream, check_pages, check_rows, described_bytes, room_for, span_of, target_of
from kvtier.formats.codec import BlockCodec
from kvtier.formats.digests import digest_address, digests_of
from kvtier.formats.native import Arrivals, Expected
from kvtier.formats.places import Place, Plan, make_plan
from kvtier.formats.proof import Proof
from kvtier.layout import DTYPE_BYTES, PageLayout

CHUNK_VALUES = 1 << 19
"""Numbers the reference codes at once: temporaries stay at a few MiB, whatever the number of pages."""

_ALL = slice(None)

Receive = Callable[[int, Sequence[int], Sequence[bytes], Sequence[int]], Arrivals]
"""`receive(record_bytes, counts, keys, rows)`: see `BlockFormat.receiver`."""


_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
USUAL: Expected | None = None if _EXCHANGE is None else (torch.Tensor, _EXCHANGE, torch.Tensor.is_neg)
"""What the native codecs see by that a tensor is a usual one; None with older versions of torch, where Python's checks do."""


class BlockFormat(Format):
    """A format of fixed size made of block codecs. `codecs` maps the names in the specification to codecs."""

    fixed_size = True

    def __init__(self, spec: FormatSpec, codecs: dict[str, BlockCodec]) -> None:
        self.name = spec.name
        self._pair = (codecs[spec.keys], codecs[spec.values])
        self._ranges = tuple((part, (codecs[part.keys], codecs[part.values])) for part in spec.layers)
        self.lossless = all(codec.lossless for pair in (self._pair, *(pair for _, pair in self._ranges)) for codec in pair)
        self._plan = lru_cache(maxsize=32)(self._make_plan)
        self._latest: tuple[PageLayout, Plan] | None = None

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"get_format({self.name!r})"

    def payload_bytes(self, layout: PageLayout) -> int:
        return self._plan(layout).payload_bytes

    def places(self, layout: PageLayout) -> tuple[tuple[Place, ...], ...]:
        """The blocks of a payload, by layer and plane."""
        return self._plan(layout).places

    def layer_starts(self, layout: PageLayout) -> tuple[int, ...]:
        """The byte of a payload at which each layer begins, and behind the last one the payload's size."""
        return (*(row[0].offset for row in self.places(layout)), self.payload_bytes(layout))

    @property
    def is_plain(self) -> bool:
        """Whether a payload is the bytes of its page, in their order."""
        return {codec.name for pair in (self._pair, *(pair for _, pair in self._ranges)) for codec in pair} == {"raw"}

    def streams(self, layout: PageLayout) -> tuple[Stream, ...]:
        return self._plan(layout).streams

    def layer_bytes(self, layout: PageLayout) -> tuple[int, ...]:
        return tuple(sum(place.size for place in row) for row in self._plan(layout).places)

    def encode(
        self,
        pages: torch.Tensor,
        layout: PageLayout,
        rows: Sequence[int] | None = None,
        out: Sequence[Payload] | None = None,
        first: Collection[int] = (),
    ) -> list[Payload]:
        plan = self._plan_of(layout)
        if rows is None and out is not None and not first and plan.native is not None and USUAL is not None:
            native, described = plan.native
            if native.encode_all(described, USUAL, pages, out, 0) is not None:
                return list(out)
        return self._encode(pages, layout, rows, out, first, 0)[0]

    def encode_with_digests(
        self,
        pages: torch.Tensor,
        layout: PageLayout,
        rows: Sequence[int] | None = None,
        out: Sequence[Payload] | None = None,
        first: Collection[int] = (),
    ) -> tuple[list[Payload], list[bytes]]:
        plan, digest_of = self._plan_of(layout), digest_address()
        if rows is None and out is not None and not first and plan.native is not None and USUAL is not None and digest_of:
            native, described = plan.native
            digests = native.encode_all(described, USUAL, pages, out, digest_of)
            if digests is not None:
                return list(out), digests
        payloads, digests = self._encode(pages, layout, rows, out, first, digest_of)
        return payloads, digests_of(payloads) if digests is None else digests

    def _encode(
        self,
        pages: torch.Tensor,
        layout: PageLayout,
        rows: Sequence[int] | None,
        out: Sequence[Payload] | None,
        first: Collection[int],
        digest_of: int,
    ) -> tuple[list[Payload], list[bytes] | None]:
        """As `encode`, in any case; and the digests where compiled kernels made them, by the function at `digest_of`, if any."""
        plan = self._plan_of(layout)
        given = check_pages(pages, layout)
        if pages.is_neg():
            pages = pages.resolve_neg()  # kernels read the memory, which says nothing of a sign that torch has put off
        rows = range(given) if rows is None else check_rows(rows, given, "encode")
        payloads = room_for(len(rows), plan.payload_bytes, out)
        if plan.native is not None and pages.is_cpu and pages.is_contiguous():
            native, described = plan.native
            begins = bytes(index in first for index in range(len(rows))) if first else b""
            made = native.encode(described, pages.data_ptr(), rows, payloads, begins, digest_of)
            return payloads, made if digest_of else None
        if pages.is_cuda:
            self._encode_on_device(pages, layout, rows, payloads, first)
            return payloads, None
        for special in (False, True):
            some = [index for index in range(len(rows)) if (index in first) == special]
            self._encode_reference(pages, layout, [rows[i] for i in some], [payloads[i] for i in some], special)
        return payloads, None

    def decode(
        self,
        payloads: Sequence[Payload],
        layout: PageLayout,
        layers: slice = slice(None),
        out: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        plan = self._plan_of(layout)
        if rows is None and plan.native is not None and out is not None and layers == _ALL and USUAL is not None:
            native, described = plan.native
            if native.decode_all(described, USUAL, payloads, out):
                return out
        for payload in payloads:
            usual = isinstance(payload, np.ndarray) and payload.dtype == UINT8 and payload.shape == (plan.payload_bytes,)
            if not usual or not payload.flags.c_contiguous:
                wanted = f"contiguous uint8 ({plan.payload_bytes},) for {layout}"
                raise ValueError(f"{self.name} payload is {described_bytes(payload)}; expected {wanted}")
        begin, end = span_of(layers, layout)
        out, rows = target_of(out, rows, len(payloads), end - begin, layout)
        if plan.native is None:
            self._decode_reference(payloads, layout, begin, end, out, rows)
            return out
        native, described = plan.native
        row_values = (end - begin) * layout.strides[0] if out.is_contiguous() else out.stride(0)
        native.decode(described, payloads, out.data_ptr(), rows, begin, end, row_values * DTYPE_BYTES[layout.dtype])
        return out

    def receives(self, layout: PageLayout) -> bool:
        """Whether there is a `receiver` for pages of this layout."""
        return self._plan_of(layout).native is not None and digest_address() != 0

    def receiver(self, layout: PageLayout, proof: Proof, out: torch.Tensor) -> Receive | None:
        """What proves records and decodes them, each right after its proof, on the threads that read them; None where compiled kernels
        cannot.

        A record is a head that `proof` describes and a payload, perhaps more bytes behind. `receive(record_bytes, counts, keys, rows)`
        gives what is to be told of groups of records that were read (`NativeCodecs.arrivals`): record i is decoded into `out[rows[i]]`,
        `out` as for `decode`, if it proves to be the copy of `keys[i]`. LayoutError if `out` or a row does not fit.
        """
        plan = self._plan_of(layout)
        digest_of = digest_address()
        if plan.native is None or not digest_of:
            return None
        native, described = plan.native
        target_of(out, [], 0, layout.layers, layout)
        row_bytes = layout.page_bytes if out.is_contiguous() else out.stride(0) * DTYPE_BYTES[layout.dtype]

        def receive(record_bytes: int, counts: Sequence[int], keys: Sequence[bytes], rows: Sequence[int]) -> Arrivals:
            places = check_rows(rows, len(out), "decode")
            return native.arrivals(described, proof.packed, record_bytes, counts, keys, out.data_ptr(), places, row_bytes, digest_of)

        return receive

    def _encode_on_device(
        self, pages: torch.Tensor, layout: PageLayout, rows: Sequence[int], payloads: Sequence[Payload], first: Collection[int]
    ) -> None:
        from kvtier.formats.on_device import encode_pages  # which is built on this file
        from kvtier.formats.paged import PagedKV

        coded = torch.empty((len(rows), self.payload_bytes(layout)), dtype=torch.uint8, device=pages.device)
        encode_pages(self, PagedKV.of_pool(pages if pages.stride(5) == 1 else pages.contiguous(), layout), rows, coded, first=first)
        for payload, each in zip(payloads, coded.cpu().numpy(), strict=True):
            payload[:] = each

    def _encode_reference(
        self, pages: torch.Tensor, layout: PageLayout, rows: Sequence[int], payloads: Sequence[Payload], special: bool
    ) -> None:
        plan = self._plan(layout)
        for some, begin, end in _chunks(len(rows), layout, plan.runs(0, layout.layers)):
            chosen = pages[list(rows[some])]
            for plane, place in enumerate(plan.places[begin]):
                encode = place.codec.encode_first if special else place.codec.encode
                coded = encode(chosen[:, begin:end, plane].flatten(0, 1), place.shape).cpu().numpy()
                for payload, blocks in zip(payloads[some], coded.reshape(len(chosen), end - begin, place.size), strict=True):
                    plan.blocks(payload, begin, end, plane)[:] = blocks

    def _decode_reference(
        self, payloads: Sequence[Payload], layout: PageLayout, begin: int, end: int, out: torch.Tensor, rows: Sequence[int]
    ) -> None:
        plan = self._plan(layout)
        for some, low, high in _chunks(len(payloads), layout, plan.runs(begin, end)):
            for plane, place in enumerate(plan.places[low]):
                coded = np.concatenate([plan.blocks(payload, low, high, plane) for payload in payloads[some]])
                numbers = place.codec.decode(torch.from_numpy(coded), place.shape)
                out[list(rows[some]), low - begin : high - begin, plane] = numbers.view(-1, high - low, *numbers.shape[1:])

    def _plan_of(self, layout: PageLayout) -> Plan:
        """`_plan`, nearly always without comparing layouts; the memory of it is replaced whole, so any thread may."""
        latest = self._latest
        if latest is None or latest[0] is not layout:
            self._latest = latest = layout, self._plan(layout)
        return latest[1]

    def _make_plan(self, layout: PageLayout) -> Plan:
        for part, _ in self._ranges:
            if part.last >= layout.layers:
                raise LayoutError(f"format {self.name}: names layer {part.last}, but the page layout has layers 0 to {layout.layers - 1}")
        return make_plan([self._pair_of(layer) for layer in range(layout.layers)], layout)

    def _pair_of(self, layer: int) -> tuple[BlockCodec, BlockCodec]:
        """What codes the keys and the values of a layer."""
        return next((pair for part, pair in self._ranges if part.first <= layer <= part.last), self._pair)


def _chunks(pages: int, layout: PageLayout, runs: Iterator[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Cut pages and layers into batches of about CHUNK_VALUES: several whole pages, or some layers of one page."""
    at_once = max(1, CHUNK_VALUES * layout.layers // layout.values)
    for first, stop in runs:
        pages_at_once = max(1, at_once // (stop - first))
        for page in range(0, pages, pages_at_once):
            for layer in range(first, stop, at_once):
                yield slice(page, min(page + pages_at_once, pages)), layer, min(layer + at_once, stop)
