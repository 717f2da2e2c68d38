"""`kvtier numa`: works on the machine there is, for people and for machines; bad input is one line."""

from __future__ import annotations

import json
import os

from kvtier.cli import main


def test_topo_shows_this_machine(capsys):
    assert main(["numa", "topo", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["nodes"]
    assert set(shown["allowed"]["affinity"]) <= {cpu["id"] for cpu in shown["cpus"]}
    assert "This process may use CPUs" in err


def test_bench_measures_and_says_whether_binding_pays(capsys):
    assert main(["numa", "bench", "--tiny", "--repeats", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["read_gb_per_s"]
    assert shown["comparison"]["verdict"] in err.replace("\n", " ")
    assert (shown["device_copies"] == []) == ("there is no CUDA device" in err)
    counted = shown["counters"]
    assert {"node-loads", "node-load-misses"} == set(counted["counts"]) | set(counted["refused"])


def test_stats_counts_what_the_kernel_and_the_processor_count(capsys):
    assert main(["numa", "stats", "--seconds", "0", "--pid", str(os.getpid()), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["process"]["bytes_by_node"]
    assert set(shown["uncore"]) == {"counts", "units", "refused"}
    assert shown["uncore"]["units"] or "describes no such counters" in err


def test_layout_says_who_has_what_and_how_to_configure_it(capsys):
    assert main(["numa", "layout", "--layers", "32", "--kv-heads", "8", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert sum(part["layers"][1] - part["layers"][0] for part in shown["parts"]) == 32
    assert "host.numa: layers" in err
    assert main(["numa", "layout", "--layers", "32", "--kv-heads", "8", "--split", "heads"]) == 0
    assert "one process and cache per node" in capsys.readouterr().out


def test_bad_input_of_layout_is_one_line(capsys):
    for options, message in (
        (["--split", "tokens"], "expected layers, heads or both"),
        (["--nodes", "99"], "there is no NUMA node 99"),
        (["--nodes", "x"], "not a list of CPUs or nodes"),
    ):
        assert main(["numa", "layout", "--layers", "4", *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.strip().splitlines()) == 1
