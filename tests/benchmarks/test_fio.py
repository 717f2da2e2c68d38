"""What calls itself fio on PATH may be anything: one clear error, whatever it answers."""

from __future__ import annotations

import pytest

from benchmarks import fio
from kvtier.errors import KVTierError


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho hello\n", "gave no figures but 'hello'"),
        ("#!/bin/sh\necho '{}'\n", "gave no figures"),
        ("#!/nothing/here\n", "cannot be started: No such file"),
    ],
)
def test_an_answer_that_is_none_of_fios_is_one_clear_error(tmp_path, monkeypatch, script, said):
    (tmp_path / "fio").write_text(script)
    (tmp_path / "fio").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KVTierError, match=said):
        fio.run(fio.Work(tmp_path / "file", "read", 4096, 1, 4096, 4096, direct=False))
