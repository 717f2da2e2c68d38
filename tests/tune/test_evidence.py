"""The written configuration: what was there and what was tuned, nothing else; written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.config import load_config
from kvtier.errors import KVTierError
from kvtier.tune.evidence import LEAST_GAIN, Evidence, commented_yaml, write_whole
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
    write_whole(out, commented_yaml(path, evidence(0.1, 0.1, values, before)))
    assert load_config(out, env={}) == load_config(path, env={}, overrides=values)
    assert "name: arc # tuned; was lru" in out.read_text()
    assert "write_policy: write_through\n" in out.read_text()


def test_without_a_file_there_are_only_the_tuned_keys(tmp_path: Path):
    text = commented_yaml(None, evidence(0.1, 0.1, {"policy.name": "arc"}, {"policy.name": "a2cr"}))
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
