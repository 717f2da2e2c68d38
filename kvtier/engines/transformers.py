"""Hugging Face transformers on top of kvtier: what a model's pages look like, chat sessions, and the caches behind them.

Batches, beams, parallel samples and assisted decoding work as with any cache (`tiered.py`); contexts larger than their share of the device
are in `budgeted.py`. A `Session` is one thread's and owns the tokens of its conversation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from kvtier.cache import TieredKVCache
from kvtier.engines.adapters import Adapters, plain_model
from kvtier.engines.budgeted import BudgetedCache, Select
from kvtier.engines.models import cache_argument
from kvtier.engines.tiered import TieredCache
from kvtier.errors import LayoutError, ModelError
from kvtier.layout import PageLayout

__all__ = ["Session", "TieredCache", "generate_together", "layout_of", "left_padded"]

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_KINDS = {"full_attention", "sliding_attention"}


def layout_of(model: Any, page_tokens: int = 16) -> PageLayout:
    """The page layout of a Hugging Face causal language model.

    Pages hold all layers of their tokens, of sliding windows too. ModelError for models whose KV is not one K and one V of equal shape per
    layer and token (linear attention, latents, layers that share their KV), or is not kept by a cache that can be given.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    foreign = sorted(kinds - _KINDS)
    if getattr(config, "kv_lora_rank", None):
        foreign.append("latents")
    if getattr(config, "is_encoder_decoder", False):
        foreign.append("an encoder")
    if getattr(config, "num_kv_shared_layers", None):
        foreign.append("layers that share their KV")
    if config.model_type == "moshi":
        foreign.append("windows that are kept by transformers' own cache alone")
    if not {"cache", "past_key_values"} & set(inspect.signature(plain_model(model).forward).parameters):
        foreign.append("no KV cache in transformers")
    if foreign:
        raise ModelError(
            f"{type(model).__name__} has {', '.join(foreign)}; kvtier's Hugging Face cache holds models with full or sliding attention, "
            "one K and one V of equal shape in every layer"
        )
    dtype = _DTYPES.get(model.dtype)
    if dtype is None:
        raise ModelError(f"the model computes in {model.dtype}; kvtier holds {', '.join(_DTYPES.values())}")
    try:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return PageLayout(config.num_hidden_layers, 2, page_tokens, _kv_heads(config), head_dim, dtype)
    except RuntimeError as error:  # transformers': an attribute that differs from layer to layer
        raise ModelError(f"{type(model).__name__} has layers of unequal KV, which kvtier's cache cannot hold: {error}") from None


def _kv_heads(config: Any) -> int:
    """Heads whose keys and values are in the cache."""
    heads: int = config.num_attention_heads
    if config.model_type == "falcon":  # which computes fewer in its new architecture, but keeps a copy for every head
        return heads if config.new_decoder_architecture else 1 if config.multi_query else config.num_kv_heads
    return getattr(config, "num_key_value_heads", None) or heads


