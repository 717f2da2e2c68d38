"""Laws checked: the sources are clean and typed, rooms import only downwards, what should not need torch does not, examples run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BELOW = {
    "layout": {"errors"},
    "keys": {"errors", "layout"},
    "config": {"errors"},
    "metrics": set(),
    "machine": set(),
    "io": {"errors"},
    "formats": {"errors", "layout"},
    "policy": {"errors"},
    "tiers": {"errors", "layout", "keys", "formats", "io"},
    "pages": {"errors", "keys", "tiers"},
    "mover": {"errors", "tiers"},
    "housekeeping": {"mover", "pages", "residency", "tiers"},
    "residency": {"config", "housekeeping", "errors", "layout", "metrics", "formats", "policy", "tiers", "pages", "mover"},
    "prefetch": {"keys", "mover", "residency"},
    "lease": {"errors", "keys", "mover", "pages", "residency"},
    "writing": {"errors", "keys", "lease", "mover", "pages", "residency", "tiers"},
    "cache": {"config", "errors", "layout", "keys", "lease", "prefetch", "mover", "pages", "residency", "tiers", "writing"},
    "engines": {"cache", "config", "errors", "layout", "lease"},
    "job": {"cache", "config", "engines", "errors", "formats", "layout", "machine"},
    "cli": {"config", "engines", "errors", "formats", "job", "layout", "tiers"},
    "testing": {"errors", "layout", "keys", "formats", "policy", "tiers"},
    "errors": set(),
}
"""Which rooms a room may import: the floors of CONTRIBUTING.md."""


def test_rooms_import_only_downwards():
    for path in sorted((ROOT / "kvtier").rglob("*.py")):
        inside = path.relative_to(ROOT / "kvtier")
        room = inside.parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvtier."):
                other = str(node.module).split(".")[1]
                assert other in BELOW[room] | {room}, f"{inside} imports kvtier.{other}"


@pytest.mark.parametrize(
    "room", ["kvtier", "kvtier.policy", "kvtier.config", "kvtier.keys", "kvtier.layout", "kvtier.io.files", "kvtier.cli.app"]
)
def test_rooms_that_need_no_torch_do_not_import_it(room):
    code = f"import sys, {room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_example_runs_and_reuses():
    done = subprocess.run([sys.executable, ROOT / "examples" / "embed.py"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "first visit: 0 tokens reused; second visit: 1280 of 1280"
    assert len((ROOT / "examples" / "embed.py").read_text().splitlines()) < 60


def test_links_in_the_documents_lead_somewhere():
    import re

    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
