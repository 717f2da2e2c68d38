from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kvtier.errors import ConfigError
from kvtier.format_spec import CODECS, NOT_FOR_KEYS, STAGES
from kvtier.formats import BLOCK_CODECS, FORMAT_NAMES, get_format
from kvtier.formats.lossless import CODERS


def test_every_name_that_configurations_may_use_has_a_codec_or_stage() -> None:
    assert tuple(BLOCK_CODECS) == CODECS
    assert all(codec.name == name for name, codec in BLOCK_CODECS.items())
    assert tuple(CODERS) == STAGES
    assert set(FORMAT_NAMES) | set(NOT_FOR_KEYS) == set(CODECS)
    assert len({coder.number for coder in CODERS.values()} | {0}) == len(CODERS) + 1


@pytest.mark.parametrize("name", [*FORMAT_NAMES, "raw+zstd", "q8/q4", "sparse24!", "q8/sparse24", "q4;0-1:q8;3:sparse24!/q6+lz4"])
def test_names_are_canonical(name: str) -> None:
    assert get_format(name).name == name
    assert get_format(name) == get_format(name)
    assert repr(name) in repr(get_format(name)) or "+" in name


@pytest.mark.parametrize(("wrong", "nearest"), [("q8_1", "q8"), ("Q4", "q4"), ("fp16", "fp8"), ("sparse", "sparse24")])
def test_unknown_names_are_errors_that_name_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"did you mean '{nearest}")) as caught:
        get_format(wrong)
    assert all(name in str(caught.value) for name in FORMAT_NAMES)


def test_formats_do_not_need_hypothesis_or_gguf() -> None:
    code = "import sys; sys.modules['hypothesis'] = sys.modules['gguf'] = None; import kvtier.formats"
    subprocess.run([sys.executable, "-c", code], check=True)
