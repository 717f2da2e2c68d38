"""kvikio as far as kvtier uses it: names and signatures of 26.10, reads done with the operating system, and whatever may be missing."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class CompatMode(enum.IntEnum):
    OFF = 0
    ON = 1
    AUTO = 2


class Settings:
    """What `defaults.set` gives: the values are changed at once, and changed back at the end of a `with`."""

    def __init__(self, values: dict[str, Any], config: dict[str, Any]) -> None:
        self._values, self._before = values, {name: values[name] for name in config}
        values.update(config)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._values.update(self._before)


class IOFuture:
    def __init__(self, work: Callable[[], int]) -> None:
        self._work = work

    def get(self) -> int:
        return self._work()

    def done(self) -> bool:
        return False


class FakeKvikio:
    """`modules`: by name. What may be missing: `cufile` (the library, or /run/udev), `nvidia_fs`; and what fails: `driver_error`,
    `file_error`, `read_error`."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"compat_mode": CompatMode.AUTO, "num_threads": 1, "task_size": 4 << 20, "gds_threshold": 16 << 10}
        self.cufile, self.nvidia_fs, self.allow_compat_mode = True, True, False
        self.driver_error = self.file_error = self.read_error = ""
        self.environment_at_open: list[str | None] = []
        self.drivers_open = 0
        self.modules = {name: ModuleType(name) for name in ("kvikio", "kvikio.defaults", "kvikio.cufile_driver")}
        whole, defaults, driver = self.modules.values()
        vars(whole).update(
            __version__="26.10.00", CompatMode=CompatMode, CuFile=self._file_class(), defaults=defaults, cufile_driver=driver
        )
        vars(defaults).update(get=self._get, set=self._set, is_compat_mode_preferred=self._prefers_compatibility)
        vars(driver).update(get=self._property, driver_open=self._open, driver_close=self._close)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on, this is what `import kvikio` finds."""
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def _get(self, config_name: str) -> Any:
        return self.values[config_name]

    def _set(self, *config: Any) -> Settings:
        return Settings(self.values, config[0] if len(config) == 1 else {config[0]: config[1]})

    def _prefers_compatibility(self) -> bool:
        mode = self.values["compat_mode"]
        return mode == CompatMode.ON or (mode == CompatMode.AUTO and not self.cufile)

    def _property(self, config_name: str) -> Any:
        known = {"major_version": 2, "minor_version": 25} if self.nvidia_fs else {"major_version": 0, "minor_version": 0}
        return {**known, "is_gds_available": self.nvidia_fs, "allow_compat_mode": self.allow_compat_mode}[config_name]

    def _open(self) -> None:
        self.environment_at_open.append(os.environ.get("CUFILE_ALLOW_COMPAT_MODE"))
        if self.driver_error:
            raise RuntimeError(self.driver_error)
        self.drivers_open += 1

    def _close(self) -> None:
        self.drivers_open -= 1

    def _file_class(self) -> type:
        fake = self

        class CuFile:
            def __init__(self, file: Path | str, flags: str = "r") -> None:
                if fake.values["compat_mode"] == CompatMode.OFF and fake.file_error:
                    raise RuntimeError(fake.file_error)
                self._descriptor = os.open(file, os.O_RDONLY)

            def close(self) -> None:
                if self._descriptor >= 0:
                    os.close(self._descriptor)
                self._descriptor = -1

            def pread(self, buf, size: int | None = None, file_offset: int = 0, task_size: int | None = None) -> IOFuture:
                def work() -> int:
                    if fake.read_error:
                        raise RuntimeError(fake.read_error)
                    memory = np.asarray(buf)
                    return os.preadv(self._descriptor, [memory[: memory.nbytes if size is None else size].data], file_offset)

                return IOFuture(work)

        return CuFile
