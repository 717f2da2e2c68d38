"""Laws checked: batches, beams, samples and speculation find what the tiers hold; nothing is kept but under the tokens it came from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvtier.engines.fed import Fed
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, generate_together, layout_of, left_padded
from kvtier.errors import LayoutError, ModelError
from tests.engines.rig import GENERATE, PROMPT, evict_everything, llama, open_cache, sliding

OTHERS = [PROMPT[40:], PROMPT[::-1][:60], PROMPT[3:]]


@pytest.fixture(scope="module")
def model():
    return llama(layers=3, initializer_range=0.15)


@torch.inference_mode()
def plain(model, sequences, past=None, **options):
    """What `generate` gives without kvtier, `[rows, tokens]`."""
    return model.generate(**left_padded(sequences, 0), **(cache_argument(past) if past is not None else {}), **{**GENERATE, **options})


@torch.inference_mode()
def computed(model, tokens):
    """The KV of tokens that nothing stands before, `[layers, 2, tokens, kv_heads, head_dim]`."""
    past = DynamicCache()
    model(torch.tensor([tokens]), **cache_argument(past))
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in past.layers]).transpose(2, 3)


def held(cache, tokens):
    """The KV that the cache holds for these tokens, as `computed`."""
    with cache.acquire(cache.lookup(tokens)) as lease:
        table = torch.as_tensor(lease.wait())
        layers = [cache_layer[table].permute(1, 0, 2, 3, 4).flatten(1, 2) for cache_layer in map(lease.layer, range(cache.layout.layers))]
        return torch.stack(layers), lease.tokens


def assert_true_to(model, cache, tokens, at_least):
    """The cache holds `at_least` of these tokens, with the KV that the model computes for them."""
    kv, count = held(cache, tokens)
    assert count >= at_least
    torch.testing.assert_close(kv, computed(model, tokens[:count]), rtol=1e-3, atol=1e-3)


def test_a_batch_equals_its_sequences_and_really_was_restored(model, tmp_path):
    prompts = [PROMPT, *OTHERS]
    with open_cache(model, tmp_path) as cache:
        sessions = [Session(model, cache) for _ in prompts]
        answers = generate_together(sessions, prompts, **GENERATE)
        assert answers == [plain(model, [prompt])[0, len(prompt) :].tolist() for prompt in prompts]
        for session in sessions:
            assert_true_to(model, cache, session.token_ids, (len(session.token_ids) - 1) // 16 * 16)
        evict_everything(cache)
        again = [Session(model, cache) for _ in prompts]
        assert generate_together(again, [session.token_ids for session in sessions], **GENERATE)
        missing = max(len(session.token_ids) - (len(session.token_ids) - 1) // 16 * 16 for session in sessions)
        assert [session.restored for session in again] == [len(session.token_ids) - missing for session in sessions]
        assert min(session.restored for session in again) > 0


def test_a_batch_with_a_stranger_restores_nothing_of_what_the_stranger_needs(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        Session(model, cache).generate(PROMPT, **GENERATE)
        both = [Session(model, cache), Session(model, cache)]
        answers = generate_together(both, [PROMPT, OTHERS[1]], **GENERATE)
        assert [session.restored for session in both] == [90, 0]
        assert answers == [plain(model, [prompt])[0, len(prompt) :].tolist() for prompt in (PROMPT, OTHERS[1])]


def test_tenants_of_one_batch_stay_apart(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        generate_together([Session(model, cache, "a"), Session(model, cache, "b")], [PROMPT, PROMPT], **GENERATE)
        assert cache.lookup(PROMPT, "a").tokens == cache.lookup(PROMPT, "b").tokens == 144
        assert cache.lookup(PROMPT).tokens == 0


def test_sequences_that_end_early_are_not_filled_up(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        answers = [plain(model, [prompt])[0, len(prompt) :].tolist() for prompt in (PROMPT, OTHERS[0])]
        end = next(token for token in answers[0] if token not in answers[1])
        sessions = [Session(model, cache), Session(model, cache)]
        found = generate_together(sessions, [PROMPT, OTHERS[0]], **GENERATE, eos_token_id=end)
        assert found == [answers[0][: answers[0].index(end) + 1], answers[1]]
        for session in sessions:
            assert_true_to(model, cache, session.token_ids, (len(session.token_ids) - 1) // 16 * 16)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_equal_plain_beams_and_are_kept(model, tmp_path, beams, warm):
    options = {"num_beams": beams, "max_new_tokens": 40}
    with open_cache(model, tmp_path) as cache:
        if warm:
            Session(model, cache).generate(PROMPT, **{**GENERATE, "max_new_tokens": 1})
        session = Session(model, cache)
        answer = session.generate(PROMPT, **{**GENERATE, **options})
        assert answer == plain(model, [PROMPT], **options)[0, len(PROMPT) :].tolist()
        assert session.restored == (144 if warm else 0)
        assert_true_to(model, cache, session.token_ids, 160)


def test_many_samples_of_a_batch_are_each_kept(model, tmp_path):
    prompts = [PROMPT, OTHERS[0]]
    with open_cache(model, tmp_path) as cache, TieredCache(cache, prompts, model=model) as past:
        torch.manual_seed(3)
        options = {**GENERATE, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 40}
        output = model.generate(**left_padded(prompts, 0), **cache_argument(past), **options)
        past.commit(output)
        rows = [row[0 if index < 3 else 40 :] for index, row in enumerate(output.tolist())]
        assert len({tuple(row) for row in rows}) == 6
        for row in rows:
            assert_true_to(model, cache, row, (len(row) - 1) // 16 * 16)


@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_assisted_decoding_rolls_back_and_keeps_only_what_stood(model, tmp_path, way):
    """Though transformers' own caches, once they hold a prefix, give wrong tokens here (5.24)."""
    options = {"max_new_tokens": 30, **({"assistant_model": llama(layers=1)} if way == "assistant" else {"prompt_lookup_num_tokens": 4})}
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache)
        answer = session.generate(PROMPT, **{**GENERATE, **options})
        assert answer == plain(model, [PROMPT], max_new_tokens=30)[0, len(PROMPT) :].tolist()
        evict_everything(cache)
        again = Session(model, cache)
        assert again.generate(PROMPT, **{**GENERATE, **options}) == answer
        assert again.restored == 144
        assert_true_to(model, cache, session.token_ids, 176)


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 3, ["sliding_attention", "full_attention", "sliding_attention"]])
def test_sliding_windows_equal_plain_and_come_back(tmp_path, kinds):
    model = sliding(kinds)
    with open_cache(model, tmp_path) as cache:
        first = Session(model, cache)
        answer = first.generate(PROMPT, **GENERATE)
        assert answer == plain(model, [PROMPT], DynamicCache(config=model.config))[0, len(PROMPT) :].tolist()
        evict_everything(cache)
        second = Session(model, cache)
        assert second.generate([*first.token_ids, 5, 6], **GENERATE) == plain(model, [[*first.token_ids, 5, 6]])[0, -12:].tolist()
        assert second.restored == 160
        both = [Session(model, cache), Session(model, cache)]
        assert generate_together(both, [PROMPT, PROMPT[:100]], **GENERATE)[0] == answer
        assert [session.restored for session in both] == [144, 94]


