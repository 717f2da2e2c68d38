"""What transformers checks of its own caches (its `tests/utils/test_cache_utils.py`, and where `tests/generation` gives one to a model), of
kvtier's with a prefix that was restored: those tests are in no package, so this is what they check, in words of our own.

Not here, because they are not about what a cache does for a model: `torch.export`, compiled static caches, several accelerators.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvtier.engines.budgeted import BudgetedCache
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, generate_together, left_padded
from kvtier.errors import LayoutError
from tests.engines.rig import GENERATE, PROMPT, SIZES, evict_everything, llama, open_cache

SHORT = PROMPT[::-1][:60]
LOUD: dict[str, Any] = {"initializer_range": 0.15, "num_hidden_layers": 2, **SIZES}
"""Weights so large that predictions hang on the context."""
ENDLESS: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "initializer_range": 0.15}
MANY: dict[str, Any] = {key: value for key, value in LOUD.items() if key != "num_key_value_heads"}


@pytest.fixture(scope="module")
def model():
    return llama(layers=3, initializer_range=0.15)


@pytest.fixture
def warm(model, tmp_path):
    """A cache that holds both prompts, below the device."""
    with open_cache(model, tmp_path) as cache:
        generate_together([Session(model, cache), Session(model, cache)], [PROMPT, SHORT], **GENERATE)
        evict_everything(cache)
        yield cache


@torch.inference_mode()
def generated(model, inputs, past=None, **options):
    return model.generate(**inputs, **(cache_argument(past) if past is not None else {}), **{**GENERATE, **options})


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_gives_what_it_gives_with_each_of_transformers_caches(tmp_path, attention, implementation):
    model, inputs = llama(layers=3, initializer_range=0.15, attn_implementation=attention), left_padded([PROMPT, SHORT], 0)
    theirs = generated(model, inputs, cache_implementation=implementation, disable_compile=True)
    with open_cache(model, tmp_path) as cache:
        for restored in ([0, 0], [138, 48]):
            with TieredCache(cache, [PROMPT, SHORT], model=model) as past:
                ours = generated(model, inputs, past)
                assert torch.equal(ours, theirs)
                assert past.restored_each == restored
                past.commit(ours)


def test_beams_of_a_batch_cross_over_and_are_all_returned(model, warm):
    inputs = left_padded([PROMPT, SHORT], 0)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "max_new_tokens": 30}
    theirs = generated(model, inputs, DynamicCache(), **options)
    with TieredCache(warm, [PROMPT, SHORT], model=model) as past:
        ours = generated(model, inputs, past, **options)
        assert min(past.restored_each) > 0
        assert torch.equal(ours.sequences, theirs.sequences)
        assert any(len(set(row.tolist()) - {-1}) > 1 for row in ours.beam_indices), "rows were really reordered"
        assert past.commit(ours.sequences) > 0


def test_samples_are_those_of_the_same_seed(model, warm):
    inputs = left_padded([PROMPT], 0)
    torch.manual_seed(5)
    theirs = generated(model, inputs, do_sample=True, max_new_tokens=30)
    torch.manual_seed(5)
    with TieredCache(warm, PROMPT, model=model) as past:
        assert torch.equal(generated(model, inputs, past, do_sample=True, max_new_tokens=30), theirs)
        assert past.restored == 144


@pytest.mark.parametrize("size", [16, 50])
def test_a_prompt_may_be_computed_in_chunks(model, warm, size):
    prompt = [*PROMPT, *SHORT]
    with TieredCache(warm, prompt, model=model) as past:
        ours = generated(model, left_padded([prompt], 0), past, prefill_chunk_size=size)
        assert past.restored == 144
        assert torch.equal(ours, generated(model, left_padded([prompt], 0)))


def test_generation_goes_on_from_the_cache_that_it_returned(model, warm):
    """4 tokens and then 8 are 12 tokens, and the cache in the answer is the one that was given."""
    with TieredCache(warm, PROMPT, model=model) as past:
        some = generated(model, left_padded([PROMPT], 0), past, max_new_tokens=4, return_dict_in_generate=True)
        assert any(value is past for value in some.values())
        more = generated(model, left_padded(some.sequences.tolist(), 0), past, max_new_tokens=8)
        assert torch.equal(more, generated(model, left_padded([PROMPT], 0)))
        assert past.commit(more) == 160


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**MANY)),
        lambda: LlamaForCausalLM(LlamaConfig(**MANY, num_key_value_heads=1)),
        lambda: GPTJForCausalLM(GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=200, n_positions=1024, **ENDLESS)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**MANY)),
        lambda: Phi3ForCausalLM(Phi3Config(**LOUD, pad_token_id=0)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**LOUD, head_dim=32)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**LOUD, head_dim=16, query_pre_attn_scalar=16, sliding_window=24, pad_token_id=0)),
    ],
    ids=["all heads", "one head", "GPT-J", "GPT-NeoX", "Phi-3", "Qwen3", "Gemma 2"],
)
def test_kinds_of_models(tmp_path, foreign):
    torch.manual_seed(2)
    other = foreign().eval()
    with open_cache(other, tmp_path) as cache:
        theirs = generated(other, left_padded([PROMPT], 0))[0, len(PROMPT) :].tolist()
        for restored in (0, 144):
            session = Session(other, cache)
            assert session.generate(PROMPT, **GENERATE) == theirs
            assert session.restored == restored
            evict_everything(cache)


@pytest.mark.parametrize("extra", [1, 16, 37])
def test_padding_beyond_what_is_needed_changes_nothing_where_the_mask_is_given(model, warm, extra):
    inputs = left_padded([PROMPT, SHORT], 0)
    wide = {"input_ids": torch.zeros(2, extra, dtype=torch.int64), "attention_mask": torch.zeros(2, extra, dtype=torch.int64)}
    wide = {name: torch.cat((wide[name], inputs[name]), dim=1) for name in wide}
    theirs = generated(model, inputs)[:, len(PROMPT) :]
    with TieredCache(warm, wide["input_ids"], model=model, attention_mask=wide["attention_mask"]) as past:
        ours = generated(model, wide, past)
        assert past.restored_each == [138, 48]
        assert torch.equal(ours[:, len(PROMPT) + extra :], theirs)
        assert past.commit(ours) == 160 + 64
    one = {name: value[:1] for name, value in wide.items()}
    with TieredCache(warm, one["input_ids"], model=model, attention_mask=one["attention_mask"]) as past:
        ours = generated(model, one, past, prompt_lookup_num_tokens=4)
        assert past.restored == 144
        assert torch.equal(ours[:, len(PROMPT) + extra :], theirs[:1])


def test_padding_that_the_cache_was_not_told_of_is_refused_before_anything_is_computed(model, warm):
    """It would shift what was restored, or keep what no token stands for under the tokens of the padding."""
    wide = {"input_ids": torch.tensor([[0] * 20 + SHORT]), "attention_mask": torch.tensor([[0] * 20 + [1] * len(SHORT)])}
    for ids in (SHORT, wide["input_ids"]):
        with TieredCache(warm, ids, model=model) as past, pytest.raises(LayoutError, match="attention mask hides something else"):
            generated(model, wide, past)
    assert warm.lookup([0] * 20 + SHORT).tokens == 0
    with TieredCache(warm, [PROMPT, SHORT], model=model) as past, pytest.raises(LayoutError, match="attention mask"):
        model(left_padded([PROMPT, SHORT], 0)["input_ids"][:, past.get_seq_length() :], **cache_argument(past))
    with BudgetedCache(model, warm, SHORT, 8) as past, pytest.raises(LayoutError, match="attention mask"):
        generated(model, wide, past)


@torch.inference_mode()
def test_a_token_that_the_mask_hides_later_is_not_kept(model, tmp_path):
    """As where `generate` takes the token of the padding for padding, because nobody gave it a mask."""
    prompt = [token + 1 for token in SHORT]
    with open_cache(model, tmp_path) as cache, TieredCache(cache, prompt, model=model) as past:
        model(torch.tensor([prompt]), attention_mask=torch.ones(1, 60), **cache_argument(past))
        hidden = torch.tensor([[1] * 60 + [0] + [1] * 9])
        model(torch.tensor([[0, *range(1, 10)]]), attention_mask=hidden, **cache_argument(past))
        with pytest.raises(LayoutError, match="attention mask"):
            past.commit([*prompt, *range(10)])
        assert cache.lookup(prompt).tokens == 0


@torch.inference_mode()
def test_positions_that_count_padding_or_not_what_was_restored_are_refused_and_nothing_is_kept(model, warm):
    """Keys are rotated by their positions: kept under their tokens, they would be found by sequences in which those stand elsewhere."""
    prompts = [[*SHORT[:5], *PROMPT], [*SHORT[:5], *SHORT]]
    inputs = left_padded(prompts, 0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    right = (mask.cumsum(-1) - 1).clamp(min=0)
    for wrong in (None, torch.arange(ids.shape[1])[None], right + 1):
        with TieredCache(warm, prompts, model=model) as past, pytest.raises(LayoutError, match="position_ids"):
            model(ids, attention_mask=mask, position_ids=wrong, **cache_argument(past))
    new = torch.tensor([PROMPT[144:]])
    counted = torch.arange(new.shape[1])[None]
    with TieredCache(warm, PROMPT, model=model) as past, pytest.raises(LayoutError, match="position_ids"):
        model(new, position_ids=counted, **cache_argument(past))
    with BudgetedCache(model, warm, PROMPT, 12) as past, pytest.raises(LayoutError, match="position_ids"):
        model(new, position_ids=counted, **cache_argument(past))
    with TieredCache(warm, prompts, model=model) as past:
        model(ids[:, :-2], attention_mask=mask[:, :-2], position_ids=right[:, :-2], **cache_argument(past))
        model(ids[:, -2:], attention_mask=mask, position_ids=right[:, -2:] - 1, **cache_argument(past))
        with pytest.raises(LayoutError, match="position_ids"):
            past.commit(prompts)
    assert warm.lookup(prompts[0]).tokens == 0
    with TieredCache(warm, prompts, model=model) as past:
        model(ids[:, :-2], attention_mask=mask[:, :-2], position_ids=right[:, :-2], **cache_argument(past))
        model(ids[:, -2:], attention_mask=mask, position_ids=right[:, -2:], **cache_argument(past))
        assert past.commit(prompts) == 144 + 64
    evict_everything(warm)
    session = Session(model, warm)
    assert session.generate(prompts[1], **GENERATE) == generated(model, left_padded(prompts[1:], 0))[0, 65:].tolist()
    assert session.restored == 64


@torch.inference_mode()
def test_a_mask_of_the_new_tokens_alone_is_refused(model, warm):
    """transformers takes it for the first columns, and hides the others."""
    new = torch.tensor([PROMPT[144:]])
    for past in (TieredCache(warm, PROMPT, model=model), BudgetedCache(model, warm, PROMPT, 12)):
        with past, pytest.raises(LayoutError, match="the attention mask has 6 columns; expected at least 150"):
            model(new, attention_mask=torch.ones_like(new), **cache_argument(past))


@pytest.mark.parametrize(
    ("ids", "mask"), [([[5, 6], [7]], [[1, 1], [1, 1]]), ([[5, 6]], [[1, 1], [1]]), ([[]], [[]]), (torch.zeros(0, 4), torch.ones(0, 4))]
)
def test_a_mask_that_is_no_batch_is_refused(model, warm, ids, mask):
    with pytest.raises(LayoutError, match=r"expected \[sequences, tokens\] for both"):
        TieredCache(warm, ids, model=model, attention_mask=mask)


def test_ids_and_mask_may_be_lists(model, warm):
    with TieredCache(warm, [[0, *PROMPT]], model=model, attention_mask=[[0] + [1] * len(PROMPT)]) as past:
        assert past.restored == 144


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[0, 1, 0, 1]], [[0, 0, 0, 0]], [1, 1, 1, 1]])
def test_a_mask_that_is_none_of_left_padding_is_refused(model, warm, mask):
    with pytest.raises(LayoutError, match="zeros at the left"):
        TieredCache(warm, torch.tensor([[5, 6, 7, 8]]), model=model, attention_mask=torch.tensor(mask))


def test_it_is_not_copied_but_made_again(model, warm):
    """Where transformers copies a cache of a common prompt, a second one of kvtier's has the same pages."""
    with TieredCache(warm, PROMPT, model=model) as past:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="make another one of the same sequence"):
                copied(past)
        with TieredCache(warm, [*PROMPT, 4], model=model) as other:
            for ids, each in (([*PROMPT, 4], other), (PROMPT, past)):
                inputs = left_padded([ids], 0)
                assert torch.equal(generated(model, inputs, each), generated(model, inputs))
                assert each.restored == 144


def test_it_describes_itself_as_a_dynamic_cache_of_the_same_prefix_does(model, warm):
    theirs = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([PROMPT[:144]]), **cache_argument(theirs))
    with TieredCache(warm, PROMPT, model=model) as ours:
        for name in ("is_compileable", "is_croppable", "is_sliding"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert (len(ours), ours.get_seq_length(), ours.get_mask_sizes(3, 0)) == (len(theirs), 144, theirs.get_mask_sizes(3, 0))
