"""Compiled modules, which an installation without a C compiler does not have: what is there, or who does the work instead. No state."""

from __future__ import annotations

import importlib
from typing import Any

REMEDY = "install a C compiler (Debian, Ubuntu: apt-get install gcc python3-dev) and install kvtier again"


def load_extension(name: str, instead: str) -> tuple[Any, str]:
    """The module and "", or None and one line: why it is not there, who does the work `instead`, and what to do."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"not built or not loadable ({error}); {instead}; {REMEDY}"
