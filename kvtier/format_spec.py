"""How a page format is written down: `q4`, `q8/q4` (keys / values), `q4;0-1:q8` (other formats for some layers), `raw+zstd` (a byte stage).

The canonical text is the format's name: it goes into store headers, so equal specifications have equal texts. Plain data, no tensors:
the configuration checks names without loading torch; `kvtier.formats.get_format` builds the format from the specification.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvtier.errors import ConfigError

CODECS = ("raw", "fp8", "q8", "q6", "q4", "q3", "q8_0", "q4_0", "q8_k", "q4_k", "sparse24")
"""How one plane (keys or values) of one layer can be coded."""

NOT_FOR_KEYS = {"sparse24": "0.43 nats of KL, 30 to 50 times the damage of 4-bit values at twice the size"}
"""Codecs that are refused for keys unless written with `FORCE` behind the name, and what they cost there."""

FORCE = "!"
_LIKE = 0.5
"""How like a codec's name an unknown one must be to be taken for it: these names are so short that one letter of two is much."""

STAGES = ("lz4", "zstd")
"""Lossless byte stages over the whole payload."""

_LAYERS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, order=True)
class LayerRange:
    """Layers `first` to `last`, both included, coded by `keys` and `values`."""

    first: int
    last: int
    keys: str
    values: str


@dataclass(frozen=True)
class FormatSpec:
    """Codecs of keys and values, ranges of layers that differ (ascending, disjoint), byte stage or None.

    A codec in `NOT_FOR_KEYS` stands with its `FORCE` where it codes keys.
    """

    keys: str
    values: str
    layers: tuple[LayerRange, ...] = ()
    stage: str | None = None

    @property
    def name(self) -> str:
        """The canonical text."""
        ranges = [f";{_span(part)}:{_pair(part.keys, part.values)}" for part in self.layers]
        return _pair(self.keys, self.values) + "".join(ranges) + (f"+{self.stage}" if self.stage else "")


def parse_format(given: object) -> FormatSpec:
    """A specification from its text, or from a mapping `{k, v, layers: {"0-1": text or {k, v}}, stage}`. ConfigError says what is wrong."""
    if isinstance(given, FormatSpec):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(given)
    if not isinstance(given, str):
        raise ConfigError(f"page format {given!r}: expected a name such as 'q4', 'q8/q4' or 'raw+zstd', or a mapping with k and v")
    text, plus, stage = given.partition("+")
    if plus and stage not in STAGES:
        raise ConfigError(f"page format {given!r}: no byte stage is called {stage!r}; known: {', '.join(STAGES)}")
    whole, *parts = text.split(";")
    keys, values = _codecs(whole, given)
    ranges = []
    for part in parts:
        span, colon, pair = part.partition(":")
        if not colon:
            raise ConfigError(f"page format {given!r}: {part!r} should read LAYER:FORMAT or FIRST-LAST:FORMAT")
        ranges.append(_layer_range(span, *_codecs(pair, given), given))
    return _checked(FormatSpec(keys, values, tuple(sorted(ranges)), stage or None), given)


def _from_mapping(given: Mapping[object, object]) -> FormatSpec:
    unknown = [key for key in given if key not in ("k", "v", "layers", "stage")]
    if unknown or "k" not in given or "v" not in given:
        raise ConfigError(f"page format {dict(given)!r}: expected the keys k and v, and perhaps layers and stage")
    layers = given.get("layers") or {}
    if not isinstance(layers, Mapping):
        raise ConfigError(f"page format: layers is {layers!r}; expected a mapping such as {{0-1: q8, 29: {{k: q8, v: q4}}}}")
    text = _pair_text(given)
    for span, codecs in layers.items():
        if not isinstance(codecs, Mapping) and not _without(codecs, ";:+"):
            raise ConfigError(f"page format: layers {span} is {codecs!r}; expected a codec, two as 'q8/q4', or a mapping with k and v")
        if not _LAYERS.fullmatch(str(span).strip()):
            raise ConfigError(f"page format: layers names {span!r}; expected a number or FIRST-LAST, counted from 0")
        text += f";{span}:{_pair_text(codecs) if isinstance(codecs, Mapping) else codecs}"
    return parse_format(text + (f"+{given['stage']}" if given.get("stage") else ""))


def _pair_text(pair: Mapping[object, object]) -> str:
    if "k" not in pair or "v" not in pair:
        raise ConfigError(f"page format {dict(pair)!r}: expected the keys k and v")
    for key in ("k", "v"):
        if not _without(pair[key], "/;:+"):
            raise ConfigError(f"page format: {key} is {pair[key]!r}; expected the name of one codec, of {', '.join(CODECS)}")
    return f"{pair['k']}/{pair['v']}"


def _without(name: object, marks: str) -> bool:
    """Whether it is a text that brings none of the grammar's `marks` along into the text it is put into."""
    return isinstance(name, str) and not any(mark in name for mark in marks)


def _codecs(text: str, given: str) -> tuple[str, str]:
    keys, slash, values = text.partition("/")
    values = (values if slash else keys).removesuffix(FORCE)
    plain_keys = keys.removesuffix(FORCE)
    for name in (plain_keys, values):
        if not name:
            raise ConfigError(f"page format {given!r}: {'it is empty' if not given else 'a codec is missing'}; known: {', '.join(CODECS)}")
        if name not in CODECS:
            nearest = difflib.get_close_matches(name, CODECS, n=1, cutoff=_LIKE)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ConfigError(f"unknown page format {given!r}: {name!r} is no codec{hint} Known: {', '.join(CODECS)}")
    if plain_keys in NOT_FOR_KEYS and keys == plain_keys:
        raise ConfigError(
            f"page format {given!r}: {keys} ruins keys ({NOT_FOR_KEYS[keys]}); "
            f"use another codec for them, such as 'q8/{values}', or write {keys + FORCE!r} to have it nevertheless"
        )
    return keys if plain_keys in NOT_FOR_KEYS else plain_keys, values


def _layer_range(span: str, keys: str, values: str, given: str) -> LayerRange:
    found = _LAYERS.fullmatch(span.strip())
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise ConfigError(f"page format {given!r}: {span!r} is no range of layers; expected a number or FIRST-LAST, counted from 0")
    return LayerRange(int(found[1]), int(found[2] or found[1]), keys, values)


def _checked(spec: FormatSpec, given: object) -> FormatSpec:
    for lower, upper in zip(spec.layers, spec.layers[1:], strict=False):
        if upper.first <= lower.last:
            raise ConfigError(f"page format {given!r}: layer {upper.first} is named twice")
    return spec


def _pair(keys: str, values: str) -> str:
    return keys if keys.removesuffix(FORCE) == values else f"{keys}/{values}"


def _span(part: LayerRange) -> str:
    return str(part.first) if part.first == part.last else f"{part.first}-{part.last}"
