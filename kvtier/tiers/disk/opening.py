"""Opening a store: the engine that its files get, and its directory, locked and described as in use. No state.

What cannot be had is one error, and nothing new is left there then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvtier.cuda.direct import DirectReader
from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, DeviceError, StoreError
from kvtier.formats.base import Format
from kvtier.io.files import FileEngine
from kvtier.io.probe import Chosen, EngineChoice, choose_engine, existing_part
from kvtier.layout import PageLayout
from kvtier.tiers.disk import record
from kvtier.tiers.disk.direct import check_direct, find_reader
from kvtier.tiers.disk.directory import Description, StoreDirectory, check_space, describe, reopened

DiskEngine = EngineChoice | Literal["gds"]

SEGMENT_BYTES = 256 << 20
MOST_SEGMENTS = 256


def open_engine(
    path: Path,
    layout: PageLayout,
    format: Format,
    engine: FileEngine | DiskEngine,
    depth: int,
    cpus: Sequence[int],
    gpu: Accelerator | None,
) -> tuple[Chosen, DirectReader | None]:
    """The engine for files in `path`, or in what there is of it; with "gds" also what reads into the memory of `gpu`. See `DiskTier`."""
    reader = None
    if engine == "gds":
        check_direct(format, layout)
        try:
            reader, engine = find_reader(gpu, existing_part(path), depth), "direct"
        except DeviceError as error:
            raise ConfigError(f"disk.io_engine is gds, but {error}; use auto") from error
    return choose_engine(existing_part(path), engine, depth, cpus, path) if isinstance(engine, str) else Chosen(engine), reader


@dataclass(frozen=True)
class OpenedDirectory:
    """A store's directory, its description now on disk, and whether it had been closed in order."""

    directory: StoreDirectory
    description: Description
    was_clean: bool


def slot_bytes_of(layout: PageLayout, format: Format, capacity_bytes: int) -> int:
    """Bytes of a record. ConfigError if not even one fits."""
    slot_bytes = record.record_bytes(format.payload_bytes(layout))
    if capacity_bytes < slot_bytes:
        needed = f"one {format.name} page of this layout takes {slot_bytes} bytes on disk"
        raise ConfigError(f"disk.capacity_bytes is {capacity_bytes}, but {needed}; raise it")
    return slot_bytes


def _wanted(layout: PageLayout, format: Format, namespace: bytes, slot_bytes: int, capacity_bytes: int) -> Description:
    segment_slots = max(1, max(SEGMENT_BYTES, capacity_bytes // MOST_SEGMENTS) // slot_bytes)
    return Description(layout, format.name, namespace.hex(), slot_bytes, segment_slots, capacity_bytes)


def check_directory(path: Path, layout: PageLayout, format: Format, namespace: bytes, slot_bytes: int, capacity_bytes: int) -> None:
    """Raises what `open_directory` would for a store of others, or for too little room. Makes nothing, and asks for no lock."""
    found = describe(path, _wanted(layout, format, namespace, slot_bytes, capacity_bytes))
    check_space(path, capacity_bytes, found.capacity_bytes if found is not None else 0)


def open_directory(
    path: Path, layout: PageLayout, format: Format, namespace: bytes, slot_bytes: int, capacity_bytes: int
) -> OpenedDirectory:
    """Lock the store in `path`, made if there is none, and mark it as in use. Raises as `DiskTier`."""
    wanted = _wanted(layout, format, namespace, slot_bytes, capacity_bytes)
    directory = StoreDirectory(path)
    try:
        found = describe(path, wanted)
        directory.check_space(capacity_bytes, found.capacity_bytes if found is not None else 0)
        description = reopened(found or wanted, capacity_bytes)
        try:
            directory.write(description)
        except OSError as error:
            raise StoreError(f"disk store {path}: cannot write its description: {error.strerror}") from error
    except BaseException:
        directory.give_up()
        raise
    return OpenedDirectory(directory, description, found is None or found.clean)
