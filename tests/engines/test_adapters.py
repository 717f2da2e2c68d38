"""Law checked: KV that adapters of PEFT computed is found under the same adapters only, whatever they are called and however they were put
into the model; what cannot be told is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvtier.engines.adapters import Adapters, plain_model
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, layout_of
from kvtier.errors import ModelError
from tests.engines.rig import GENERATE, PROMPT, llama, open_cache

peft = pytest.importorskip("peft")

LOUD: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
"""Adapters whose KV is another than the model's from the start."""


def base() -> Any:
    return llama(layers=2, initializer_range=0.15)


def adapted(*names: str, **config: Any) -> Any:
    """A model with adapters of these names, each with weights of its own; the first is on."""
    torch.manual_seed(3)
    settings = LOUD | config
    model = peft.get_peft_model(base(), peft.LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**settings))
    return model.eval()


def plain(model: Any) -> list[int]:
    inputs = torch.tensor([PROMPT])
    answer: list[int] = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **GENERATE)[0, len(PROMPT) :].tolist()
    return answer


def played(model: Any, cache: Any, **options: Any) -> int:
    """A turn through the tiers gives what the model alone gives; how many tokens were restored."""
    session = Session(model, cache, **options)
    assert session.generate(PROMPT, **GENERATE) == plain(model)
    return session.restored


def test_adapters_have_pages_of_their_own_and_find_them_again(tmp_path):
    model = adapted("north", "south")
    with open_cache(model, tmp_path) as cache:
        for expected in (0, 144):
            for adapter in ("north", "south"):
                model.set_adapter(adapter)
                assert played(model, cache) == expected
            with model.disable_adapter():
                assert played(model, cache) == expected
        assert played(base(), cache) == 144, "without adapters it is the plain model"
        assert played(model, cache, salt="other") == 0
    with open_cache(model, tmp_path) as cache:
        assert played(model, cache) == 144, "after a restart"
        model.base_model.set_adapter(["north", "south"])
        assert played(model, cache) == 0, "two at once are a third"


def test_a_device_budget_keeps_them_apart_too(tmp_path):
    model = adapted("north", "south")
    with open_cache(model, tmp_path) as cache:
        assert played(model, cache, device_pages=12, select="exact") == 0
        assert played(model, cache, device_pages=12, select="exact") == 144
        model.set_adapter("south")
        assert played(model, cache, device_pages=12, select="exact") == 0


def test_the_same_weights_are_the_same_adapter_by_any_name_and_way(tmp_path):
    model = adapted("one")
    model.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter" / "one")
    again = peft.PeftModel.from_pretrained(base(), folder, adapter_name="two").eval()
    theirs = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(folder), base(), adapter_name="three").eval()
    peft.set_peft_model_state_dict(theirs, load_file(f"{folder}/adapter_model.safetensors"), adapter_name="three")
    with open_cache(model, tmp_path / "store") as cache:
        assert played(model, cache) == 0
        assert played(again, cache) == 144
        assert played(theirs, cache) == 144
        assert played(again.get_base_model(), cache) == 144
        again.base_model.disable_adapter_layers()
        assert played(again, cache) == 0


@pytest.mark.parametrize(
    "change", [lambda weight: weight.add_(1.0), lambda weight: weight.data.mul_(-1.0)], ids=["in place", "where torch does not see it"]
)
@torch.no_grad()
def test_weights_that_were_changed_are_another_adapter(tmp_path, change):
    model = adapted("north")
    with open_cache(model, tmp_path) as cache:
        assert played(model, cache) == 0
        change(model.get_base_model().model.layers[0].self_attn.k_proj.lora_A["north"].weight)
        assert played(model, cache) == 0
        assert played(model, cache) == 144


