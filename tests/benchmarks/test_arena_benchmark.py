"""The arena benchmark runs and reports every kind of pages there is, beside its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cli import main
from tests.memory.kernel import POOL, pool_of


def rows_of(text: str) -> dict[str, dict[str, float]]:
    return {row["name"]: row for row in json.loads(text)["rows"]}


def test_a_tiny_run_reports_start_copy_and_pages(capsys, tmp_path: Path):
    plot = tmp_path / "plot.svg"
    assert main(["bench", "arena", "--tiny", "--repeats", "1", "--json", "-", "--plot", str(plot)]) == 0
    rows = rows_of(capsys.readouterr().out)
    startup = {f"arena.startup.{name}" for name in ("first-touch", "none", "default", "unlocked", "seconds", "speedup")}
    assert startup | {"arena.size", "arena.copy.none", "host.store.page", "host.load.page"} <= set(rows)
    assert rows["arena.size"]["value"] == 8 / 1024
    for row in rows.values():
        assert row["value"] > 0
        assert row["ceiling"] is None or row["ratio"] == pytest.approx(row["value"] / row["ceiling"])
    assert plot.read_text().startswith("<?xml")


HELD = """
from pathlib import Path
from benchmarks import arena
from benchmarks.measure import Run
from kvtier.memory.limits import Room

def most_bytes():
    facts = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["VmHWM"].split()[0]) * 1024

arena.available_memory = lambda: Room(256 << 20, "as in a small container")
arena.measure(Run(1, tiny=True))
before = most_bytes()
rows = arena.measure(Run(1), 4 << 30)
print(most_bytes() - before, int(rows[0].value * 2**30))
"""


def test_no_part_takes_more_than_half_of_the_memory_that_can_be_had():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    held, size = map(int, done.stdout.split())
    assert size == 128 << 20
    assert held < 132 << 20, "half, and a little for threads and their stacks"


def test_explicit_huge_pages_are_set_apart_only_for_the_run(capsys):
    with pool_of(1) as there:
        if not there:
            pytest.skip("the pool of huge pages cannot be raised here")
        before = (POOL / "nr_hugepages").read_text()
        assert main(["bench", "arena", "--tiny", "--repeats", "1", "--json", "-", "--raise-pool"]) == 0
        assert {"arena.startup.explicit", "arena.copy.explicit"} <= set(rows_of(capsys.readouterr().out))
        assert (POOL / "nr_hugepages").read_text() == before


@pytest.mark.parametrize("size", ["many", "0", "-4GiB"])
def test_a_size_that_is_none_is_one_line_and_exit_code_2(capsys, size):
    assert main(["bench", "arena", "--tiny", "--size-bytes", size]) == 2
    err = capsys.readouterr().err
    assert "--size-bytes" in err
    assert "Traceback" not in err
