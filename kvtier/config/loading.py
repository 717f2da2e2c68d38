"""How values reach the configuration tree, and what is said when they cannot.

Order: defaults < YAML file < environment (`KVTIER_<SECTION>__<FIELD>`) < arguments. Unknown keys are errors at every step.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kvtier.config.tree import Config
from kvtier.config.wording import expected, section_of
from kvtier.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """Where a value came from: `kind`, and the file, variable or dotted key as `name`."""

    kind: Literal["default", "base", "file", "environment", "argument"]
    name: str = ""


DEFAULT = Origin("default")
_LIKE = 0.6
"""How like another key an unknown one must be to be taken for it: difflib's own measure of a close match."""


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
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides are a {type(overrides).__name__}; expected dotted keys, such as {{'disk.path': '/nvme/kv'}}")
    layers: list[tuple[Origin, Mapping[str, object]]] = []
    if base is not None:
        layers.append((Origin("base", "base"), base))
    if path is not None:
        layers.append((Origin("file", str(path)), _read_file(Path(path))))
    for variable, text in sorted((os.environ if env is None else env).items()):
        _check_underscores(variable)
        if variable.startswith("KVTIER_") and "__" in variable:
            key = variable.removeprefix("KVTIER_").lower().replace("__", ".")
            layers.append((Origin("environment", variable), _nested(key, _parse_text(key, text, variable))))
    for key, value in (overrides or {}).items():
        _known_field(key, f"argument {key}")
        layers.append((Origin("argument", f"argument {key}"), _nested(key, value)))

    values: dict[str, object] = {}
    origins: dict[str, Origin] = {}
    faults: list[str] = []
    for origin, layer in layers:
        _merge(values, _known(layer, Config, "", origin.name, faults), Config, "", origin, origins)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        # What is missing may have been meant by a key that is unknown.
        items = [item for item in error.errors(include_url=False) if not faults or item["type"] != "missing"]
        faults += [_explain(dict(item), origins) for item in items]
    if faults:
        raise ConfigError("; ".join(faults))
    return Resolved(config, origins)


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


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = section_of(field.annotation)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}[]." if get_origin(field.annotation) is tuple else f"{prefix}{name}.")


def _check_underscores(variable: str) -> None:
    """A variable that names a key with one underscore where two belong would be ignored without a word."""
    for key in _known_keys():
        if "." in key and variable == f"KVTIER_{key.replace('.', '_').upper()}":
            raise ConfigError(f"{variable}: write KVTIER_{key.replace('.', '__').upper()}, with two underscores after the section")


def _unknown(key: str, where: str) -> ConfigError:
    """The error names the nearest known key or, where none is near, those that are known in this place."""
    given = re.sub(r"\[[0-9]+\]", "[]", key)
    known = list(_known_keys())

    def likeness(other: str) -> float:
        names = given.rpartition(".")[2], other.rpartition(".")[2]
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((given, other), names)) / 2

    nearest, above = max(known, key=likeness), given.rpartition(".")[0]
    siblings = [other for other in known if other.rpartition(".")[0] == above]
    if likeness(nearest) >= _LIKE:
        hint = f"the nearest known key is {nearest}"
    elif siblings:
        hint = f"the keys of {above} are {', '.join(siblings)}" if above else f"the sections and keys are {', '.join(siblings)}"
    else:
        hint = f"{above} is a key without keys of its own" if above in known else "`kvtier config show` lists all keys"
    return ConfigError(f"{where}: unknown key {key!r}; {hint}")


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


def _known(values: Mapping[str, object], model: type[BaseModel], prefix: str, where: str, faults: list[str]) -> dict[str, object]:
    """`values` without the keys that are unknown, each of which is one of `faults` from now on."""
    known: dict[str, object] = {}
    for key, value in values.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            faults.append(str(_unknown(f"{prefix}{key}", where)))
            continue
        section = section_of(field.annotation)
        if section is not None and isinstance(value, Mapping):
            value = _known(value, section, f"{prefix}{key}.", where, faults)
        elif section is not None and isinstance(value, list | tuple):
            place = f"{prefix}{key}[%d]."
            value = [
                _known(item, section, place % index, where, faults) if isinstance(item, Mapping) else item
                for index, item in enumerate(value)
            ]
        known[key] = value
    return known


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
    one_of_many = dotted.endswith("]") and field is not None and section_of(field.annotation) is not None
    what = own_words or (f"expected {expected(field)}" if field and not one_of_many else "expected a mapping of keys")
    return f"{where}{dotted} is {_short(error['input'])}; {what}"


def _short(value: object) -> str:
    """A value in an error message, on one line and not long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 256 bits"
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
