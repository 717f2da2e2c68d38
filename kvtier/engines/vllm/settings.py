"""From vLLM's configuration to kvtier's: what is refused, what pages look like, which names go into their keys, which tiers a worker has.

Users give kvtier's own dotted keys in `kv_connector_extra_config` (`{"host.capacity_bytes": "8GiB", "disk.path": "/nvme/kv"}`), and under
"config" the path of a YAML file. Sizes are those of the whole engine, shared evenly by its workers.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvtier.config import Config, MiB, load_config
from kvtier.engines.weights import given_name, model_revision
from kvtier.errors import ConfigError, LayoutError, ModelError
from kvtier.keys import namespace
from kvtier.layout import PageLayout

STAGING_BYTES = 256 * MiB
FEWEST_STAGED = 16
"""Pages that the staging area must hold at least."""
_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
_OURS = ("model.name", "pages.page_tokens", "device.place")


@dataclass(frozen=True)
class Settings:
    """What both sides of the connector derive from vLLM's configuration."""

    config: Config
    """That of one worker."""
    layout: PageLayout
    """Of one worker's part of a page."""
    namespace: bytes
    """What the keys of all workers start from."""
    workers: int
    media: str = ""
    """What separates images and the like of this engine from those of others, where vLLM names them by number; else empty."""


def settings_of(vllm_config: Any, kv_cache_config: Any) -> Settings:
    """ConfigError, LayoutError or ModelError for what kvtier cannot serve, naming what to change."""
    parallel = vllm_config.parallel_config
    for feature, degree in {
        "pipeline parallelism": parallel.pipeline_parallel_size,
        "prefill context parallelism": parallel.prefill_context_parallel_size,
        "decode context parallelism": parallel.decode_context_parallel_size,
    }.items():
        if degree > 1:
            raise ConfigError(f"the kvtier connector does not work with {feature} yet (here {degree}); use tensor parallelism")
    role = vllm_config.kv_transfer_config.kv_role
    if role != "kv_both":
        raise ConfigError(f"kv_role is {role!r}; the kvtier connector stores and loads, so say 'kv_both'")
    if vllm_config.speculative_config is not None:
        raise ConfigError("the kvtier connector is not tested with speculative decoding; start vLLM without it")
    spec = _only_group(kv_cache_config).kv_cache_spec
    layout = layout_of(spec, len(kv_cache_config.kv_cache_groups[0].layer_names))
    workers = parallel.world_size
    config = _configured(vllm_config, layout, workers)
    identity = f"{config.model.revision}, {workers} workers, vLLM KV {spec.dtype}"
    return Settings(config, layout, namespace(config.model.name, identity, layout), workers, _media(vllm_config))


def _media(vllm_config: Any) -> str:
    """vLLM hashes media only for a cache of its own: without one it counts them, and the next engine begins at the first again."""
    multimodal = vllm_config.model_config.multimodal_config
    hashed = multimodal is None or multimodal.mm_processor_cache_gb or vllm_config.cache_config.enable_prefix_caching
    return "" if hashed else uuid.uuid4().hex


def _only_group(kv_cache_config: Any) -> Any:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:  # those made of it hold something else
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
        raise ModelError(
            f"kvtier holds models with full attention in every layer; vLLM keeps this one's KV in groups of another kind: {kinds}"
        )
    return groups[0]


def layout_of(spec: Any, layers: int) -> PageLayout:
    """The page of one worker for vLLM's `FullAttentionSpec`. LayoutError for KV that is not one K and one V of equal, plain dtype."""
    dtype = _DTYPES.get(str(spec.dtype))
    if dtype is None or spec.kv_quant_mode.value:
        raise LayoutError(
            f"vLLM keeps this KV as {spec.dtype} ({spec.kv_quant_mode.name.lower()}); kvtier takes {', '.join(_DTYPES.values())}: "
            "leave kv_cache_dtype at 'auto' and let kvtier's tiers quantize"
        )
    uncommon = spec.head_size_v != spec.head_size or spec.state_content_bytes is not None or spec.tokens_per_state != 1
    if uncommon or spec.num_head_slots not in (None, spec.num_kv_heads) or spec.page_size_padded is not None:
        raise LayoutError(f"kvtier does not know the KV layout of this model in vLLM: {spec}")
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise ModelError("kvtier holds models with full attention in every layer; this one has windows or chunks of attention")
    return PageLayout(layers, 2, spec.block_size, spec.num_kv_heads, spec.head_size, dtype)


def _configured(vllm_config: Any, layout: PageLayout, workers: int) -> Config:
    model = vllm_config.model_config
    asked = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
    path = asked.pop("config", None)
    if path is not None and not isinstance(path, str):
        raise ConfigError(f"kv_connector_extra_config: config is {path!r}; expected the path of a kvtier YAML file")
    for key in _OURS:
        if key in asked:
            raise ConfigError(f"kv_connector_extra_config: {key} is not for you to set; the connector takes it from vLLM")
    base: dict[str, object] = {
        "device": {"capacity_bytes": max(STAGING_BYTES, FEWEST_STAGED * layout.page_bytes) * workers},
        "host": {"write_policy": "write_through"},
    }
    whole = load_config(path, overrides=asked, base=base)
    if whole.disk is not None:
        # Nothing may be left for the end: `vllm serve` kills the processes of its engine as soon as it is told to stop.
        base["disk"] = {"write_policy": "write_through"}
        whole = load_config(path, overrides=asked, base=base)
    if whole.host is None and whole.disk is None:
        raise ConfigError("kvtier has neither host nor disk here: there is nowhere to keep pages; give it host.capacity_bytes or disk.path")
    given = model_revision(model, vllm_config.load_config.load_format, whole.model.revision)
    fixed: dict[str, object] = {
        "model.name": Path(given_name(model.model)).name,
        "model.revision": f"{given}, {model.dtype}, quantization {model.quantization}",
        "pages.page_tokens": layout.page_tokens,
        "device.place": "cpu",
        "device.capacity_bytes": whole.device.capacity_bytes // workers,
    }
    fewest = FEWEST_STAGED * layout.page_bytes * workers
    if whole.device.capacity_bytes < fewest:
        raise ConfigError(
            f"device.capacity_bytes is {whole.device.capacity_bytes}: the staging area must hold {FEWEST_STAGED} pages, "
            f"each of {layout.page_bytes} bytes, for each of {workers} workers; raise it to at least {fewest}"
        )
    if whole.host is not None:
        fixed["host.capacity_bytes"] = whole.host.capacity_bytes // workers
    if whole.disk is not None:
        fixed["disk.capacity_bytes"] = whole.disk.capacity_bytes // workers
        if replica := vllm_config.parallel_config.data_parallel_index:  # an engine of its own, with the configuration of the first one
            fixed["disk.path"] = str(Path(whole.disk.path) / f"replica-{replica}")
    return load_config(path, overrides=asked | fixed, base=base)


def for_rank(settings: Settings, rank: int) -> Config:
    """The configuration of worker `rank`: its own directory where there are several, and a revision that no other rank has."""
    config = settings.config
    if settings.workers == 1:
        return config
    part = f"rank-{rank}-of-{settings.workers}"
    model = config.model.model_copy(update={"revision": f"{config.model.revision}, {part}"})
    disk = config.disk and config.disk.model_copy(update={"path": str(Path(config.disk.path) / part)})
    return config.model_copy(update={"model": model, "disk": disk})
