"""Page formats: how a page becomes bytes and comes back.

| name       | what it is                                        | bits per value (head_dim 64, 16 tokens) |
|------------|---------------------------------------------------|------------------------------------------|
| `raw`      | bytes as they are                                 | 16 or 32, lossless                       |
| `q8`       | Hadamard + int8                                   | 8.25                                     |
| `fp8`      | float8 e4m3                                       | 8.25                                     |
| `q6`       | Hadamard + 63 even steps, keys minus mean         | 6.38                                     |
| `q4`       | Hadamard + 16 Gaussian levels, keys minus mean    | 4.27                                     |
| `q3`       | Hadamard + 8 Gaussian levels, keys minus mean     | 3.27                                     |
| `q8_0`     | ggml blocks of 32                                 | 8.5                                      |
| `q8_k`     | ggml blocks of 256                                | 9.125                                    |
| `q4_0`     | ggml blocks of 32                                 | 4.5                                      |
| `q4_k`     | ggml blocks of 256                                | 4.5                                      |
| `sparse24` | 2:4 sparsity, an experiment for values            | 9                                        |

A name may say more: `q8/q4` codes keys and values differently, `q4;0-1:q8` some layers, `raw+zstd` adds a lossless byte stage
(`lossless.py`); see `kvtier.format_spec` for the grammar. One file per codec (`BlockCodec`, in `codec.py`) or family of them; the
contract of the whole is `Format`, in `base.py`. What each costs a model: docs/quality.md.
"""

from __future__ import annotations

from functools import lru_cache

from kvtier.format_spec import CODECS, FORCE, NOT_FOR_KEYS, STAGES, FormatSpec, parse_format
from kvtier.formats.base import Format, Payload, Stream, check_pages
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.codec import BlockCodec, BlockShape
from kvtier.formats.economy import StageEconomy
from kvtier.formats.fp8 import FP8
from kvtier.formats.ggml import Q4K, Q8K, Q4Zero, Q8Zero
from kvtier.formats.lossless import Staged
from kvtier.formats.q4 import Q3, Q4
from kvtier.formats.q6 import Q6
from kvtier.formats.q8 import Q8
from kvtier.formats.raw import Raw
from kvtier.formats.sparse24 import Sparse24

BLOCK_CODECS: dict[str, BlockCodec] = {
    codec.name: codec for codec in (Raw(), FP8(), Q8(), Q6(), Q4, Q3, Q8Zero(), Q4Zero(), Q8K(), Q4K(), Sparse24())
}
"""The codec of each name in `kvtier.format_spec.CODECS`."""

_BY_WRITTEN_NAME = BLOCK_CODECS | {name + FORCE: BLOCK_CODECS[name] for name in NOT_FOR_KEYS}

FORMAT_NAMES: tuple[str, ...] = tuple(name for name in CODECS if name not in NOT_FOR_KEYS)
"""The formats that code all blocks alike, without byte stage."""


def get_format(given: str | FormatSpec) -> Format:
    """The format of that name or specification. ConfigError, naming the nearest known codec, if there is none."""
    return _build(parse_format(given))


@lru_cache(maxsize=64)
def _build(spec: FormatSpec) -> Format:
    plain = BlockFormat(FormatSpec(spec.keys, spec.values, spec.layers), _BY_WRITTEN_NAME)
    return plain if spec.stage is None else Staged(plain, spec.stage)


__all__ = [
    "BLOCK_CODECS",
    "FORMAT_NAMES",
    "STAGES",
    "BlockCodec",
    "BlockFormat",
    "BlockShape",
    "Format",
    "Payload",
    "StageEconomy",
    "Staged",
    "Stream",
    "check_pages",
    "get_format",
]
