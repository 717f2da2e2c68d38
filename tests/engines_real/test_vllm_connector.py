"""Laws checked in real vLLM: what kvtier brings back gives the same tokens as vLLM's own cache, and what it cannot bring back is computed.

Each test that is about hits asserts that there were some: an integration that never hits passes all else. Compared with vLLM's own prefix
cache at the same length, because a prefix that was computed in one go may round differently from one that was found. Engines run one after
the other, one per class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored, KVEventBatch

from kvtier.engines.vllm.settings import for_rank, settings_of
from kvtier.errors import KVTierError, LayoutError, ModelError, StoreLocked
from kvtier.tiers.disk.record import HEADER_BYTES
from tests.engines_real.conftest import running

BLOCK = 128
FRONT_PAGE = (Path(__file__).parents[2] / "README.md").read_text()
SHOWN: dict[str, Any] = eval(f"dict({re.findall(r'```python.(kv_connector=.*?)```', FRONT_PAGE, re.DOTALL)[0]})")
"""What the front page tells users to write, which the engines of these tests are started with, but for paths and sizes."""


def connector(policy=SHOWN["kv_load_failure_policy"], **settings):
    """vLLM's configuration of the connector, with kvtier's dotted keys."""
    from vllm.config import KVTransferConfig

    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return KVTransferConfig(**SHOWN | {"kv_load_failure_policy": policy, "kv_connector_extra_config": dotted})


LOSSLESS: dict[str, Any] = {
    "host__format": "raw",
    "host__capacity_bytes": "200MiB",
    "disk__format": "raw",
    "disk__capacity_bytes": "400MiB",
}


class Talk:
    """One engine and its connector's two sides."""

    def __init__(self, llm):
        self.llm = llm
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector
        text = (Path(__file__).parents[2] / "LICENSE").read_text()
        self.text = llm.get_tokenizer().encode(text)

    @property
    def worker(self):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    def prompt(self, tokens, start=0, salt=None):
        """`tokens` tokens of a text, from another place for every `start`."""
        from vllm.inputs import TokensPrompt

        ids = (self.text * 3)[start : start + tokens]
        return TokensPrompt(prompt_token_ids=ids, **({"cache_salt": salt} if salt else {}))

    def ask(self, *prompts, tokens=6, limits=None, **options):
        """(cached tokens, generated tokens) of each prompt, all asked at once; `limits`: what kvtier may store and load for them."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={"kv_transfer_params": limits})
        outputs = self.llm.generate(list(prompts), sampling, use_tqdm=False, **options)
        answers = [(output.num_cached_tokens, list(output.outputs[0].token_ids)) for output in outputs]
        return answers if len(answers) > 1 else answers[0]

    def let_kvtier_end(self):
        """Step until the workers said that they did what they were told."""
        side = self.scheduler.scheduler_side
        while side._storing.jobs or side._loading:
            self.ask(self.prompt(3), tokens=1)

    def forget(self):
        """Empty vLLM's own cache, and let kvtier finish what it has begun."""
        self.let_kvtier_end()
        self.worker.worker_side.cache.settle()
        assert self.llm.reset_prefix_cache()

    def counted(self, name):
        """The value of a connector's counter in vLLM's metrics, labels added up."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:kvtier_{name}")

    def gauge(self, name, label):
        """The values of a connector's gauge in vLLM's metrics, by label."""
        return {metric.labels[label]: metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:kvtier_{name}"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "kv"


@pytest.fixture(scope="module")
def answers():
    """What vLLM said with its own cache, kept for later engines."""
    return {}


@pytest.fixture(scope="class")
def talk(request, model_folder, store):
    settings, options = request.cls.settings, request.cls.options
    if "disk__format" in settings:
        settings = settings | {"disk__path": str(store)}
    with running(model_folder, kv_transfer_config=connector(**settings), **options) as llm:
        yield Talk(llm)


LENGTHS = (4 * BLOCK, 4 * BLOCK + 1, 6 * BLOCK + 70)
"""A prompt ending with a block, one token after one, and inside one."""


ANNOUNCED = 5 * BLOCK + 3
"""One more, of which events tell."""


class TestLossless:
    settings: ClassVar[dict[str, Any]] = LOSSLESS
    options: ClassVar[dict[str, Any]] = {"max_num_batched_tokens": 512}  # prompts are computed in pieces

    @pytest.mark.parametrize("length", LENGTHS)
    def test_a_prefix_comes_back_bit_for_bit(self, talk, answers, length):
        prompt = talk.prompt(length, length)
        cached, cold = talk.ask(prompt)
        assert cached == 0
        cached_by_vllm, own = talk.ask(prompt)
        talk.forget()
        cached, restored = talk.ask(prompt)
        assert cached == cached_by_vllm == (length - 1) // BLOCK * BLOCK
        assert restored == own
        answers[length] = own
        assert len(cold) == len(own)

    def test_what_vllm_holds_itself_is_not_loaded(self, talk):
        prompt = talk.prompt(6 * BLOCK + 5, 50)
        talk.ask(prompt)
        talk.forget()
        head = {"prompt_token_ids": prompt["prompt_token_ids"][: 3 * BLOCK + 1]}
        talk.ask(head)
        before = talk.counted("loaded_pages")
        assert talk.ask(prompt)[0] == 6 * BLOCK
        assert talk.counted("loaded_pages") - before == 3

    def test_many_at_once_load_a_shared_prefix_once(self, talk):
        shared = [talk.prompt(4 * BLOCK + extra, 300) for extra in (5, 20, 40, 60)]
        prompts = [*shared, *(talk.prompt(3 * BLOCK + 9, 500 + at) for at in (0, 9))]
        talk.ask(*prompts)
        own = talk.ask(*prompts)
        talk.forget()
        before = talk.counted("loaded_pages")
        restored = talk.ask(*prompts)
        assert [cached for cached, _ in restored] == [4 * BLOCK] * 4 + [3 * BLOCK] * 2
        assert talk.counted("loaded_pages") - before == 4 + 2 * 3
        assert [said for _, said in restored] == [said for _, said in own]

    def test_a_salt_separates_tenants(self, talk):
        mine, yours = talk.prompt(4 * BLOCK + 3, 700, "mine"), talk.prompt(4 * BLOCK + 3, 700, "yours")
        talk.ask(mine)
        talk.forget()
        assert talk.ask(yours)[0] == 0
        talk.forget()
        assert talk.ask(mine)[0] == talk.ask(yours)[0] == 4 * BLOCK

    def test_a_request_that_is_not_to_be_stored_leaves_nothing(self, talk):
        prompt = talk.prompt(4 * BLOCK + 3, 900)
        before = talk.counted("stored_pages")
        talk.ask(prompt, limits={"max_offload_tokens": 0})
        talk.forget()
        assert talk.ask(prompt, limits={"max_offload_tokens": 2 * BLOCK})[0] == 0
        talk.forget()
        assert talk.counted("stored_pages") - before == 2
        assert talk.ask(prompt, limits={"max_load_tokens": 0})[0] == 0
        talk.forget()
        assert talk.counted("stored_pages") - before == 4
        assert talk.ask(prompt, limits={"max_load_tokens": 3 * BLOCK})[0] == 3 * BLOCK

    def test_cancelled_requests_leave_nothing_behind(self, talk):
        from vllm import SamplingParams

        prompt = talk.prompt(8 * BLOCK + 3, 1100)
        talk.ask(prompt)
        talk.forget()
        engine = talk.llm.llm_engine
        for name, steps in (("waiting", 0), ("loading", 1), ("begun", 3)):
            engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=50))
            for _ in range(steps):
                engine.step()
            engine.abort_request([name])
            while engine.has_unfinished_requests():
                engine.step()
        talk.forget()
        side = talk.scheduler.scheduler_side
        assert not side._requests._states
        assert not side._loading
        assert not side._fetching
        assert talk.ask(prompt)[0] == 8 * BLOCK
        talk.worker.worker_side.cache.check_integrity()

    def test_vllm_counts_what_kvtier_does(self, talk):
        names = {metric.name: metric for metric in talk.llm.get_metrics()}
        assert names["vllm:external_prefix_cache_hits"].value > 0
        for name in ("hit_tokens", "loaded_pages", "stored_pages"):
            assert talk.counted(name) > 0
        assert talk.counted("failed_pages") == 0

    def test_vllm_says_how_full_the_tiers_are(self, talk, monkeypatch):
        talk.forget()
        monkeypatch.setattr("kvtier.engines.vllm.scheduler.LEVELS_EVERY_S", 0.0)
        talk.ask(talk.prompt(3), tokens=1)
        stats = talk.worker.worker_side.cache.stats()
        assert stats["tiers"]["host"]["used_slots"] > 0
        for gauge, key in (("capacity_bytes",) * 2, ("used_bytes", "bytes_used"), ("capacity_slots",) * 2, ("used_slots",) * 2):
            assert talk.gauge(f"tier_{gauge}", "tier") == {name: tier[key] for name, tier in stats["tiers"].items()}
        assert set(talk.gauge("tier_leased_slots", "tier").values()) == {0}
        assert talk.gauge("link_queued_bytes", "link") == dict.fromkeys(stats["links"], 0)

    def test_a_second_engine_on_the_store_is_refused(self, talk):
        from kvtier.engines.vllm.worker import WorkerSide

        with pytest.raises(StoreLocked, match="Another process|another|in use"):
            WorkerSide(talk.scheduler.scheduler_side._settings, 0)

    def test_what_the_next_engine_will_ask_for_is_there(self, talk, answers):
        for length in (*LENGTHS, ANNOUNCED):
            talk.ask(talk.prompt(length, length))
            answers[length] = talk.ask(talk.prompt(length, length))[1]


class TestRestarted:
    settings: ClassVar[dict[str, Any]] = LOSSLESS
    options: ClassVar[dict[str, Any]] = {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}

    @pytest.mark.parametrize("length", LENGTHS)
    def test_a_new_engine_finds_what_the_last_one_left_on_disk(self, talk, answers, length):
        cached, restored = talk.ask(talk.prompt(length, length))
        assert cached == (length - 1) // BLOCK * BLOCK
        assert restored == answers[length]
        assert talk.counted("failed_pages") == 0

    def test_events_name_pages_as_vllm_names_its_own_blocks(self, talk, monkeypatch):
        told: list[Any] = []
        publisher = talk.llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        monkeypatch.setattr(publisher, "publish", lambda batch: told.extend(decoder.decode(msgspec.msgpack.encode(batch)).events))
        prompt = talk.prompt(ANNOUNCED, ANNOUNCED)
        assert talk.ask(prompt)[0] == 5 * BLOCK
        stored = {
            medium: [event for event in told if isinstance(event, BlockStored) and event.medium == medium] for medium in ("GPU", "STORAGE")
        }
        hashes = {medium: [name for event in events for name in event.block_hashes] for medium, events in stored.items()}
        assert len(hashes["STORAGE"]) == 5
        assert hashes["STORAGE"] == hashes["GPU"]
        assert [token for event in stored["STORAGE"] for token in event.token_ids] == prompt["prompt_token_ids"][: 5 * BLOCK]
        assert [event.parent_block_hash for event in stored["STORAGE"]] == [None, *hashes["STORAGE"][:-1]]

    def test_it_all_came_from_disk(self, talk):
        hits = {metric.labels.get("tier"): metric.value for metric in talk.llm.get_metrics() if metric.name == "vllm:kvtier_hit_tokens"}
        assert set(hits) == {"disk"}


def overwrite_payloads_with_zeros(store: Path, page_bytes: int) -> int:
    """Spoil every copy of the store behind its header; how many bytes are zero now that were not."""
    spoiled = 0
    for path in store.rglob("*"):
        if path.is_file() and path.stat().st_size > page_bytes:
            content = bytearray(path.read_bytes())
            header = content.find(b"kvtier\0r")
            while header >= 0:
                end = content.find(b"kvtier\0r", header + 1)
                payload = slice(header + HEADER_BYTES, end if end >= 0 else len(content))
                spoiled += payload.stop - payload.start - content[payload].count(0)
                content[payload] = bytes(payload.stop - payload.start)
                header = end
            path.write_bytes(content)
    return spoiled


class TestDamaged:
    settings: ClassVar[dict[str, Any]] = LOSSLESS
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _damage(cls, store):
        assert overwrite_payloads_with_zeros(store, 1 << 20) > 1 << 20

    @pytest.mark.parametrize("length", LENGTHS)
    def test_damaged_copies_are_computed_again(self, talk, length):
        prompt, failed = talk.prompt(length, length), talk.counted("failed_pages")
        _, said = talk.ask(prompt)
        assert talk.counted("failed_pages") > failed
        assert said == talk.ask(talk.prompt(length, length, "computed in one go, as the damaged one is"))[1]
        _, own = talk.ask(prompt)
        talk.forget()
        cached, again = talk.ask(prompt)
        assert cached == (length - 1) // BLOCK * BLOCK
        assert again == own

    def test_the_reason_is_counted(self, talk):
        reasons = {metric.labels.get("why") for metric in talk.llm.get_metrics() if metric.name == "vllm:kvtier_refused_pages"}
        assert reasons == {"checksum"}


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"host__capacity": "1GiB"}, {}, "capacity_bytes"),
        ({"host": None}, {}, "nowhere to keep pages"),
        ({"pages__page_tokens": 16}, {}, "not for you to set"),
        ({"device__capacity_bytes": "3MiB"}, {}, "raise it to at least"),
        ({"config": 7}, {}, "the path of a kvtier YAML file"),
        ({}, {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({}, {"kv_role": "kv_producer"}, "say 'kv_both'"),
    ],
)
def test_what_kvtier_cannot_serve_is_refused(model_folder, settings, options, message):
    with pytest.raises(KVTierError, match=message):
        settings_of(*configured(model_folder, settings, options))


def configured(model_folder, settings, options):
    """vLLM's two configurations as a connector gets them, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    transfer = connector(**settings)
    transfer.kv_role = options.pop("kv_role", transfer.kv_role)
    args = EngineArgs(model=str(model_folder), dtype="bfloat16", kv_transfer_config=transfer, **options)
    return args.create_engine_config(), kv_cache_config([spec()])


