"""Law checked: what is missing is said, for people and for machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kvtier.cli import main
from kvtier.cli.app import app
from kvtier.errors import ConfigError


def test_doctor_says_what_the_machine_allows(capsys, tmp_path):
    assert main(["doctor", "--path", str(tmp_path), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    findings = {item["what"]: item for item in json.loads(out)}
    assert {"CUDA", "locked host memory", "huge pages", "disk store", "hole punching", "matplotlib"} <= set(findings)
    assert str(tmp_path) in findings["disk store"]["meaning"]
    assert all(name in err for name in findings)
    assert not list(tmp_path.iterdir())


def test_doctor_names_a_missing_extra(capsys, monkeypatch):
    monkeypatch.setattr("kvtier.cli.doctor.find_spec", lambda _: None)
    assert main(["doctor"]) == 0
    assert "pip install 'kvtier[report]'" in capsys.readouterr().out.replace("\n", " ")


def test_doctor_refuses_a_directory_that_is_none(capsys):
    assert main(["doctor", "--path", "/nowhere"]) == 2
    assert "/nowhere is not a directory" in capsys.readouterr().err


def test_every_command_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {"run", "doctor"} <= set(names)
    assert all(f"`kvtier {name}" in text for name in [*names, *(group.name for group in app.registered_groups)])


def test_a_gpu_is_told_about_as_it_is(monkeypatch, capsys):
    from kvtier.cuda import find
    from kvtier.testing.accelerator import LateAccelerator

    monkeypatch.setattr(find, "find_accelerator", lambda place: LateAccelerator(can_grow=False, refuse_after=0))
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for line in ("CUDA: a stand-in", "GPU memory that grows: the device tier has a fixed size", "the stand-in registers no more"):
        assert line in told

    for why, told in (
        ("", "yes  GPU copies by a kernel: faster than the copy engines for 64 pages: d2h up to"),
        ("no Triton", "kernel: no Triton; the"),
    ):
        monkeypatch.setattr(find, "find_accelerator", lambda place, why=why: LateAccelerator(why_no_kernels=why))
        assert main(["doctor"]) == 0
        assert told in capsys.readouterr().out

    def broken(place):
        raise ConfigError("device.place is 'auto', but no kernel image is available")

    monkeypatch.setattr(find, "find_accelerator", broken)
    assert main(["doctor"]) == 0
    assert "no kernel image is available" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "no   GPUDirect Storage: not looked for, because kvikio is not installed; disk pages pass through host memory"),
        (RuntimeError("no libcufile.so.0\nlooked in /usr/lib"), "no   GPUDirect Storage: kvikio does not load: no libcufile.so.0; disk"),
        (False, "no   GPUDirect Storage: kvikio finds none here; disk pages"),
        (True, "yes  GPUDirect Storage: files could go straight to the GPU, which kvtier makes no use of: disk pages"),
    ],
)
def test_direct_storage_is_looked_for_through_kvikio(monkeypatch, capsys, found, told):
    def get(name):
        assert name == "is_gds_available"
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setitem(sys.modules, "kvikio", None if found is None else ModuleType("kvikio"))
    monkeypatch.setitem(sys.modules, "kvikio.cufile_driver", None if found is None else SimpleNamespace(get=get))
    assert main(["doctor"]) == 0
    assert told in capsys.readouterr().out
