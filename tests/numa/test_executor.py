"""Laws checked: work runs on its node, helpers come by distance and only when enough waits; failures, shutdown and bounds are orderly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kvtier.errors import Closed, NumaError
from kvtier.numa import executor as module
from kvtier.numa.binding import Bound, get_current_numa_node, this_machine
from kvtier.numa.executor import EAGER, PATIENT, NodeExecutor, NumaThreadPool, usable_nodes
from kvtier.numa.padded import PaddedCounters, cache_line_bytes
from kvtier.numa.topology import read_topology
from tests.numa.machines import A3, Machine, NodeSpec, build, write

NODES = usable_nodes(this_machine())


class Described:
    """An executor over a machine that is only described; its threads are bound to nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path, machine: Machine) -> None:
        self.topology = read_topology(build(tmp_path, machine))
        monkeypatch.setattr(module, "bind_thread_to_numa_node", lambda node: Bound(node, (), False, "only described"))

    def __call__(self, nodes: dict[int, int], **more) -> NodeExecutor:
        return NodeExecutor(nodes, topology=self.topology, **more)


def blocked(executor: NodeExecutor, node: int) -> Callable[[], None]:
    """Keep one thread of a node (or who helps it) busy until the answer is called."""
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert end.wait(20)

    executor.submit(node, work)
    assert begun.wait(20)
    return end.set


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def test_work_runs_on_its_node_and_results_come_in_order():
    with NumaThreadPool(2) as pool:
        seen = pool.map(lambda place: (place, get_current_numa_node()), range(20))
        assert [place for place, _ in seen] == list(range(20))
        wanted = [NODES[place % len(NODES)] for place in range(20)]
        stolen = sum(pool.executor.report()["taken"][level] for level in ("one_hop", "further"))
        assert sum(node != want for (_, node), want in zip(seen, wanted, strict=True)) <= stolen
        assert set(pool.executor.report()["nodes"]) == set(NODES)
        assert pool.executor.report()["not_bound"] == ""
        assert pool.map(len, [], []) == []


def test_a_failure_is_raised_once_nothing_runs_and_the_threads_live_on():
    with NumaThreadPool(1) as pool:
        done = []

        def work(item: int) -> int:
            if item == 3:
                raise ValueError("item 3")
            done.append(item)
            return item

        with pytest.raises(ValueError, match="item 3"):
            pool.map(work, range(50))
        assert done[:3] == [0, 1, 2] or len(NODES) > 1
        assert pool.map(work, [7, 8]) == [7, 8]
        with pytest.raises(NumaError, match="2 items for 1 nodes"):
            pool.map(work, [1, 2], [NODES[0]])


def test_after_a_failure_what_nobody_began_is_cancelled():
    go, done = threading.Event(), []

    def work(item: int) -> None:
        if item == 0:
            raise ValueError("item 0")
        assert go.wait(20)
        done.append(item)

    with NumaThreadPool(1, NODES[:1]) as pool:
        pending = pool.start(work, range(9))
        later = threading.Timer(0.3, go.set)
        later.start()
        with pytest.raises(ValueError, match="item 0"):
            pending.results()
        assert done == [1]


def test_helpers_come_by_distance_and_only_when_enough_waits(monkeypatch, tmp_path):
    """Nodes 0 and 1 share a socket of the eight-node machine, 7 is another socket: it leaves three waiting tasks to those nearer."""
    with Described(monkeypatch, tmp_path, A3)({0: 1, 1: 1, 7: 1}) as executor:
        ends = [blocked(executor, node) for node in (0, 1)]
        ran: list[str] = []
        lines = [executor.submit(0, lambda: ran.append(threading.current_thread().name)) for _ in range(PATIENT[3])]
        assert not eventually_taken(lines)
        lines.append(executor.submit(0, lambda: ran.append(threading.current_thread().name)))
        assert eventually(lambda: len(ran) == 1)
        assert ran[0].startswith("kvtier-node7")
        assert executor.queued == PATIENT[3]
        ends[1]()
        assert eventually(lambda: len(ran) == 3), "one hop away, one task is left to the owner"
        assert all(name.startswith("kvtier-node1") for name in ran[1:])
        ends[0]()
        assert eventually(lambda: len(ran) == 4)
        assert executor.report()["taken"] == {"own": 3, "same_node": 0, "one_hop": 2, "further": 1}


def eventually_taken(futures) -> bool:
    time.sleep(0.1)
    return any(future.done() for future in futures)


