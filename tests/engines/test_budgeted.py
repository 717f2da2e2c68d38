"""Laws checked: no more pages on the device than the budget, queries recall what they ask for, and exact mode is exact."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.engines.budgeted import BudgetedCache
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, layout_of
from kvtier.errors import ConfigError, LayoutError, LeaseError, ModelError, TransferFailed
from kvtier.leases.budget import BudgetedLease
from kvtier.tiers.device import DevicePool
from tests.engines.rig import llama

PAGE = 4
BUDGET = 10
PROMPT = [(7 * position * position + 3 * position) % 200 for position in range(150)]
GENERATE = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model():
    """Large weights, so that its predictions hang on the context."""
    return llama(3, initializer_range=0.15)


def open_cache(model, store=None, slots=BUDGET - 1, host_pages=100, host_format="raw", **more):
    layout = layout_of(model, PAGE)
    sizes = {
        "model.name": "tiny",
        "device.capacity_bytes": slots * layout.page_bytes,
        "device.place": "cpu",
        "host.capacity_bytes": host_pages * layout.page_bytes,
        "host.format": host_format,
    }
    if store is not None:
        sizes |= {"disk.path": str(store), "disk.capacity_bytes": "4MiB", "disk.format": "raw"}
    return TieredKVCache(load_config(env={}, overrides=sizes | more), layout)


@torch.inference_mode()
def untiered(model, prompt):
    output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **cache_argument(DynamicCache()), **GENERATE)
    return output[0, len(prompt) :].tolist()


class Watched:
    """The most device slots that were ever taken at once, told by the pool itself."""

    def __init__(self, monkeypatch) -> None:
        self.most = 0
        reserve = DevicePool.reserve

        def watched(pool, count):
            slots = reserve(pool, count)
            self.most = max(self.most, pool.capacity_slots - pool.free_slots)
            return slots

        monkeypatch.setattr(DevicePool, "reserve", watched)


@pytest.mark.parametrize("slots", [BUDGET - 1, 60])
def test_exact_mode_equals_the_untiered_output_within_the_budget(model, slots, monkeypatch):
    """Whether the device is no larger than the budget or only this sequence's share is."""
    watched = Watched(monkeypatch)
    with open_cache(model, slots=slots) as cache:
        session = Session(model, cache, device_pages=BUDGET, select="exact")
        assert session.generate(PROMPT, **GENERATE) == untiered(model, PROMPT)
        assert watched.most <= BUDGET - 1
        assert cache.stats()["recalls"] == 0
        assert cache.lookup(PROMPT).pages_by_tier["host"] >= len(PROMPT) // PAGE - BUDGET
        cache.check_integrity()


def test_a_budget_as_large_as_the_sequence_equals_the_untiered_output(model):
    with open_cache(model, slots=100) as cache:
        session = Session(model, cache, device_pages=60)
        assert session.generate(PROMPT, **GENERATE) == untiered(model, PROMPT)
        assert cache.stats()["recalls"] == 0


@pytest.mark.parametrize("slots", [BUDGET - 1, 60])
def test_decoding_by_attention_stays_within_the_budget_and_recalls(model, slots, monkeypatch):
    watched = Watched(monkeypatch)
    with open_cache(model, slots=slots) as cache:
        session = Session(model, cache, device_pages=BUDGET)
        answer = session.generate(PROMPT, **GENERATE)
        assert len(answer) == GENERATE["max_new_tokens"]
        assert watched.most <= BUDGET - 1
        frames = (BUDGET - 1 - 1 - 3) * cache.layout.layers
        assert cache.stats()["recalls"] > frames  # the frames were filled, and then pages took the places of others
        attention = cache._residency.table.attention
        assert (attention[: cache._residency.table.rows] > 0).sum() > BUDGET  # the scorer heard of it
        cache.check_integrity()


def test_what_is_chosen_matters(model):
    """The control: with all pages but those that stay zeroed in the host, the answer is another one."""
    with open_cache(model) as cache:
        Session(model, cache, device_pages=BUDGET).generate(PROMPT, **GENERATE)
        right = Session(model, cache, device_pages=BUDGET).generate(PROMPT, **GENERATE)
    with open_cache(model) as cache:
        layout = cache.layout
        with cache.acquire_within(cache.lookup([]), BUDGET) as lease:
            lease.append(PROMPT[:148], torch.zeros(layout.layers, 2, 148, layout.kv_heads, layout.head_dim))
        assert Session(model, cache, device_pages=BUDGET).generate(PROMPT, **GENERATE) != right


