"""What a binding plan is made from: patterns of processes, how many groups a socket takes, where the others go. YAML or JSON.

The keys are those of the binding document of the sources; `configs/numa/` holds ready files.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kvtier.errors import NumaError


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    if not text:
        raise ValueError("an empty pattern would match everything")
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class Shape(BaseModel):
    """The machine a plan is for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sockets: int = Field(ge=1)
    nodes: int = Field(ge=1)


class PlanConfig(BaseModel):
    """A binding plan's configuration.

    Patterns are regular expressions, searched in command lines (groups, others) and thread names (forward threads). Processes of a group
    pattern with a named part `(?P<group>...)` belong to the group of that value, such as a rank; of one without, the first one started
    to the first group, and so on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    machine: Shape | None = None
    """The machine expected; another is refused. None: any."""
    groups_per_socket: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Groups on each socket, filled one after the other; "auto" spreads all groups evenly."""
    group_patterns: tuple[Pattern, ...] = Field(min_length=1, strict=False)
    other_patterns: tuple[Pattern, ...] = Field(default=(), strict=False)
    forward_thread_patterns: tuple[Pattern, ...] = Field(default=(), strict=False)
    others_socket_index: Annotated[int, Field(ge=0)] | Literal["last"] = "last"
    """Which socket, counted from 0, takes the others, on its first node."""
    memory: Literal["none", "interleave", "bind", "preferred"] = "none"
    """Where a group's memory shall come from: interleaved over the nodes of its socket, from its first node only, or preferably."""
    memory_share: float = Field(default=0.95, gt=0, le=1)
    """Share of a group's own pages that has to be on those nodes for `verify`; libraries' few shared pages are where they are."""
    report: str = "numa_binding_report.md"
    """Where `kvtier numa report` writes, relative to the working directory."""


def load_plan_config(path: Path) -> PlanConfig:
    """The configuration in a YAML or JSON file. NumaError, in one line, for anything wrong with it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NumaError(f"{path}: no such file; configs/numa/ has ready ones") from None
    except OSError as error:
        raise NumaError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise NumaError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise NumaError(f"{path}: expected keys such as group_patterns, with values")
    for key in values:
        if key not in PlanConfig.model_fields:
            nearest = difflib.get_close_matches(str(key), PlanConfig.model_fields, n=1)
            hint = f"the nearest known key is {nearest[0]}" if nearest else f"the known keys are {', '.join(PlanConfig.model_fields)}"
            raise NumaError(f"{path}: unknown key {key!r}; {hint}")
    try:
        return PlanConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part in PlanConfig.model_fields or isinstance(part, int))
        raise NumaError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
