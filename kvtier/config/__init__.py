"""Configuration: `tree` (every key, default and unit), `values` (what they accept), `wording` (how that is said and written), `loading`
(file, environment, arguments), `units` (byte sizes). Imports no torch."""

from __future__ import annotations

from kvtier.config.loading import DEFAULT, Origin, Resolved, load_config, parse_assignments, resolve_config
from kvtier.config.tree import (
    AttentionConfig,
    Band,
    Config,
    DeviceConfig,
    DiskConfig,
    HostConfig,
    ModelConfig,
    MoverConfig,
    PagesConfig,
    PolicyConfig,
)
from kvtier.config.units import BYTE_UNITS, GiB, KiB, MiB, TiB, format_bytes, parse_bytes
from kvtier.config.wording import expected, section_of, value_text

__all__ = [
    "BYTE_UNITS",
    "DEFAULT",
    "AttentionConfig",
    "Band",
    "Config",
    "DeviceConfig",
    "DiskConfig",
    "GiB",
    "HostConfig",
    "KiB",
    "MiB",
    "ModelConfig",
    "MoverConfig",
    "Origin",
    "PagesConfig",
    "PolicyConfig",
    "Resolved",
    "TiB",
    "expected",
    "format_bytes",
    "load_config",
    "parse_assignments",
    "parse_bytes",
    "resolve_config",
    "section_of",
    "value_text",
]
