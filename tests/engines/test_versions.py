"""Doors into engines say which version they are for, where it is missing or another."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata

import pytest

from kvtier.engines.versions import SUPPORTED, require_engine
from kvtier.errors import ConfigError, MissingExtra


@pytest.mark.parametrize("package", SUPPORTED)
@pytest.mark.parametrize(
    ("installed", "fits"),
    [("{}", True), ("{}.0", True), ("{}+cpu", True), ("{}.1.dev3", True), ("{}1", False), ("0.1", False), ("9", False)],
)
def test_only_the_tested_versions_are_taken(monkeypatch, package, installed, fits):
    found = installed.format(SUPPORTED[package])
    monkeypatch.setattr(metadata, "version", lambda name: found)
    if fits:
        assert require_engine(package) == found
        return
    with pytest.raises(ConfigError, match=f"{package} {found} is installed; .* for {package} {SUPPORTED[package]}"):
        require_engine(package)


def test_vllm_for_cpus_counts_as_vllm(monkeypatch):
    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", version)
    assert require_engine("vllm") == "0.32.0"


@pytest.mark.parametrize(
    ("module", "package", "what"),
    [
        ("vllm_policy", "vllm", "vllm==0.32.*"),
        ("vllm_tier", "vllm", "vllm==0.32.*"),
        ("sglang", "sglang", "sglang==0.5.23"),
    ],
)
def test_a_door_without_its_engine_says_what_to_install(module, package, what):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    done = subprocess.run([sys.executable, "-c", f"import kvtier.engines.{module}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"MissingExtra: {package} is not installed here" in done.stderr
    assert what in done.stderr


def test_the_connector_looks_at_the_version_before_it_imports_anything_of_vllm(monkeypatch):
    import kvtier.engines.vllm as connector

    monkeypatch.setattr(metadata, "version", lambda name: "0.33.1")
    monkeypatch.setitem(sys.modules, "kvtier.engines.vllm.connector", None)
    with pytest.raises(ConfigError, match=r"vllm 0\.33\.1 is installed; .* for vllm 0\.32"):
        connector.KvtierConnector  # noqa: B018


def test_the_adapter_for_lmcache_without_lmcache_says_so(tmp_path):
    if importlib.util.find_spec("lmcache") is not None:
        pytest.skip("lmcache is installed here")
    from kvtier.engines.lmcache import KvtierL2

    with pytest.raises(MissingExtra, match="lmcache==0.5.6"):
        KvtierL2(**{"disk.path": str(tmp_path)})
    assert not list(tmp_path.iterdir())