@pytest.mark.parametrize("select", ["attention", "exact"])
@pytest.mark.parametrize("host_pages", [100, 6])
def test_a_later_turn_continues_from_host_and_disk(model, host_pages, select, tmp_path, monkeypatch):
    with open_cache(model, tmp_path, host_pages=host_pages) as cache:
        session = Session(model, cache, device_pages=BUDGET, select=select)
        first = session.generate(PROMPT, **GENERATE)
        watched = Watched(monkeypatch)
        second = session.generate([5, 6, 7], **GENERATE)
        assert session.restored == (len(PROMPT) + len(first) - 1) // PAGE * PAGE
        assert watched.most <= BUDGET - 1
        if select == "exact":
            assert second == untiered(model, [*PROMPT, *first, 5, 6, 7])
        cache.check_integrity()
    with open_cache(model, tmp_path, host_pages=host_pages) as cache:  # nothing but the disk, and no digests
        again = Session(model, cache, device_pages=BUDGET, select=select)
        answer = again.generate([*PROMPT, *first, 5, 6, 7], **GENERATE)
        assert select == "attention" or answer == second  # by attention the last token of the prompt is a step of its own this time
        assert len(answer) == len(second)
        assert again.restored == (len(PROMPT) + len(first) + 2) // PAGE * PAGE
        cache.check_integrity()


def test_pages_that_do_not_verify_shorten_the_prefix(model):
    with open_cache(model) as cache:
        session = Session(model, cache, device_pages=BUDGET, select="exact")
        session.generate(PROMPT, **GENERATE)
        host = cache._residency.tiers[1]
        damaged = cache.lookup(PROMPT).keys[20]
        host._bytes[int(cache._residency.table.slot[1, cache._residency.table.row(damaged)])][7] ^= 1
        again = Session(model, cache, device_pages=BUDGET, select="exact")
        assert again.generate(PROMPT, **GENERATE) == untiered(model, PROMPT)
        assert again.restored == 20 * PAGE
        assert sum(cache.stats()["tiers"]["host"]["refused"].values()) == 1
        cache.check_integrity()


def test_a_page_lost_in_the_middle_of_decoding_is_an_error_and_never_wrong(model, tmp_path):
    layout = layout_of(model, PAGE)
    with open_cache(model, tmp_path, host=None) as cache:
        with cache.acquire_within(cache.lookup([]), BUDGET) as lease:
            lease.append(PROMPT[:120], torch.randn(layout.layers, 2, 120, layout.kv_heads, layout.head_dim))
            for path in (tmp_path).rglob("*"):
                if path.is_file() and path.stat().st_size > 20 * layout.page_bytes:
                    path.write_bytes(bytes(path.stat().st_size))
            with pytest.raises(TransferFailed, match="compute its tokens again"):
                lease.stream(0)
        cache.check_integrity()


def test_two_sequences_share_a_prefix_and_the_device(model):
    with open_cache(model, slots=2 * (BUDGET - 1)) as cache:
        a, b = (Session(model, cache, device_pages=BUDGET, select="exact") for _ in "ab")
        a.generate(PROMPT, **GENERATE)
        with BudgetedCache(model, cache, [*PROMPT, 1, 2], BUDGET, select="exact") as past:
            assert past.restored == len(PROMPT) // PAGE * PAGE
            assert b.generate(PROMPT, **GENERATE) == untiered(model, PROMPT)
        cache.check_integrity()


def test_other_caches_of_an_attached_model_are_left_alone(model):
    before = untiered(model, PROMPT)
    with open_cache(model, slots=60) as cache:
        Session(model, cache, device_pages=BUDGET).generate(PROMPT, **GENERATE)
        assert untiered(model, PROMPT) == before
        assert Session(model, cache, salt="other").generate(PROMPT, **GENERATE) == before


