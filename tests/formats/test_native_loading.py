"""How the native codecs are found: the CPU that the environment names, and formats without the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.errors import ConfigError
from kvtier.format_spec import parse_format
from kvtier.formats import BLOCK_CODECS, native
from kvtier.formats.blocks import BlockFormat
from kvtier.layout import PageLayout
from tests.formats.rig import INSTRUCTION_SETS, loaded, needs_native, usual_pages

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def loaded_anew():
    """The choice that loading makes is made again in the test, and behind it."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()
    if loaded:
        loaded.use(loaded.available()[0])


@needs_native
class TestTheCPUThatTheEnvironmentNames:
    @pytest.mark.parametrize("features", INSTRUCTION_SETS)
    def test_is_the_one_that_is_used(self, loaded_anew, monkeypatch, features):
        monkeypatch.setenv("KVTIER_CPU", features)
        chosen = native.codecs()
        assert chosen is not None
        assert chosen.features() == features

    def test_is_an_error_where_it_is_not_there(self, loaded_anew, monkeypatch):
        monkeypatch.setenv("KVTIER_CPU", "mmx")
        with pytest.raises(ConfigError, match="KVTIER_CPU=mmx: not there; this CPU and build have .*portable"):
            native.codecs()

    def test_is_an_error_where_nothing_is_compiled(self, loaded_anew, monkeypatch):
        monkeypatch.setenv("KVTIER_CPU", "portable")
        monkeypatch.setitem(sys.modules, "kvtier.formats.native._codecs", None)
        with pytest.raises(ConfigError, match="no compiled kernels"):
            native.codecs()

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("features", [name for name in INSTRUCTION_SETS if not name.startswith("avx512")])
    def test_formats_keep_their_contract_on_it(self, features):
        tests = [f"tests/formats/test_contract.py::{name}" for name in ("TestQ8", "TestQ4")]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"KVTIER_CPU": features}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


class TestWithoutTheExtension:
    def test_formats_work_and_it_is_said_why(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "kvtier.formats.native._codecs", None)
        native._load.cache_clear()
        try:
            assert native.codecs() is None
            assert "install a C compiler" in native.why_missing()
            layout = PageLayout(2, 2, 16, 2, 64, "bf16")
            pages, format = usual_pages(layout), BlockFormat(parse_format("q8/q4"), BLOCK_CODECS)
            decoded = format.decode(format.encode(pages, layout), layout)
        finally:
            native._load.cache_clear()
        assert (decoded - pages).float().norm() < 0.1 * pages.float().norm()

    @pytest.mark.slow
    def test_a_compiler_that_fails_does_not_fail_the_installation(self, tmp_path):
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CC": "false"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.rglob("*.so"))
