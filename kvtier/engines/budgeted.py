"""Decoding on a device budget in Hugging Face transformers: such a cache, its layers, and attention over the pages a query chooses.

A cache layer never sees the query, so what it returns for keys is a marked tensor of the tokens that are not in pages yet; the model's
attention function, wrapped once by `attach`, finds the mark and puts the chosen pages in front. That changes nothing for any other cache.
Keys carry their positions (they are rotated before they come here), so gathered pages need no more than being in order.
Forward passes of several tokens (a prompt) attend over everything, streamed layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from kvtier.cache import TieredKVCache
from kvtier.engines.adapters import Adapters, plain_model
from kvtier.engines.dense import check_kind
from kvtier.engines.fed import Positions, alike_up_to, check_inputs, check_mask
from kvtier.engines.models import check_named
from kvtier.errors import LayoutError, ModelError, needing
from kvtier.layout import PageLayout
from kvtier.leases.budget import BudgetedLease

with needing("hf", "the Hugging Face engine", "transformers"):
    from transformers import AttentionInterface
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Select = Literal["attention", "exact"]
_PREFIX = "kvtier_"
_MARK = "kvtier_layer"


def attach(model: Any) -> None:
    """Let the model's attention go through kvtier from now on; other caches than kvtier's are passed straight on.

    ModelError for models that do not look their attention function up, or whose function takes no mask per key.
    """
    name = model.config.get_text_config()._attn_implementation
    if name.startswith(_PREFIX):
        return
    if name not in ALL_ATTENTION_FUNCTIONS or name not in ALL_MASK_ATTENTION_FUNCTIONS or "flash" in name:
        raise ModelError(
            f"{type(model).__name__} computes attention by {name!r}, which cannot be told which pages to attend over; load it with "
            'attn_implementation="sdpa"'
        )
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **settings: Any) -> Any:
        layer: BudgetedLayer | None = getattr(key, _MARK, None)
        if layer is not None:
            key, value, mask = layer.chosen(query, mask, settings.get("scaling"))
        return original(module, query, key, value, mask, **settings)

    AttentionInterface.register(_PREFIX + name, attend)
    AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(_PREFIX + name)


class BudgetedCache(Cache):  # type: ignore[misc]
    """The cache of one sequence with at most `device_pages` pages on the device at any time, however long it is (docs/attention.md).

    `select` says what a decoded token attends over: "attention", the pages that its query asks for, recalled from the tiers below; or
    "exact", everything, streamed layer by layer. The model's attention goes through kvtier from now on. What a forward pass computes is in
    memory until the next one; so give `generate` a `prefill_chunk_size` for long prompts, as `Session` does. Used like `TieredCache`.
    """

    def __init__(
        self, model: Any, cache: TieredKVCache, token_ids: Sequence[int], device_pages: int, salt: str = "", select: Select = "attention"
    ) -> None:
        if select not in get_args(Select):
            raise ModelError(f"select is {select!r}; expected one of {', '.join(get_args(Select))}")
        if len(token_ids) < 1:
            raise LayoutError("BudgetedCache: an empty sequence has nothing to predict from; give at least one token")
        check_named(cache)
        self._adapters = Adapters.of(model)
        salt = self._adapters.salt(salt)
        self._model, model = model, plain_model(model)
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ModelError(f"{type(model).__name__} has {', '.join(sorted(kinds))}; a device budget is for full attention in every layer")
        choosing = select == "attention"
        if choosing:
            attach(model)
        self._page_tokens = cache.layout.page_tokens
        match = cache.lookup(token_ids[: len(token_ids) - 1], salt)
        self.lease = lease = cache.acquire_within(match, device_pages, choosing)
        self.restored = lease.tokens
        """Tokens that came from the tiers."""
        self._fed = match.ids[: lease.tokens].tolist()
        self._unasked: list[int] = []
        layout = cache.layout
        super().__init__(layers=[BudgetedLayer(lease, index, choosing, self._unasked, layout) for index in range(layout.layers)])
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Full pages of the passes before go to the lease; the ids of this one are noted, because pages are named by their tokens."""
        if not any(value is self for value in (*inputs, *named.values())):
            return
        check_inputs(named)
        ids = named.get("input_ids", inputs[0] if inputs else None)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1:
            raise LayoutError("on a device budget a forward pass needs the input_ids of one sequence, [1, tokens]: pages are named by them")
        check_mask(named.get("attention_mask"), [0], 1, len(self._fed) + ids.shape[1])
        if len(self._fed) + ids.shape[1] > (longest := alike_up_to(model)):
            raise ModelError(
                f"{type(model).__name__} rotates all keys anew beyond {longest:.0f} tokens; a device budget holds no longer sequence"
            )
        positions = Positions([0])
        positions.tell(model, named.get("position_ids"), len(self._fed), ids.shape[1])
        positions.check()
        if len(self._fed) == self.restored:
            self._adapters.check(self._model)
        self._keep_full_pages()
        self._fed += ids[0].tolist()

    def _keep_full_pages(self) -> None:
        check_asked(self._unasked)
        tokens = (len(self._fed) - self.lease.tokens) // self._page_tokens * self._page_tokens
        if tokens:
            self._adapters.check(self._model)
            kv = torch.stack([layer.take(tokens) for layer in self.layers])
            self.lease.append(self._fed[self.lease.tokens : self.lease.tokens + tokens], kv)

    def commit(self, token_ids: Sequence[int] | torch.Tensor) -> int:
        """Keep the full pages of what was computed; `token_ids` is the whole sequence. Returns how many of its tokens are cached now.

        LayoutError if these are not the tokens that the model was fed.
        """
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids)
        if ids[: len(self._fed)] != self._fed:
            raise LayoutError("commit: these are not the tokens that the model was fed with this cache")
        self._keep_full_pages()
        return self.lease.tokens

    def release(self) -> None:
        """Let the pages go."""
        self._hook.remove()
        self.lease.release()

    def __enter__(self) -> BudgetedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class BudgetedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: `keys` and `values` are those of the tokens that are not in pages yet; the pages are the lease's.

    `unasked` is shared by the layers: the layer that waits for its attention function to call `chosen`, if one does.
    """

    is_croppable = False

    def __init__(self, lease: BudgetedLease, index: int, choosing: bool, unasked: list[int], layout: PageLayout) -> None:
        super().__init__()
        self._unseen: PageLayout | None = layout
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self._lease = lease
        self._index = index
        self._choosing = choosing
        self._unasked = unasked

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """New `[1, kv_heads, new, head_dim]` in; all `[1, kv_heads, total, head_dim]` out, or marked keys for `chosen`."""
        if key_states.shape[0] != 1:
            raise LayoutError(f"the forward pass has {key_states.shape[0]} sequences; on a device budget there is one at a time")
        check_asked(self._unasked)
        if self._unseen is not None:
            check_kind(self._unseen, self._index, key_states, value_states)
            self._unseen = None
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not self._lease.pages:
            return keys, values
        if self._choosing and key_states.shape[2] == 1 and self._lease.parked:
            self._unasked.append(self._index)
            marked = keys[:]
            setattr(marked, _MARK, self)
            return marked, values
        return self._behind(self._lease.stream(self._index))

    def chosen(
        self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of the pages that `query` `[1, heads, 1, head_dim]` chooses, the tokens behind them, and the mask for these."""
        self._unasked.clear()
        pages = self._lease.choose(self._index, query[0, :, 0], scaling)
        keys, values = self._behind(self._lease.gather(self._index, pages))
        if mask is not None:
            page_tokens = self._lease.tokens // self._lease.pages
            starts = torch.tensor(pages, device=mask.device) * page_tokens
            paged = (starts[:, None] + torch.arange(page_tokens, device=mask.device)).flatten()
            mask = mask.index_select(-1, torch.cat((paged, torch.arange(self._lease.tokens, mask.shape[-1], device=mask.device))))
        return keys, values, mask

    def get_seq_length(self) -> int:
        """Tokens in this layer, those in pages included."""
        return self._lease.tokens + int(super().get_seq_length())

    def get_max_cache_shape(self) -> int:
        """No bound. Transformers before 5.20 ask for it under this name."""
        return -1

    def take(self, tokens: int) -> torch.Tensor:
        """Remove the first `tokens` tokens that are not in pages: `[2, tokens, kv_heads, head_dim]`."""
        taken = torch.stack((self.keys[0, :, :tokens], self.values[0, :, :tokens])).transpose(1, 2)
        self.keys, self.values = self.keys[:, :, tokens:].clone(), self.values[:, :, tokens:].clone()
        return taken

    def crop(self, tokens_to_remove: int) -> None:
        """Not on a device budget: the pages to crop may have left the device."""
        raise ModelError(f"a cache on a device budget cannot be cropped (by {tokens_to_remove}); leave device_pages out")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not on a device budget: there is one sequence."""
        raise ModelError(f"a cache on a device budget has one sequence, no {len(beam_idx)} beams; leave device_pages out")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As `reorder_cache`."""
        raise ModelError(f"a cache on a device budget has one sequence and cannot have {repeats}; leave device_pages out")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `reorder_cache`."""
        raise ModelError(f"a cache on a device budget has one sequence, nothing to select {len(indices)} of; leave device_pages out")

    def _behind(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages `[n, 2, page_tokens, kv_heads, head_dim]` and the tokens behind them, dense."""
        planes = pages.permute(1, 3, 0, 2, 4).flatten(2, 3).to(self.keys.device)
        return torch.cat((planes[0][None], self.keys), 2), torch.cat((planes[1][None], self.values), 2)


def check_asked(unasked: list[int]) -> None:
    """ModelError if a layer's marked keys never came to the wrapped attention function: it attended over almost nothing then."""
    if unasked:
        raise ModelError(
            f"layer {unasked[0]} did not attend through kvtier: the model's attention was changed after its cache was made, or does not go "
            "through transformers' attention interface; leave device_pages out"
        )
