"""The attention a model really computes: recorded call by call, so that it can be repeated over other keys and values.

Transformers looks its attention function up by name for every call; while `record` is open, the name leads to one that takes notes. That
works for every model on that interface whatever its masks, scales or head groups. Models that compute attention elsewhere leave no notes.
The table of names is the process's: record in one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.errors import needing

with needing("hf", "measuring quality", "transformers"):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention: queries `[1, heads, queries, head_dim]`, mask and settings as the model gave them, and what came out,
    `[1, queries, heads, head_dim]`. `module` is the layer's name in the model."""

    module: str
    function: str
    query: torch.Tensor
    mask: torch.Tensor | None
    settings: dict[str, Any]
    output: torch.Tensor

    def repeat(self, model: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The output for the same queries over other keys and values `[1, kv_heads, tokens, head_dim]`."""
        function = ALL_ATTENTION_FUNCTIONS[self.function]
        output: torch.Tensor = function(model.get_submodule(self.module), self.query, keys, values, self.mask, **self.settings)[0]
        return output


def is_on_the_interface(model: Any) -> bool:
    """Whether the model's attention can be recorded and replaced."""
    return model.config.get_text_config()._attn_implementation in ALL_ATTENTION_FUNCTIONS


@contextmanager
def replaced(model: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside the block the model's attention function is what `wrap` makes of it. The model must be on the interface."""
    function = model.config.get_text_config()._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[function]
    ALL_ATTENTION_FUNCTIONS[function] = wrap(original)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[function] = original


@contextmanager
def record(model: Any) -> Iterator[list[AttentionCall]]:
    """A list that fills with the attention calls of `model` inside the block; it stays empty if the model does not use the interface."""
    calls: list[AttentionCall] = []
    if not is_on_the_interface(model):
        yield calls
        return
    names = {module: name for name, module in model.named_modules()}
    function = model.config.get_text_config()._attn_implementation

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def note(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
            result = original(module, query, key, value, mask, **settings)
            calls.append(AttentionCall(names[module], function, query, mask, settings, result[0]))
            return result

        return note

    with replaced(model, noting):
        yield calls
