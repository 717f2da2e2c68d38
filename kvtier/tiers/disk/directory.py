"""The directory of a disk store: its lock, its description (`store.json`) and its segment files by name.

Opened by one process at a time; the description is written whole (temporary file, fsync, rename, fsync of the directory), by one
thread at a time, which `DiskTier` sees to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvtier.errors import ConfigError, LayoutError, StoreError, StoreLocked
from kvtier.io.probe import existing_part
from kvtier.layout import PageLayout

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DESCRIPTION = "store.json"
_TEMPORARY = "store.json.tmp"
_LOCK = "lock"
_SEGMENT = re.compile(r"segment-(\d{5,})\.kvt")
_OURS_BEFORE_DESCRIPTION = {_LOCK, _TEMPORARY, "lost+found"}
_MAGIC = "kvtier disk store"
_VERSION = 1
_REMEDY = "use another disk.path, or delete this directory (its copies are only a cache)"
_log = logging.getLogger(__name__)
_held: set[int] = set()
"""The locks that this process has, as open files."""


@dataclass(frozen=True)
class Description:
    """What `store.json` says. `namespace` is hex. `clean`: closed in order. Records up to `synced_sequence` survive a power failure."""

    layout: PageLayout
    format: str
    namespace: str
    slot_bytes: int
    segment_slots: int
    capacity_bytes: int
    clean: bool = False
    synced_sequence: int = 0

    def to_json(self) -> str:
        """The text of `store.json`."""
        fingerprint = self.layout.fingerprint.hex()
        return json.dumps({"magic": _MAGIC, "version": _VERSION, "layout_fingerprint": fingerprint, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: Path) -> Description:
        """Parse `store.json`. StoreError if it is damaged or newer than this kvtier."""
        try:
            fields = json.loads(text)
            magic, version, fingerprint = (fields.pop(name) for name in ("magic", "version", "layout_fingerprint"))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StoreError(f"{where}: not readable as the description of a disk store ({error!r}); {_REMEDY}") from error
        if magic != _MAGIC or not isinstance(version, int):
            raise StoreError(f"{where}: not the description of a kvtier disk store; {_REMEDY}")
        if version > _VERSION:
            raise StoreError(f"{where}: version {version}, written by a newer kvtier; this one reads up to {_VERSION}; {_REMEDY}")
        try:
            found = cls(layout=PageLayout(**fields.pop("layout")), **fields)
        except (KeyError, TypeError, LayoutError) as error:
            raise StoreError(f"{where}: fields are missing or unknown ({error}); {_REMEDY}") from error
        wrong = [
            name for name, kind in (("format", str), ("namespace", str), ("clean", bool)) if not isinstance(getattr(found, name), kind)
        ] + [
            name
            for name, least in (("slot_bytes", 1), ("segment_slots", 1), ("capacity_bytes", 1), ("synced_sequence", 0))
            if type(getattr(found, name)) is not int or getattr(found, name) < least
        ]
        if fingerprint != found.layout.fingerprint.hex():
            wrong.append("layout_fingerprint")
        if wrong:
            raise StoreError(f"{where}: damaged ({', '.join(wrong)}); {_REMEDY}")
        return found


class StoreDirectory:
    """A locked store directory, from construction to `close`."""

    def __init__(self, path: Path) -> None:
        """Create `path` if missing and lock it. ConfigError if it cannot be created or written, StoreError if it holds other files,
        StoreLocked if another store object, of this or another process, has it."""
        self.path = path
        self._made: list[Path] = []
        """What this object made here so far, in that order, and takes back if the store is not opened after all."""
        self._lock: int | None = None
        try:
            self._make(path)
            names = set(os.listdir(path))
            if _DESCRIPTION not in names and names - _OURS_BEFORE_DESCRIPTION:
                strangers = ", ".join(sorted(names - _OURS_BEFORE_DESCRIPTION)[:3])
                raise StoreError(f"disk.path {path} is no disk store and not empty ({strangers}); use an empty or new directory")
            self._lock = self._open_lock()
        except OSError as error:
            self.give_up()
            raise ConfigError(f"disk.path {path} cannot be created or written: {error.strerror}; name a writable directory") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            os.close(self._lock)
            self._lock = None
            if isinstance(error, BlockingIOError):
                message = f"disk store {path} is in use by process {holder or 'unknown'}; stop it or use another disk.path"
                if any(_same_file(lock, path / _LOCK) for lock in _held):
                    message = f"disk store {path} is open in this process already; close() what has it first, or use another disk.path"
                raise StoreLocked(message) from error
            self.give_up()
            raise StoreError(f"disk store {path} cannot be locked: {error.strerror}; {_REMEDY}") from error
        if not _same_file(self._lock, path / _LOCK):
            self.close()
            raise StoreLocked(f"disk store {path} was just made and given up by somebody else, with its lock; try again")
        _held.add(self._lock)
        self._made += [where for name in (_TEMPORARY, _DESCRIPTION) if not (where := path / name).exists()]
        with contextlib.suppress(OSError):  # only a courtesy to the next opener, and the disk may be full
            os.pwrite(self._lock, f"{os.getpid():<31}\n".encode(), 0)

    def _make(self, path: Path) -> None:
        """`path` and what is missing above it."""
        missing = [part for part in (path, *path.parents) if not part.exists()]
        for part in reversed(missing):
            with contextlib.suppress(FileExistsError):  # by now somebody else's
                part.mkdir()
                self._made.append(part)

    def _open_lock(self) -> int:
        file = self.path / _LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            lock = os.open(file, flags | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(file, flags, 0o600)
        self._made.append(file)
        return lock

    def write(self, description: Description) -> None:
        """Replace the description, durably. OSError if the medium fails.

        On a full disk the old file is overwritten in place: not safe against a power failure in that instant, but a store must be able
        to open and close on a full disk, and a damaged description is found out and costs only the cache.
        """
        data = description.to_json().encode()
        try:
            _write_durably(self.path / _TEMPORARY, data, os.O_CREAT | os.O_TRUNC)
            os.rename(self.path / _TEMPORARY, self.path / _DESCRIPTION)
        except OSError as error:
            if error.errno not in FULL_ERRNOS or not (self.path / _DESCRIPTION).exists():
                raise
            with contextlib.suppress(OSError):
                os.unlink(self.path / _TEMPORARY)
            _write_durably(self.path / _DESCRIPTION, data, 0)
        self.sync()

    def sync(self) -> None:
        """Make created and renamed files survive a power failure."""
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def segment_path(self, segment: int) -> Path:
        """File of segment number `segment`."""
        return _segment_path(self.path, segment)

    def segments(self) -> list[int]:
        """Numbers of the segment files that exist, ascending."""
        return _segments(self.path)

    def check_space(self, capacity_bytes: int, before_bytes: int = 0) -> None:
        """As the function of that name; and what room is missing is told in the log, where that is no error."""
        missing, available = check_space(self.path, capacity_bytes, before_bytes)
        if missing > 0:
            _log.warning(
                "disk store: %s of disk.capacity_bytes %d; what is there is used, others leave for what comes; free %d bytes for all of it",
                available,
                capacity_bytes,
                missing,
            )

    def give_up(self) -> None:
        """Take back what was made here, and unlock: for a store that was refused. What was there before stays."""
        for path in reversed(self._made):  # the lock while it is held, so that it is nobody else's
            with contextlib.suppress(OSError):  # never written, or by now with something of others in it
                path.rmdir() if path.is_dir() else path.unlink()
        self._made.clear()
        self.close()

    def close(self) -> None:
        """Unlock. Safe to call twice."""
        if self._lock is not None:
            # Explicitly, because a forked child may still have the file open and would keep the lock.
            _held.discard(self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None


def read_description(path: Path) -> Description | None:
    """The description of the store in directory `path`, None if there is none. StoreError if it is damaged, newer, or cannot be read."""
    where = path / _DESCRIPTION
    try:
        text = where.read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{where}: cannot be read: {error.strerror}; {_REMEDY}") from error
    return Description.from_json(text, where)


def describe(path: Path, wanted: Description) -> Description | None:
    """The description of the store in `path`, None if there is none. LayoutError or StoreError unless it agrees with `wanted`."""
    found = read_description(path)
    if found is None:
        return None
    if found.layout != wanted.layout:
        raise LayoutError(f"disk store {path} holds pages of {found.layout}; this cache has {wanted.layout}; {_REMEDY}")
    for field, what in (("format", "format"), ("namespace", "model or revision (namespace)"), ("slot_bytes", "record size")):
        theirs, ours = getattr(found, field), getattr(wanted, field)
        if theirs != ours:
            raise StoreError(f"disk store {path} has another {what}: {theirs} there, {ours} here; {_REMEDY}")
    return found


def check_space(path: Path, capacity_bytes: int, before_bytes: int = 0) -> tuple[int, str]:
    """ConfigError if the file system could not hold `capacity_bytes` of segments in `path`, which may not be there yet, even if nobody else
    wrote to it.

    A store that had `before_bytes` when it was last opened may have as many again, whoever filled the disk meanwhile: what is in it can be
    used. How many bytes are missing then, and in words what is available. A file system that gives no size of its own (ramfs, some in user
    space or across the network) is taken at no word: writes will show.
    """
    system = os.statvfs(existing_part(path))
    if system.f_blocks == 0:
        return 0, ""
    free = system.f_bavail * system.f_frsize
    held = sum(os.stat(_segment_path(path, segment)).st_blocks * 512 for segment in _segments(path))
    missing = capacity_bytes - free - held
    available = f"on the file system of {path} {free + held} bytes are available ({free} free, {held} held by the store)"
    if missing > 0 and capacity_bytes > before_bytes:
        raise ConfigError(f"disk.capacity_bytes is {capacity_bytes}, but {available}; lower it, or free {missing} bytes there")
    return missing, available


def _segments(path: Path) -> list[int]:
    names = os.listdir(path) if path.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _SEGMENT.fullmatch(name)))


def _segment_path(path: Path, segment: int) -> Path:
    return path / f"segment-{segment:05d}.kvt"


def reopened(found: Description, capacity_bytes: int) -> Description:
    """The description of a store that was just opened: in use, so not clean, with the capacity now configured."""
    return replace(found, capacity_bytes=capacity_bytes, clean=False)


def _same_file(file: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _write_durably(path: Path, data: bytes, flags: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
    try:
        if os.pwrite(file, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(file, len(data))
        os.fsync(file)
    finally:
        os.close(file)