def test_what_cannot_be_is_refused_before_anything_is_held(model):
    with open_cache(model, slots=20) as cache:
        for pages, why in [(3, "at least 4"), (22, "the device holds 20")]:
            with pytest.raises(LeaseError, match=why):
                BudgetedCache(model, cache, PROMPT, pages)
        with pytest.raises(ModelError, match="expected one of attention, exact"):
            BudgetedCache(model, cache, PROMPT, 8, select="best")  # type: ignore[arg-type]
        model.config._attn_implementation = "eager"
        with pytest.raises(ModelError, match='attn_implementation="sdpa"'):
            BudgetedCache(model, cache, PROMPT, 8)
        assert cache.stats()["leased_pages"] == 0
    with open_cache(model, host=None) as cache, pytest.raises(ConfigError, match="needs a tier below the device"):
        cache.acquire_within(cache.lookup([]), 8)


def test_no_room_below_is_an_error_that_says_so(model):
    with open_cache(model, host_pages=5) as cache, pytest.raises(LeaseError, match=r"raise host\.capacity_bytes"):
        Session(model, cache, device_pages=BUDGET).generate(PROMPT, **GENERATE)


def test_batches_beams_crops_and_embeddings_are_refused(model):
    with open_cache(model) as cache, BudgetedCache(model, cache, PROMPT, BUDGET) as past:
        with pytest.raises(LayoutError, match="one sequence"):
            model(torch.tensor([PROMPT, PROMPT]), **cache_argument(past))
        with pytest.raises(LayoutError, match="inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 3, 64), **cache_argument(past))
        for call in (
            lambda: past.layers[0].crop(-1),
            lambda: past.layers[0].reorder_cache(torch.tensor([0])),
            lambda: past.layers[0].batch_repeat_interleave(2),
            lambda: past.layers[0].batch_select_indices(torch.tensor([0])),
        ):
            with pytest.raises(ModelError, match="leave device_pages out"):
                call()


def test_attention_that_does_not_come_through_kvtier_is_noticed(model):
    with open_cache(model) as cache, BudgetedCache(model, cache, PROMPT, BUDGET) as past:
        model(torch.tensor([PROMPT]), **cache_argument(past))
        model.set_attn_implementation("sdpa")
        with pytest.raises(ModelError, match="did not attend through kvtier"):
            model(torch.tensor([[3]]), **cache_argument(past))


def test_nothing_is_left_on_the_model_but_the_wrapped_attention(model):
    with open_cache(model) as cache:
        Session(model, cache, device_pages=BUDGET).generate(PROMPT, **GENERATE)
        with pytest.raises(LayoutError), BudgetedCache(model, cache, PROMPT, BUDGET) as past:
            model(torch.tensor([PROMPT, PROMPT]), **cache_argument(past))
        assert not model._forward_pre_hooks
        assert cache.stats()["leased_pages"] == 0


def test_other_tokens_than_those_fed_are_not_committed(model):
    with open_cache(model) as cache, BudgetedCache(model, cache, PROMPT, BUDGET) as past:
        model(torch.tensor([PROMPT]), **cache_argument(past))
        with pytest.raises(LayoutError, match="not the tokens"):
            past.commit([*PROMPT[:-1], 199])
        assert past.commit([*PROMPT, 3]) == 148


@torch.inference_mode()
def test_the_mask_follows_the_chosen_pages(model):
    with open_cache(model) as cache, BudgetedCache(model, cache, PROMPT, BUDGET) as past:
        model(torch.tensor([PROMPT]), **cache_argument(past))
        model(torch.tensor([[3]]), **cache_argument(past))
        layer = past.layers[1]
        assert isinstance(past.lease, BudgetedLease)
        dense, _ = layer._behind(past.lease.stream(1))
        assert dense.shape[2] == past.get_seq_length() == 151
        position = torch.arange(151.0)[None, None, None]
        keys, values, mask = layer.chosen(torch.randn(1, 4, 1, 16), position, None)
        assert mask is not None
        chosen = mask[0, 0, 0].long()
        assert len(chosen) == (BUDGET - 1) * PAGE + 151 % PAGE
        assert torch.equal(keys, dense[:, :, chosen])
        assert values.shape == keys.shape
