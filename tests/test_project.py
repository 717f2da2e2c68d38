"""Laws checked: the sources are clean and typed, rooms import only downwards, what should not need torch does not, examples run."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from kvtier.extensions import load_extension

CAN_COMPILE = shutil.which("cc") is not None and (Path(sysconfig.get_path("include")) / "Python.h").exists()
ROOT = Path(__file__).parent.parent

BELOW = {
    "layout": {"errors"},
    "keys": {"errors", "layout"},
    "format_spec": {"errors"},
    "config": {"errors", "format_spec"},
    "machine": set(),
    "repeated": set(),
    "forked": {"errors"},
    "io": {"errors", "extensions", "forked", "repeated"},
    "memory": {"errors", "extensions"},
    "numa": {"errors", "forked"},
    "formats": {"cuda", "errors", "extensions", "format_spec", "layout"},
    "columns": {"extensions"},
    "cuda": {"errors"},
    "attention": {"cuda", "errors", "formats", "layout", "numa", "pricing"},
    "policy": {"columns", "errors"},
    "replay": {"errors", "policy"},
    "tune": {"config", "errors", "format_spec", "formats", "layout", "policy", "replay"},
    "tiers": {"columns", "cuda", "errors", "forked", "layout", "keys", "formats", "io", "memory", "numa", "repeated"},
    "pages": {"columns", "errors", "keys", "tiers"},
    "pricing": set(),
    "mover": {"cuda", "errors", "forked", "formats", "layout", "machine", "memory", "numa", "tiers"},
    "residency": {
        *("attention", "config", "errors", "forked", "formats", "keys", "layout"),
        *("mover", "numa", "pages", "policy", "pricing", "repeated", "tiers"),
    },
    "leases": {
        *("attention", "errors", "formats", "keys", "layout", "memory", "mover", "numa", "pages", "residency", "tiers"),
    },
    "stats": {"pages", "residency"},
    "blocks": {"config", "errors", "forked", "formats", "keys", "mover", "pages", "policy", "repeated", "residency", "tiers"},
    "cache": {
        *("config", "errors", "forked", "layout", "keys", "leases", "residency", "stats"),
    },
    "series": set(),
    "prometheus": {"cache", "errors", "series"},
    "engines": {
        *("blocks", "cache", "config", "cuda", "errors", "keys", "layout"),
        *("leases", "memory", "policy", "pricing", "series", "tiers"),
    },
    "quality": {"attention", "engines", "errors", "formats", "layout", "leases"},
    "job": {"cache", "config", "engines", "errors", "formats", "layout", "machine", "quality"},
    "cli": {
        *("columns", "config", "cuda", "engines", "errors", "formats", "io", "job", "layout"),
        *("mover", "tiers", "memory", "machine", "numa", "quality", "replay", "tune"),
    },
    "testing": {"cuda", "errors", "io", "layout", "keys", "formats", "policy", "tiers"},
    "errors": set(),
    "extensions": set(),
}
"""Which rooms a room may import: the floors of CONTRIBUTING.md."""


def rooms_imported(source: ast.Module) -> set[str]:
    """Rooms of kvtier that a file imports, however it says so; its own neighbours, named by a relative import, are left out."""
    names: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] for name in names if name.startswith("kvtier.")}
    return {room for room in rooms if (ROOT / "kvtier" / room).is_dir() or (ROOT / "kvtier" / f"{room}.py").exists()}


@pytest.mark.parametrize(
    "line",
    [
        "import kvtier.pages",
        "import kvtier.pages as p",
        "from kvtier import pages",
        "from kvtier.pages import READY",
        "def f():\n import kvtier.pages",
    ],
)
def test_every_way_to_import_a_room_is_seen(line):
    assert rooms_imported(ast.parse(line)) == {"pages"}


def test_rooms_import_only_downwards():
    for path in sorted((ROOT / "kvtier").rglob("*.py")):
        inside = path.relative_to(ROOT / "kvtier")
        room = inside.parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for other in rooms_imported(ast.parse(path.read_text())):
            assert other in BELOW[room] | {room}, f"{inside} imports kvtier.{other}"


@pytest.mark.parametrize(
    "room",
    [
        "kvtier",
        "kvtier.policy",
        "kvtier.replay.runs",
        "kvtier.replay.show",
        "kvtier.tune.evidence",
        "kvtier.config",
        "kvtier.keys",
        "kvtier.layout",
        "kvtier.io.files",
        "kvtier.memory.arena",
        "kvtier.cli.app",
    ],
)
def test_rooms_that_need_no_torch_do_not_import_it(room):
    code = f"import sys, {room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not CAN_COMPILE, reason="no C compiler, or no Python.h: NumPy, torch and Python threads do the work")
@pytest.mark.parametrize("module", ["formats.native._codecs", "columns._loops", "io._requests", "memory._strided", "numa._chase"])
def test_where_there_is_a_compiler_everything_is_compiled(module):
    """A build that fails is not an error for users; here it would quietly leave what is compiled untested."""
    assert load_extension(f"kvtier.{module}", "tests skip it")[1] == ""


def test_example_runs_and_reuses():
    done = subprocess.run([sys.executable, ROOT / "examples" / "embed.py"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "first visit: 0 tokens reused; second visit: 1280 of 1280"
    assert len((ROOT / "examples" / "embed.py").read_text().splitlines()) < 60


def test_nothing_waits_for_a_whole_gpu():
    """An engine's work is not kvtier's to wait for: streams and events only. And one room alone talks to CUDA about them."""
    forbidden = ("cuda.synchronize", "DeviceSynchronize", "CtxSynchronize", "stream.synchronize", "stream().synchronize")
    streams = ("torch.cuda.Stream", "torch.cuda.stream(", "torch.cuda.Event", "cudart", "libcuda")
    for path in (ROOT / "kvtier").rglob("*.py"):
        text, room = path.read_text(), path.relative_to(ROOT / "kvtier").parts[0]
        assert not [word for word in forbidden if word in text], f"{path} waits for more than one transfer"
        if room != "cuda" and path.name != "stopwatch.py":
            assert not [word for word in streams if word in text], f"{path} talks to CUDA itself; kvtier.cuda does that"


def test_links_in_the_documents_lead_somewhere():
    import re

    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
