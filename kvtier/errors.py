"""Every error kvtier raises at its users, named for what the caller can do about it.

Messages say what was wrong, what was expected and what to do. Expected outcomes of a cache (a miss, a page still on its way,
a queue that is full) are results, not exceptions; see `kvtier.cache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KVTierError(Exception):
    """Base of all errors raised by kvtier. The command line prints its message as one line, without a traceback."""


class ConfigError(KVTierError):
    """A configuration value is unknown, impossible or cannot be met on this machine. Nothing has been started."""


class LayoutError(KVTierError):
    """A tensor or a store does not have the page layout this cache was built for. Nothing has been written."""


class AlignmentError(KVTierError):
    """Memory, offset or length given to a file engine is not aligned, contiguous or writable as it needs. Nothing was read or written."""


class StoreLocked(KVTierError):
    """Another process holds the disk store. Use another path or stop that process."""


class StoreError(KVTierError):
    """The disk store cannot be used at all (foreign files, unreadable description, unusable directory)."""


class ModelError(KVTierError):
    """A model folder is missing, is not one, or is of a kind kvtier cannot hold."""


class TraceError(KVTierError):
    """A file is not the trace of requests it should be. The message names the line and says what was expected there."""


class MissingExtra(KVTierError):
    """An optional package is not installed. The message names the extra to install."""


@contextmanager
def needing(extra: str, what: str, package: str) -> Iterator[None]:
    """Imports within need `package`, which `extra` installs, for `what`. MissingExtra if it is not there."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"{what} needs {package}; pip install 'kvtier[{extra}]'") from error


class Closed(KVTierError):
    """The cache was closed, the file engine stopped, or this process was forked from the one that made it; build a new one."""


class LeaseError(KVTierError):
    """A lease was used after its release, or for tokens it does not cover."""


class TransferFailed(KVTierError):
    """A restore broke after its pages had been verified (an internal failure). Release the lease and recompute."""


class DeviceError(KVTierError):
    """A GPU refused a call, or work on it failed. What was asked for has not been done; other work on it may go on."""


class NumaError(KVTierError):
    """A NUMA node, CPU, process or plan is not there, not allowed or not understood. Nothing has been bound."""


class IntegrityError(KVTierError):
    """kvtier's own bookkeeping contradicts itself: a bug. Raised by `check_integrity()`, and where going on would spread the damage."""
