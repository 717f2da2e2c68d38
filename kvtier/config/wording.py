"""The configuration in words: what a key accepts, its value as YAML, its description as a comment. Knows no key of the tree."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvtier.config.units import format_bytes


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


def value_text(key: str, value: object) -> str:
    """A value on one line as YAML, byte sizes with their unit."""
    if key.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, tuple):
        return f"[{', '.join(value_text(key, item) for item in value)}]"
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=2**31, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def yaml_lines(key: str, value: object) -> list[str]:
    """A key of a section and its value as YAML; a list has a line for each item."""
    if isinstance(value, tuple) and value:
        return [f"  {key}:", *(f"    - {value_text(key, item)}" for item in value)]
    return [f"  {key}: {value_text(key, value)}"]


def comment_lines(field: FieldInfo, indent: str) -> list[str]:
    """What a key means, as comments of YAML."""
    return textwrap.wrap(field.description or "", 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
