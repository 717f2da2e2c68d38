"""Hugging Face transformers on top of kvtier: a `Cache` for `generate` whose prefix comes from the tiers, and chat sessions.

The dense K and V that attention needs are gathered layer by layer from leased device pages, at the moment the model reaches the layer,
so that later layers may still be on their way. New KV goes back page by page with `commit`. One sequence per cache (batch size 1).
Contract checked against transformers 5.19 to 5.23 (`CacheLayerMixin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from kvtier.budget import BudgetedLease
from kvtier.cache import TieredKVCache
from kvtier.config import ModelConfig
from kvtier.engines.budgeted import BudgetedLayer, attach, check_asked
from kvtier.engines.models import cache_argument
from kvtier.engines.stopwatch import Stopwatch
from kvtier.errors import LayoutError, MissingExtra, ModelError
from kvtier.layout import PageLayout
from kvtier.lease import Lease, Match

try:
    from transformers.cache_utils import Cache, DynamicLayer
except ImportError as error:
    raise MissingExtra("the Hugging Face engine needs transformers; install it with: pip install 'kvtier[hf]'") from error

Select = Literal["attention", "exact"]
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def layout_of(model: Any, page_tokens: int = 16) -> PageLayout:
    """The page layout of a Hugging Face causal language model.

    ModelError for models whose KV is not one K and one V of equal shape per layer and token (sliding windows, linear attention, latents).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "kv_lora_rank", None):
        raise ModelError(
            f"{type(model).__name__} mixes kinds of attention ({', '.join(sorted(kinds))}); kvtier's Hugging Face cache holds models with "
            "full attention in every layer"
        )
    heads = config.num_attention_heads
    dtype = _DTYPES.get(model.dtype)
    if dtype is None:
        raise ModelError(f"the model computes in {model.dtype}; kvtier holds {', '.join(_DTYPES.values())}")
    return PageLayout(
        layers=config.num_hidden_layers,
        planes=2,
        page_tokens=page_tokens,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )


class TieredLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: a leased prefix that is gathered when the model first gets here, then what the model adds."""

    def __init__(self, lease: Lease, index: int, stopwatch: Stopwatch) -> None:
        super().__init__()
        self._lease: Lease | None = lease if lease.tokens else None
        self._index = index
        self._stopwatch = stopwatch

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """New `[1, kv_heads, new, head_dim]` in, all `[1, kv_heads, total, head_dim]` out."""
        self._stopwatch.reached(self._index, self.get_seq_length(), key_states.shape[-2], key_states.device)
        with self._stopwatch.waiting():
            self._gather(key_states.device)
        both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return both

    def get_seq_length(self) -> int:
        """Tokens in this layer, the leased prefix included."""
        return self._lease.tokens if self._lease is not None else int(super().get_seq_length())

    def get_max_cache_shape(self) -> int:
        """No bound. Transformers before 5.20 ask for it under this name."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        self._gather(None)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch axis."""
        self._gather(None)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat along the batch axis."""
        self._gather(None)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select along the batch axis."""
        self._gather(None)
        super().batch_select_indices(indices)

    def _gather(self, device: torch.device | None) -> None:
        """Build the dense prefix `[1, kv_heads, tokens, head_dim]` from device pages, once."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        pool = lease.layer(self._index)
        pages = pool[torch.as_tensor(lease.slots(), device=pool.device)]
        planes = pages.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, : lease.tokens].to(device or pool.device)
        self.dtype, self.device = planes.dtype, planes.device
        self.keys, self.values = planes[0][None], planes[1][None]
        self.is_initialized = True


class TieredCache(Cache):  # type: ignore[misc]
    """The cache (`past_key_values` before transformers 5.24) of one sequence: starts with whatever prefix of `token_ids` the tiers hold.

    Use as a context manager, and give `generate` the *whole* sequence:

        with TieredCache(cache, ids) as past:
            output = model.generate(input_ids=torch.tensor([ids]), cache=past, ...)
            past.commit(output[0])

    At most `len(token_ids) - 1` tokens are restored, because a model needs one token to predict the next. `restored` is how many were.

    With `device_pages`, no more pages of the sequence than that are on the device at any time, however long it is (docs/attention.md).
    `select` says what a decoded token attends over: "attention", the pages that its query asks for, recalled from the tiers below; or
    "exact", everything, streamed layer by layer. `model` must be given then, and its attention goes through kvtier from now on. What a
    forward pass computes is in memory until the next one; so give `generate` a `prefill_chunk_size` for long prompts, as `Session` does.
    """

    def __init__(
        self,
        cache: TieredKVCache,
        token_ids: Sequence[int],
        salt: str = "",
        device_pages: int | None = None,
        select: Select = "attention",
        model: Any = None,
    ) -> None:
        if len(token_ids) < 1:
            raise LayoutError("TieredCache: an empty sequence has nothing to predict from; give at least one token")
        if cache.config.disk is not None and cache.config.model.name == ModelConfig().name:
            raise ModelError(
                "the cache has a disk, but its configuration does not name the model; set model.name and model.revision, because a "
                "model with other weights must never find these pages"
            )
        self.tiered = cache
        self._hook: Any = None
        self.lease: Lease | BudgetedLease
        match = cache.lookup(token_ids[: len(token_ids) - 1], salt)
        if device_pages is not None:
            self._begin_on_budget(match, device_pages, select, model)
            return
        self.lease = cache.acquire(match)
        try:
            self.lease.wait_layers(1)
        except BaseException:
            self.lease.release()
            raise
        self.restored = self.lease.tokens
        self._stopwatch = Stopwatch(cache.layout.layers)
        super().__init__(layers=[TieredLayer(self.lease, index, self._stopwatch) for index in range(cache.layout.layers)])

    def _begin_on_budget(self, match: Match, device_pages: int, select: Select, model: Any) -> None:
        if select not in get_args(Select):
            raise ModelError(f"select is {select!r}; expected one of {', '.join(get_args(Select))}")
        if model is None:
            raise ModelError("device_pages needs the model that this cache is for; give model=...")
        choosing = select == "attention"
        if choosing:
            attach(model)
        self.lease = lease = self.tiered.acquire_within(match, device_pages, choosing)
        self.restored = lease.tokens
        self._fed = match.ids[: lease.tokens].tolist()
        self._unasked: list[int] = []
        super().__init__(layers=[BudgetedLayer(lease, index, choosing, self._unasked) for index in range(self.tiered.layout.layers)])
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Full pages of the passes before go to the lease; the ids of this one are noted, because pages are named by their tokens."""
        if not any(value is self for value in (*inputs, *named.values())):
            return
        ids = named.get("input_ids", inputs[0] if inputs else None)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1:
            raise LayoutError("on a device budget a forward pass needs the input_ids of one sequence, [1, tokens]: pages are named by them")
        self._keep_full_pages()
        self._fed += ids[0].tolist()

    def _keep_full_pages(self) -> None:
        check_asked(self._unasked)
        lease = self.lease
        tokens = (len(self._fed) - lease.tokens) // self.tiered.layout.page_tokens * self.tiered.layout.page_tokens
        if tokens and isinstance(lease, BudgetedLease):
            kv = torch.stack([layer.take(tokens) for layer in self.layers])
            lease.append(self._fed[lease.tokens : lease.tokens + tokens], kv)

    def commit(self, token_ids: Sequence[int] | torch.Tensor) -> int:
        """Keep the KV computed since the prefix; `token_ids` is the whole sequence, of which at least the cached part has KV.

        Returns how many tokens of the sequence are cached now. Full pages only; LayoutError for batches.
        """
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids)
        if isinstance(self.lease, BudgetedLease):
            if ids[: len(self._fed)] != self._fed:
                raise LayoutError("commit: these are not the tokens that the model was fed with this cache")
            self._keep_full_pages()
            return self.lease.tokens
        if prefill := self._stopwatch.result():
            self.tiered.record_prefill(prefill.start, prefill.tokens, prefill.seconds)
        length = min(self.get_seq_length(), len(ids))
        self.lease.wait()
        start = self.lease.tokens
        if length <= start:
            return start
        if self.layers[0].keys.shape[0] != 1:
            raise LayoutError(f"commit: the cache holds {self.layers[0].keys.shape[0]} sequences; kvtier commits one at a time")
        planes = [torch.stack((layer.keys[0, :, start:length], layer.values[0, :, start:length])) for layer in self.layers]
        kv = torch.stack(planes).transpose(2, 3)
        self.tiered.put(ids[start:length], kv, after=self.lease)
        return self.lease.tokens

    def release(self) -> None:
        """Let the leased pages go."""
        if self._hook is not None:
            self._hook.remove()
        self.lease.release()

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Session:
    """One conversation: the tokens so far, and turns played through the tiers. `salt` keeps tenants apart.

    `device_pages` and `select`: see `TieredCache`.
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
        """Hint that this session's next turn is near."""
        self.cache.prefetch(self.token_ids, deadline, self.salt)

    def generate(self, new_ids: Sequence[int], **options: Any) -> list[int]:
        """Play one turn: append `new_ids`, generate with `options` (as for `model.generate`), return the generated tokens."""
        prompt = [*self.token_ids, *new_ids]
        inputs = torch.tensor([prompt], device=self.model.device)
        if self.device_pages is not None:
            options.setdefault("prefill_chunk_size", self.device_pages * self.cache.layout.page_tokens)
        with TieredCache(self.cache, prompt, self.salt, self.device_pages, self.select, self.model) as past:
            output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **cache_argument(past), **options)
            self.restored = past.restored
            self.token_ids = output[0].tolist()
            past.commit(self.token_ids)
        return self.token_ids[len(prompt) :]
