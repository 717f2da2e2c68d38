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
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for piece in range(PIECES):
                    file.seek(piece * max(0, size - PIECE_BYTES) // (PIECES - 1))
                    digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def adapter_revision(path: str) -> str:
    """The same for a LoRA adapter; empty for one that is not a folder here."""
    return folder_revision(Path(path)) if os.path.isdir(path) else ""


def model_revision(model: Any) -> str:
    """Of a vLLM `ModelConfig`: its weights, wherever they are, and its configuration with all overrides."""
    digest = xxhash.xxh3_128(json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str).encode())
    folder = Path(model.model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
        folder = Path(found).parent if isinstance(found, str) else folder
    digest.update((folder_revision(folder) if folder.is_dir() else f"{model.revision}").encode())
    return digest.hexdigest()
