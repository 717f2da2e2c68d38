"""Which weights a model has, told without reading all of them: KV outlives the process, so other weights must give other keys.

A folder's configuration files are hashed whole, of each weight file its size and pieces from all over it. Fine-tuning changes those;
whoever edits a few tensors by hand sets `model.revision`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

PIECES, PIECE_BYTES = 64, 1 << 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def folder_revision(folder: Path) -> str:
    """32 hex digits for a folder of weights."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in _WEIGHTS:
            _add_pieces(digest, path)
    return digest.hexdigest()


def _add_pieces(digest: xxhash.xxh3_128, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(piece * max(0, size - PIECE_BYTES) // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))


def adapter_revision(path: str) -> str:
    """The same for a LoRA adapter, found where vLLM looks for it; empty for one that is not on this machine."""
    folder = Path(os.path.expanduser(path))
    found = folder if folder.is_dir() else _in_hub_cache(path, None, "adapter_config.json")
    return folder_revision(found) if found is not None else ""


def named_revision(name: str, revision: str | None = None) -> str:
    """Of the weights that an engine is given as `name`: a folder, a file (GGUF), or a name of Hugging Face's, at its `revision`.

    Where they are not on this machine, `revision`, which may be empty.
    """
    place = Path(name)
    if place.is_file():
        digest = xxhash.xxh3_128()
        _add_pieces(digest, place)
        return digest.hexdigest()
    folder = place if place.is_dir() else _in_hub_cache(name, revision)
    return (revision or "") if folder is None else folder_revision(folder)


def model_revision(model: Any, load_format: str, weights: str | None = None) -> str:
    """Of a vLLM `ModelConfig`: its weights, wherever they are (or `weights`, what tells them apart), and its configuration, overrides too.

    `load_format`: of vLLM's `LoadConfig`; "dummy" makes weights up.
    """
    digest = xxhash.xxh3_128(json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(model.model_weights.encode())  # where they are elsewhere than the configuration
    digest.update((weights or named_revision(model.model, model.revision)).encode())
    digest.update(json.dumps([load_format == "dummy", _rotated_for_long(model)]).encode())
    return digest.hexdigest()


def _rotated_for_long(model: Any) -> list[bool]:
    """For "longrope", by kind of layer: vLLM rotates all keys for long or all for short sequences, as `max_model_len` says."""
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    return [model.max_model_len > kind["original_max_position_embeddings"] for kind in kinds]


def _in_hub_cache(name: str, revision: str | None, file: str = "config.json") -> Path | None:
    """The folder of a model that an engine is given by its name; None if it is not there, or the name is none of Hugging Face's."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # such as `name:quantization`
        return None
    return Path(found).parent if isinstance(found, str) else None
