"""Adapters of PEFT that are on in a Hugging Face model, told by what is in them: pages of each get keys of their own.

Through `PeftModel` or transformers' `load_adapter`, PEFT puts layers of its own into the model, which say what in them belongs to which
adapter, and which adapters are on. Nothing of PEFT is imported here. What is read are all bytes of the adapters that are on, each time:
in-place updates (training, hot swaps) leave no other trace. No state.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from kvtier.errors import ModelError

_NO_MATTER = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""What the configuration of an adapter says of where it comes from, not of what it does."""
_BEYOND_TOKENS = {
    "alora_invocation_tokens": "is switched on by tokens that come later",
    "arrow_config": "chooses among adapters that are not on",
    "is_prompt_learning": "puts virtual tokens before the sequence",
}
"""What adapters have in their configuration whose KV is not that of the tokens so far and of the layers that are on."""
_ROUTED = {"XLORA", "POLY"}
"""Kinds of adapters whose weights are mixed by something beside the tokens and the layers."""


@dataclass(frozen=True)
class Adapters:
    """What is on in a model: names, with tensors or plain values. Empty where nothing is."""

    parts: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, model: Any) -> Adapters:
        """Those of a model, or of a `PeftModel`. ModelError for kinds whose KV depends on more than kvtier can see."""
        if "peft" not in sys.modules:  # looking for its layers takes a millisecond or two in a large model
            return cls(())
        inner = plain_model(model)
        layers = [(name, module) for name, module in inner.named_modules() if hasattr(module, "adapter_layer_names")]
        configs = getattr(model, "peft_config", None) or getattr(inner, "peft_config", None) or {}
        if not layers:
            if inner is not model:
                raise ModelError(f"{_kinds(configs)}: it has no layers that kvtier could tell it by; {_REMEDY}")
            return cls(())
        on = {adapter: None for _, layer in layers for adapter in _adapters_on(layer)}
        parts = [part for name, layer in layers for part in _parts(name, layer)]
        for adapter in on:
            if (config := configs.get(adapter)) is not None:
                _check(adapter, config)
                parts.append(("configuration", _described(config)))
        if any("adapter_names" in hook.keywords for _, layer in layers for hook in _partial_hooks(layer)):
            raise ModelError(f"adapter_names gives each sequence of a batch an adapter of its own, which kvtier cannot tell; {_REMEDY}")
        return cls(tuple(parts))

    def salt(self, salt: str) -> str:
        """`salt` for pages computed under these adapters; itself where nothing is on."""
        if not self.parts:
            return salt
        digest = xxhash.xxh3_128()
        for name, value in self.parts:
            if isinstance(value, torch.Tensor):
                if value.is_meta:
                    raise ModelError(f"the adapter's {name} is on no device (offloaded), so kvtier cannot tell it from others; {_REMEDY}")
                digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(f"{name} {value!r}\n".encode())
        return json.dumps([salt, digest.hexdigest()])

    def check(self, model: Any) -> None:
        """ModelError if others are on by now. Looks at which, not into them."""
        now = Adapters.of(model).parts
        if len(now) != len(self.parts) or not all(_same(one, other) for one, other in zip(now, self.parts, strict=True)):
            raise ModelError("the model's adapters were changed after its cache was made; make a cache of these tokens after the change")


_REMEDY = "use transformers' own cache with it, or a model that it was merged into, under a model.revision of its own"


def plain_model(model: Any) -> Any:
    """The transformers model inside of PEFT's wrappers, which is what runs in the end."""
    while any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.model
    return model


def _adapters_on(layer: Any) -> list[str]:
    """By name; merged ones stay in the weights whichever is active."""
    if layer.disable_adapters:
        return []
    return list(layer.merged_adapters) if getattr(layer, "merged", False) else list(layer.active_adapters)


def _parts(name: str, layer: Any) -> Iterator[tuple[str, Any]]:
    """Everything in one of PEFT's layers that belongs to the adapters that are on, or to all."""
    for held in (*layer.adapter_layer_names, *getattr(layer, "other_param_names", ())):
        values: Any = getattr(layer, held, None)
        for adapter in _adapters_on(layer):
            if not hasattr(values, "keys"):
                yield from _leaves(f"{name}.{held}", values)
            elif adapter in values:
                yield from _leaves(f"{name}.{held}", values[adapter])


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.nn.Module):
        yield from ((f"{name}.{inside}", tensor) for inside, tensor in value.state_dict(keep_vars=True).items())
    else:
        yield name, value


def _check(adapter: str, config: Any) -> None:
    for field, why in _BEYOND_TOKENS.items():
        if getattr(config, field, None):
            raise ModelError(f"the adapter {adapter!r} {why}, so its KV cannot be named by the tokens before; {_REMEDY}")
    if _kind(config) in _ROUTED:
        raise ModelError(f"the adapter {adapter!r} is of the kind {_kind(config)}, mixed by more than kvtier can see; {_REMEDY}")


def _described(config: Any) -> str:
    said = {key: value for key, value in config.to_dict().items() if key not in _NO_MATTER}
    return json.dumps(said, sort_keys=True, default=lambda value: sorted(map(str, value)) if isinstance(value, set) else str(value))


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _kinds(configs: Any) -> str:
    return ", ".join(f"the adapter {name!r} is of the kind {_kind(config)}" for name, config in configs.items()) or "this is PEFT's wrapper"


def _partial_hooks(layer: Any) -> list[functools.partial[Any]]:
    """How PEFT tells a layer which adapter each sequence has."""
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, functools.partial)]


def _same(one: tuple[str, Any], other: tuple[str, Any]) -> bool:
    if isinstance(one[1], torch.Tensor) or isinstance(other[1], torch.Tensor):
        return one[0] == other[0] and one[1] is other[1]
    return one == other
