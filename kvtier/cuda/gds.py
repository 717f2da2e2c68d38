"""GPUDirect Storage through kvikio: files read by DMA into a GPU's memory, on kvikio's threads.

Written against kvikio 26.10. Both kvikio and the cuFile below it like to read through host memory instead, without a word, where something
is missing; then they are of no use here, and `GdsReader` says what it is. State: kvikio's settings, which belong to the process: its thread
pool is made larger if need be, and files are opened while `compat_mode` is off, one at a time.

Before a read kvikio lets the calling thread, one of kvtier's own, wait for the default stream of the GPU: an engine that computes there is
not held up, but the read is.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import torch

from kvtier.cuda.direct import DirectFile, DirectReader, Reading
from kvtier.errors import DeviceError

INSTALL = "pip install 'kvtier[gds]'"
_NO_FALLBACK = "CUFILE_ALLOW_COMPAT_MODE"
_settings = threading.Lock()


class _Future(Protocol):
    def get(self) -> int:
        """Wait; the bytes read. RuntimeError if that failed."""


class _CuFile(Protocol):
    def pread(self, buf: object, size: int | None = None, file_offset: int = 0, task_size: int | None = None) -> _Future:
        """Begin to read into device memory. Tasks of `task_size` bytes, by default 4 MiB, go to kvikio's threads."""

    def close(self) -> None:
        """Deregister and close."""


class GdsReading(Reading):
    """A future of kvikio's."""

    def __init__(self, future: _Future) -> None:
        self._future = future

    def finish(self) -> int:
        with _os_errors():
            return self._future.get()


class GdsFile(DirectFile):
    """A file that cuFile has registered."""

    def __init__(self, file: _CuFile) -> None:
        self._file = file

    def begin(self, offset: int, memory: torch.Tensor) -> Reading:
        with _os_errors():
            return GdsReading(self._file.pread(memory, memory.numel(), offset))

    def close(self) -> None:
        self._file.close()


class GdsReader(DirectReader):
    """kvikio, with at least `depth` threads. DeviceError, in one line, that says which part is missing."""

    def __init__(self, depth: int) -> None:
        self._kvikio, defaults, driver = _load()
        if not self._kvikio_reaches_cufile(defaults):
            raise DeviceError(
                "kvikio would read through host memory: there is no libcufile.so.0, or /run/udev cannot be read (mount it into a "
                "container), or this is WSL"
            )
        _open_driver(driver)
        if not driver.get("is_gds_available"):
            raise DeviceError("cuFile would read through host memory: the kernel module nvidia-fs is not loaded (see gdscheck -p)")
        with _settings:
            if defaults.get("num_threads") < depth:
                defaults.set("num_threads", depth)
        version = f"{driver.get('major_version')}.{driver.get('minor_version')}"
        # Where cuFile was set up before, or ignores what `_open_driver` asks for, it still may; `open` cannot tell.
        may_not = ", which may read through host memory where it has to (allow_compat_mode)" if driver.get("allow_compat_mode") else ""
        self.name = f"kvikio {self._kvikio.__version__}, nvidia-fs {version}{may_not}"

    def open(self, path: Path) -> DirectFile:
        with _settings, _os_errors(), self._kvikio.defaults.set("compat_mode", self._kvikio.CompatMode.OFF):
            return GdsFile(cast(_CuFile, self._kvikio.CuFile(path, "r")))

    def _kvikio_reaches_cufile(self, defaults: ModuleType) -> bool:
        """Whether kvikio does not, by itself, prefer its own way through host memory, whatever its environment says."""
        with _settings, defaults.set("compat_mode", self._kvikio.CompatMode.AUTO):
            return not defaults.is_compat_mode_preferred()


def _load() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        kvikio, defaults, driver = (importlib.import_module(name) for name in ("kvikio", "kvikio.defaults", "kvikio.cufile_driver"))
    except ModuleNotFoundError as error:
        raise DeviceError(f"kvikio is not installed ({error}); {INSTALL}") from error
    except Exception as error:  # its loaders raise what they like where a library is missing
        raise DeviceError(f"kvikio does not load: {_first_line(error)}") from error
    return kvikio, defaults, driver


@lru_cache(maxsize=1)
def _open_driver(driver: ModuleType) -> None:
    """Open cuFile's driver for the life of the process, asking it not to read through host memory unless the environment says otherwise.

    It looks at that variable when it is opened, and may have been before by somebody else.
    """
    before = os.environ.get(_NO_FALLBACK)
    os.environ.setdefault(_NO_FALLBACK, "false")
    try:
        driver.driver_open()
    except RuntimeError as error:
        raise DeviceError(f"cuFile's driver cannot be opened: {_first_line(error)}; see cufile.log and gdscheck -p") from error
    finally:
        if before is None:
            del os.environ[_NO_FALLBACK]
    atexit.register(driver.driver_close)


@contextmanager
def _os_errors() -> Iterator[None]:
    """What kvikio raises inside for files is an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.EIO, _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    """What kvikio says, without where in its sources it says so."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.rpartition(".cpp:")[2].partition(": ")[2] or line