def left_padded(sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 `[sequences, longest]`, for a batch whose shorter sequences are padded on the left."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences])
    mask = torch.tensor([[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _turn(new_ids: Sequence[int] | torch.Tensor) -> list[int]:
    """The tokens of one turn, of which a tokenizer may have made a batch of one. LayoutError for a larger batch."""
    if not isinstance(new_ids, torch.Tensor):
        return list(new_ids)
    if new_ids.ndim > 1 and new_ids.shape[:-1].numel() != 1:
        raise LayoutError(f"new_ids have shape {list(new_ids.shape)}; a session plays one sequence: [tokens] or [1, tokens]")
    tokens: list[int] = new_ids.flatten().tolist()
    return tokens


class Session:
    """One conversation: the tokens so far, and turns played through the tiers. `salt` keeps tenants apart. PEFT's adapters, those that are
    on when a turn begins, are kept apart without.

    `device_pages` and `select`: see `BudgetedCache`.
    """

    def __init__(
        self, model: Any, cache: TieredKVCache, salt: str = "", device_pages: int | None = None, select: Select = "attention"
    ) -> None:
        self.model = model
        self.cache = cache
        self.salt = salt
        self.device_pages = device_pages
        self.select = select
        self.token_ids: list[int] = []
        self.restored = 0
        """Tokens of the last turn that came from the cache."""

    def prefetch(self, deadline: float | None = None) -> None:
        """Hint that this session's next turn is near, with the adapters that are on now."""
        self.cache.prefetch(self.token_ids, deadline, Adapters.of(self.model).salt(self.salt))

    def generate(self, new_ids: Sequence[int] | torch.Tensor, **options: Any) -> list[int]:
        """Play one turn: append `new_ids`, generate with `options` (as for `model.generate`), return the generated tokens.

        ModelError for options that return something else than one sequence of tokens.
        """
        _check_options(self.model, options)
        if self.device_pages is None:
            return generate_together([self], [new_ids], **options)[0]
        prompt = [*self.token_ids, *_turn(new_ids)]
        inputs = torch.tensor([prompt], device=self.model.device)
        options.setdefault("use_cache", True)
        options.setdefault("prefill_chunk_size", self.device_pages * self.cache.layout.page_tokens)
        with BudgetedCache(self.model, self.cache, prompt, self.device_pages, self.salt, self.select) as past:
            output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **cache_argument(past), **options)
            self.restored = past.restored
            self.token_ids = output[0].tolist()
            past.commit(self.token_ids)
        return self.token_ids[len(prompt) :]


def generate_together(sessions: Sequence[Session], new_ids: Sequence[Sequence[int] | torch.Tensor], **options: Any) -> list[list[int]]:
    """Play one turn of several sessions of one model and cache as a batch; `options` as for `model.generate`.

    Returns the generated tokens of each, without what a sequence that ended early is filled up with. ModelError for sessions that cannot be
    played together, and as `Session.generate`.
    """
    if not sessions or len(sessions) != len(new_ids):
        raise ModelError(
            f"generate_together: {len(sessions)} sessions and new tokens for {len(new_ids)}; expected as many, and one at least"
        )
    model, cache = sessions[0].model, sessions[0].cache
    _check_options(model, options)
    if any(session.model is not model or session.cache is not cache or session.device_pages is not None for session in sessions):
        raise ModelError("generate_together: the sessions need one model and one cache, and no device budget")
    if len({id(session) for session in sessions}) != len(sessions):
        raise ModelError("generate_together: a session is there twice; its second turn continues its first one")
    prompts = [[*session.token_ids, *_turn(new)] for session, new in zip(sessions, new_ids, strict=True)]
    options.setdefault("use_cache", True)  # some models say no by themselves, as do most that were trained
    padding = options.setdefault("pad_token_id", _padding_token(model, options))
    with TieredCache(cache, prompts, [session.salt for session in sessions], model) as past:
        inputs = left_padded(prompts, padding, model.device)
        output = model.generate(**inputs, **cache_argument(past), **options)
        longest = inputs["input_ids"].shape[1]
        answers = [_ended(row[longest:], _setting(model, options, "eos_token_id")) for row in output.tolist()]
        for session, prompt, answer, restored in zip(sessions, prompts, answers, past.restored_each, strict=True):
            session.token_ids, session.restored = [*prompt, *answer], restored
        past.commit([session.token_ids for session in sessions])
    return answers


def _check_options(model: Any, options: dict[str, Any]) -> None:
    if options.get("adapter_names"):
        raise ModelError("adapter_names: a session's adapter is the one that is on; call set_adapter before its turn, and leave it out")
    if (_setting(model, options, "num_return_sequences") or 1) != 1 or _setting(model, options, "return_dict_in_generate"):
        raise ModelError(
            "a session continues one sequence of tokens: leave num_return_sequences and return_dict_in_generate out, or call "
            "model.generate with a TieredCache"
        )


def _setting(model: Any, options: dict[str, Any], name: str) -> Any:
    """What `generate` would go by."""
    return options[name] if name in options else getattr(options.get("generation_config") or model.generation_config, name)


def _padding_token(model: Any, options: dict[str, Any]) -> int:
    """The model's padding, else its end, else anything, since it is masked."""
    ends = _setting(model, options, "eos_token_id")
    first = ends[0] if isinstance(ends, list) else ends
    return next((token for token in (_setting(model, options, "pad_token_id"), first) if token is not None), 0)


def _ended(answer: list[int], ends: int | Sequence[int] | None) -> list[int]:
    """An answer up to and with the first token that ends it."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return answer[: next((index + 1 for index, token in enumerate(answer) if token in stops), len(answer))]
