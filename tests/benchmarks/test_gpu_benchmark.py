"""The GPU benchmark runs, on a stand-in, and reports every row with its ceiling; its check finds a format that comes back wrong."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu, gpu_check
from benchmarks.measure import Row, Run
from kvtier.cli.app import app
from kvtier.errors import KVTierError
from kvtier.formats import on_device
from kvtier.mover import lane
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
    assert {*gpu.FLOORS, *gpu.CEILINGS, "prefix.restore", "sparse24.matmul", "digest.encode", "digest.score"} <= rows.keys()
    for way in ("d2h", "h2d"):
        assert rows[f"pages.{way}"].value in (rows[f"pages.{way}.copies"].value, rows[f"pages.{way}.kernel"].value)
        assert rows[f"crossover.{way}"].value > 0, "on a stand-in the kernel wins for small pages"
    assert all(row.ratio is not None for name, row in rows.items() if not name.startswith("copy."))
    assert all(row.value > 0 for name, row in rows.items() if name != "prefix.exposed")
    assert card.registered == {}, "everything is given back"


def test_the_verdict_names_floors_in_both_directions():
    good = [Row("pages.d2h", 9.5, "GB/s", 10.0), Row("decode.step", 1.0, "us", 1.0)]
    assert gpu.verdict(good) == "all floors met"
    bad = [Row("pages.d2h", 8.9, "GB/s", 10.0), Row("decode.step", 1.1, "us", 1.0)]
    assert gpu.verdict(bad) == "floors not met: pages.d2h, decode.step"


def test_a_sparse_product_that_is_another_one_is_no_figure(card, monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.zeros_like)
    with pytest.raises(KVTierError, match="semi-structured product is not that of"):
        gpu._sparse_product(Run(1, tiny=True), card, gpu.TINY)


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