def spec(**changes):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(**({"block_size": BLOCK, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16} | changes))


def kv_cache_config(specs):
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    groups = [KVCacheGroupSpec([f"layer.{group}.{index}" for index in range(30)], spec) for group, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=groups)


def test_paths_and_sizes_are_taken_as_the_front_page_writes_them(model_folder):
    config = settings_of(*configured(model_folder, SHOWN["kv_connector_extra_config"], {})).config
    assert config.host is not None
    assert config.disk is not None
    assert (config.host.capacity_bytes, config.disk.path, config.disk.capacity_bytes) == (8 << 30, "/nvme/kv", 200 << 30)


@pytest.mark.parametrize(("asked", "policy"), [({}, "write_through"), ({"disk__write_policy": "write_back"}, "write_back")])
def test_what_a_killed_engine_would_lose_is_on_disk_unless_users_say_otherwise(model_folder, tmp_path, asked, policy):
    config = settings_of(*configured(model_folder, {"disk__path": str(tmp_path)} | asked, {})).config
    assert config.host is not None
    assert config.disk is not None
    assert (config.host.write_policy, config.disk.write_policy) == ("write_through", policy)
    assert settings_of(*configured(model_folder, {}, {})).config.disk is None


def test_models_and_layouts_kvtier_cannot_hold_are_refused(model_folder):
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, SinkFullAttentionSpec, SlidingWindowSpec

    vllm_config, _ = configured(model_folder, {}, {})
    usual: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    window = SlidingWindowSpec(**usual, sliding_window=64)
    for specs in ([spec(), window], [window], [], [MLAAttentionSpec(**usual)], [SinkFullAttentionSpec(**usual, sink_len=BLOCK)]):
        with pytest.raises(ModelError, match="full attention in every layer"):
            settings_of(vllm_config, kv_cache_config(specs))
    for odd in (spec(dtype=torch.uint8), spec(head_size_v=32)):
        with pytest.raises(LayoutError, match="kvtier"):
            settings_of(vllm_config, kv_cache_config([odd]))


