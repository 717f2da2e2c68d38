"""Laws checked of the connector's scheduler, without an engine: what is asked of the workers, and that only what all of them say counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvtier.config import load_config
from kvtier.engines.vllm import requests, scheduler
from kvtier.engines.vllm.messages import Hello, LoadDone, RankReport, WorkerReport
from kvtier.engines.vllm.scheduler import SchedulerSide
from kvtier.engines.vllm.settings import Settings
from kvtier.engines.vllm.storing import MOST_STORING
from kvtier.engines.weights import adapter_revision
from kvtier.errors import ConfigError
from kvtier.layout import PageLayout

PAGE = 4
LAYOUT = PageLayout(2, 2, PAGE, 1, 8, "fp32")


class Engine:
    """vLLM's scheduler as far as the connector sees it."""

    def __init__(self, workers=1, events=False, **settings):
        config = load_config(env={}, overrides={key.replace("__", "."): value for key, value in settings.items()})
        self.side = SchedulerSide(Settings(config, LAYOUT, b"namespace", workers), events)
        self.workers = workers
        hellos = {rank: Hello(rank, ["device", "host"], [512, 512], RankReport(0)) for rank in range(workers)}
        self.side.greet(hellos)
        self.blocks: dict[str, list[int]] = {}

    def request(self, name, tokens, salt=None, lora=None, params=None):
        request = SimpleNamespace(
            request_id=name,
            all_token_ids=list(tokens),
            num_tokens=len(tokens),
            num_computed_tokens=0,
            prompt_embeds=None,
            lora_request=lora,
            cache_salt=salt,
            mm_features=[],
            skip_reading_prefix_cache=False,
            kv_transfer_params=params,
        )
        self.side.on_new_request(request)
        return request

    def step(self, *scheduled, first_block=0):
        """Compute the whole of these new requests; the plan."""
        new = []
        for request in scheduled:
            count = -(-request.num_tokens // PAGE)
            self.blocks[request.request_id] = list(range(first_block, first_block + count))
            first_block += count
            new.append(SimpleNamespace(req_id=request.request_id, num_computed_tokens=0, block_ids=(self.blocks[request.request_id],)))
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={request.request_id: request.num_tokens for request in scheduled},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (self.blocks[name],)),
            kv_cache_block_copies=None,
        )
        return self.side.plan(output)

    def stored(self, plan, ranks=None, generation=0):
        """These workers ended all stores of `plan`."""
        done = {}
        for rank in range(self.workers) if ranks is None else ranks:
            masks = {key: 0b10 for job in plan.stores for key in job.keys}
            done[rank] = RankReport(generation, masks, [job.number for job in plan.stores])
        first, *others = (WorkerReport({rank: report}) for rank, report in done.items())
        for other in others:
            first = first.aggregate(other)
        self.side.heard(first)


def test_the_greeting_of_another_connectors_workers_is_refused():
    with pytest.raises(ConfigError, match="Greeting.*MultiConnector hands all its connectors the first one's; use kvtier's alone"):
        Engine().side.greet({0: type("Greeting", (), {})()})


def test_full_pages_are_stored_once_and_then_found():
    engine = Engine()
    first = engine.request("a", range(11))
    plan = engine.step(first)
    assert [(job.depth, job.blocks) for job in plan.stores] == [(0, [0, 1])]
    assert engine.side.matched(engine.request("b", range(11)), 0) is None, "its pages are being stored"
    engine.stored(plan)
    assert engine.side.matched(engine.request("c", range(11)), 0) == 8
    assert engine.side.matched(engine.request("d", range(8)), 0) == 4, "one token is left to compute"
    assert engine.side.matched(engine.request("e", range(11)), 4) == 4
    assert engine.side.matched(engine.request("f", range(11), "salt"), 0) == 0
    assert engine.step(engine.request("g", range(11))).stores == []


