"""What a model of a few megabytes shows in real vLLM: LoRA adapters, images and weights changed in memory share no page; KV events as a
subscriber hears them; more prompts than the tiers hold.
"""

from __future__ import annotations

import random
import socket
import time
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_GPU, MEDIUM_STORAGE, AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.lora.request import LoRARequest

from tests.engines_real.conftest import running
from tests.engines_real.test_vllm_connector import BLOCK, Talk, connector
from tests.engines_real.tiny_models import PAGE_BYTES, tiny_adapter, tiny_blip, tiny_llama

HOST_PAGES = 24
SAID: dict[str, list[int]] = {}
"""What the first engine said, kept for the next one."""


@contextmanager
def tiny_engine(folder, store=None, staged_pages=64, **options: Any):
    """An engine with a small host tier, and a disk where there is a `store`."""
    sizes = {"host": HOST_PAGES, "device": staged_pages} | ({} if store is None else {"disk": 256})
    settings: dict[str, Any] = {f"{tier}__capacity_bytes": pages * PAGE_BYTES for tier, pages in sizes.items()} | {"host__format": "raw"}
    settings |= {} if store is None else {"disk__path": str(store), "disk__format": "raw"}
    with running(folder, dtype="float32", kv_transfer_config=connector(**settings), **({"max_model_len": 2048} | options)) as llm:
        yield Talk(llm)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The model's folder and the store of all engines of this module."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny"), tmp_path_factory.mktemp("store")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def preemptions(talk):
    """How many requests vLLM preempted so far."""
    return next(metric.value for metric in talk.llm.get_metrics() if metric.name == "vllm:num_preemptions")


class TestOneEngine:
    """The first engine on the store. Its tests build on each other."""

    @pytest.fixture(scope="class")
    @classmethod
    def port(cls):
        return free_port()

    @pytest.fixture(scope="class")
    @classmethod
    def talk(cls, places, port):
        events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"tcp://*:{port}")
        with tiny_engine(*places, enable_lora=True, max_loras=2, max_lora_rank=8, kv_events_config=events) as talk:
            yield talk

    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, talk, port):
        """What a router hears: every event since the last call, decoded with vLLM's own types."""
        import zmq

        subscriber = zmq.Context.instance().socket(zmq.SUB)
        subscriber.connect(f"tcp://localhost:{port}")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        numbers: list[int] = []

        def hear() -> list[Any]:
            events: list[Any] = []
            while subscriber.poll(1000):
                _, number, batch = subscriber.recv_multipart()
                numbers.append(int.from_bytes(number, "big"))
                events += decoder.decode(batch).events
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "none is missing"
            return events

        while not subscriber.poll(100):  # until it is connected
            talk.ask(talk.prompt(BLOCK + 1), tokens=1)
            assert talk.llm.reset_prefix_cache()
        yield hear
        subscriber.close(0)

    def test_an_adapter_and_the_model_without_it_share_no_page(self, talk, tmp_path_factory):
        folder = tmp_path_factory.mktemp("adapters")
        adapters = [LoRARequest(name, number, str(tiny_adapter(folder / name, number))) for number, name in enumerate(("one", "two"), 1)]
        prompt, everybody = talk.prompt(3 * BLOCK + 3), [None, *adapters]
        cold = [talk.ask(prompt, lora_request=who) for who in everybody]
        assert [cached for cached, _ in cold] == [0, 0, 0], "nor does one adapter with the other"
        assert len({tuple(said) for _, said in cold}) == 3
        talk.forget()
        found = [talk.ask(prompt, lora_request=who) for who in everybody]
        assert [cached for cached, _ in found] == [3 * BLOCK] * 3
        assert [said for _, said in found] == [said for _, said in cold]

    def test_a_subscriber_hears_what_comes_to_host_and_disk_and_what_leaves(self, talk, told):
        talk.forget()
        told()
        prompts = [talk.prompt(6 * BLOCK + 3, 100 + 400 * at) for at in range(6)]  # none begins as what is on the disk already
        for prompt in prompts:
            talk.ask(prompt, tokens=1)
        talk.let_kvtier_end()
        talk.worker.worker_side.cache.settle()
        talk.ask(talk.prompt(3), tokens=1)  # with which vLLM hears of it
        events = told()
        stored = {
            medium: {
                name: event for event in events if isinstance(event, BlockStored) and event.medium == medium for name in event.block_hashes
            }
            for medium in (MEDIUM_GPU, MEDIUM_CPU, MEDIUM_STORAGE)
        }
        assert len(stored[MEDIUM_GPU]) == 36
        assert stored[MEDIUM_GPU].keys() <= stored[MEDIUM_CPU].keys() | stored[MEDIUM_STORAGE].keys(), "named as vLLM names its own blocks"
        assert stored[MEDIUM_STORAGE]
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        pages = [each[start : start + BLOCK] for each in ids for start in range(0, 6 * BLOCK, BLOCK)]
        ours = [event for medium in (MEDIUM_CPU, MEDIUM_STORAGE) for name, event in stored[medium].items() if name in stored[MEDIUM_GPU]]
        assert all(event.token_ids in pages for event in ours)
        removed = [
            name for event in events if isinstance(event, BlockRemoved) and event.medium == MEDIUM_CPU for name in event.block_hashes
        ]
        assert removed
        assert stored[MEDIUM_STORAGE].keys() & set(removed), "what leaves the host is on disk"
        assert talk.llm.reset_prefix_cache(reset_connector=True)
        talk.ask(talk.prompt(3), tokens=1)
        assert any(isinstance(event, AllBlocksCleared) for event in told())

    def test_a_reset_reaches_every_tier(self, talk):
        prompt = talk.prompt(4 * BLOCK + 2, 1500)
        talk.ask(prompt)
        talk.forget()
        assert talk.ask(prompt)[0] == 4 * BLOCK
        assert talk.llm.reset_prefix_cache(reset_connector=True)
        assert talk.ask(prompt)[0] == 0
        evicted = {name: tier["evicted"] for name, tier in talk.worker.worker_side.cache.stats()["tiers"].items()}
        assert evicted["host"]["cleared"]
        assert evicted["disk"]["cleared"]
        talk.forget()
        assert talk.ask(prompt)[0] == 4 * BLOCK

    def test_weights_changed_in_memory_find_nothing_of_the_old_ones(self, talk):
        prompt = talk.prompt(4 * BLOCK + 3)
        _, SAID["before"] = talk.ask(prompt)
        talk.forget()

        def change(model):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)).to(parameter), alpha=0.2)

        talk.llm.apply_model(change)
        assert talk.llm.reset_prefix_cache(reset_connector=True)
        cached, new = talk.ask(prompt)
        assert cached == 0
        assert new != SAID["before"]
        talk.forget()
        assert talk.ask(prompt) == (4 * BLOCK, new)


