"""Which weights a model has, told without reading all of them: KV outlives the process, so other weights must give other keys.

A folder's configuration files are hashed whole, of each weight file its size and pieces from all over it. Fine-tuning changes those;
whoever edits a few tensors by hand sets `model.revision`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from kvtier.errors import ModelError

PIECES, PIECE_BYTES = 64, 1 << 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_REPOSITORY = "models--"
"""How the folder of a model begins in Hugging Face's cache; its revisions are in `snapshots/<commit>`."""
_UNKNOWN = (
    "are neither a folder or file of this machine nor in Hugging Face's cache, so kvtier cannot tell them from others; set model.revision "
    "to something that changes with them"
)


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


def adapter_revision(path: str) -> str | None:
    """The same for a LoRA adapter: a folder, or a name of Hugging Face's; None while it is not on this machine."""
    folder = Path(path).expanduser()
    found = folder if folder.is_dir() else _snapshot(path, None)
    return None if found is None else _found_revision(found)


def named_adapter_revision(path: str) -> str:
    """As `adapter_revision`; ModelError for one that is not on this machine."""
    found = adapter_revision(path)
    if found is None:
        raise ModelError(f"the weights of the adapter {path!r} {_UNKNOWN}")
    return found


def named_revision(name: str, revision: str | None) -> str:
    """Of the weights that an engine is given as `name`: a folder, a file (GGUF), or a name of Hugging Face's, at its `revision`.

    ModelError where they are not on this machine.
    """
    given = _given_revision(name)
    if given is None and (folder := _snapshot(name, revision)) is not None:
        given = _found_revision(folder)
    if given is None:
        raise ModelError(f"the weights of {name!r}{'' if revision is None else f' at {revision!r}'} {_UNKNOWN}")
    return given


def only_revision(name: str) -> str:
    """As `named_revision`, for engines that do not tell the revision. ModelError also where several are on this machine."""
    given = _given_revision(name)
    if given is not None:
        return given
    folders = _snapshots(name)
    if not folders:
        raise ModelError(f"the weights of {name!r} {_UNKNOWN}")
    if len(folders) > 1:
        raise ModelError(
            f"Hugging Face's cache has several revisions of {name!r} ({', '.join(folder.name for folder in folders)}), and the engine does "
            "not tell kvtier which of them it serves; set model.revision to that one, or serve the folder of the one you mean"
        )
    return _found_revision(folders[0])


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


def given_name(model: str) -> str:
    """What a model is called: offline, vLLM puts the folder in Hugging Face's cache in the place of its name."""
    place = Path(model)
    if place.parent.name == "snapshots" and place.parents[1].name.startswith(_REPOSITORY):
        return place.parents[1].name.removeprefix(_REPOSITORY).replace("--", "/")
    return model


def _given_revision(name: str) -> str | None:
    """Where `name` is a file or a folder."""
    place = Path(name)
    if place.is_file():
        digest = xxhash.xxh3_128()
        _add_pieces(digest, place)
        return digest.hexdigest()
    return _found_revision(place) if place.is_dir() else None


def _found_revision(folder: Path) -> str:
    """Of a folder. What is named after a commit is known by that where its weights are elsewhere (`--download-dir`)."""
    is_commit = given_name(str(folder)) != str(folder)
    if is_commit and not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        return folder.name
    return folder_revision(folder)


def _snapshots(name: str) -> list[Path]:
    """The folders of a model of Hugging Face's on this machine, one per revision."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE) / (_REPOSITORY + name.replace("/", "--")) / "snapshots"
    return sorted(folders.iterdir()) if folders.is_dir() else []


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a model at one revision: a branch, a tag or a commit, the main branch where nobody says."""
    for folder in _snapshots(name):
        reference = folder.parents[1] / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        if folder.name == commit:
            return folder
    return None
