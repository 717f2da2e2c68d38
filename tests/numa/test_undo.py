"""Laws checked: what is not an undo file, or is one no more, is one error; a process that ended while it was looked at is left out."""

from __future__ import annotations

import json
import os

import pytest

from kvtier.errors import NumaError
from kvtier.numa.undo import Before, recall, remember

PID = os.getpid()


def test_what_is_remembered_is_recalled(tmp_path):
    file = tmp_path / "undo.json"
    remember(file, [Before(PID, 7, {PID: (0, 1), PID + 1: (1,)}), Before(PID + 2, 8, {})])
    assert recall(file) == [Before(PID, 7, {PID: (0, 1), PID + 1: (1,)})]


@pytest.mark.parametrize("affinities", [{PID + 1: [0]}, {PID: []}, {PID: [-1]}, {PID: [1 << 70]}, {PID: ["x"]}, {PID: 3}, {PID: None}, [1]])
def test_a_damaged_file_is_one_clear_error(affinities, tmp_path):
    file = tmp_path / "undo.json"
    remember(file, [Before(PID, 7, {PID: (0,)})])
    record = json.loads(file.read_text())
    record["processes"][0]["affinities"] = affinities
    file.write_text(json.dumps(record))
    with pytest.raises(NumaError, match="is not an undo file of kvtier numa"):
        recall(file)