class TestCrowded:
    """A host with room for a part of the prompts only, behind an engine whose own cache is small, too."""

    @pytest.fixture(scope="class")
    @classmethod
    def talk(cls, places):
        with tiny_engine(places[0], staged_pages=16, num_gpu_blocks_override=40, max_num_seqs=8) as talk:
            yield talk

    def test_generated_tokens_are_found_again(self, talk):
        prompt = talk.prompt(2 * BLOCK, 900)
        _, said = talk.ask(prompt, tokens=BLOCK + 10)
        longer = {"prompt_token_ids": prompt["prompt_token_ids"] + said}
        talk.forget()
        assert talk.ask(longer)[0] == 3 * BLOCK

    def test_more_than_fits_is_served_all_the_same(self, talk):
        prompts = [talk.prompt(8 * BLOCK + 1, 60 * at) for at in range(8)]
        for prompt in prompts:
            talk.ask(prompt)
        talk.forget()
        cached = [talk.ask(prompt)[0] for prompt in reversed(prompts)]
        assert any(cached)
        assert not all(cached)
        assert talk.counted("evicted_pages") > 0
        talk.worker.worker_side.cache.check_integrity()

    def test_preempted_requests_end(self, talk):
        # Five prompts of 7 blocks fit 39 blocks, but not when each begins its eighth.
        prompts = [talk.prompt(6 * BLOCK + 120, 90 * at) for at in range(5)]
        together = talk.ask(*prompts, tokens=20)
        assert [len(said) for _, said in together] == [20] * 5
        assert preemptions(talk) > 0
        assert not talk.scheduler.scheduler_side._requests._states

    def test_requests_that_load_wait_and_are_preempted_or_cancelled_leave_the_others_right(self, talk, monkeypatch):
        from vllm import SamplingParams

        chance, tokens = random.Random(0), BLOCK + 12
        prompts = [talk.prompt(blocks * BLOCK + more, start) for start in range(0, 2500, 500) for blocks, more in ((3, 5), (6, 120))]
        alone = [talk.ask(prompt, tokens=tokens)[1] for prompt in prompts]
        talk.forget()
        pages, engine = talk.worker.worker_side._pages, talk.llm.llm_engine
        restore, loaded, preempted = pages.restore, talk.counted("loaded_pages"), preemptions(talk)

        def slow_and_at_times_not_whole(keys, hand_out, until_s=None, only_near=False):
            time.sleep(chance.random() * 0.02)
            return restore(keys[: len(keys) - (chance.random() < 0.1)], hand_out, until_s, only_near)

        monkeypatch.setattr(pages, "restore", slow_and_at_times_not_whole)
        asked: dict[str, int] = {}
        said: dict[str, list[int]] = {}

        def step():
            said.update({output.request_id: list(output.outputs[0].token_ids) for output in engine.step() if output.finished})

        for number in range(40):
            name = f"request {number}"
            asked[name] = chance.randrange(len(prompts))
            engine.add_request(name, prompts[asked[name]], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
            for _ in range(chance.choice((0, 1, 3, 20))):
                step()
            if chance.random() < 0.2:
                engine.abort_request([cancelled := chance.choice([name for name in asked if name not in said])])
                del asked[cancelled]
            if chance.random() < 0.2:
                talk.llm.reset_prefix_cache()
        while engine.has_unfinished_requests():
            step()
        assert len(asked) > 20
        assert all(said[name] == alone[prompt] for name, prompt in asked.items())
        assert talk.counted("loaded_pages") > loaded
        assert preemptions(talk) > preempted
        monkeypatch.undo()
        talk.forget()
        side = talk.scheduler.scheduler_side
        assert not any((side._requests._states, side._loading, side._fetching, side._storing.pages, side._storing.jobs))
        talk.worker.worker_side.cache.check_integrity()


@pytest.mark.timeout(300)  # an engine starts
def test_an_engine_with_the_weights_of_the_folder_finds_nothing_that_changed_ones_left(places):
    with tiny_engine(*places) as talk:
        assert len(talk.scheduler.scheduler_side.mirror._masks[0]) >= 4, "though it has their pages"
        assert talk.ask(talk.prompt(4 * BLOCK + 3)) == (0, SAID["before"])


def showing(seed):
    """A prompt of one text with the image of this number."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), np.uint8)
    return {"prompt": "Water boils at a lower temperature on a mountain. " * 35, "multi_modal_data": {"image": Image.fromarray(pixels)}}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The folder of a model that sees images."""
    return tiny_blip(tmp_path_factory.mktemp("seeing") / "model")


LOOKING: dict[str, Any] = {"max_model_len": 1024, "limit_mm_per_prompt": {"image": 1}}


@pytest.mark.timeout(300)  # an engine starts
def test_two_images_with_the_same_text_share_no_page(seeing):
    with tiny_engine(seeing, **LOOKING) as talk:
        cold = [talk.ask(showing(image)) for image in range(3)]
        assert [cached for cached, _ in cold] == [0, 0, 0]
        assert len({tuple(said) for _, said in cold}) == 3
        talk.forget()
        found = [talk.ask(showing(image)) for image in range(3)]
        assert [said for _, said in found] == [said for _, said in cold]
        assert min(cached for cached, _ in found) >= 2 * BLOCK
        talk.forget()
        assert talk.ask(showing(9))[0] == 0
        SAID["shown 1"] = found[1][1]


@pytest.mark.timeout(300)  # two engines start
def test_images_that_vllm_only_counts_are_not_those_of_the_last_engine(seeing, tmp_path):
    counting = LOOKING | {"mm_processor_cache_gb": 0, "enable_prefix_caching": False}
    with tiny_engine(seeing, tmp_path, **counting) as talk:
        text = talk.prompt(2 * BLOCK + 3)
        asked = [talk.ask(showing(0)), talk.ask(text)]
        assert [cached for cached, _ in asked] == [0, 0]
        talk.let_kvtier_end()
    with tiny_engine(seeing, tmp_path, **counting) as talk:
        assert talk.ask(showing(1)) == (0, SAID["shown 1"]), "in vLLM both are the first image"
        assert talk.ask(text) == (2 * BLOCK, asked[1][1]), "text is found"
