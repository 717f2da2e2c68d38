"""A kernel that says no, as containers do: chosen NUMA calls fail with chosen errors."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from kvtier.numa import syscalls


def refuse(monkeypatch: pytest.MonkeyPatch, errors: Mapping[str, int]) -> None:
    """The calls named in `errors` fail with that errno from now on."""
    real = syscalls._call

    def call(name: str, *arguments: object) -> int:
        if name in errors:
            raise OSError(errors[name], os.strerror(errors[name]))
        return real(name, *arguments)

    monkeypatch.setattr(syscalls, "_call", call)
