"""Law checked in real vLLM: what comes back from a tier that loses bits changes what the model says by no more than its format does.

What a format does is measured beside it, on the same tokens, as `kvtier quality` does: the model in transformers, its KV encoded and
decoded, nothing else. Vocabularies are compared whole, along answers generated over restored prompts and over vLLM's own cache, in fp32: in
bf16 any difference, however small, rounds differently in every layer behind it, and the mean KL of that alone is about 1e-3 here, fifty
times what docs/quality.md says of 8 bits.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvtier.engines.models import cache_argument, load_model
from kvtier.engines.transformers import layout_of
from kvtier.formats import get_format
from tests.engines_real.conftest import running
from tests.engines_real.test_vllm_connector import BLOCK, Talk, connector

MARGIN = 1.5
"""Both ways compute the same in fp32, in another order, so that some numbers fall into the next step of 4 bits: the means were 8.43e-5 and
8.42e-5 for `q8`, 1.04e-2 and 1.24e-2 for `q4`. Another layout, or bits lost twice, are a multiple."""


class Said(NamedTuple):
    """An answer: the prompt's tokens that were cached, its own, and the log probabilities `[tokens, vocabulary]` they were taken from."""

    cached: int
    tokens: list[int]
    logarithms: np.ndarray


def say(talk: Talk, prompt: Any, tokens: int = 12) -> Said:
    from vllm import SamplingParams

    (output,) = talk.llm.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=-1), use_tqdm=False)
    answer = output.outputs[0]
    rows = [[each.logprob for _, each in sorted(row.items())] for row in answer.logprobs]
    return Said(output.num_cached_tokens, list(answer.token_ids), np.array(rows))


def divergences(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of distributions from its own, nats, at each place; both `[places, vocabulary]`, as logarithms."""
    kl: np.ndarray = (np.exp(own) * (own - other)).sum(axis=1)
    return kl


@torch.inference_mode()
def expected(model: Any, prompt: list[int], answer: list[int], name: str) -> np.ndarray:
    """The divergences along `answer` in transformers when the prompt's full pages went through the format."""
    keep = (len(prompt) - 1) // BLOCK * BLOCK
    layout, said = layout_of(model, BLOCK), []
    past = DynamicCache()
    model(torch.tensor([prompt[:keep]]), **cache_argument(past))
    planes = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in past.layers]).transpose(2, 3)
    pages = planes.unflatten(2, (-1, BLOCK)).movedim(2, 0).contiguous()
    back = get_format(name).decode(get_format(name).encode(pages, layout), layout).movedim(0, 2).flatten(2, 3).transpose(2, 3)
    for kv in (planes.transpose(2, 3), back):
        cache = DynamicCache()
        for index, (keys, values) in enumerate(kv):
            cache.update(keys[None], values[None], index)
        logits = model(torch.tensor([[*prompt[keep:], *answer[:-1]]]), **cache_argument(cache)).logits[0, -len(answer) :]
        said.append(logits.double().log_softmax(dim=-1).numpy())
    return divergences(*said)


def hits(talk: Talk) -> dict[str, float]:
    """Tokens that came back, by tier."""
    return {metric.labels["tier"]: metric.value for metric in talk.llm.get_metrics() if metric.name == "vllm:kvtier_hit_tokens"}


class Quality:
    """Answers over prompts that were pushed down into one tier, `tier`, in one format, `name`."""

    tier: ClassVar[str]
    name: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def talk(cls, model_folder, tmp_path_factory):
        bytes_of = {f"{cls.tier}__format": cls.name, f"{cls.tier}__capacity_bytes": "160MiB", "device__capacity_bytes": "96MiB"}
        place = {"disk__path": str(tmp_path_factory.mktemp("store") / "kv"), "host": None} if cls.tier == "disk" else {}
        options = {"dtype": "float32", "max_logprobs": -1, "max_model_len": 16 * BLOCK}
        with running(model_folder, kv_transfer_config=connector(**bytes_of, **place), **options) as llm:
            yield Talk(llm)

    def test_the_model_says_the_same_up_to_what_the_format_loses(self, talk, model_folder):
        prompts = [talk.prompt(4 * BLOCK + 11, 200 * at) for at in range(4)]
        for prompt in prompts:
            assert say(talk, prompt, tokens=1).cached == 0
        own = [say(talk, prompt) for prompt in prompts]
        talk.forget()
        for at in range(3):  # until none of them is left in the device tier, where pages are raw
            talk.ask(talk.prompt(8 * BLOCK, 1000 + 50 * at), tokens=1)
        talk.forget()
        before = hits(talk)
        restored = [say(talk, prompt) for prompt in prompts]
        assert [each.cached for each in restored] == [4 * BLOCK] * 4
        after = hits(talk)
        assert {tier: after[tier] - before.get(tier, 0) for tier in after if after[tier] > before.get(tier, 0)} == {self.tier: 16 * BLOCK}
        model = load_model(model_folder, "fp32").model
        found, wanted = [], []
        for prompt, mine, theirs in zip(prompts, own, restored, strict=True):
            same = next((at for at, pair in enumerate(zip(mine.tokens, theirs.tokens, strict=True)) if pair[0] != pair[1]), 11) + 1
            found.append(divergences(mine.logarithms[:same], theirs.logarithms[:same]))
            wanted.append(expected(model, prompt["prompt_token_ids"], mine.tokens[:same], self.name))
        kl, reference = np.concatenate(found), np.concatenate(wanted)
        assert len(kl) >= 24, "answers that part after a few tokens compare nothing"
        assert reference.mean() / MARGIN <= kl.mean() <= MARGIN * reference.mean()


class TestEightBitsOnTheHost(Quality):
    tier, name = "host", "q8"


class TestFourBitsOnDisk(Quality):
    tier, name = "disk", "q4"
