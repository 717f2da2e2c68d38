"""Kinds of values that keys of the configuration have: what is accepted for each, and how it is called in messages (its `title`)."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from kvtier.config.units import parse_bytes
from kvtier.errors import ConfigError
from kvtier.format_spec import parse_format


def _switch(value: object) -> object:
    """YAML reads a bare `on` or `off` as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _format(value: object) -> str:
    try:
        return parse_format(value).name
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _fixed_format(value: object) -> str:
    name = _format(value)
    if (stage := parse_format(name).stage) is not None:
        plain = name.removesuffix(f"+{stage}")
        raise ValueError(f"host slots have a fixed size, so a byte stage saves nothing there; use {plain} here and {name} in disk.format")
    return name


def _file_path(given: str) -> str:
    path = os.path.expanduser(given)
    if "\0" in path:
        raise ValueError("a path cannot have a zero byte in it")
    if path.startswith("~"):
        raise ValueError(f"nobody here is called {path.split(os.sep)[0][1:]!r}, so that is no home directory; write ./{path} for a folder")
    return path


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(title='bytes, as a number or like "8GiB"')]
_FORMAT_TITLE = "a page format such as q8, q4, or {k: q8, v: q4}"
PageFormat = Annotated[str, BeforeValidator(_format), Field(title=_FORMAT_TITLE)]
FixedFormat = Annotated[str, BeforeValidator(_fixed_format), Field(title=_FORMAT_TITLE)]
Place = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"), Field(title="auto, cpu, cuda or cuda:N")]
FilePath = Annotated[str, Field(min_length=1, title="a path"), AfterValidator(_file_path)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
NumaMode = Annotated[Literal["off", "auto", "interleave", "explicit", "layers"], BeforeValidator(_switch)]
