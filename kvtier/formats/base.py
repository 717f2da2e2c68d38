"""The contract of a page format: turns pages into bytes and back, and knows nothing of tiers.

A format is a frozen value named by a short text ("q8", "q8/q4", "raw+zstd"; see `kvtier.format_spec`). Its payload is self-contained
given the page layout and the format's name: every scale, mean or flag needed to decode is inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.formats.digests import digests_of
from kvtier.layout import DTYPE_BYTES, PageLayout

Payload = NDArray[np.uint8]
UINT8 = np.dtype(np.uint8)
"""Comparing with this is several times faster than with `np.uint8`."""
_ALL = slice(None)
_STRIDED = torch.strided
_SEQUENCES = (list, range, tuple, Sequence)


@dataclass(frozen=True)
class Stream:
    """Bytes of a payload that are alike and compress best together: `spans` of (first byte, bytes), in ascending order.

    `element_bytes`: bytes of each number if all spans are plain rows of them, else 1.
    """

    element_bytes: int
    spans: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """Bytes of all spans."""
        return sum(size for _, size in self.spans)


class Format(ABC):
    """One way to write a page as bytes.

    Implementations hold no mutable state and may be called from several threads at once.
    """

    name: str
    """Canonical name; `get_format(name)` gives an equal format."""

    lossless: bool
    """True if decode(encode(page)) has the same bits as page, for every page (NaN payloads included)."""

    fixed_size: bool
    """True if every payload has exactly `payload_bytes(layout)` bytes; otherwise that is the upper bound."""

    @abstractmethod
    def payload_bytes(self, layout: PageLayout) -> int:
        """Bytes of one payload: exact where `fixed_size`, else the most it can take. LayoutError if the layout does not fit."""

    @abstractmethod
    def encode(
        self,
        pages: torch.Tensor,
        layout: PageLayout,
        rows: Sequence[int] | None = None,
        out: Sequence[Payload] | None = None,
        first: Collection[int] = (),
    ) -> list[Payload]:
        """Payloads of `pages[rows]` (all pages by default).

        `pages` is `[n, layers, planes, page_tokens, kv_heads, head_dim]` in `layout.torch_dtype`, on any device, of any strides. `out`: one
        writable uint8 array of at least `payload_bytes` bytes for each payload; the results are then views of them, else new arrays.
        Each result is 1-D and contiguous, in CPU memory. `first`: which results (by index) begin a sequence; attention looks at the first
        token more than at any other, so formats may spend more on it, in a payload of the same size. Input is not changed. Payloads may be
        at any address, numbers at multiples of their size. LayoutError if shape or dtype differ, numbers are at other addresses or `out` is
        too small. NaN, infinities and extreme values encode to what the format's documentation states, never raise.
        """

    def encode_with_digests(
        self,
        pages: torch.Tensor,
        layout: PageLayout,
        rows: Sequence[int] | None = None,
        out: Sequence[Payload] | None = None,
        first: Collection[int] = (),
    ) -> tuple[list[Payload], list[bytes]]:
        """As `encode`; and the xxh3-128 of each payload, as `xxhash.xxh3_128_digest` gives it: what tiers prove copies by."""
        payloads = self.encode(pages, layout, rows, out, first)
        return payloads, digests_of(payloads)

    def unpack(self, payloads: Sequence[Payload], layout: PageLayout) -> list[Payload]:
        """Undo a byte stage, if this format has one; the result is what `decode` takes. ValueError on a payload that is malformed or not
        contiguous."""
        return list(payloads)

    @abstractmethod
    def decode(
        self,
        payloads: Sequence[Payload],
        layout: PageLayout,
        layers: slice = slice(None),
        out: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Pages `[n, len(layers), planes, page_tokens, kv_heads, head_dim]` in `layout.torch_dtype` on CPU, from unpacked payloads.

        `layers` is a slice of the layer axis with step 1: decoding layer by layer gives the same numbers as decoding all at once.
        With `out` `[m, len(layers), ...]`, in CPU memory with contiguous rows (such as `pool[:, layers]`), page i goes to
        `out[rows[i]]` (default: `out[i]`) and `out` is returned. ValueError if a payload has another size than `payload_bytes` or is not
        contiguous, LayoutError if `out` does not fit or is not at a multiple of its numbers' size. Payloads may be at any address.
        """

    def streams(self, layout: PageLayout) -> tuple[Stream, ...]:
        """For a format of fixed size: what a byte stage compresses apart. Together the streams are each byte of a payload once."""
        return (Stream(1, ((0, self.payload_bytes(layout)),)),)

    def layer_bytes(self, layout: PageLayout) -> tuple[int, ...]:
        """For a format of fixed size: bytes of the stretches that a payload consists of, one per layer, in order; only one where layers are
        not apart."""
        return (self.payload_bytes(layout),)

    def bits_per_value(self, layout: PageLayout) -> float:
        """Bits per number of the page, every scale and flag counted (upper bound where the size varies)."""
        return self.payload_bytes(layout) * 8 / layout.values


# A page of 64 KiB is coded in some microseconds, and asking an array or a tensor for anything takes a twentieth of one, or a tenth when the
# page has just been through the cache: what follows asks for as little as it can.