def test_a_device_budget_is_for_full_attention(tmp_path):
    model = sliding(["sliding_attention", "full_attention"])
    with open_cache(model, tmp_path) as cache, pytest.raises(ModelError, match="full attention in every layer"):
        Session(model, cache, device_pages=8).generate(PROMPT, **GENERATE)


RESUME = """
import sys
from tests.engines.rig import GENERATE, PROMPT, llama, open_cache
from kvtier.engines.transformers import Session
model = llama(layers=3, initializer_range=0.15)
with open_cache(model, sys.argv[1]) as cache:
    session = Session(model, cache)
    print(*session.generate(PROMPT, **GENERATE), session.restored)
    cache.settle()
"""


def test_a_session_resumes_in_a_new_process(tmp_path):
    def play():
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RESUME, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=root,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *answer, restored = done.stdout.split()
        return answer, int(restored)

    first, nothing = play()
    second, restored = play()
    assert (nothing, restored) == (0, 144)
    assert first == second


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["update", "crop", "repeat", "reorder", "select", "reset"]), st.integers(1, 5)), min_size=1, max_size=6
)


@torch.inference_mode()
@settings(max_examples=40)
@given(operations=OPERATIONS, known=st.lists(st.sampled_from([0, 16, 32, 48]), min_size=1, max_size=3))
def test_it_does_what_a_dynamic_cache_does(model, tmp_path_factory, operations, known):
    """Whatever is done with its layers, they hold what transformers' own cache holds that was filled with the same prefix."""
    prompts = [[1000 * row + token for token in range(50 - 5 * row)] for row in range(len(known))]
    layout = layout_of(model)
    kv = torch.randn(len(known), layout.layers, 2, 50, layout.kv_heads, layout.head_dim)
    with open_cache(model, tmp_path_factory.mktemp("store"), disk_bytes="2MiB") as cache:
        for prompt, pages, numbers in zip(prompts, known, kv, strict=True):
            cache.put(prompt[:pages], numbers[:, :, : len(prompt[:pages])])
        with TieredCache(cache, prompts) as mine:
            theirs = DynamicCache()
            columns = mine.get_seq_length()
            found = [len(prompt[:pages]) // 16 * 16 for prompt, pages in zip(prompts, known, strict=True)]
            assert columns in (0, min(5 * row + tokens for row, tokens in enumerate(found)))
            if columns:
                dense = torch.zeros(layout.layers, 2, len(known), layout.kv_heads, columns, layout.head_dim)
                for row, numbers in enumerate(kv):
                    dense[:, :, row, :, 5 * row :] = numbers[:, :, : max(0, columns - 5 * row)].transpose(2, 3)
                for layer, (keys, values) in enumerate(dense):
                    theirs.update(keys, values, layer)
            rows = len(known)
            for name, number in [*operations, ("update", 1)]:
                for layer in range(layout.layers) if name == "update" else ():
                    new = torch.randn(2, rows, layout.kv_heads, number, layout.head_dim)
                    for one, other in zip(mine.update(*new, layer), theirs.update(*new, layer), strict=True):
                        assert torch.equal(one, other)
                index = torch.arange(number) % rows
                for each in (mine, theirs):
                    if name == "crop":
                        each.crop(-number)
                    elif name == "repeat":
                        each.batch_repeat_interleave(number)
                    elif name == "reorder" and each.get_seq_length():
                        each.reorder_cache(index)
                    elif name == "select":
                        each.batch_select_indices(index)
                    elif name == "reset":
                        each.reset()
                if name in ("repeat", "reorder", "select", "reset"):
                    held = mine.layers[0].keys if mine.layers[0].is_initialized else None  # of no tokens, perhaps, but so many rows
                    rows = len(known) if held is None or held.ndim < 4 else len(held)
                assert mine.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize(
    ("options", "why"),
    [({"num_return_sequences": 2, "do_sample": True}, "one sequence"), ({"return_dict_in_generate": True}, "one sequence")],
)
def test_a_session_refuses_what_is_not_one_sequence(model, tmp_path, options, why):
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache)
        with pytest.raises(ModelError, match=why):
            session.generate(PROMPT, **{**GENERATE, **options})
        assert session.token_ids == []
        assert cache.stats()["leased_pages"] == 0


