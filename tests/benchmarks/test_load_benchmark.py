"""The load benchmark plays what it was asked for, and fails when a request does or when a page comes back wrong."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.load import Service, Shape, plan
from benchmarks.rig import TINY_LAYOUT, Room, open_cache, token_ids
from kvtier.cache import TieredKVCache
from kvtier.cli import bench, main
from kvtier.errors import IntegrityError


def test_a_tiny_run_plays_every_combination(capsys, tmp_path: Path):
    plot, folder = tmp_path / "plot.svg", tmp_path / "disk"
    folder.mkdir()
    options = ["--batch", "1,2", "--sequence-tokens", "64", "--concurrency", "2", "--rate", "30", "--path", str(folder)]
    assert main(["bench", "load", "--tiny", *options, "--json", "-", "--plot", str(plot)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    figures = {"tokens", "hit_rate", "unserved", "short", "error_rate"}
    figures |= {f"window.{what}" for what in ("min", "median", "max")} | {f"latency.{what}" for what in ("mean", "p50", "p95", "p99")}
    figures |= {f"{what}.{tier}" for what in ("hit_rate", "utilisation") for tier in ("device", "host", "disk")}
    shapes = ("load.1x64.c2.r30", "load.2x64.c2.r30")
    assert set(rows) == {f"{shape}.{figure}" for shape in shapes for figure in figures}
    for shape in shapes:
        values = {figure: rows[f"{shape}.{figure}"]["value"] for figure in figures}
        assert values["error_rate"] == 0
        assert 0 < values["hit_rate"] <= 1
        assert values["hit_rate"] == pytest.approx(sum(values[f"hit_rate.{tier}"] for tier in ("device", "host", "disk")))
        assert all(0 < values[f"utilisation.{tier}"] <= 1 for tier in ("device", "host", "disk"))
        assert values["latency.p50"] <= values["latency.p95"] <= values["latency.p99"]
        assert values["window.min"] <= values["window.median"] <= values["window.max"]
    assert list(folder.iterdir()) == []
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize("options", [["--rate", "1e12"], ["--duration", "1e18"]])
def test_more_requests_than_can_be_planned_are_one_clear_error(capsys, options):
    assert main(["bench", "load", *options]) == 2
    assert "at most 1,000,000" in capsys.readouterr().err


def test_an_interrupted_run_ends_at_once_with_its_threads_and_files(capsys, monkeypatch, tmp_path):
    ticks: list[int] = []

    def interrupted(*_):
        ticks.append(len(threading.enumerate()))
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtier.bench.load._watch", interrupted)
    options = ["--sequence-tokens", "64", "--rate", "0.01", "--duration", "600", "--ramp-up", "1", "--path", str(tmp_path)]
    assert main(["bench", "load", *options]) == 130
    assert ticks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load-")]
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_fails_fails_the_command(capsys, monkeypatch):
    lookup, calls = TieredKVCache.lookup, []

    def failing(self, *given):
        calls.append(given)
        if len(calls) == 50:
            raise RuntimeError("the disk fell off")
        return lookup(self, *given)

    monkeypatch.setattr(TieredKVCache, "lookup", failing)
    assert main(["bench", "load", "--tiny", "--sequence-tokens", "32", "--rate", "60"]) == 2
    assert "1 x RuntimeError: the disk fell off" in capsys.readouterr().err


def test_a_page_that_comes_back_as_another_one_is_an_error(monkeypatch):
    with open_cache(TINY_LAYOUT, Room(8, host=16)) as cache:
        service = Service(cache, 4)
        service.serve((1,), 0)
        service.serve((1,), 1)
        with cache.acquire(cache.lookup(token_ids(1, 4 * TINY_LAYOUT.page_tokens))) as lease:
            first, second = lease.slots().tolist()[:2]
            layers = [lease.layer(index) for index in range(TINY_LAYOUT.layers)]
        for layer in layers:
            layer[second] = layer[first]
        with pytest.raises(IntegrityError, match="another one or damaged"):
            service.serve((1,), 2)
        for layer in layers:
            layer[second] = torch.nan
        with pytest.raises(IntegrityError, match="another one or damaged"):
            service.serve((1,), 3)


def test_arrivals_are_the_same_every_time_and_climb_to_their_rate():
    shape = Shape(batch=2, tokens=64, concurrency=1, rate=200)
    requests = plan(shape, duration_s=20, ramp_up_s=10, sequences=32)
    assert requests == plan(shape, duration_s=20, ramp_up_s=10, sequences=32)
    moments = np.array([request.at_s for request in requests])
    assert (np.diff(moments) >= 0).all()
    assert moments[-1] < 20
    counts = np.histogram(moments, [0, 5, 10, 20])[0]
    assert counts == pytest.approx([250, 750, 2000], rel=0.15), "half the ramp has a quarter of its arrivals"
    assert all(len(set(request.sequences)) == 2 for request in requests)
    assert max(max(request.sequences) for request in requests) >= 32, "now and then somebody new comes"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--batch", "0"),
        ("--batch", "many"),
        ("--concurrency", "0"),
        ("--sequence-tokens", "8"),
        ("--ramp-up", "99"),
        ("--duration", "-1"),
        ("--layout", "gpt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments):
    assert main(["bench", "load", "--tiny", *arguments]) == 2
    err = capsys.readouterr().err
    assert arguments[0] in err
    assert "Traceback" not in err


def test_a_short_run_needs_no_word_about_its_ramp_up(monkeypatch):
    given = {}
    monkeypatch.setattr(bench, "measured", lambda *_, **options: given.update(options))
    assert main(["bench", "load", "--duration", "2"]) == 0
    assert (given["duration_s"], given["ramp_up_s"]) == (2, 0.5)
    assert main(["bench", "load", "--duration", "2", "--ramp-up", "0"]) == 0
    assert given["ramp_up_s"] == 0