def check_pages(pages: torch.Tensor, layout: PageLayout) -> int:
    """n, of `pages` `[n, *layout.shape]`. LayoutError unless it is a dense tensor of the layout's dtype that has its numbers, each at a
    multiple of its size."""
    if not isinstance(pages, torch.Tensor) or pages.layout is not _STRIDED or pages.is_meta:
        what = f"a {pages.layout} tensor on {pages.device}" if isinstance(pages, torch.Tensor) else f"{type(pages).__name__}"
        raise LayoutError(f"pages are {what}; expected a dense tensor on a CPU or GPU")
    shape = pages.shape
    if shape != (shape[0] if shape else 0, *layout.shape):
        raise LayoutError(f"pages have shape {tuple(shape)}; expected [n, {', '.join(map(str, layout.shape))}]")
    if pages.dtype is not layout.torch_dtype:
        raise LayoutError(f"pages are {pages.dtype}; expected {layout.torch_dtype}")
    check_address(pages, layout, "pages begin")
    return shape[0]


def check_address(numbers: torch.Tensor, layout: PageLayout, what: str) -> None:
    """LayoutError unless a dense tensor of the layout's dtype begins at a multiple of its numbers' size: compiled code, ours and others',
    reads and writes them as such."""
    address, size = numbers.data_ptr(), DTYPE_BYTES[layout.dtype]
    if address % size:
        raise LayoutError(
            f"{what} at address {address:#x}; expected a multiple of {size}, the bytes of each number; take memory that torch allocates, "
            "or a copy (clone())"
        )


def check_rows(rows: Sequence[int] | None, places: int, what: str) -> Sequence[int]:
    """`rows` as plain numbers, all `places` by default. LayoutError unless they are a sequence of whole numbers from 0 to `places` - 1."""
    if rows is None:
        return range(places)
    try:
        plain = [index(row) for row in rows] if isinstance(rows, _SEQUENCES) else None
    except TypeError:
        plain = None
    if plain is None:
        raise LayoutError(f"{what}: rows are {type(rows).__name__} {rows!r:.80}; expected a list of whole numbers (of arrays, .tolist())")
    if plain and not 0 <= min(plain) <= max(plain) < places:
        raise LayoutError(f"{what}: rows from {min(plain)} to {max(plain)} of {places} pages")
    return plain


def described_bytes(payload: object) -> str:
    """A payload that is none, for the error that says so."""
    if not isinstance(payload, np.ndarray):
        return f"of type {type(payload).__name__}"
    strides = "" if payload.flags.c_contiguous else f" with strides {payload.strides}"
    return f"{payload.dtype} {payload.shape}{strides}"


def room_for(count: int, payload_bytes: int, out: Sequence[Payload] | None) -> list[Payload]:
    """Where `encode` writes `count` payloads: the first bytes of each array in `out`, or new arrays. LayoutError if `out` does not fit."""
    if out is None:
        return [np.empty(payload_bytes, np.uint8) for _ in range(count)]
    places = []
    for place in out if len(out) == count else out[:count]:
        room = isinstance(place, np.ndarray) and place.dtype == UINT8 and place.ndim == 1 and place.flags.carray
        if not room or (size := place.size) < payload_bytes:
            break
        places.append(place if size == payload_bytes else place[:payload_bytes])
    if len(places) < count:
        expected = f"that many writable, contiguous uint8 arrays of one dimension, at least {payload_bytes} bytes each"
        raise LayoutError(f"encode: out has no room for {count} payloads; expected {expected}")
    return places


def span_of(layers: slice, layout: PageLayout) -> tuple[int, int]:
    """First layer and the one behind the last of a slice of the layer axis. ValueError unless its step is 1."""
    if layers == _ALL:
        return 0, layout.layers
    first, stop, step = layers.indices(layout.layers)
    if step != 1:
        raise ValueError(f"layers is {layers}; expected a slice with step 1")
    return first, max(first, stop)


def target_of(
    out: torch.Tensor | None, rows: Sequence[int] | None, count: int, layers: int, layout: PageLayout
) -> tuple[torch.Tensor, Sequence[int]]:
    """Where `decode` writes `count` pages of `layers` layers: `out`, or a new tensor; and the rows. LayoutError if that does not fit."""
    each = layout.shape if layers == layout.layers else (layers, *layout.shape[1:])
    if out is None:
        if rows is not None:
            raise LayoutError("decode: rows without out; give the tensor whose rows they are")
        return torch.empty((count, *each), dtype=layout.torch_dtype), range(count)
    shape = out.shape
    places = shape[0] if shape else 0
    if shape != (places, *each) or out.dtype is not layout.torch_dtype or not out.is_cpu:
        expected = f"{layout.torch_dtype} {['m', *each]} on cpu"
        raise LayoutError(f"decode: out is {out.dtype} {tuple(shape)} on {out.device}; expected {expected}")
    check_address(out, layout, "decode: out begins")
    if out.is_neg():  # kernels write the memory, which says nothing of a sign that torch has put off
        raise LayoutError("decode: torch would negate what is read from out; expected memory that is read as it is, see Tensor.resolve_neg")
    if not out.is_contiguous() and out.stride()[1:] != layout.strides and places and not out[0].is_contiguous():
        raise LayoutError(f"decode: the rows of out have strides {out.stride()[1:]}; expected contiguous rows of shape {each}")
    rows = range(count) if rows is None and count <= places else check_rows(rows, places, "decode")
    if len(rows) != count:
        raise LayoutError(f"decode: {len(rows)} rows for {count} pages into {places} places; expected one row per page")
    return out, rows
