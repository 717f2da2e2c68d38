"""Which file engine a directory gets: tried for real with an unnamed file, written and read back. No state."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from kvtier.errors import ConfigError
from kvtier.io.async_files import AsyncFilesEngine
from kvtier.io.buffered import BufferedEngine
from kvtier.io.direct import DirectEngine
from kvtier.io.files import BLOCK_BYTES, FileEngine, Request, page_aligned
from kvtier.io.holes import FULL
from kvtier.io.pooled import DEPTH

EngineName = Literal["direct", "buffered", "aiofiles"]
EngineChoice = Literal["auto", "direct", "buffered", "aiofiles"]
SECTOR_BYTES = 512

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """An engine, and why it is not the fastest ("" if it is, or was asked for)."""

    engine: FileEngine
    instead: str = ""


def choose_engine(
    directory: Path, wanted: EngineChoice = "auto", depth: int = DEPTH, cpus: Sequence[int] = (), path: Path | None = None
) -> Chosen:
    """The engine for files in `directory`, which exists, or below it in `path`; `auto` takes `direct`, else `buffered` with one line in the
    log. Its threads are kept on `cpus`, if any are given.

    ConfigError if an engine asked for by name does not work there, or the directory cannot be written. Leaves nothing behind.
    """
    if wanted not in get_args(EngineChoice):
        raise ConfigError(f"disk.io_engine is {wanted!r}; expected one of {', '.join(get_args(EngineChoice))}")
    if depth < 1:
        raise ConfigError(f"disk.io_depth is {depth}; give at least 1 request at a time")
    refusals: list[str] = []
    for name in ("direct", "buffered") if wanted == "auto" else (wanted,):
        for make in _CANDIDATES[name]:
            engine = make(depth)
            refusal = _refusal(engine, directory)
            if refusal is None:
                engine.keep_on(cpus)
                instead = f"direct I/O does not work there: {refusals[-1]}" if name == "buffered" and refusals else ""
                if instead:
                    _log.info("%s: using the buffered I/O engine; %s", directory, instead)
                return Chosen(engine, instead)
            engine.stop()
            refusals.append(refusal)
    if wanted == "auto":
        where = "" if path in (None, directory) else f" in {directory}"
        raise ConfigError(f"disk.path {path or directory} cannot be created or written: {refusals[-1]}{where}; name a writable directory")
    raise ConfigError(f"disk.io_engine is {wanted}, but {directory} refuses it: {refusals[-1]}; use auto, or another disk.path")


def existing_part(path: Path) -> Path:
    """The longest existing beginning of `path`: where it will be made, so the file system to try."""
    return next((part for part in (path, *path.parents) if os.path.exists(part)), path)


_CANDIDATES: dict[str, Sequence[Callable[[int], FileEngine]]] = {
    "direct": (lambda depth: DirectEngine(depth, SECTOR_BYTES), lambda depth: DirectEngine(depth, BLOCK_BYTES)),
    "buffered": (BufferedEngine,),
    "aiofiles": (AsyncFilesEngine,),
}
"""By name, the variants to try in turn."""


def _refusal(engine: FileEngine, directory: Path) -> str | None:
    """Why an engine does not work in a directory, None if it does."""
    try:
        with tempfile.TemporaryFile(dir=directory) as unnamed:
            file = engine.open(Path(f"/proc/self/fd/{unnamed.fileno()}"))
            try:
                return _comes_back(engine, file)
            finally:
                engine.close(file)
    except OSError as error:
        # A full disk says nothing about the engine: the file was opened, which is where most refusals happen.
        if error.errno in FULL and engine.alignment_bytes in (1, BLOCK_BYTES):
            return None
        return error.strerror or str(error)


def _comes_back(engine: FileEngine, file: int) -> str | None:
    """Write a piece that is aligned no better than the engine asks for, and read it back. Batches of one, so that no thread starts yet."""
    step = engine.alignment_bytes if engine.alignment_bytes > 1 else SECTOR_BYTES
    piece = page_aligned(BLOCK_BYTES + step)[step : 2 * step]
    piece[:] = np.arange(step, dtype=np.uint32).astype(np.uint8) ^ np.uint8(0xA5)
    expected = piece.copy()
    request = Request(file, step, piece)
    for error in engine.write_all([request]):
        if error is not None:
            raise error
    piece[:] = 0
    for _, outcome in engine.read_each([request]):
        if isinstance(outcome, OSError):
            raise outcome
    return None if np.array_equal(piece, expected) else "what was written does not come back"
