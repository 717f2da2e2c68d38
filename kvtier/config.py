"""The one configuration tree: every section, key, default and unit, and how values reach it.

Order: defaults < YAML file < environment (`KVTIER_<SECTION>__<FIELD>`) < arguments. Unknown keys are errors at every step. The trees are
frozen; the descriptions below are the text of docs/configuration.md (`kvtier config reference`). Imports no tensor library.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kvtier.errors import ConfigError

KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40
BYTE_UNITS = {"TiB": TiB, "GiB": GiB, "MiB": MiB, "KiB": KiB, "TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}


def parse_bytes(value: object) -> int:
    """Bytes from a whole number or text such as "8GiB", "64 MiB", "500MB", "1.5GiB". ValueError says what is wrong."""
    expected = 'expected a whole number of bytes or text like "8GiB", "64 MiB", "500MB"'
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or len(value) > 40:
            raise ValueError(expected)
        units = {unit.lower(): size for unit, size in BYTE_UNITS.items()}
        unit = match[2].lower() or "b"
        if unit not in units:
            raise ValueError(f"unknown unit {match[2]!r}, expected one of {', '.join(reversed(BYTE_UNITS))}")
        exact = Fraction(match[1]) * units[unit]
    elif isinstance(value, int) and not isinstance(value, bool):
        exact = Fraction(value)
    else:
        raise ValueError(expected)
    if exact < 0:
        raise ValueError("a size cannot be negative")
    if exact.denominator != 1:
        raise ValueError("this is not a whole number of bytes")
    if exact >= 2**63:
        raise ValueError("larger than any machine can address")
    return int(exact)


def format_bytes(value: int) -> str:
    """The shortest text that `parse_bytes` reads back exactly: 4294967296 -> "4GiB"."""
    exact = [f"{value // size}{unit}" for unit, size in BYTE_UNITS.items() if size > 1 and value and value % size == 0]
    return min([*exact, str(value)], key=len)


def _switch(value: object) -> object:
    """YAML reads a bare `on` or `off` as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _no_byte_stage(value: object) -> object:
    if isinstance(value, str) and value in FORMATS and "+" in value:
        plain = value.partition("+")[0]
        raise ValueError(f"host slots have a fixed size, so a byte stage saves nothing there; use {plain} here and {value} in disk.format")
    return value


