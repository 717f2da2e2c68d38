"""The written configuration: what was there and what was tuned, nothing else; written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kvtier.config import load_config
from kvtier.errors import KVTierError
from kvtier.tune.annotated import commented_yaml
from kvtier.tune.evidence import LEAST_GAIN, Evidence, heading, write_whole
from kvtier.tune.judge import Cell
from kvtier.tune.space import Values

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def evidence(first: float, second: float, values: Values | None = None, before: Values | None = None) -> Evidence:
    """Of a configuration that finds half of the tokens in both halves, and gains so much in each."""
    given, tuned = [Cell("t", "5%", 0.5, 0.5, 0)], [Cell("t", "5%", 0.5 + first, 0.5 + second, 0)]
    return Evidence("in.yaml", given, tuned, values or {}, before or {}, 3, 0, "3 trials", "kvtier tune t.jsonl", "0")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_everything_that_was_there_is_there_afterwards(tmp_path: Path, path: Path):
    values: Values = {"policy.name": "arc", "policy.time_decay_factor": 1e-05, "host.write_policy": "write_through"}
    before: Values = {"policy.name": "lru", "policy.time_decay_factor": 0.05, "host.write_policy": "write_through"}
    out = tmp_path / "out.yaml"
    write_whole(out, commented_yaml(path, values, before, heading(evidence(0.1, 0.1))))
    assert load_config(out, env={}) == load_config(path, env={}, overrides=values)
    assert re.search(r"  name: arc +# (.* \()?tuned; was lru", out.read_text())
    assert "write_policy: write_through\n" in out.read_text()

    comments = [line.strip() for line in path.read_text().splitlines() if line.strip().startswith("#")]
    assert comments
    assert [line for line in out.read_text().splitlines() if line.strip() in comments] == [
        line for line in path.read_text().splitlines() if line.strip() in comments
    ]


AUTHORS = """\
# My server.

policy: # ours
  name: lru
  # It forgets slowly.
  time_decay_factor: 0.05 # keep low

host: {write_policy: "write_back", capacity_bytes: 4GiB} # from operations
mover: null
# The end.
"""


def test_every_comment_stays_where_it_is_also_when_it_is_tuned_again(tmp_path: Path):
    values: Values = {"policy.name": "arc", "policy.time_decay_factor": 1e-05, "host.write_policy": "write_through"}
    before: Values = {"policy.name": "lru", "policy.time_decay_factor": 0.05, "host.write_policy": "write_back"}
    path = tmp_path / "server.yaml"
    path.write_text(AUTHORS)
    tuned = commented_yaml(path, values, before, ["# Tuned by kvtier 0: tune", "# evidence"])
    assert (
        tuned
        == """\
# Tuned by kvtier 0: tune
# evidence

# My server.

policy: # ours
  name: arc # tuned; was lru
  # It forgets slowly.
  time_decay_factor: 1.0e-05 # keep low (tuned; was 0.05)

host: # from operations
  write_policy: "write_through" # tuned; was write_back
  capacity_bytes: 4GiB
mover: null
# The end.
"""
    )
    path.write_text(tuned)
    again = commented_yaml(path, values, values, ["# Tuned by kvtier 1: tune"])
    assert "was" not in again
    assert again.count("# keep low\n") == again.count("# My server.\n") == again.count("Tuned") == 1
    assert yaml.safe_load(again) == yaml.safe_load(tuned)


def test_without_a_file_there_are_only_the_tuned_keys(tmp_path: Path):
    text = commented_yaml(None, {"policy.name": "arc"}, {"policy.name": "a2cr"}, ["# head"])
    assert [line for line in text.splitlines() if line and not line.startswith("#")] == ["policy:", "  name: arc # tuned; was a2cr"]


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (0.1, LEAST_GAIN * 1.01, None),
        (0.1, LEAST_GAIN * 0.99, "does not hold on the second"),
        (0.1, -0.1, "does not hold on the second"),
        (LEAST_GAIN * 0.99, 0.1, "on the first half"),
    ],
)
def test_both_halves_must_be_better(first, second, refused):
    refusal = evidence(first, second).refusal
    assert refusal is None if refused is None else refused in str(refusal)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(KVTierError, match="cannot write"):
        write_whole(tmp_path / "taken", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
