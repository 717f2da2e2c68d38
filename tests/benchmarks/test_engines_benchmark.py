"""The benchmark of engines refuses what it cannot do before it starts any, and compares like with like. Real ones: `tests/engines_real`."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import engines, serving
from benchmarks.contestants import LAYOUT, SYSTEMS, Place
from benchmarks.engines_report import Seen, Spent, Turn, outcome, plot, rows, to_fastest
from benchmarks.measure import Run
from benchmarks.serving import Answer, Engine, EngineSetUp, Serving, drop_from_page_cache
from benchmarks.workloads import WORKLOADS, Sizes
from kvtier.cli import main
from kvtier.errors import KVTierError

ALONE = importlib.util.find_spec("vllm") is None


@pytest.mark.skipif(not ALONE, reason="vLLM is here")
def test_without_vllm_it_is_one_line_that_names_the_environment(capsys):
    assert main(["bench", "engines", "--tiny"]) == 2
    err = capsys.readouterr().err
    assert "vLLM is not installed" in err
    assert "make test-engines" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"systems": ["kvtier-q9"]}, "--systems kvtier-q9: expected some of plain"),
        ({"workloads": ["chats"]}, "--workload chats: expected some of documents, chat, agent, no-reuse"),
        ({"systems": ["kvtier-q8", "lmcache-fs"]}, "compares lmcache-fs with a plain engine; name plain among --systems too"),
        ({"contexts": 3}, "--contexts 3"),
        ({"rounds": 0}, "--rounds 0"),
        ({"document_tokens": 100}, "--document-tokens 100"),
    ],
)
def test_options_that_make_no_sense_are_refused(monkeypatch, options, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(KVTierError, match=says):
        engines.measure(Run(1), **options)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("sizes", [Sizes(4, 400, 1), Sizes(5, 3000, 3)])
def test_what_a_request_says_was_sent_before_was_and_what_comes_back_was_pushed_out_meanwhile(name, sizes):
    workload = WORKLOADS[name](sizes)
    own_blocks = blocks_of(max(make(sizes).longest for make in WORKLOADS.values())) + 2
    sent: list[list[int]] = []
    for request in (request for each in (*workload.rounds, *workload.after_restart) for request in each):
        known = request.prompt[: request.known_tokens]
        assert (request.case == "cold") >= (not known)
        assert request.prompt not in sent
        if known:
            place = max(number for number, prompt in enumerate(sent) if prompt[: len(known)] == known)
            assert request.case != "own" or place == len(sent) - 1
            if request.case != "own" and name != "agent":
                assert sum(blocks_of(len(prompt)) for prompt in sent[place + 1 :]) + blocks_of(len(request.prompt)) > own_blocks
        sent.append(request.prompt)


def blocks_of(tokens: int) -> int:
    return -(-(tokens + engines.NEW_TOKENS) // 128)


def test_agents_together_are_more_than_the_engines_own_cache_and_share_their_beginning():
    workload = WORKLOADS["agent"](Sizes(4, 3000, 1))
    own_blocks = blocks_of(WORKLOADS["documents"](Sizes(4, 3000, 1)).longest) + 2
    assert sum(len(request.prompt) - request.known_tokens for request in workload.rounds[0]) // 128 > own_blocks
    firsts = [request.prompt for request in workload.rounds[0] if request.case == "cold"]
    assert len(firsts) == 4
    assert len({tuple(prompt[:1000]) for prompt in firsts}) == 1
    assert len({tuple(prompt[:1100]) for prompt in firsts}) == 4


def test_all_get_memory_for_the_same_number_of_pages(tmp_path):
    place = Place(tmp_path, 1, memory_pages=40, disk_pages=90)

    def told(name: str) -> dict[str, Any]:
        connector = SYSTEMS[name].connector
        assert connector is not None
        extra: dict[str, Any] = connector(place)["kv_connector_extra_config"]
        return extra

    vllm, q8, raw = told("vllm-fs"), told("kvtier-q8"), told("kvtier-raw")
    assert vllm["cpu_bytes_to_use"] == 40 * LAYOUT.page_bytes
    assert 40 * LAYOUT.page_bytes <= raw["host.capacity_bytes"] < 41 * LAYOUT.page_bytes
    share = 8.25 / {"bf16": 16, "fp32": 32}[LAYOUT.dtype]
    assert share <= q8["host.capacity_bytes"] / vllm["cpu_bytes_to_use"] < share + 0.02
    assert share <= q8["disk.capacity_bytes"] / (90 * LAYOUT.page_bytes) < share + 0.02


class Stub:
    """Stands for an engine: takes a second, or a tenth where something is behind it, which finds what it was not to pass over."""

    def __init__(self, asked, name, restless):
        self.asked, self.name, self.engine, self.restless = asked, name, self, restless
        self.passed_over: list[list[int]] = []

    def cpu_s(self):
        return float(len(self.asked))

    def ask(self, prompt, new_tokens, passed_over=False):
        assert self.restless <= {self.name}, "nobody is asked beside what another one has not done yet"
        self.restless.add(self.name)
        self.asked.append((self.name + " passes over" * passed_over, prompt))
        self.passed_over += [prompt] * passed_over
        found = 0 if self.name == "plain" or prompt in self.passed_over else len(prompt)
        return Answer(0.1 if found else 1.0, 2.0, found, new_tokens)

    def settle(self):
        self.restless.discard(self.name)


def test_every_request_is_asked_of_all_in_turn_and_of_the_durable_ones_after_a_restart(monkeypatch, tmp_path):
    asked: list[tuple[str, list[int]]] = []
    starts: list[tuple[str, int]] = []
    restless: set[str] = set()

    @contextlib.contextmanager
    def stubbed(name, set_up, memory_pages, disk_pages, room):
        starts.append((name, memory_pages))
        yield Stub(asked, name, restless)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(engines, "serving", stubbed)
    monkeypatch.setattr(engines, "bytes_on_disk", lambda store: 1000)
    monkeypatch.setitem(sys.modules, "kvtier.engines.models", SimpleNamespace(packaged_model=lambda: tmp_path))
    systems = ["plain", "lmcache-ram", "kvtier-q8"]
    made = {row.name.removeprefix("engines."): row.value for row in engines.measure(Run(1, tiny=True), systems, path=tmp_path)}
    alone = ["plain", "lmcache-ram", "kvtier-q8", "lmcache-ram", "plain", "kvtier-q8"]
    assert [name for name, _ in starts] == [*systems, "kvtier-q8", *alone], "without reuse, or with a plain engine"
    assert starts[3][1] < starts[2][1], "little memory after the restart"
    documents = [(name, tuple(prompt)) for name, prompt in asked if len(prompt) == 440]
    assert len(documents) == 4 * (3 * 3 + 2)
    for turn in range(12):
        names, prompts = zip(*documents[3 * turn : 3 * turn + 3], strict=True)
        assert sorted(names) == sorted(systems)
        assert len(set(prompts)) == 1
    assert {documents[3 * turn][0] for turn in range(8)} == set(systems), "each comes first at times"
    assert made["kvtier-q8.documents.restart"] == 0.1
    assert made["plain.chat.ram"] == 1.0
    assert "kvtier-q8.no_reuse" in made
    unique = [name for name, prompt in asked if len(prompt) == 400]
    kept, not_kept, looked = "kvtier-q8", "kvtier-q8 passes over", ["kvtier-q8"] * 2
    turns = [["lmcache-ram", "plain", kept, not_kept], ["plain", "lmcache-ram", not_kept, kept]]
    in_a_row = [[name for name in turn for _ in range(engines.UNIQUE_IN_A_ROW)] for turn in turns]
    assert unique == [*in_a_row[0], *looked, *in_a_row[1], *looked], "one right after the other, then the others; last, what was kept"
    assert "plain.no_reuse" not in made
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("deaf", "says"), [(True, "were found of a prompt of 400 .* passed over"), (False, "0 tokens were .* kept")])
def test_a_cache_that_keeps_what_it_was_to_pass_over_or_nothing_stops_the_measurement(monkeypatch, tmp_path, deaf, says):
    class Wrong(Stub):
        def ask(self, prompt, new_tokens, passed_over=False):
            return super().ask(prompt, new_tokens, passed_over=not deaf)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(engines, "serving", lambda name, *_: contextlib.nullcontext(Wrong([], name, set())))
    monkeypatch.setitem(sys.modules, "kvtier.engines.models", SimpleNamespace(packaged_model=lambda: tmp_path))
    with pytest.raises(KVTierError, match=f"kvtier-q8, no-reuse: .*{says}"):
        engines.measure(Run(1, tiny=True), ["kvtier-q8"], ["no-reuse"], path=tmp_path)


def test_an_engine_that_ended_is_an_error_with_what_it_said_last(monkeypatch, tmp_path):
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\necho out of memory >&2\necho '{}'\n")
    program.chmod(0o755)
    monkeypatch.setattr("benchmarks.serving.sys", SimpleNamespace(executable=str(program)))
    engine = Engine("kvtier-q8", EngineSetUp({}, 1, [0]), None, tmp_path / "log")
    engine.child.wait()
    with pytest.raises(KVTierError, match="the engine of kvtier-q8 ended.*\n.*out of memory"):
        engine.ask([1, 2, 3], 1)
    engine.stop()


def answers(seconds: float) -> list[Answer]:
    return [Answer(seconds * factor, 2 * seconds, 256, 8) for factor in (0.5, 1, 9)]


def seen(ram: float, disk: float, disk_bytes: int) -> Seen:
    cases = {"cold": answers(1.0), "ram": answers(ram), "disk": answers(disk)}
    found = Seen({("documents", case): given for case, given in cases.items()}, {"documents": 3.0}, {"documents": 600}, {"documents": 4.0})
    found.disk_bytes = disk_bytes
    found.no_reuse = [Turn(Spent([1.0, 2.0 * more], 12.0), Spent([1.0, 1.0], 10.0)) for more in (1.02, 1.06, 1.03)]
    return found


def test_kvtier_is_compared_with_the_better_peer_of_each_case_and_with_a_plain_engines_own_cache():
    plain = Seen({("documents", "own"): answers(0.04), ("documents", "ram"): answers(0.01)})
    found = {"vllm-fs": seen(0.2, 0.3, 100), "lmcache-fs": seen(0.1, 0.4, 80), "kvtier-q8": seen(0.05, 0.6, 40)}
    made = {row.name.removeprefix("engines."): row for row in rows({"plain": plain} | found)}
    assert made["kvtier-q8.documents.ram"].value == 0.05
    assert made["kvtier-q8.documents.ram"].ceiling == 0.04
    assert made["kvtier-q8.documents.ram.p95"].value == pytest.approx(0.45)
    assert made["kvtier-q8.documents.ram.to_peer"].value == pytest.approx(0.05 / 0.1)
    assert made["kvtier-q8.documents.disk.to_peer"].value == pytest.approx(0.6 / 0.3)
    assert made["kvtier-q8.documents.tokens"].value == 150
    assert made["kvtier-q8.disk_bytes"].ratio == pytest.approx(40 / 80)
    assert made["kvtier-q8.no_reuse"].value == pytest.approx((1.0 + 2.06) / 2 - 1)
    assert 0 < made["kvtier-q8.no_reuse.error"].value < 0.04
    assert made["kvtier-q8.no_reuse.cpu"].value == pytest.approx(0.2)
    assert "vllm-fs.documents.ram.to_peer" not in made


def test_what_slows_the_machine_for_one_request_slows_all_and_weighs_as_much_as_any_other():
    slow = [1.0, 1.0, 5.0, 5.0]  # in other requests the machine is five times as slow
    theirs = [Answer(factor * 0.4, 1.0, 256, 8) for factor in slow]
    ours = [Answer(factor * share, 1.0, 256, 8) for factor, share in zip(slow, [0.3, 0.3, 0.4, 0.2], strict=True)]
    assert to_fastest(ours, [answers(9.0), theirs]) == pytest.approx(0.3 / 0.4)


def test_the_drawing_has_a_panel_per_workload(tmp_path):
    pytest.importorskip("matplotlib")
    plot(rows({"vllm-fs": seen(0.2, 0.3, 100), "kvtier-q8": seen(0.05, 0.6, 40)}), tmp_path / "engines.svg")
    assert "documents" in (tmp_path / "engines.svg").read_text()


def test_dropping_files_from_the_page_cache_keeps_their_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 10000)
    drop_from_page_cache(tmp_path)
    assert (tmp_path / "a" / "file").read_bytes() == b"x" * 10000


def test_a_system_is_at_rest_when_it_takes_no_more_processor_time(monkeypatch, tmp_path):
    took = itertools.chain([1.0, 1.5, 1.9, 1.9], itertools.count(2.0))
    monkeypatch.setattr(serving, "LOOK_S", 0.001)
    monkeypatch.setattr(Serving, "cpu_s", lambda _: next(took))
    Serving(cast(Any, None), None).settle()
    assert next(took) == 2.0, "it looked until nothing was added, and no longer"
    monkeypatch.setattr(serving, "SETTLE_S", 0.05)
    Serving(cast(Any, None), None).settle()
    assert next(took) > 3.0, "one that never rests is not waited for without end"


def test_what_another_system_did_not_find_is_counted_and_compared_with_nothing():
    def each(*seconds: float) -> list[Answer]:
        return [Answer(one, 10.0, 0 if one == 9.0 else 256, 8, missed=one == 9.0) for one in seconds]

    seen = {
        "lmcache-fs": Seen({("agent", "ram"): each(0.4, 0.2, 9.0), ("agent", "disk"): each(9.0)}),
        "vllm-fs": Seen({("agent", "ram"): each(0.9, 0.9, 0.9), ("agent", "disk"): each(0.8)}),
        "kvtier-q8": Seen({("agent", "ram"): each(0.2, 0.2, 0.1), ("agent", "disk"): each(0.2)}),
    }
    value = {row.name.removeprefix("engines."): row.value for row in rows(seen)}
    assert value["lmcache-fs.agent.ram"] == pytest.approx(0.3)
    assert value["lmcache-fs.agent.ram.missed"] == value["lmcache-fs.agent.disk.missed"] == 1
    assert "lmcache-fs.agent.disk" not in value
    assert "vllm-fs.agent.ram.missed" not in value
    assert value["kvtier-q8.agent.ram.to_peer"] == pytest.approx(0.75), "beside LMCache, in the two that it found"
    assert value["kvtier-q8.agent.disk.to_peer"] == pytest.approx(0.25), "beside vLLM's tiers"
    assert outcome(seen["lmcache-fs"]) == "agent: memory 0.300 (1 of 3 missed), disk nan (1 of 1 missed) s"