FormatName = Literal["raw", "raw+lz4", "fp8", "fp8+lz4", "q8", "q8+lz4", "q4", "q4+lz4"]
FORMATS: tuple[str, ...] = get_args(FormatName)
"""The page formats by name; equals `kvtier.formats.FORMAT_NAMES`, written here too because that package imports torch."""

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(title='bytes, as a number or like "8GiB"')]
HostFormat = Annotated[Literal["raw", "fp8", "q8", "q4"], BeforeValidator(_no_byte_stage)]
Place = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"), Field(title="auto, cpu, cuda or cuda:N")]
FilePath = Annotated[str, Field(min_length=1, title="a path"), AfterValidator(os.path.expanduser)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
WritePolicy = Literal["write_back", "write_through", "write_through_selective"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_WRITE_POLICY = (
    "When pages are copied into this tier. `write_back`: when they are evicted from the tier above, or ahead of that once its pressure is "
    "over `mover.clean_pressure`. `write_through`: at once when they are committed above. `write_through_selective`: at use number "
    "`selective_uses`; pages that never reach it are dropped at eviction."
)
_SELECTIVE_USES = "The use at which `write_through_selective` copies a page into this tier; being committed counts as the first use."


class ModelConfig(_Section):
    name: str = Field(default="unnamed", description="Name of the model; part of every page key, so its pages are only found under it.")
    revision: str = Field(default="", description="Revision of its weights; part of every page key. Change it when they change.")


class PagesConfig(_Section):
    page_tokens: int = Field(default=16, ge=1, le=1024, description="Tokens per page, the unit that is placed, moved and reused.")


class DeviceConfig(_Section):
    capacity_bytes: Bytes = Field(default=1 * GiB, gt=0, description="Memory for pages the engine attends over, always stored raw.")
    place: Place = Field(default="auto", description="Where that memory is. `auto`: the current CUDA device, or the CPU.")


class HostConfig(_Section):
    capacity_bytes: Bytes = Field(default=4 * GiB, gt=0, description="Host memory for copies.")
    format: HostFormat = Field(default="q8", description="Page format. Only `raw` gives every bit back.")
    write_policy: WritePolicy = Field(default="write_back", description=_WRITE_POLICY)
    selective_uses: int = Field(default=2, ge=1, description=_SELECTIVE_USES)
    mlock: Switch = Field(default="auto", description="Never swap this memory out. `auto`: if the system allows it; `on`: or fail.")
    pin: Switch = Field(default="auto", description="Pin this memory for faster CUDA copies. `auto`: if CUDA is in use; `on`: or fail.")


class DiskConfig(_Section):
    path: FilePath = Field(description="Directory of the store; made if missing. Relative to the working directory; `~` is your home.")
    capacity_bytes: Bytes = Field(default=16 * GiB, gt=0, description="Disk space for copies.")
    format: FormatName = Field(default="q4", description="Page format. `+lz4` packs the bytes without loss; only `raw` gains from it.")
    write_policy: WritePolicy = Field(default="write_back", description=_WRITE_POLICY)
    selective_uses: int = Field(default=2, ge=1, description=_SELECTIVE_USES)
    durability: Literal["process", "power"] = Field(
        default="process",
        description="What committed copies survive. `process`: a crash of the process. `power`: a power cut too, with slower writes.",
    )


class Band(_Section):
    above: float = Field(ge=0, lt=1, description="The band applies from this pressure (used / capacity) to the next band.")
    eviction_threshold: float = Field(ge=0, le=1, description="`policy.eviction_threshold` within the band.")
    time_decay_factor: float = Field(ge=0, description="`policy.time_decay_factor` within the band, per second.")


class PolicyConfig(_Section):
    name: Literal["lru", "a2cr-classic"] = Field(
        default="lru",
        description="Which pages leave a full tier. `lru`: the least recently used. `a2cr-classic`: those of least attention, use and "
        "recency, summed. `lru` is the default because it wins on the Mooncake conversation trace: with room for 5 % of the pages it "
        "finds .2002 of the tokens, `a2cr-classic` .1345.",
    )
    attention_weight: float = Field(default=0.4, ge=0, description="a2cr-classic: weight of the attention paid to a page, if reported.")
    frequency_weight: float = Field(default=0.3, ge=0, description="a2cr-classic: weight of how often a page is used.")
    recency_weight: float = Field(default=0.3, ge=0, description="a2cr-classic: weight of how recently a page was used.")
    time_decay_factor: float = Field(default=0.05, ge=0, description="a2cr-classic: decay of recency per second; larger forgets sooner.")
    eviction_threshold: float = Field(default=0.2, ge=0, le=1, description="a2cr-classic: pages scored below may leave before they must.")
    cleanup_interval: float = Field(default=60.0, gt=0, description="a2cr-classic: seconds between looks for pages below the threshold.")
    adaptive: bool = Field(
        default=True, description="a2cr-classic: take threshold and decay from `bands`, by pressure, not from the two keys above."
    )
    bands: tuple[Band, ...] = Field(
        default=(
            Band(above=0.0, eviction_threshold=0.2, time_decay_factor=0.02),
            Band(above=0.7, eviction_threshold=0.3, time_decay_factor=0.05),
            Band(above=0.9, eviction_threshold=0.4, time_decay_factor=0.1),
        ),
        strict=False,
        description="The bands of `adaptive`, by rising pressure: keep pages under 0.7, balance up to 0.9, then clean aggressively.",
    )
    hysteresis: float = Field(default=0.05, ge=0, lt=1, description="A band is left downwards once pressure is this far below its `above`.")

    @model_validator(mode="after")
    def _fits(self) -> PolicyConfig:
        if self.attention_weight + self.frequency_weight + self.recency_weight <= 0:
            raise ValueError("attention_weight, frequency_weight and recency_weight are all 0; at least one must be above 0")
        if not self.bands or self.bands[0].above != 0:
            raise ValueError("bands must start with one at above: 0")
        for lower, upper in zip(self.bands, self.bands[1:], strict=False):
            if upper.above <= lower.above:
                raise ValueError(f"bands must be ascending, but above: {upper.above} follows above: {lower.above}")
            if upper.above - lower.above <= self.hysteresis:
                raise ValueError(f"hysteresis {self.hysteresis} must be smaller than the gap of bands {lower.above} and {upper.above}")
        return self


class MoverConfig(_Section):
    workers: int = Field(default=2, ge=1, le=256, description="Threads that carry pages between tiers.")
    staging_bytes: Bytes = Field(default=64 * MiB, gt=0, description="Most scratch memory for transfers under way.")
    prefetch_budget_bytes: Bytes = Field(default=64 * MiB, ge=0, description="Most bytes prefetched but not yet used; 0: no prefetching.")
    queue_bytes: Bytes = Field(default=256 * MiB, gt=0, description="Most bytes queued per link (pair of tiers) before back-pressure.")
    clean_pressure: float = Field(
        default=0.7, gt=0, le=1, description="With `write_back`: above this pressure, pages are copied down ahead."
    )


class Config(_Section):
    """Everything that can be configured. Build it with `load_config`, which names the file or variable a mistake came from."""

    model: ModelConfig = Field(default=ModelConfig(), description="Whose KV is cached.")
    pages: PagesConfig = Field(default=PagesConfig(), description="The unit of placement.")
    device: DeviceConfig = Field(default=DeviceConfig(), description="The tier the engine attends over.")
    host: HostConfig | None = Field(default=HostConfig(), description="Host memory below the device. `null`: no such tier.")
    disk: DiskConfig | None = Field(default=None, description="A store below the host that survives restarts. `null`: no such tier.")
    policy: PolicyConfig = Field(default=PolicyConfig(), description="Which pages leave a full tier; one policy object per tier.")
    mover: MoverConfig = Field(default=MoverConfig(), description="How bytes travel between the tiers, and the bounds on that.")

    def to_yaml(self, comments: bool = False) -> str:
        """The whole tree as YAML that `load_config` reads back to an equal one; with `comments`, each key is explained."""
        lines = []
        for name, field in type(self).model_fields.items():
            section = getattr(self, name)
            lines += ["", *_comment(field, "")] if comments else []
            lines.append(f"{name}: null" if section is None else f"{name}:")
            for key, about in (type(section).model_fields if section is not None else {}).items():
                lines += _comment(about, "  ") if comments else []
                lines += _yaml_lines(key, getattr(section, key))
        return "\n".join(lines).lstrip("\n") + "\n"


@dataclass(frozen=True)
class Origin:
    """Where a value came from: `kind`, and the file, variable or dotted key as `name`."""

    kind: Literal["default", "base", "file", "environment", "argument"]
    name: str = ""


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Resolved:
    """A configuration and the origin of each value that is not a default, by dotted key (a whole section when it was set to null)."""

    config: Config
    origins: dict[str, Origin]

    def leaves(self) -> Iterator[tuple[str, object, Origin]]:
        """(dotted key, value, origin) of every key; a section that is null is one key."""
        for section in Config.model_fields:
            values = getattr(self.config, section)
            if values is None:
                yield section, None, self.origins.get(section, DEFAULT)
            else:
                for key in type(values).model_fields:
                    yield f"{section}.{key}", getattr(values, key), self.origins.get(f"{section}.{key}", DEFAULT)


def load_config(
    path: str | Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    base: Mapping[str, object] | None = None,
) -> Config:
    """The configuration from defaults < `base` < the YAML file at `path` < `env` < `overrides`.

    `base` is a nested mapping that takes the defaults' place where it has keys. `env` is os.environ unless given (`{}` for none).
    `overrides` has dotted keys: `{"host.capacity_bytes": "2GiB", "disk": None}`. ConfigError, in one line, for anything wrong.
    """
    return resolve_config(path, env=env, overrides=overrides, base=base).config


def resolve_config(
    path: str | Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    base: Mapping[str, object] | None = None,
) -> Resolved:
    """As `load_config`, and where each value came from."""
    layers: list[tuple[Origin, Mapping[str, object]]] = []
    if base is not None:
        layers.append((Origin("base", "base"), base))
    if path is not None:
        layers.append((Origin("file", str(path)), _read_file(Path(path))))
    for variable, text in sorted((os.environ if env is None else env).items()):
        if variable.startswith("KVTIER_") and "__" in variable:
            key = variable.removeprefix("KVTIER_").lower().replace("__", ".")
            layers.append((Origin("environment", variable), _nested(key, _parse_text(key, text, variable))))
    for key, value in (overrides or {}).items():
        _known_field(key, f"argument {key}")
        layers.append((Origin("argument", f"argument {key}"), _nested(key, value)))

    values: dict[str, object] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in layers:
        _check_keys(layer, Config, "", origin.name)
        _merge(values, layer, Config, "", origin, origins)
    try:
        return Resolved(Config.model_validate(values), origins)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item), origins) for item in error.errors(include_url=False))) from None


