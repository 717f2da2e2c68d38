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
    """The same for a LoRA adapter; empty for one that is not a folder here."""
    return folder_revision(Path(path)) if os.path.isdir(path) else ""


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


def model_revision(model: Any) -> str:
    """Of a vLLM `ModelConfig`: its weights, wherever they are, and its configuration with all overrides."""
    digest = xxhash.xxh3_128(json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(model.model_weights.encode())  # where they are elsewhere than the configuration
    digest.update(named_revision(model.model, model.revision).encode())
    return digest.hexdigest()


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """The folder of a model that an engine is given by its name; None if it is not there, or the name is none of Hugging Face's."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # such as `name:quantization`
        return None
    return Path(found).parent if isinstance(found, str) else None