def test_a_request_says_how_much_of_it_is_stored():
    engine = Engine()
    assert engine.step(engine.request("a", range(11), params={"max_offload_tokens": 0})).stores == []
    plan = engine.step(engine.request("b", range(11), params={"max_offload_tokens": 7}))
    assert [job.blocks for job in plan.stores] == [[0]], "the second page holds its eighth token"
    engine.stored(plan)
    assert engine.side.matched(engine.request("c", range(11)), 0) == 4
    for name in "ab":
        engine.side.finished(SimpleNamespace(request_id=name))
    assert "skipped_pages" not in engine.side.counts.data, "what was not to be stored did not fail"
    assert [job.blocks for job in engine.step(engine.request("d", range(11))).stores] == [[1]], "others store what they have in common"


def test_a_request_says_how_much_is_loaded_for_it_and_waits_for_no_more():
    engine = Engine()
    plan = engine.step(engine.request("a", range(13)))
    assert engine.side.matched(engine.request("b", range(13), params={"max_load_tokens": 0}), 0) == 0, "it is being stored"
    engine.stored(plan)
    assert engine.side.matched(engine.request("c", range(13), params={"max_load_tokens": 7}), 0) == 4
    assert engine.side.matched(engine.request("d", range(13), params={"max_load_tokens": 7}), 4) == 4, "beyond what vLLM has itself"


@pytest.mark.parametrize("said", [-1, True, "0", 2.5, [0]])
def test_limits_that_are_none_are_taken_as_0_and_the_log_says_so(said, monkeypatch):
    warned = []
    monkeypatch.setattr(requests.log, "warning", lambda message, *values: warned.append(message % values))
    engine = Engine()
    engine.stored(engine.step(engine.request("a", range(9))))
    assert engine.side.matched(engine.request("b", range(9), params={"max_load_tokens": said}), 0) == 0
    assert engine.step(engine.request("c", range(50, 59), params={"max_offload_tokens": said})).stores == []
    assert warned == [
        f"kvtier: {name}: expected a number of tokens, 0 or more, not {said!r}; taken as 0"
        for name in ("max_load_tokens of request b", "max_offload_tokens of request c")
    ]


@pytest.mark.parametrize("params", ["none of it", "", [], False])
def test_a_request_whose_parameters_are_no_mapping_is_neither_stored_nor_loaded(params):
    engine = Engine()
    engine.stored(engine.step(engine.request("a", range(9))))
    assert engine.side.matched(engine.request("b", range(9), params=params), 0) == 0
    assert engine.step(engine.request("c", range(50, 59), params=params)).stores == []


@pytest.mark.parametrize("params", [None, {}, {"max_offload_tokens": None, "max_load_tokens": None}])
def test_a_request_that_says_nothing_of_it_has_no_limits(params):
    engine = Engine()
    plan = engine.step(engine.request("a", range(9), params=params))
    assert [job.blocks for job in plan.stores] == [[0, 1]]
    engine.stored(plan)
    assert engine.side.matched(engine.request("b", range(9), params=params), 0) == 8


def test_a_page_is_found_when_all_workers_have_stored_it():
    engine = Engine(workers=2)
    plan = engine.step(engine.request("a", range(9)))
    engine.stored(plan, [1])
    assert engine.side.matched(engine.request("b", range(9)), 0) is None
    engine.stored(plan, [0])
    assert engine.side.matched(engine.request("c", range(9)), 0) == 8
    gone = {plan.stores[0].keys[1]: 0}
    engine.side.heard(WorkerReport({1: RankReport(0, gone)}))
    assert engine.side.matched(engine.request("d", range(9)), 0) == 4


def test_blocks_that_are_overwritten_name_the_jobs_that_read_them():
    engine = Engine()
    plan = engine.step(engine.request("a", range(8)), first_block=0)
    assert engine.step(engine.request("b", range(100, 108)), first_block=2).overwritten == []
    assert engine.step(engine.request("c", range(200, 208)), first_block=1).overwritten == [
        plan.stores[0].number,
        plan.stores[0].number + 1,
    ]
    engine.stored(plan)
    assert plan.stores[0].number not in engine.step(engine.request("d", range(300, 308)), first_block=0).overwritten


