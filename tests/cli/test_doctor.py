"""Law checked: what is missing is said, for people and for machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

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


def test_doctor_says_that_restores_take_longer_without_the_digest_for_compiled_code(capsys, monkeypatch):
    monkeypatch.setattr("kvtier.formats.digests.digest_address", lambda: 0)
    assert main(["doctor", "--json", "-"]) == 0
    found = {item["what"]: item for item in json.loads(capsys.readouterr().out)}["digests while decoding"]
    assert not found["there"]
    assert "restores take longer" in found["meaning"]


def test_doctor_refuses_a_directory_that_is_none(capsys):
    assert main(["doctor", "--path", "/nowhere"]) == 2
    assert "/nowhere is not a directory" in capsys.readouterr().err


def only_free(monkeypatch, path: Path, free: int) -> None:
    """As a file system answers that has no more room than this."""
    real = os.statvfs(path)
    blocks = free // real.f_frsize
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((real.f_bsize, real.f_frsize, 1 << 20, blocks, blocks, *real[5:10])))


def test_a_disk_too_small_to_be_tried_is_told_in_words_that_the_user_knows(capsys, tmp_path, monkeypatch):
    only_free(monkeypatch, tmp_path, 64 << 10)
    assert main(["doctor", "--path", str(tmp_path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path} cannot hold a disk tier: 65536 bytes are free there, and trying it takes 262144; free 196608 more" in error
    assert "capacity_bytes" not in error
    assert not list(tmp_path.iterdir())


def test_a_disk_with_little_room_is_tried(capsys, tmp_path, monkeypatch):
    only_free(monkeypatch, tmp_path, 512 << 10)
    assert main(["doctor", "--path", str(tmp_path), "--json", "-"]) == 0
    findings = {item["what"]: item for item in json.loads(capsys.readouterr().out)}
    assert findings["disk store"]["there"]


def test_every_command_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {"run", "doctor"} <= set(names)
    assert all(f"`kvtier {name}" in text for name in [*names, *(group.name for group in app.registered_groups)])


FindsAccelerator = Callable[[Callable[[str], object]], None]


@pytest.fixture
def gpu_found_by(monkeypatch) -> FindsAccelerator:
    """Replaces how a GPU is found. What keeps that function under a name of its own is imported before, with the real one: it stays so for
    the tests that follow in this process."""
    import kvtier.cli.cuda_links
    import kvtier.tiers.gpu  # noqa: F401

    return lambda find: monkeypatch.setattr("kvtier.cuda.find.find_accelerator", find)


def test_a_gpu_is_told_about_as_it_is(gpu_found_by, capsys):
    from kvtier.testing.accelerator import LateAccelerator

    gpu_found_by(lambda place: LateAccelerator(can_grow=False, refuse_after=0))
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for line in ("CUDA: a stand-in", "GPU memory that grows: the device tier has a fixed size", "the stand-in registers no more"):
        assert line in told

    for why, told in (
        ("", "yes  GPU copies by a kernel: faster than the copy engines for 64 pages: d2h up to"),
        ("no Triton", "kernel: no Triton; the"),
    ):
        gpu_found_by(lambda place, why=why: LateAccelerator(why_no_kernels=why))
        assert main(["doctor"]) == 0
        assert told in capsys.readouterr().out

    def broken(place):
        raise ConfigError("device.place is 'auto', but no kernel image is available")

    gpu_found_by(broken)
    assert main(["doctor"]) == 0
    assert "no kernel image is available" in capsys.readouterr().out


def told_of_direct_storage(capsys, *args: str) -> str:
    assert main(["doctor", *args]) == 0
    told: str = capsys.readouterr().out
    return next(line for line in told.splitlines() if "GPUDirect Storage" in line).strip()


def test_without_a_gpu_there_is_nothing_to_read_into(gpu_found_by, capsys):
    gpu_found_by(lambda place: None)
    found = told_of_direct_storage(capsys)
    assert found.startswith("no   GPUDirect Storage: the device tier is not in a GPU's memory")
    assert found.endswith("; disk pages pass through host memory")


def test_direct_storage_is_tried_for_real_in_the_directory_asked_for(gpu_found_by, monkeypatch, capsys, tmp_path):
    from kvtier.testing.accelerator import LateAccelerator

    gpu = LateAccelerator()
    gpu_found_by(lambda place: gpu)
    measured: list[LateAccelerator] = []

    def why_no_kernel_copies(gpu: LateAccelerator) -> str:
        measured.append(gpu)
        return "no Triton"

    monkeypatch.setattr(LateAccelerator, "why_no_kernel_copies", why_no_kernel_copies)
    assert told_of_direct_storage(capsys, "--path", str(tmp_path)).startswith(
        "yes  GPUDirect Storage: disk.io_engine: gds reads pages straight"
    )
    assert gpu.files.begun == 1
    assert len(measured) == 1, "copies are measured once"
    gpu.files.missing = "kvikio is not installed"
    assert told_of_direct_storage(capsys).startswith("no   GPUDirect Storage: kvikio is not installed; disk pages pass")
    assert not list(tmp_path.iterdir())


def test_kvikio_that_is_not_there_is_named(gpu_found_by, monkeypatch, capsys):
    """As on a machine with a GPU: the way to kvikio is the real one."""
    from kvtier.cuda.gds import GdsReader
    from kvtier.testing.accelerator import LateAccelerator

    monkeypatch.setattr(LateAccelerator, "direct_reader", lambda gpu, depth: GdsReader(depth))
    gpu_found_by(lambda place: LateAccelerator())
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert "kvikio is not installed" in told_of_direct_storage(capsys)
