"""Compiled kernels for the block codecs: `codecs()` gives them, or None where the extension was not built or does not load.

They are built with the package (setup.py) from the C sources beside this file, choose the CPU's best instruction set when they are loaded,
or the one that the environment variable KVTIER_CPU names, and compute what the torch reference computes: the same bits when decoding,
the same codes up to one step when encoding (the same bits for raw, q8, q8_0 and q4_0). They hold no state but that choice and may be
called from several threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from kvtier.errors import ConfigError
from kvtier.extensions import load_extension
from kvtier.formats.base import Payload

CPU_VARIABLE = "KVTIER_CPU"
"""Names one of `available()`, so that a wide CPU shows what a narrower one would do."""


Expected = tuple[type, object, object]
"""The type of a tensor, what it has for DLPack's exchange in C (`__dlpack_c_exchange_api__`), and what tells of one whether there is more
to it than its memory (such as its `is_neg`), asked last."""


class Arrivals(Protocol):
    """Records that are being read; see `NativeCodecs.arrivals`. Groups may be taken by several threads at once, each group by one."""

    def take(self, group: int, read: int, memory: Payload, /) -> None:
        """So many bytes of a group were read into `memory`, or less than 0: decodes those of its records that are whole and prove
        themselves."""

    def function(self) -> tuple[int, int]:
        """Address of what does the same, `void (*)(void *context, Py_ssize_t group, int64_t read, const void *memory)`, on any thread and
        without the interpreter's lock, and its context, which lives as long as this."""

    def placed(self) -> bytes:
        """For each record 1 if it was decoded, else 0: nothing was written then."""


class NativeCodecs(Protocol):
    """What the extension offers.

    `plan` describes pages and payloads: struct "<8i" dtype (0 bf16, 1 fp16, 2 fp32), layers, planes, tokens, heads, head_dim, number of
    blocks, 0; for each layer and plane "<iiq" codec (0 raw, 1 q8, 2 q6, 3 q4, 4 q3, 5 q8_0, 6 q4_0), whether it holds the keys of two
    planes, offset of the block in the payload; then "<q" bytes of a payload. ValueError if it is none, if a shape has no kernels, if a
    payload has another size or a row is negative; nothing has been written then. That the addresses are good is the caller's promise. The
    interpreter's lock is released meanwhile.
    """

    def supports(self, codec: int, dtype: int, tokens: int, heads: int, head_dim: int, /) -> bool:
        """Whether there are kernels for such blocks: a Hadamard block of 16 to 256 and sizes that fit the stack."""

    def encode(
        self, plan: bytes, source: int, rows: Sequence[int], outs: Sequence[Payload], begins: bytes, digest_of: int, /
    ) -> list[bytes]:
        """Page `rows[i]` of the contiguous pages at address `source` into the writable buffer `outs[i]`; one that begins a sequence if
        `begins[i]` is not 0; with no `begins` at all none does. `digest_of`: address of xxHash's `XXH3_128bits`
        (`kvtier.formats.digests`), or 0 for none; gives the digest of each payload, as `xxhash.xxh3_128_digest` does, made right after
        it was encoded."""

    def encode_all(self, plan: bytes, expected: Expected, pages: object, outs: object, digest_of: int, /) -> list[bytes] | None:
        """All of the usual case in one call, as `encode`: if `pages` is a contiguous CPU tensor of that very type, of as many pages of the
        plan as `outs`, a list, has writable uint8 arrays of one dimension and a payload's size; none of them begins a sequence. Else None,
        and nothing is written."""

    def decode(
        self, plan: bytes, payloads: Sequence[Payload], target: int, rows: Sequence[int], first: int, stop: int, row_bytes: int, /
    ) -> None:
        """Layers `first` to `stop` of `payloads[i]` to address `target + rows[i] * row_bytes`."""

    def decode_all(self, plan: bytes, expected: Expected, payloads: object, pages: object, /) -> bool:
        """The same the other way: all layers of a list of payloads to as many pages; whether that was the case."""

    def arrivals(
        self,
        plan: bytes,
        proof: bytes,
        record_bytes: int,
        counts: Sequence[int],
        keys: Sequence[bytes],
        target: int,
        rows: Sequence[int],
        row_bytes: int,
        digest_of: int,
        /,
    ) -> Arrivals:
        """Records to come, in groups that are read at once, `counts` says how many records each, one right behind the other in memory. Each
        is a head and a payload, perhaps more bytes, `record_bytes` together; all layers of those that prove themselves
        (`kvtier.formats.proof`, `Proof.packed`) to be copies of `keys[i]` are decoded to address `target + rows[i] * row_bytes`, past the
        caches, for whoever reads them later. `digest_of`: as for `encode`, and not 0."""

    def features(self) -> str:
        """The instruction set in use: "avx512bf16", "avx512", "avx2" or "portable"."""

    def available(self) -> list[str]:
        """The instruction sets that this CPU and build have, fastest first."""

    def use(self, features: str, /) -> None:
        """Use one of `available()` from now on, in the whole process. For tests and benchmarks. ValueError for any other."""


def codecs() -> NativeCodecs | None:
    """The compiled kernels, or None; `why_missing()` then says why. ConfigError if KVTIER_CPU asks for what is not there."""
    return _load()[0]


def why_missing() -> str:
    """One line: why there are no compiled kernels and what to do; empty if there are."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[NativeCodecs | None, str]:
    wanted = os.environ.get(CPU_VARIABLE)
    loaded, missing = load_extension("kvtier.formats.native._codecs", "torch does the work, several times slower")
    found: NativeCodecs | None = loaded
    if wanted:
        if found is None:
            raise ConfigError(f"{CPU_VARIABLE}={wanted}: unset it; there are no compiled kernels: {missing}")
        if wanted not in found.available():
            raise ConfigError(f"{CPU_VARIABLE}={wanted}: not there; this CPU and build have {', '.join(found.available())}")
        found.use(wanted)
    return found, missing