def test_what_is_being_loaded_is_not_loaded_twice():
    engine = Engine()
    engine.stored(engine.step(engine.request("a", range(9))))
    loading, waiting = engine.request("b", range(9)), engine.request("c", range(9))
    assert engine.side.matched(loading, 0) == 8
    engine.side.allocated(loading, [7, 8, 9], 8)
    assert engine.side.matched(waiting, 0) is None
    assert [(load.request_id, load.blocks) for load in engine.step().loads] == [("b", [7, 8])]
    engine.side.heard(WorkerReport({0: RankReport(0, loads=[LoadDone("b", 2, 0.1)])}))
    engine.side.received(["b"])
    assert engine.side.matched(waiting, 0) == 8


def with_slow_tiers(**settings):
    """An engine that has two pages of a prompt of 9 tokens, and has learned that loading a page takes 1 s and computing its tokens 1 ms."""
    engine = Engine(**settings)
    engine.stored(engine.step(engine.request("a", range(9))))
    prices = engine.side._prices
    assert prices is not None
    for pages in (1, 2, 3, 4):
        prices.restored([0, pages * 512], float(pages))
        prices.computed(0, pages * PAGE, pages / 1000)
    return engine


def test_what_is_faster_to_compute_is_not_loaded_however_often_vllm_asks():
    engine = with_slow_tiers()
    request = engine.request("b", range(9))
    assert {engine.side.matched(request, 0) for _ in range(20_000)} == {0}
    assert "declined_tokens" not in engine.side.counts.data, "nothing came of these questions yet"
    engine.side.allocated(request, [7, 8, 9], 0)
    engine.side.allocated(request, [7, 8, 9], 0)
    assert engine.side.counts.data["declined_tokens"] == {"": 8}
    assert engine.step().loads == []


def a_clock_to_turn(monkeypatch):
    """The scheduler's clock, which hardly moves by itself; the function that moves it."""
    now_s = [100.0]

    def read():
        now_s[0] += 1e-6
        return now_s[0]

    def later(seconds):
        now_s[0] += seconds

    monkeypatch.setattr("kvtier.engines.vllm.scheduler.time.perf_counter", read)
    return later


@pytest.mark.parametrize("what", ["stored", "loaded"])
def test_who_waited_long_enough_for_pages_computes(what, monkeypatch):
    engine, later = Engine(mover__patience_s=3), a_clock_to_turn(monkeypatch)
    plan = engine.step(engine.request("a", range(9)))
    if what == "loaded":
        engine.stored(plan)
        loading = engine.request("b", range(9))
        assert engine.side.matched(loading, 0) == 8
        engine.side.allocated(loading, [4, 5, 6], 8)
    waiting = engine.request("c", range(9))
    assert engine.side.matched(waiting, 0) is None
    later(2.9)
    assert engine.side.matched(waiting, 0) is None
    later(0.2)
    assert engine.side.matched(waiting, 0) == 0
    engine.side.allocated(waiting, [7, 8, 9], 0)
    assert engine.side.counts.data["late"] == {"": 1}


def test_a_load_has_the_time_that_its_request_has_not_waited_yet(monkeypatch):
    engine, later = Engine(mover__patience_s=3), a_clock_to_turn(monkeypatch)
    plan = engine.step(engine.request("a", range(9)))
    waiting = engine.request("b", range(9))
    assert engine.side.matched(waiting, 0) is None
    later(2.0)
    engine.stored(plan)
    assert engine.side.matched(waiting, 0) == 8
    engine.side.allocated(waiting, [7, 8, 9], 8)
    assert [load.within_s for load in engine.step().loads] == [pytest.approx(1.0, abs=0.1)]
    engine.side.heard(WorkerReport({0: RankReport(0, loads=[LoadDone("b", 0, 1.0, late=True)])}))
    assert engine.side.counts.data["late"] == {"": 1}
    prices = engine.side._prices
    assert prices is not None
    assert prices.restoring.observations == 1, "the next ones know that it takes so long"


