"""Laws checked: what the documents point to is there: sections, commands with their options, metrics."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import _command
from kvtier.series import COUNTERS, GAUGES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_sections_that_are_there(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
        assert anchor in anchors(document.parent / target if target else document), f"{document.name} links to {target}#{anchor}"


def commands(document: Path) -> Iterator[str]:
    """The command lines of `kvtier` in shell blocks and between backticks."""
    text = document.read_text().replace("\\\n", " ")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from re.findall(r"^(?:\S+/)?kvtier .*$", block, re.MULTILINE)
    yield from re.findall(r"`(?:\S+/)?(kvtier [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\|", "|"))


def unknown_to(command: Any, words: list[str]) -> list[str]:
    """Subcommands and options of a command line that `command` does not have. `a|b` names alternatives."""
    if words and hasattr(command, "commands") and not words[0].startswith("-"):
        found = [unknown_to(command.commands[name], words[1:]) if name in command.commands else [name] for name in words[0].split("|")]
        return [] if words[0].isupper() else [unknown for one in found for unknown in one]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in options]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_have_the_options_that_documents_say(document):
    for line in commands(document):
        words = [word.strip("[],") for word in shlex.split(line, comments=True)]
        assert unknown_to(_command(), words[1:]) == [], f"{document.name}: {line}"


def test_every_counter_of_the_connector_is_on_the_page_on_operations():
    source = (ROOT / "kvtier/engines/vllm/metrics.py").read_text()
    counters = re.findall(r'^    "(\w+)": \(', source, re.MULTILINE)
    page = (ROOT / "docs/operations.md").read_text()
    assert "hit_tokens" in counters
    assert [name for name in counters if not re.search(rf"`{name}(\{{\w+\}})?`", page)] == []


def test_every_series_for_prometheus_is_on_the_page_on_operations():
    page = (ROOT / "docs/operations.md").read_text()
    named = [f"`{series.name}{{{','.join(series.labels)}}}`" if series.labels else f"`{series.name}`" for series in (*GAUGES, *COUNTERS)]
    assert [name for name in named if name not in page] == []
