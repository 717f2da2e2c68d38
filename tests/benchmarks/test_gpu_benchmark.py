"""The GPU benchmark runs, on a stand-in, and reports every row with its ceiling; its check finds a format that comes back wrong."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu, gpu_check, gpu_direct, gpu_kernels, gpu_timing
from benchmarks.measure import Row, Run
from kvtier.cli.app import app
from kvtier.errors import KVTierError
from kvtier.formats import on_device
from kvtier.mover import direct, lane
from kvtier.testing.accelerator import LateAccelerator
from kvtier.tiers import gpu as pools


@pytest.fixture
def card(monkeypatch):
    made = LateAccelerator(total_bytes=1 << 27, step_bytes=1 << 16, why_no_kernels="")
    monkeypatch.setattr(pools, "find_accelerator", lambda place: made)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", _compressed)  # torch has it on CUDA only
    return made


def _compressed(dense: torch.Tensor) -> torch.Tensor:
    assert int((dense.view(len(dense), -1, 4) != 0).sum(-1).max()) == 2, "of every four along the last dimension two are zero"
    return dense.clone()


@pytest.mark.slow
def test_tiny_run_reports_every_row_with_its_ceiling(card):
    rows = {row.name: row for row in gpu.measure(Run(1, tiny=True), card, check=False)}
    assert {
        *gpu.FLOORS,
        *gpu.CEILINGS,
        "prefix.restore",
        "sparse24.matmul",
        "digest.encode",
        "digest.score",
        "disk.restore",
        "gds.read",
    } <= rows.keys()
    for way in ("d2h", "h2d"):
        assert rows[f"pages.{way}"].value in (rows[f"pages.{way}.copies"].value, rows[f"pages.{way}.kernel"].value)
        assert rows[f"crossover.{way}"].value > 0, "on a stand-in the kernel wins for small pages"
    assert all(row.ratio is not None for name, row in rows.items() if not name.startswith("copy."))
    assert all(row.value > 0 for name, row in rows.items() if name != "prefix.exposed")
    assert card.registered == {}, "everything is given back"


DIRECT = (gpu_timing.SMALL, 5, 100.0)


def test_pages_from_disk_are_measured_both_ways_beside_plain_reads(card, tmp_path):
    rows = {row.name: row for row in gpu_direct.measure(Run(1, tiny=True), card, *DIRECT, tmp_path)}
    assert set(rows) == {"checksum.xxh3", "disk.restore", "gds.read"}
    assert all(row.ratio for row in rows.values())
    assert card.files.begun >= 3 + 2, "more than was tried to find out whether it works"
    assert (card.files.open_files, card.registered, list(tmp_path.iterdir())) == (0, {}, [])


def test_where_there_is_no_direct_storage_its_row_is_left_out_and_the_note_says_why(card, tmp_path, monkeypatch):
    card.files.missing = "kvikio is not installed"
    rows = {row.name for row in gpu_direct.measure(Run(1, tiny=True), card, *DIRECT, tmp_path)}
    assert rows == {"checksum.xxh3", "disk.restore"}
    monkeypatch.setattr(gpu, "find_accelerator", lambda place: card)
    assert gpu.note(tmp_path).endswith("; no gds.read: kvikio is not installed")
    card.files.missing = ""
    assert "gds" not in gpu.note(tmp_path)


def test_pages_from_disk_that_come_back_wrong_are_no_figure(card, tmp_path, monkeypatch):
    def scribbled(form, payloads, target, *rest):
        on_device.decode_pages(form, payloads, target, *rest)
        target.views[0][0][0] += 1

    monkeypatch.setattr(direct, "decode_pages", scribbled)
    with pytest.raises(KVTierError, match="not those that were written"):
        gpu_direct.measure(Run(1, tiny=True), card, *DIRECT, tmp_path)


def test_pages_that_took_the_way_through_host_memory_are_no_figure_of_the_direct_one(card, tmp_path):
    card.files.failures = [None, None, OSError(5, "a cosmic ray")]  # first it is tried, for the row and by the store
    with pytest.raises(KVTierError, match="not proven directly"):
        gpu_direct.measure(Run(1, tiny=True), card, *DIRECT, tmp_path)


def test_the_verdict_names_floors_in_both_directions():
    good = [Row("pages.d2h", 9.5, "GB/s", 10.0), Row("decode.step", 1.0, "us", 1.0)]
    assert gpu.verdict(good) == "all floors met"
    bad = [Row("pages.d2h", 8.9, "GB/s", 10.0), Row("decode.step", 1.1, "us", 1.0)]
    assert gpu.verdict(bad) == "floors not met: pages.d2h, decode.step"


def test_a_sparse_product_that_is_another_one_is_no_figure(card, monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.zeros_like)
    with pytest.raises(KVTierError, match="semi-structured product is not that of"):
        gpu_kernels.sparse_product(Run(1, tiny=True), card, gpu_timing.TINY)


@pytest.mark.slow
def test_the_check_covers_every_format_and_passes_on_the_reference(card):
    assert gpu_check.check(card) >= 2 * len(gpu_check.FORMATS)


@pytest.mark.parametrize("fault", ["decode", "encode"])
def test_the_check_finds_wrong_kernels(card, monkeypatch, fault):
    monkeypatch.setattr(gpu_check, "FORMATS", ("q8",))

    def wrong_decode(form, payloads, target, *rest):
        on_device.decode_pages(form, payloads, target, *rest)
        target.views[0][0][gpu_check.PAGES + 2] += 1

    def wrong_encode(form, source, blocks, out, *rest):
        on_device.encode_pages(form, source, blocks, out, *rest)
        out[:, 5] ^= 0x55

    monkeypatch.setattr(lane, f"{fault}_pages", wrong_decode if fault == "decode" else wrong_encode)
    with pytest.raises(KVTierError, match="what the GPU decoded" if fault == "decode" else "the GPU's encoding is off"):
        gpu_check.check(card)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_without_a_gpu_there_is_one_clear_error():
    done = CliRunner().invoke(app, ["bench", "gpu", "--tiny"])
    assert done.exit_code != 0
    assert "bench gpu needs an NVIDIA GPU" in str(done.exception)
