"""SGLang's storage interface and the memory arithmetic of its host pools, from the installed wheel, without what needs a GPU.

SGLang's package cannot be imported whole without CUDA: the modules above the storage interface are stood in for by empty ones, and of the
host pools, whose file needs kernels, the methods that say where a page is are taken out of the source and run as they are.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

_METHODS = {
    "get_page_buffer_meta",
    "get_data_page",
    "get_dummy_flat_data_page",
    "set_from_flat_data_page",
    "k_buffer",
    "v_buffer",
    "_storage_page_index",
}


def import_storage() -> Path:
    """Make `sglang.srt.mem_cache.hicache_storage` and the backend factory importable; the folder of the package."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.mem_cache.storage", "sglang.srt.utils"):
        if not isinstance(sys.modules.get(name), _Hollow):
            module = sys.modules[name] = _Hollow(name)
            module.__path__ = [] if name.endswith("utils") else [str(root.joinpath(*name.split(".")[1:]))]
    common = sys.modules["sglang.srt.utils.common"] = types.ModuleType("sglang.srt.utils.common")
    common.human_readable_int = int  # type: ignore[attr-defined]
    return root


class _Hollow(types.ModuleType):
    """A package without the code of its `__init__`."""


def pool_class(root: Path, file: str, name: str) -> type:
    """A host pool's class with only the methods of `_METHODS`, its own code."""
    source = ast.parse((root / "srt" / "mem_cache" / "pool_host" / file).read_text())
    found = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == name)
    found.body = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name in _METHODS]
    found.bases, found.decorator_list = [], []
    names: dict[str, Any] = {"torch": torch, "Sequence": Sequence, "Optional": Any}
    exec(compile(ast.fix_missing_locations(ast.Module([found], [])), file, "exec"), names)
    made: type = names[name]
    return made


def static_method(root: Path, file: str, owner: str, name: str) -> Callable[..., Any]:
    """A static method of a class in `srt/mem_cache`, its own code, which needs no more than JSON and files."""
    source = ast.parse((root / "srt" / "mem_cache" / file).read_text())
    class_ = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == owner)
    found = next(node for node in class_.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    names: dict[str, Any] = {"json": json, "os": os, "Optional": Optional}
    exec(compile(ast.fix_missing_locations(ast.Module([found], [])), file, "exec"), names)
    made: Callable[..., Any] = names[name]
    return made


def mha_pool(root: Path, layout: str, dtype: torch.dtype, pages: int = 12) -> Any:
    """A host pool of keys and values: 3 layers, 2 heads of 32, pages of 16 tokens, filled with different numbers."""
    pool = pool_class(root, "mha.py", "MHATokenToKVPoolHost")()
    sizes = {"layer_num": 3, "head_num": 2, "head_dim": 32, "v_head_dim": 32, "page_size": 16, "page_num": pages, "size": pages * 16}
    vars(pool).update(sizes, layout=layout, dtype=dtype, device="cpu", pin_memory=False, start_layer=0, end_layer=3)
    shape = {
        "layer_first": (2, 3, pages * 16, 2, 32),
        "page_first": (2, pages * 16, 3, 2, 32),
        "page_first_direct": (2, pages, 3, 16, 2, 32),
        "page_head": (2, pages, 2, 16, 3, 32),
    }[layout]
    pool.kv_buffer = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return pool
