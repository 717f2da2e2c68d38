"""`TieredCache`: the cache of a sequence or a batch in `model.generate`, whose prefix comes from the tiers and whose new KV goes there.

What the attention sees is in `dense.py`, who was fed what in `fed.py`. A cache owns leases on the pages of its prefix from when it is made
until `release`; one thread plays it. Contract checked against transformers 5.19 to 5.24 (`CacheLayerMixin`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kvtier.cache import TieredKVCache
from kvtier.engines.adapters import Adapters, plain_model
from kvtier.engines.dense import Prefix, TieredLayer
from kvtier.engines.fed import Fed, Positions, Row, alike_up_to, check_form, check_inputs, check_mask, unpadded
from kvtier.engines.models import check_named
from kvtier.engines.stopwatch import Stopwatch
from kvtier.errors import LayoutError, ModelError, needing
from kvtier.leases.lease import Lease

with needing("hf", "the Hugging Face engine", "transformers"):
    from transformers.cache_utils import Cache

Sequences = Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


class TieredCache(Cache):  # type: ignore[misc]
    """The cache (`past_key_values` before transformers 5.24) of one sequence or a batch: starts with what the tiers hold of `token_ids`.

    Use as a context manager, and give `generate` the *whole* sequence:

        with TieredCache(cache, ids, model=model) as past:
            output = model.generate(input_ids=torch.tensor([ids]), cache=past, ...)
            past.commit(output)

    or, for a batch (`token_ids` a list of sequences), all of them as `left_padded(...)`. `salt` is one for all or one per sequence. What a
    tokenizer padded, on the left, is given with its mask: `TieredCache(cache, ids, attention_mask=mask, model=model)`.

    At most all but one token are restored, because a model needs one to predict the next. `restored` counts them, over the batch;
    `restored_each` by sequence: the rows of a batch end in the same column, so each computes as many tokens as the row that needs most.
    `model` lets kvtier see what each row of the cache was fed (`commit`), whether its mask hides this padding and nothing else, and whether
    its `position_ids` count all but that: else a LayoutError, before anything is computed; and which of PEFT's adapters are on, which have
    pages of their own (`adapters.py`). Without it a batch that grew (beams) cannot be committed. Not to be copied: a second cache of the
    same sequence shares its pages.
    """

    def __init__(
        self,
        cache: TieredKVCache,
        token_ids: Sequences,
        salt: str | Sequence[str] = "",
        model: Any = None,
        attention_mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
    ) -> None:
        check_named(cache)
        if attention_mask is None:
            sequences = _sequences(token_ids)
            width = max(map(len, sequences))
        else:
            sequences, width = unpadded(token_ids, attention_mask)
        salts = [salt] * len(sequences) if isinstance(salt, str) else list(salt)
        if len(salts) != len(sequences):
            raise LayoutError(f"TieredCache: {len(salts)} salts for {len(sequences)} sequences; give one for all, or one for each")
        self.tiered = cache
        self._hook: Any = None
        self._fed: Fed | None = None
        self._mask: Any = None
        self._model = model
        self._adapters = Adapters(()) if model is None else Adapters.of(model)
        salts = [self._adapters.salt(tenant) for tenant in salts]
        self._padding = [width - len(sequence) for sequence in sequences]
        self._positions = Positions(self._padding)
        self._alike_up_to = math.inf if model is None else alike_up_to(model)
        self._columns_alike = math.inf
        """Columns before the first that was computed in a sequence so long that its keys are rotated in another way."""
        most = 0 if width - min(self._padding) > self._alike_up_to else width
        self._leases: list[Lease] = []
        try:
            for sequence, tenant in zip(sequences, salts, strict=True):
                self._leases.append(cache.acquire(cache.lookup(sequence[: min(most, len(sequence) - 1)], tenant)))
            for lease in self._leases:
                lease.wait_layers(1)
        except BaseException:
            self.release()
            raise
        columns = min(pad + lease.tokens for pad, lease in zip(self._padding, self._leases, strict=True))
        self.restored_each = [max(0, columns - pad) for pad in self._padding]
        self.restored = sum(self.restored_each)
        prefix = Prefix(self._leases, self.restored_each, columns if self.restored else 0)
        self._stopwatch = Stopwatch(cache.layout.layers)
        super().__init__(layers=[TieredLayer(prefix, index, self._stopwatch, cache.layout) for index in range(cache.layout.layers)])
        if model is not None:
            held = [list(sequence[:tokens]) for sequence, tokens in zip(sequences, self.restored_each, strict=True)]
            self._fed = Fed(held, self._padding, prefix.columns)
            self._told = sequences[0] if len(held) == 1 and self.restored else []
            self._unseen = True
            self._hook = plain_model(model).register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(
        self, model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._fed is None or not any(value is self for value in (*inputs, *named.values())):
            return None
        ids = named.get("input_ids", inputs[0] if inputs else None)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise LayoutError("a forward pass with this cache needs input_ids, [sequences, tokens]: pages are named by their tokens")
        check_inputs(named)
        if len(ids) % len(self._leases):
            raise LayoutError(
                f"the forward pass has {len(ids)} sequences and its cache {len(self._leases)}; expected as many, or so many of each"
            )
        columns = self.get_seq_length()
        told, self._told = self._told, []
        if told and self._is_whole(ids, named.get("position_ids"), told):
            # Assisted decoding (transformers 5.24) feeds the whole prompt in its first pass, whatever its cache holds already.
            ids = ids[:, columns:]
            inputs, named = ((ids, *inputs[1:]), dict(named)) if "input_ids" not in named else (inputs, {**named, "input_ids": ids})
            if (positions := named.get("position_ids")) is not None:
                named["position_ids"] = positions[..., -ids.shape[1] :]
        self._mask = named.get("attention_mask")
        if columns + ids.shape[1] - min(self._padding) > self._alike_up_to:
            self._columns_alike = min(self._columns_alike, columns)
        check_form(self._mask)
        if self._unseen:
            check_mask(self._mask, self._padding, len(ids), columns + ids.shape[1])
        self._positions.tell(model, named.get("position_ids"), columns, ids.shape[1])
        if self._unseen:
            self._positions.check()
            self._adapters.check(self._model)
            self._unseen = False
        self._fed.feed(ids)
        return inputs, named

    def _is_whole(self, ids: torch.Tensor, positions: object, told: list[int]) -> bool:
        """Whether the first pass feeds the whole of one prompt, and not what comes behind its restored tokens, which may begin as they do.

        Where it says positions, those tell; else the prompt that this cache was told of.
        """
        pad = self._padding[0]
        places = positions if isinstance(positions, torch.Tensor) and positions.shape[-1] == ids.shape[1] else None
        known = told if places is None else told[: self.restored]
        if len(ids) != 1 or ids[0, pad : pad + len(known)].tolist() != known:
            return False
        return places is None or not bool(places[..., pad].any())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every row."""
        super().crop(tokens_to_remove)
        if self._fed is not None:
            self._fed.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The rows are now those of `beam_idx` `[rows]`."""
        super().reorder_cache(beam_idx)
        if self._fed is not None:
            self._fed.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row stands there `repeats` times, one beside the other."""
        super().batch_repeat_interleave(repeats)
        if self._fed is not None:
            self._fed.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The rows are now those of `indices` `[rows]`."""
        super().batch_select_indices(indices)
        if self._fed is not None:
            self._fed.select(indices)

    def reset(self) -> None:
        """Forget everything, the restored prefix too."""
        super().reset()
        if self._fed is not None:
            self._fed.clear()

    def commit(self, token_ids: Sequences) -> int:
        """Keep the KV computed since the prefix. Returns how many tokens of these sequences are cached now; full pages only.

        `token_ids`: what `generate` returned, `[sequences, tokens]` with its padding, or whole sequences without padding; as many as there
        are prompts, or so many of each. The last token has no KV yet. With `model`, a sequence is kept as far as some row of the cache was
        fed with it. LayoutError where nobody can tell which row belongs to which sequence.
        """
        sequences = self._unpadded(token_ids)
        each, left = divmod(len(sequences), len(self._leases))
        if left or not each:
            raise LayoutError(f"commit: {len(sequences)} sequences for {len(self._leases)} prompts; expected as many, or so many of each")
        if len(self._leases) == 1 and (prefill := self._stopwatch.result()):
            self.tiered.record_prefill(prefill.start, prefill.tokens, prefill.seconds)
        rows = self._rows(sequences)
        if self._fed is not None and not self._unseen:
            check_mask(self._mask, self._padding, len(rows), self.get_seq_length())
            self._positions.check()
            self._adapters.check(self._model)
        for lease in self._leases:
            lease.wait()
        total = 0
        for prompt, prompted in enumerate(self._leases):
            kept = prompted.tokens
            for number, sequence in enumerate(sequences[prompt * each : (prompt + 1) * each]):
                if number == 0:
                    total += self._keep(rows, prompt, prompted, sequence)
                    continue
                with self.tiered.fork(prompted) as lease:
                    self.tiered.truncate(lease, kept)
                    total += self._keep(rows, prompt, lease, sequence)
        return total

    def _keep(self, rows: list[Row], prompt: int, lease: Lease, sequence: list[int]) -> int:
        """Commit one sequence behind its lease, from the row of its prompt that was fed most of it."""
        candidates = [(_common(row.token_ids, sequence), index) for index, row in enumerate(rows) if row.prompt == prompt]
        length, row = max(candidates, default=(0, 0))
        start, pad = lease.tokens, self._padding[prompt]
        length = int(min(length, self._columns_alike - pad))
        if length > start and self.get_seq_length():
            if missed := [index for index, layer in enumerate(self.layers) if layer.get_seq_length() != self.get_seq_length()]:
                raise ModelError(f"the model computed no KV in layer {missed[0]} of this cache, whose pages hold {self.tiered.layout}")
            columns = slice(pad + start, pad + length)
            planes = [torch.stack((layer.keys[row, :, columns], layer.values[row, :, columns])) for layer in self.layers]
            self.tiered.put(sequence[start:length], torch.stack(planes).transpose(2, 3), after=lease)
        return lease.tokens

    def _rows(self, sequences: list[list[int]]) -> list[Row]:
        """The tokens of each row of the cache: those that were fed, or, unseen, those that the caller says."""
        if self._fed is not None:
            return self._fed.rows()
        length = self.get_seq_length()
        held = len(self.layers[0].keys) if length > max(self._padding) and self.layers[0].is_initialized else len(self._leases)
        if held != len(self._leases) or held != len(sequences):
            raise LayoutError(
                f"commit: the cache holds {held} sequences for {len(self._leases)} prompts and was told {len(sequences)}; which is which "
                "is known only to a TieredCache that was made with model=..."
            )
        return [Row(index, sequence[: length - self._padding[index]]) for index, sequence in enumerate(sequences)]

    def _unpadded(self, token_ids: Sequences) -> list[list[int]]:
        if not isinstance(token_ids, torch.Tensor) or token_ids.ndim != 2:
            return _sequences(token_ids)
        each = max(1, len(token_ids) // len(self._leases))
        return [row[self._padding[min(index // each, len(self._leases) - 1)] :] for index, row in enumerate(token_ids.tolist())]

    def release(self) -> None:
        """Let the leased pages go."""
        if self._hook is not None:
            self._hook.remove()
        for lease in self._leases:
            lease.release()

    def __reduce_ex__(self, _: object) -> Any:
        raise TypeError("a TieredCache holds leases and cannot be copied; make another one of the same sequence, which shares its pages")

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _sequences(token_ids: Sequences) -> list[list[int]]:
    """One sequence or several as several. LayoutError where one is empty."""
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.tolist()
    several: Any = token_ids if len(token_ids) and isinstance(token_ids[0], Sequence) else [token_ids]
    sequences: list[list[int]] = [list(sequence) for sequence in several]
    if not all(sequences):
        raise LayoutError("TieredCache: an empty sequence has nothing to predict from; give at least one token")
    return sequences


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the start that two sequences share."""
    return next(
        (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), min(len(first), len(second))
    )