def test_time_in_which_vllm_has_no_place_for_a_request_is_no_wait_for_pages(monkeypatch):
    engine, later = Engine(mover__patience_s=3), a_clock_to_turn(monkeypatch)
    plan = engine.step(engine.request("a", range(9)))
    waiting = engine.request("b", range(9))
    assert engine.side.matched(waiting, 0) is None
    engine.stored(plan)
    for _ in range(9):  # others have the places, so vLLM does not ask
        later(1.0)
        engine.step()
    assert engine.side.matched(waiting, 0) == 8
    engine.side.allocated(waiting, [7, 8, 9], 8)
    assert [load.within_s for load in engine.step().loads] == [pytest.approx(3.0, abs=0.1)]


def test_a_request_that_runs_has_its_patience_again_when_it_is_preempted(monkeypatch):
    engine, later = Engine(mover__patience_s=3), a_clock_to_turn(monkeypatch)
    plan = engine.step(engine.request("a", range(9)))
    waiting = engine.request("b", range(9))
    assert engine.side.matched(waiting, 0) is None
    later(3.1)
    assert engine.side.matched(waiting, 0) == 0
    engine.side.allocated(waiting, [7, 8, 9], 0)
    engine.stored(plan)
    later(60.0)
    assert engine.side.matched(waiting, 0) == 8
    engine.side.allocated(waiting, [7, 8, 9], 8)
    assert [load.within_s for load in engine.step().loads] == [pytest.approx(3.0, abs=0.1)]


def test_a_load_that_had_hardly_any_time_does_not_look_fast():
    engine = with_slow_tiers()
    prices = engine.side._prices
    assert prices is not None
    before = prices.restore_s([0, 1024])
    request = engine.request("b", range(9))
    engine.side.allocated(request, [7, 8, 9], 8)
    engine.step()
    engine.side.heard(WorkerReport({0: RankReport(0, loads=[LoadDone("b", 0, 0.001, late=True)])}))
    assert prices.restore_s([0, 1024]) == before


@pytest.mark.parametrize("late", [True, False])
def test_a_request_whose_pages_did_not_come_computes_them_though_vllm_asks_again(late):
    engine = Engine()
    engine.stored(engine.step(engine.request("a", range(9))))
    request = engine.request("b", range(9))
    assert engine.side.matched(request, 0) == 8
    engine.side.allocated(request, [7, 8, 9], 8)
    engine.step()
    engine.side.heard(WorkerReport({0: RankReport(0, loads=[LoadDone("b", 0, 1.0, late)])}))
    engine.side.received(["b"])
    assert engine.side.matched(request, 0) == 0, "it waited as long as it may"
    assert engine.side.matched(engine.request("c", range(9)), 0) == 8


def test_requests_for_an_adapter_that_nobody_knows_yet_are_passed_over(tmp_path):
    engine, folder = Engine(), tmp_path / "adapter"

    def request(name):
        return engine.request(name, range(9), lora=LoRARequest("adapter", 1, str(folder)))

    assert engine.step(request("a")).stores == []
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    engine.stored(engine.step(request("b")))
    assert engine.side.matched(request("c"), 0) == 8


def test_everything_is_loaded_where_the_configuration_says_always():
    engine = with_slow_tiers(mover__restore="always")
    assert engine.side.matched(engine.request("b", range(9)), 0) == 8


def test_an_adapter_that_is_loaded_anew_has_pages_of_its_own(tmp_path, monkeypatch):
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    engine, read = Engine(), []

    def reading(path):
        read.append(path)
        return adapter_revision(path)

    monkeypatch.setattr(requests, "adapter_revision", reading)

    def found(name, number, **more):
        adapter = LoRARequest("adapter", number, str(tmp_path), **more)
        return engine.side.matched(engine.request(name, range(9), lora=adapter), 0)

    engine.stored(engine.step(engine.request("a", range(9), lora=LoRARequest("adapter", 1, str(tmp_path)))))
    assert found("b", 1) == 8
    assert len(read) == 1, "the weights are read once, not for every request"
    weights.write_bytes(b"two")
    assert found("c", 1) == 8, "vLLM goes on with the weights it has"
    assert found("d", 1, load_inplace=True) == 0
    assert found("e", 2) == 0
    weights.write_bytes(b"one")
    assert found("f", 3) == 8


