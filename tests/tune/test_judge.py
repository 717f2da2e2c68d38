"""What configurations find: halves, rooms, and the points of the space as configurations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.config import Config, load_config
from kvtier.errors import KVTierError
from kvtier.policy import POLICIES
from kvtier.replay.capacities import Capacity, Layout
from kvtier.replay.runs import replay_capacities, replay_tiers
from kvtier.replay.trace import Trace, build_trace
from kvtier.replay.workloads import make_requests
from kvtier.tune.judge import Judge, check_replayable, mean_first, mean_second
from kvtier.tune.rooms import Room, room_implied, rooms_given
from kvtier.tune.space import Raw, Space
from tests.replay.rig import trace_of, traces


def config_of(**keys: object) -> Config:
    return load_config(None, env={}, overrides={key.replace("__", "."): value for key, value in keys.items()})


def whole_ratio(trace: Trace, judge: Judge, config: Config) -> float:
    """From the two halves back to the whole."""
    (cell,) = judge.both_halves(config)
    half = trace.head(trace.requests // 2).tokens
    return (cell.first * half + cell.second * (trace.tokens - half)) / trace.tokens


@given(trace=traces(), requests=st.integers(1, 25))
def test_the_head_of_a_trace_is_the_trace_of_its_first_requests(trace, requests):
    head = trace.head(min(requests, trace.requests))
    assert head.requests == min(requests, trace.requests)
    assert head.accesses == head.lengths.sum() == len(head.parents) == len(head.depths)
    assert np.array_equal(head.pages, trace.pages[: head.accesses])
    assert head.tokens == int(trace.input_tokens[: head.requests].sum())
    assert (head.fingerprint == trace.fingerprint) == (head.requests == trace.requests)


@given(trace=traces(), name=st.sampled_from(POLICIES), share=st.integers(1, 60))
def test_the_search_sees_of_a_trace_what_the_whole_replay_finds_in_its_first_half(trace, name, share):
    if trace.requests < 2:
        return
    config = config_of(policy__name=name)
    judge = Judge([trace], rooms_given(config, f"{share}%", []))
    cells = judge.both_halves(config)
    assert judge.first_half(config) == pytest.approx(mean_first(cells))
    rows = replay_capacities([trace], [name], [Capacity.parse(f"{share}%")], None, lambda *_: None)
    assert whole_ratio(trace, judge, config) == pytest.approx(rows[0].token_hit_ratio)


@given(trace=traces(), name=st.sampled_from(["lru", "a2cr"]), writes=st.sampled_from(["write_back", "write_through_selective"]))
def test_tiers_are_replayed_as_configured(trace, name, writes):
    if trace.requests < 2 or trace.distinct < 2:
        return
    config = config_of(policy__name=name, host__write_policy=writes, host__selective_uses=3)
    judge = Judge([trace], rooms_given(config, None, ["device=10%,host=30%"]))
    assert judge.first_half(config) == pytest.approx(mean_first(judge.both_halves(config)))
    row = replay_tiers([trace], [name], [Layout.parse("device=10%,host=30%", writes, 3)], None, lambda *_: None)[0]
    assert whole_ratio(trace, judge, config) == pytest.approx(row.token_hit_ratio)
    assert judge.both_halves(config)[0].moved_pages == sum(move.pages for move in row.moved)


def test_admission_is_replayed_as_configured():
    trace = build_trace("chat", make_requests({"chat": 1.0}, 800, 3.4, 0))
    moved = {}
    for admission in ("auto", "always"):
        config = config_of(policy__admission=admission)
        judge = Judge([trace], rooms_given(config, None, ["device=1%,host=4%"]))
        row = replay_tiers([trace], ["a2cr"], [Layout.parse("device=1%,host=4%", admission=admission)], None, lambda *_: None)[0]
        moved[admission] = sum(move.pages for move in row.moved)
        assert judge.both_halves(config)[0].moved_pages == moved[admission]
        assert whole_ratio(trace, judge, config) == pytest.approx(row.token_hit_ratio)
    assert moved["auto"] < moved["always"]


def test_the_second_half_is_served_by_tiers_that_served_the_first():
    trace = trace_of([0, 1], [2], [0, 1], [2])
    judge = Judge([trace], rooms_given(config_of(), "100%", []))
    (cell,) = judge.both_halves(config_of())
    assert (cell.first, cell.second) == (0, 1)


def test_several_traces_and_rooms_count_alike():
    long, short = trace_of(*[[0]] * 10), trace_of([0], [1])
    judge = Judge([long, short], rooms_given(config_of(), "50%,100%", []))
    cells = judge.both_halves(config_of())
    assert [(cell.trace, cell.room) for cell in cells] == [("t", "50%"), ("t", "100%")] * 2
    assert mean_second(cells) == pytest.approx(0.5)


def test_parameters_of_the_classic_policy_arrive():
    """Two texts used often, long ago, and one used just now: what leaves depends on the decay."""
    trace = trace_of(*[[0]] * 8, *[[1]] * 3, [2], [0], [1], step_ms=10_000)
    found = []
    for decay in (1e-6, 10.0):
        keys = {"policy__name": "a2cr-classic", "policy__adaptive": False, "policy__time_decay_factor": decay}
        config = config_of(**keys, policy__frequency_weight=0.3, policy__recency_weight=0.3)
        found.append(Judge([trace], rooms_given(config, "2", [])).both_halves(config)[0].second)
    other = config_of(policy__name="a2cr-classic", policy__adaptive=False, policy__frequency_weight=0.0, policy__recency_weight=1.0)
    assert len({*found, Judge([trace], rooms_given(other, "2", [])).both_halves(other)[0].second}) > 1


def test_a_half_needs_a_request():
    with pytest.raises(KVTierError, match="t has 1 request; expected at least 2"):
        Judge([trace_of([0])], [])


def test_what_replay_cannot_tell_apart_is_refused():
    disk = {"path": "x", "write_policy": "write_through_selective", "selective_uses": 2}
    config = config_of(disk=disk, host__write_policy="write_through_selective", host__selective_uses=3)
    check_replayable(config, [Room("r", ("device", "host"), ())])
    with pytest.raises(KVTierError, match="make them equal"):
        check_replayable(config, [Room("r", ("device", "host", "disk"), ())])


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        (["host=1%,device=2%"], "expected tiers of a configuration, warmest first"),
        (["device=1%,tape=2%"], "expected tiers of a configuration"),
        (["device=1%,disk=2%"], "the configuration has no disk"),
        (["device=1%,host=2%", "device=1%"], "different tiers"),
    ],
)
def test_tiers_that_do_not_fit_the_configuration_are_refused(tiers, expected):
    with pytest.raises(KVTierError, match=expected):
        rooms_given(config_of(), None, tiers)


def test_capacities_follow_from_bytes_and_formats():
    trace = trace_of(*([page] for page in range(100)))
    config = config_of(device__capacity_bytes=1000, host__capacity_bytes=1000, host__format="q8")
    room = room_implied(config, [trace], 100)
    assert room.names == ("device", "host")
    device, host = room.pages(trace)
    assert device == 10
    assert 18 <= host <= 20
    assert room_implied(config_of(device__capacity_bytes=1000), [trace], 100).pages(trace) == [10, 100]
    with pytest.raises(KVTierError, match="hold no page of"):
        room_implied(config, [trace], 2000)
    with pytest.raises(KVTierError, match="nothing ever has to leave"):
        room_implied(config, [trace], 10)


@st.composite
def points(draw: st.DrawFn, space: Space) -> Raw:
    from kvtier.tune.space import Choice

    raw: Raw = {}
    while missing := [name for name in space.parameters(raw) if name not in raw]:
        for name in missing:
            kind = space.parameters(raw)[name]
            if isinstance(kind, Choice):
                raw[name] = draw(st.sampled_from(kind.values))
            else:
                raw[name] = draw(st.integers(int(kind.low), int(kind.high)) if kind.whole else st.floats(kind.low, kind.high))
    return raw


SPACE = Space.of(config_of(disk={"path": "x"}), POLICIES, ("host", "disk"))


@given(raw=points(SPACE))
def test_every_point_is_a_configuration(raw):
    values = SPACE.values(raw)
    config = load_config(None, env={}, overrides={"disk.path": "x"} | values)
    assert config.policy.name == raw["policy.name"]
    assert config.policy.frequency_weight + config.policy.recency_weight == pytest.approx(0.6)
    check_replayable(config, [Room("r", ("device", "host", "disk"), ())])


def test_a_policy_without_parameters_leaves_nothing_to_search():
    with pytest.raises(KVTierError, match="a2cr has no parameters"):
        Space.of(config_of(), ["a2cr"], ())
    assert Space.of(config_of(), ["a2cr"], ("host",)).first_points(config_of())
    assert Space.of(config_of(), ["a2cr-classic"], ()).first_points(config_of())