def test_threads_of_the_same_node_and_eager_helpers_take_whatever_waits(monkeypatch, tmp_path):
    described = Described(monkeypatch, tmp_path, A3)
    with described({0: 2}) as executor:
        end = blocked(executor, 0)
        assert [executor.submit(0, int, place).result(10) for place in range(6)] == list(range(6))
        end()
    with described({0: 1, 7: 1}, thresholds=EAGER) as executor:
        end = blocked(executor, 0)
        assert executor.submit(0, int, 3).result(10) == 3, "whichever thread is not blocked takes it"
        assert executor.submit(5, get_current_numa_node).result(10) is not None, "of the nearest node with threads"
        end()


def test_full_queues_keep_submitters_waiting_and_never_a_thread_of_its_own(monkeypatch, tmp_path):
    with Described(monkeypatch, tmp_path, A3)({0: 1}, most_queued=2) as executor:
        end = blocked(executor, 0)
        waiting = [executor.submit(0, int) for _ in range(2)]
        with pytest.raises(TimeoutError, match="node 0 still had 2 tasks waiting after 0.05 s"):
            executor.submit(0, int, timeout=0.05)
        assert executor.queued == 2
        assert executor.utilisation == 1.0
        late: list[int] = []
        submitter = threading.Thread(target=lambda: late.append(executor.submit(0, int, 5).result(10)))
        submitter.start()
        end()
        submitter.join(10)
        assert late == [5]
        assert [future.result(10) for future in waiting] == [0, 0]

        def nested() -> list[int]:
            return [future.result(0) for future in [executor.submit(0, int, place) for place in range(8)][2:]]

        assert executor.submit(0, nested).result(10) == [2, 3, 4, 5, 6, 7]


def test_shutdown_finishes_or_cancels_what_waits_and_later_work_is_refused(monkeypatch, tmp_path):
    described = Described(monkeypatch, tmp_path, A3)
    executor = described({0: 1})
    end = blocked(executor, 0)
    waiting = executor.submit(0, int, 3)
    end()
    executor.shutdown()
    assert waiting.result(0) == 3
    with pytest.raises(Closed):
        executor.submit(0, int)
    executor.shutdown()
    executor = described({0: 1})
    end = blocked(executor, 0)
    waiting = executor.submit(0, int, 3)
    stopper = threading.Thread(target=executor.shutdown, kwargs={"cancel": True})
    stopper.start()
    assert eventually(waiting.cancelled)
    end()
    stopper.join(10)
    assert not stopper.is_alive()


def test_idle_threads_use_no_processor():
    with NumaThreadPool(2) as pool:
        pool.map(int, range(8))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_what_cannot_be_is_refused_and_leaves_no_thread():
    before = threading.active_count()
    node = NODES[0]
    cases: list[tuple[dict[int, int], dict[str, object], str]] = [
        ({}, {}, "at least one of each"),
        ({node: 0}, {}, "expected at least 1"),
        ({9999: 1}, {}, "there is no NUMA node 9999"),
        ({node: 1}, {"most_queued": 0}, "at least one of each"),
        ({node: 1}, {"thresholds": (0, 2, 1, 3)}, "none below the one before"),
        ({node: 1}, {"thresholds": (0, 0)}, "expected 4"),
    ]
    for nodes, more, message in cases:
        with pytest.raises(NumaError, match=message):
            NodeExecutor(nodes, **more)  # type: ignore[arg-type]

    def broken() -> None:
        raise RuntimeError("not prepared")

    with pytest.raises(RuntimeError, match="not prepared"):
        NodeExecutor({node: 2}, prepare=broken)
    assert threading.active_count() == before


def test_counters_of_threads_never_share_a_cache_line(tmp_path):
    write(tmp_path / "sys/devices/system/cpu/cpu0/cache/index0/coherency_line_size", 128)
    assert cache_line_bytes(tmp_path) == 128
    assert cache_line_bytes(tmp_path / "nothing") == 64
    counters = PaddedCounters(3, 9)
    line = cache_line_bytes()
    assert counters.address % line == counters.stride_bytes % line == 0
    assert counters.stride_bytes >= 9 * 8
    for thread in range(3):
        counters.add(thread, 8, thread + 1)
    assert counters.totals() == [0] * 8 + [6]
    with pytest.raises(NumaError):
        PaddedCounters(0, 1)


def test_a_machine_without_hops_in_between_has_no_one_hop_threshold_to_wait_for(monkeypatch, tmp_path):
    two = Machine({0: NodeSpec([0]), 1: NodeSpec([1], 1)})
    with Described(monkeypatch, tmp_path, two)({0: 1, 1: 1}) as executor:
        end = blocked(executor, 0)
        tasks = [executor.submit(0, int) for _ in range(PATIENT[2] + 1)]
        assert tasks[0].result(10) == 0
        assert executor.report()["taken"]["one_hop"] == 1
        end()