def test_stores_are_bounded_and_what_is_left_of_a_request_that_ends_is_counted():
    engine = Engine()
    pages = MOST_STORING + 5
    request = engine.request("a", range(pages * PAGE))
    plan = engine.step(request)
    assert sum(len(job.keys) for job in plan.stores) == MOST_STORING
    engine.side.finished(request)
    assert engine.side.counts.data["skipped_pages"] == {"busy": 5}
    engine.stored(plan)
    assert not engine.side._storing.pages
    assert not engine.side._storing._fences


def test_a_reset_forgets_at_once_and_late_reports_do_not_bring_pages_back():
    engine = Engine()
    late = engine.step(engine.request("a", range(9)))
    engine.side.reset()
    assert engine.side.must_step
    engine.stored(late, generation=0)
    assert engine.side.matched(engine.request("b", range(9)), 0) == 0
    assert engine.step().generation == 1
    engine.side.heard(WorkerReport({0: RankReport(1)}))
    assert not engine.side.must_step


def test_an_engine_without_requests_goes_on_until_blocks_are_copied_but_not_for_ever(monkeypatch):
    engine, later = Engine(mover__patience_s=3), a_clock_to_turn(monkeypatch)
    plan = engine.step(engine.request("a", range(9)))
    goes_on = {"copying": engine.side.must_step}  # who sleeps now takes away what is being read
    engine.stored(plan)
    goes_on["copied"] = engine.side.must_step
    engine.step(engine.request("b", range(100, 109)))
    later(3.1)
    goes_on["stuck"] = engine.side.must_step
    assert goes_on == {"copying": True, "copied": False, "stuck": False}


def test_what_is_kept_after_a_reset_has_keys_of_its_own():
    engine = Engine()
    waiting = engine.request("a", range(9))
    before = engine.step(engine.request("b", range(9))).stores[0].keys
    engine.side.reset()
    plan = engine.step(waiting)
    assert not set(plan.stores[0].keys) & set(before), "the weights may be others"
    engine.stored(plan, generation=1)
    assert engine.side.matched(engine.request("c", range(9)), 0) == 8


def test_what_a_running_request_computed_before_a_reset_is_not_kept():
    engine = Engine()
    running = engine.request("a", range(9))
    running.num_computed_tokens = 9
    engine.side.reset()
    assert engine.step(running).stores == []


def test_events_tell_of_tiers_in_vllms_words():
    engine = Engine(events=True)
    request = engine.request("a", range(9))
    request.block_hashes, request.session_id = [b"h0", b"h1"], None
    first, second = map(maybe_convert_block_hash, request.block_hashes)
    plan = engine.step(request)
    assert engine.side.events() == []
    engine.stored(plan)
    told = engine.side.events()
    assert [(type(event).__name__, event.block_hashes, event.medium) for event in told] == [
        ("BlockStored", [first], "CPU"),
        ("BlockStored", [second], "CPU"),
    ]
    assert told[1].parent_block_hash == first
    assert told[1].token_ids == [4, 5, 6, 7]
    engine.side.heard(WorkerReport({0: RankReport(0, {plan.stores[0].keys[1]: 0})}))
    assert [(type(event).__name__, event.block_hashes, event.medium) for event in engine.side.events()] == [
        ("BlockRemoved", [second], "CPU")
    ]
    engine.side.reset()
    assert [type(event).__name__ for event in engine.side.events()] == ["AllBlocksCleared"]


def test_workers_are_asked_how_full_they_are_now_and_then(monkeypatch):
    engine = Engine()
    assert [engine.step().levels for _ in range(3)] == [True, False, False]
    monkeypatch.setattr(scheduler, "LEVELS_EVERY_S", 0.0)
    assert engine.step().levels