def parse_assignments(assignments: Sequence[str]) -> dict[str, object]:
    """`["host.capacity_bytes=2GiB", ...]` from a command line as `overrides`. Text for a text key stays as it is; the rest is YAML."""
    overrides: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as host.capacity_bytes=2GiB")
        overrides[key] = _parse_text(key, text, f"--set {key}")
    return overrides


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section class in an annotation such as `HostConfig | None` or `tuple[Band, ...]`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def expected(field: FieldInfo) -> str:
    """What a key accepts, in words: "a whole number from 1 to 1024"."""
    section = section_of(field.annotation)
    if section is not None:
        if get_origin(field.annotation) is tuple:
            return f"a list of mappings with {', '.join(section.model_fields)}"
        return "a mapping of keys" + (" or null" if type(None) in get_args(field.annotation) else "")
    if get_origin(field.annotation) is Literal:
        *most, last = get_args(field.annotation)
        return f"{', '.join(most)} or {last}"
    nouns: dict[object, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text, in quotes if it looks like a number",
    }
    limits = {Ge: "at least {0.ge}", Gt: "above {0.gt}", Le: "at most {0.le}", Lt: "below {0.lt}"}
    bounds = [limits[type(m)].format(m) for m in field.metadata if type(m) in limits]
    return (field.title or nouns[field.annotation]) + (f" ({', '.join(bounds)})" if bounds else "")


