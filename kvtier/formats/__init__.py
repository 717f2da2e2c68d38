"""Page formats: how a page becomes bytes and comes back. One file per format; the contract is in `base.py`.

| name  | what it is                                     | bits per value (head_dim 64, 16 tokens) | for                              |
|-------|------------------------------------------------|------------------------------------------|----------------------------------|
| `raw` | bytes as they are                              | 16 or 32, lossless                       | device tier, exactness           |
| `q8`  | Hadamard + int8                                | 8.25, KL 0.00002                         | host tier                        |
| `q4`  | Hadamard + 16 Gaussian levels, keys minus mean | 4.51, KL 0.0026                          | disk and remote tiers            |
| `fp8` | float8 e4m3                                    | 8.25, KL 0.00079                         | engines that read e4m3           |

Each also as `<name>+lz4` (see `lossless.py`); that gains 13 % on raw bf16 pages, 6 % on fp32 and nothing on the others.
"""

from __future__ import annotations

import difflib

from kvtier.errors import ConfigError
from kvtier.formats.base import Format, Payload, check_pages
from kvtier.formats.fp8 import FP8
from kvtier.formats.lossless import LZ4
from kvtier.formats.q4 import Q4
from kvtier.formats.q8 import Q8
from kvtier.formats.raw import Raw

_PLAIN: tuple[Format, ...] = (Raw(), FP8(), Q8(), Q4())
_REGISTRY: dict[str, Format] = {format.name: format for plain in _PLAIN for format in (plain, LZ4(plain))}

FORMAT_NAMES: tuple[str, ...] = tuple(_REGISTRY)


def get_format(name: str) -> Format:
    """The format called `name`. ConfigError, naming the nearest known one, if there is none."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    nearest = difflib.get_close_matches(name, FORMAT_NAMES, n=1, cutoff=0.0)[0]
    raise ConfigError(f"unknown page format {name!r}; did you mean {nearest!r}? Known: {', '.join(FORMAT_NAMES)}")


__all__ = ["FORMAT_NAMES", "FP8", "LZ4", "Q4", "Q8", "Format", "Payload", "Raw", "check_pages", "get_format"]
