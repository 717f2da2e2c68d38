"""kvtier's policies under vLLM's own CPU offloading manager: atomic, leaving alone what is held, better than LRU where reuse differs."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

from benchmarks import vllm_manager
from kvtier.engines.vllm_policy import A2CR

BLOCK = 16


def key(number: int, group: int = 0) -> bytes:
    return make_offload_key(number.to_bytes(32, "big"), group)


def request(name: str, keys: list[bytes]) -> ReqContext:
    context = ReqContext(req_id=name)
    for place, each in enumerate(keys):
        context.set_offload_key_position(each, (place + 1) * BLOCK)
    return context


def manager(chunks: int, policy: str = "A2CR") -> CPUOffloadingManager:
    path = "kvtier.engines.vllm_policy" if policy == "A2CR" else None
    return CPUOffloadingManager(num_chunks=chunks, cache_policy=policy, cache_policy_module_path=path)


def serve(cpu: CPUOffloadingManager, name: str, keys: list[bytes]) -> int:
    """One request from lookup to end, as the scheduler does it; how many chunks were found."""
    return vllm_manager.serve(cpu, vllm_manager.Asked(request(name, keys), keys))


def test_vllm_finds_the_policy_by_its_configuration():
    assert isinstance(manager(4)._policy, A2CR)


def test_evict_takes_exactly_as_many_or_none_and_nothing_protected_held_or_unfinished():
    policy: Any = A2CR(cache_capacity=6)
    keys = [key(number) for number in range(6)]
    context = request("a", keys)
    policy.on_store_miss(keys, context)
    for place, each in enumerate(keys):
        policy.insert(each, ChunkStatus(place))
    assert policy.evict(1, set()) is None  # none is written yet
    for each in keys:
        policy.get(each).ref_cnt = 0
    policy.get(keys[5]).ref_cnt = 1  # being read, so that what stands before it stays, too
    assert policy.evict(1, set()) is None
    policy.get(keys[5]).ref_cnt = 0
    assert policy.evict(7, set()) is None
    assert policy.evict(1, {keys[5]}) is None
    assert [policy.get(each) is not None for each in keys] == [True] * 6
    assert [each for each, _ in policy.evict(2, set())] == [keys[5], keys[4]]
    assert policy.evict(0, set()) == []
    policy.clear()
    assert policy.get(keys[0]) is None
    assert policy.evict(1, set()) is None


def test_a_request_leaves_from_its_end_also_when_its_chunks_come_in_two_steps():
    policy: Any = A2CR(cache_capacity=8)
    keys = [key(number) for number in range(6)]
    context = request("a", keys)
    for part in (keys[:3], keys[3:]):
        policy.on_store_miss(part, context)
        for place, each in enumerate(part):
            policy.insert(each, ChunkStatus(place))
            policy.get(each).ref_cnt = 0
    assert [each for each, _ in policy.evict(4, set())] == keys[:1:-1]


def test_what_goes_on_from_a_resident_prefix_keeps_the_prefix():
    cpu = manager(8)
    keys = [key(number) for number in range(6)]
    assert serve(cpu, "first turn", keys[:3]) == 0
    assert serve(cpu, "second turn", keys) == 3
    serve(cpu, "others", [key(100 + number) for number in range(2)])
    context = request("look", keys)
    serve(cpu, "more", [key(200 + number) for number in range(3)])
    here = [cpu.lookup(each, context) is LookupResult.HIT for each in keys]
    assert here == sorted(here, reverse=True)
    policy: Any = cpu._policy
    policy._settle()
    depths = {each: policy._depth[page] for each, page in policy._page_of.items()}
    assert [depths[each] for each, found in zip(keys, here, strict=True) if found] == list(range(sum(here)))


def test_a_failed_store_leaves_nothing_behind():
    cpu = manager(4)
    keys = [key(number) for number in range(4)]
    for round_ in range(5):
        context = request(f"r{round_}", keys)
        cpu.on_new_request(context)
        output = cpu.prepare_store(keys, context)
        cpu.complete_store(output.keys_to_store, context, success=False)
        cpu.on_request_finished(context)
        assert [cpu.lookup(each, context) for each in keys] == [LookupResult.MISS] * 4
    assert len(cpu._policy._keys) <= 4
    assert serve(cpu, "good", keys) == 0
    assert serve(cpu, "again", keys) == 4


@pytest.mark.parametrize("seed", range(3))
def test_under_any_traffic_manager_and_policy_agree(seed):
    choose = random.Random(seed)
    cpu = manager(20)
    for number in range(300):
        start = choose.randrange(12) * 100
        keys = [key(start + place, group) for group in range(2) for place in range(choose.randrange(1, 9))]
        context = ReqContext(req_id=str(number))
        for each in keys:
            context.set_offload_key_position(each, (int.from_bytes(each[:-4], "big") - start + 1) * BLOCK)
        cpu.on_new_request(context)
        found = [each for each in keys if cpu.lookup(each, context) is LookupResult.HIT]
        cpu.prepare_load(found, context)
        output = cpu.prepare_store(keys, context)
        cpu.complete_load(found, context)
        if output is not None:
            cpu.complete_store(output.keys_to_store, context, success=choose.random() < 0.8)
        cpu.on_request_finished(context)
        policy = cpu._policy
        assert len(policy._chunks) == cpu._num_chunks - cpu._get_num_free_chunks() <= 20
        policy._settle()
        policy._policy.check_integrity()
        assert len(policy._policy) == len(policy._chunks)
        assert sorted(policy._free) == sorted(page for page, each in enumerate(policy._keys) if each is None and not policy._children[page])
        if number == 150:
            cpu.reset_cache()


def test_conversations_survive_a_flood_of_single_requests_better_than_under_lru():
    def hits(policy: str) -> int:
        cpu, choose, found, fresh = manager(60, policy), random.Random(1), 0, 10_000
        for step in range(600):
            if step % 3 == 0:
                talk = choose.randrange(6)
                found += serve(cpu, f"t{step}", [key(talk * 100 + place) for place in range(5)])
            else:
                fresh += 100
                serve(cpu, f"s{step}", [key(fresh + place) for place in range(5)])
        return found

    assert hits("A2CR") > 1.1 * hits("lru") > 0