def test_merged_adapters_count_while_they_are_merged(tmp_path):
    model = adapted("north", "south")
    with open_cache(model, tmp_path) as cache:
        assert played(model, cache) == 0
        model.merge_adapter(["north"])
        session = Session(model, cache)
        session.generate(PROMPT, **GENERATE)
        assert session.restored == 144
        model.merge_adapter(["south"])
        session = Session(model, cache)
        session.generate(PROMPT, **GENERATE)
        assert session.restored == 0, "two are merged now"


def test_scaling_and_modules_saved_beside_count():
    salts = {
        Adapters.of(model).salt("")
        for model in (base(), adapted("north"), adapted("north", lora_alpha=32), adapted("north", modules_to_save=["embed_tokens"]))
    }
    assert len(salts) == 4
    assert Adapters.of(adapted("north")).salt("") == Adapters.of(adapted("south")).salt("")
    assert Adapters.of(base()).salt("tenant") == "tenant"


def test_an_adapter_that_is_changed_before_its_cache_is_used_is_refused(tmp_path):
    model = adapted("north", "south")
    inputs = torch.tensor([PROMPT])
    with open_cache(model, tmp_path) as cache:
        played(model, cache)
        with TieredCache(cache, PROMPT, model=model) as past:
            model.set_adapter("south")
            with pytest.raises(ModelError, match="adapters were changed after its cache was made"):
                model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **cache_argument(past), **GENERATE)
        with TieredCache(cache, PROMPT, model=model) as past:
            output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **cache_argument(past), **GENERATE)
            model.set_adapter("north")
            with pytest.raises(ModelError, match="adapters were changed after its cache was made"):
                past.commit(output)
        model.set_adapter("south")
        assert played(model, cache) == 0, "nothing was kept"


def test_an_adapter_for_each_sequence_of_a_batch_is_refused(tmp_path):
    model = adapted("north", "south")
    both = torch.tensor([PROMPT, PROMPT])
    with open_cache(model, tmp_path) as cache:
        with pytest.raises(ModelError, match="adapter_names"):
            Session(model, cache).generate(PROMPT, adapter_names=["south"], **GENERATE)
        with TieredCache(cache, both, model=model) as past, pytest.raises(ModelError, match="adapter_names"):
            model.generate(
                input_ids=both, attention_mask=torch.ones_like(both), adapter_names=["north", "south"], **cache_argument(past), **GENERATE
            )
        assert cache.lookup(PROMPT).tokens == 0


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "no layers that kvtier could tell it by"),
        (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "no layers that kvtier could tell it by"),
        (lambda: peft.LoraConfig(**LOUD, alora_invocation_tokens=[5, 6]), "switched on by tokens that come later"),
    ],
    ids=["prompt tuning", "prefix tuning", "activated LoRA"],
)
def test_adapters_whose_kv_is_not_of_the_tokens_before_are_refused(tmp_path, config, why):
    model = peft.get_peft_model(base(), config()).eval()
    with open_cache(base(), tmp_path) as cache, pytest.raises(ModelError, match=why):
        Session(model, cache).generate(PROMPT, **GENERATE)


@pytest.mark.parametrize("kind", ["IA3Config", "VeraConfig", "LoHaConfig", "OFTConfig"])
def test_other_kinds_are_told_apart_by_their_weights(tmp_path, kind):
    made: dict[str, dict[str, Any]] = {
        "IA3Config": {"feedforward_modules": [], "target_modules": ["k_proj", "v_proj"]},
        "OFTConfig": {"r": 0, "oft_block_size": 8},
    }
    settings: dict[str, Any] = {"target_modules": ["q_proj", "k_proj"], **made.get(kind, {})}
    model = peft.get_peft_model(base(), getattr(peft, kind)(**settings)).eval()
    with open_cache(model, tmp_path) as cache:
        assert played(model, cache) == 0
        assert played(model, cache) == 144
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.5)
        assert played(model, cache) == 0


def test_the_layout_is_that_of_the_model_inside():
    assert layout_of(adapted("north")) == layout_of(base())
    inner = base()
    assert plain_model(peft.get_peft_model(inner, peft.LoraConfig(**LOUD))) is inner
    assert plain_model(inner) is inner
