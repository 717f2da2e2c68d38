"""What file systems refuse, as real ones do."""

from __future__ import annotations

import errno
import os

import pytest


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on O_DIRECT is refused, when a file is opened."""
    real = os.open

    def refuse(path, flags, *mode, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse)