def test_batches_that_cannot_be_are_refused(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache)
        for sessions, tokens, why in [
            ([], [], "one at least"),
            ([session], [PROMPT, PROMPT], "expected as many"),
            ([session, session], [PROMPT, PROMPT], "there twice"),
            ([session, Session(llama(1), cache)], [PROMPT, PROMPT], "one model"),
            ([session, Session(model, cache, device_pages=8)], [PROMPT, PROMPT], "no device budget"),
        ]:
            with pytest.raises(ModelError, match=why):
                generate_together(sessions, tokens, **GENERATE)
        with pytest.raises(LayoutError, match="2 salts for 1"):
            TieredCache(cache, PROMPT, ["a", "b"])
        with pytest.raises(LayoutError, match="empty"):
            TieredCache(cache, [PROMPT, []])
        with TieredCache(cache, [PROMPT, PROMPT], model=model) as past:
            with pytest.raises(LayoutError, match="3 sequences and its cache 2"):
                model(torch.tensor([PROMPT] * 3), **cache_argument(past))
            with pytest.raises(LayoutError, match="3 sequences for 2 prompts"):
                past.commit([PROMPT] * 3)
            with pytest.raises(LayoutError, match="input_ids"):
                model(inputs_embeds=torch.zeros(2, 3, 64), **cache_argument(past))
        assert cache.stats()["leased_pages"] == 0
        assert not model._forward_pre_hooks


@torch.inference_mode()
def test_what_was_not_fed_is_not_kept(model, tmp_path):
    with open_cache(model, tmp_path) as cache, TieredCache(cache, PROMPT, model=model) as past:
        model(torch.tensor([PROMPT]), **cache_argument(past))
        assert past.commit([*PROMPT[:70], 199, *PROMPT[71:]]) == 64
        assert cache.lookup(PROMPT).tokens == 64


def test_the_log_of_what_was_fed():
    fed = Fed([[1, 2], [5]], [0, 1], 2)
    fed.feed(torch.tensor([[3], [6]]))
    fed.repeat(2)
    fed.select(torch.tensor([3, 0, 1, 1]))
    fed.feed(torch.tensor([[7], [8], [9], [4]]))
    fed.crop(0)
    assert [(row.prompt, row.token_ids) for row in fed.rows()] == [(1, [5, 6, 7]), (0, [1, 2, 3, 8]), (0, [1, 2, 3, 9]), (0, [1, 2, 3, 4])]
    fed.crop(2)
    assert [(row.prompt, row.token_ids) for row in fed.rows()] == [(1, [5]), (0, [1, 2]), (0, [1, 2]), (0, [1, 2])]
    fed.clear()
    assert [row.token_ids for row in fed.rows()] == [[], [], [], []]


def test_layout_of_a_sliding_model_holds_every_layer():
    assert layout_of(sliding(["sliding_attention", "full_attention"])).layers == 2
