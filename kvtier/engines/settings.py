"""What a serving engine's own configuration says about a block store below it. No state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvtier.config import Config, load_config
from kvtier.errors import ConfigError
from kvtier.tiers.disk.directory import StoreDirectory, read_description

LOSSLESS = "raw+lz4"
"""The format of stores unless the configuration names another: most engines do not say what is inside their blocks."""


def store_config(settings: Mapping[str, object]) -> Config:
    """The configuration of a store from what an engine's own configuration says: kvtier's dotted keys (`disk.path`,
    `disk.capacity_bytes`, `disk.format`, `policy.name`, `mover.workers`, ...), and `config`, a YAML file below them.

    `disk.path` is required; `disk.format` is LOSSLESS where nobody says. ConfigError, in one line, for anything wrong.
    """
    overrides = dict(settings)
    file = overrides.pop("config", None)
    if file is not None and not isinstance(file, str | Path):
        raise ConfigError(f"config is {file!r}; expected the path of a YAML file of kvtier")
    config = load_config(file, overrides=overrides, base={"disk": {"format": LOSSLESS}})
    if config.disk is None:
        raise ConfigError("disk is null, and there is no store without one; name its directory as disk.path")
    return config


def stored_block_bytes(config: Config) -> int | None:
    """Bytes of a block in the store that `config` names; None if there is none yet. For integrations that learn them with the first block.

    StoreError if there is one that cannot be read.
    """
    found = read_description(Path(config.disk.path)) if config.disk is not None else None
    return None if found is None else found.layout.page_bytes


def check_new_store(config: Config) -> None:
    """Errors as of opening the store that `config` names, as far as they hang on its directory; leaves there what was there before.

    For integrations that open theirs with the first block, long after whoever configured them stopped looking.
    """
    if config.disk is not None:
        directory = StoreDirectory(Path(config.disk.path))
        try:
            directory.check_space(config.disk.capacity_bytes)
        finally:
            directory.give_up()
