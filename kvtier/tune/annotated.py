"""The configuration that was found, written as its author would have: the file as it was, comments and all, with the tuned values in place.

ruamel.yaml reads and writes it, which keeps comments and order; PyYAML, which kvtier reads configurations with, keeps neither.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvtier.errors import needing
from kvtier.tune.space import Values

HEAD = "# Tuned by kvtier"
"""How the first comment of a file begins that was written here; it is replaced when that is tuned again."""
_REMARKS = re.compile(r"[ \t]+(# tuned; was .*|\(tuned; was .*\))$", re.MULTILINE)


def require_ruamel() -> Any:
    """The module `ruamel.yaml`. MissingExtra if it is not installed."""
    with needing("tune", "kvtier tune", "ruamel.yaml to keep your comments"):
        import ruamel.yaml
    return ruamel.yaml


def commented_yaml(source: Path | None, values: Values, before: Values, heading: Sequence[str]) -> str:
    """The file `source` (None: there is none) with `values` in their places below `heading`; every changed one says what it was."""
    ruamel = require_ruamel()
    editor = ruamel.YAML()
    editor.width = 2**31
    editor.preserve_quotes = True
    editor.indent(mapping=2, sequence=4, offset=2)
    editor.representer.add_representer(float, lambda made, value: made.represent_scalar("tag:yaml.org,2002:float", one_line(value)))
    editor.representer.add_representer(type(None), lambda made, _: made.represent_scalar("tag:yaml.org,2002:null", "null"))
    sections = editor.load(_untuned(source.read_text(encoding="utf-8")) if source is not None else "")
    sections = ruamel.comments.CommentedMap() if sections is None else sections
    for key, value in values.items():
        section, _, name = key.partition(".")
        if sections.get(section) is None:
            sections[section] = ruamel.comments.CommentedMap()
        if sections[section].fa.flow_style():
            _unfold(sections, section)
        sections[section][name] = value
        if before.get(key, value) != value:
            _remark(sections[section], name, f"tuned; was {one_line(before[key])}")
    text = io.StringIO()
    editor.dump(sections, text)
    return "\n".join(heading) + "\n\n" + text.getvalue()


def one_line(value: object) -> str:
    """A value as YAML that kvtier reads back."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**31, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _untuned(text: str) -> str:
    """A file without what was written here before."""
    if not text.startswith(HEAD):
        return text
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        del lines[0]
    return _REMARKS.sub("", "".join(lines).lstrip("\n"))


def _unfold(sections: Any, name: str) -> None:
    """A section in braces gets a line for each key, where remarks have room; the author's own goes behind its name."""
    sections[name].fa.set_block_style()
    for comment in sections.ca.items.get(name) or ():
        if comment is not None:
            comment.start_mark.column = 0


def _remark(section: Any, name: str, remark: str) -> None:
    """Say something behind a key, and behind what its author says there. What follows in the lines below belongs to the same comment."""
    found = section.ca.items.get(name)
    if not found or found[2] is None:
        section.yaml_add_eol_comment(remark, name, column=0)
        return
    own, newline, below = found[2].value.partition("\n")
    found[2].value = (f"{own.rstrip()} ({remark})" if own.strip() else f"# {remark}") + newline + below