def test_workers_share_the_sizes_and_keep_their_parts_apart(model_folder, tmp_path):
    asked = {
        "host__capacity_bytes": "48MiB",
        "disk__path": str(tmp_path),
        "disk__capacity_bytes": "128MiB",
        "device__capacity_bytes": "1GiB",
    }
    whole = settings_of(*configured(model_folder, asked, {}))
    thirds = settings_of(*configured(model_folder, asked, {"tensor_parallel_size": 3}))
    third, all_of_it = thirds.config.host, whole.config.host
    assert third is not None
    assert all_of_it is not None
    assert third.capacity_bytes * 3 == all_of_it.capacity_bytes == 48 << 20
    assert thirds.namespace != whole.namespace
    first, second = (for_rank(thirds, rank) for rank in (0, 1))
    assert first.disk != second.disk
    assert first.model.revision != second.model.revision


def test_replicas_of_one_configuration_have_directories_of_their_own(model_folder, tmp_path):
    asked = {"disk__path": str(tmp_path), "disk__capacity_bytes": "128MiB"}
    vllm_config, groups = configured(model_folder, asked, {})
    paths, namespaces = [], set()
    for replica in range(3):
        vllm_config.parallel_config.data_parallel_index = replica
        settings = settings_of(vllm_config, groups)
        assert settings.config.disk is not None
        paths.append(settings.config.disk.path)
        namespaces.add(settings.namespace)
    assert paths == [str(tmp_path), str(tmp_path / "replica-1"), str(tmp_path / "replica-2")]
    assert len(namespaces) == 1