# Reading the layers


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{where}: not usable YAML: {' '.join(str(error.problem).split())}{line}") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: not usable YAML: {' '.join(str(error).split())}") from None


def _read_file(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read this configuration file: {reason}") from None
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file holds {_short(values)}; expected sections such as 'host:' with keys below them")
    return values


def _parse_text(key: str, text: str, where: str) -> object:
    """A value written in an environment variable or on the command line. A revision like 0123 must not become a number."""
    field = _known_field(key, where)
    return text if field.annotation is str else _parse_yaml(text, where)


def _nested(key: str, value: object) -> dict[str, object]:
    first, dot, rest = key.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _merge(
    into: dict[str, object], layer: Mapping[str, object], model: type[BaseModel], prefix: str, origin: Origin, origins: dict[str, Origin]
) -> None:
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        section = section_of(model.model_fields[key].annotation)
        if section is not None and isinstance(value, Mapping):
            before = into.get(key)
            inner = dict(before) if isinstance(before, Mapping) else {}
            origins.pop(dotted, None)
            _merge(inner, value, section, f"{dotted}.", origin, origins)
            into[key] = inner
        else:
            for below in [name for name in origins if name.startswith(f"{dotted}.")]:
                del origins[below]
            into[key], origins[dotted] = value, origin


# Saying what is wrong


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = section_of(field.annotation)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}[]." if get_origin(field.annotation) is tuple else f"{prefix}{name}.")


def _unknown(key: str, where: str) -> ConfigError:
    given = re.sub(r"\[[0-9]+\]", "[]", key)

    def likeness(known: str) -> float:
        names = given.rpartition(".")[2], known.rpartition(".")[2]
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((given, known), names))

    return ConfigError(f"{where}: unknown key {key!r}; the nearest known key is {max(_known_keys(), key=likeness)}")


def _known_field(key: str, where: str) -> FieldInfo:
    model: type[BaseModel] | None = Config
    field = None
    for part in key.split("."):
        field = model.model_fields.get(part) if model else None
        if field is None:
            raise _unknown(key, where)
        model = section_of(field.annotation) if get_origin(field.annotation) is not tuple else None
    assert field is not None
    return field


def _check_keys(values: Mapping[str, object], model: type[BaseModel], prefix: str, where: str) -> None:
    for key, value in values.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise _unknown(f"{prefix}{key}", where)
        section = section_of(field.annotation)
        if section is None:
            continue
        if isinstance(value, Mapping):
            _check_keys(value, section, f"{prefix}{key}.", where)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    _check_keys(item, section, f"{prefix}{key}[{index}].", where)


def _explain(error: Mapping[str, Any], origins: Mapping[str, Origin]) -> str:
    """One pydantic error as `where: dotted.key is value; expected ...`."""
    dotted = ""
    model: type[BaseModel] = Config
    field: FieldInfo | None = None
    for part in error["loc"]:
        if isinstance(part, int):
            dotted += f"[{part}]"
            continue
        dotted = f"{dotted}.{part}" if dotted else str(part)
        field = model.model_fields.get(str(part))
        model = (section_of(field.annotation) if field else None) or model
    missing = error["type"] == "missing"
    plain = (dotted.rpartition(".")[0] if missing else dotted).partition("[")[0]
    touched = [o.name for key, o in origins.items() if f"{plain}.".startswith(f"{key}.") or f"{key}.".startswith(f"{plain}.")]
    where = f"{', '.join(dict.fromkeys(touched))}: " if touched else ""
    own_words = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    if own_words and isinstance(error["input"], Mapping):
        return f"{where}{dotted}: {own_words}"
    if missing:
        return f"{where}{dotted} is missing; expected {expected(field) if field else 'a value'}"
    what = own_words or (f"expected {expected(field)}" if field and not dotted.endswith("]") else "expected a mapping of keys")
    return f"{where}{dotted} is {_short(error['input'])}; {what}"


def _short(value: object) -> str:
    """A value in an error message, on one line and not long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 256 bits"
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


# Writing YAML


def value_text(key: str, value: object) -> str:
    """A value on one line as YAML, byte sizes with their unit."""
    if key.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, tuple):
        return f"[{', '.join(value_text(key, item) for item in value)}]"
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=2**31, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _yaml_lines(key: str, value: object) -> list[str]:
    if isinstance(value, tuple):
        return [f"  {key}:", *(f"    - {value_text(key, item)}" for item in value)]
    return [f"  {key}: {value_text(key, value)}"]


def _comment(field: FieldInfo, indent: str) -> list[str]:
    return textwrap.wrap(field.description or "", 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
