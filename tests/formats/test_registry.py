from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kvtier.errors import ConfigError
from kvtier.formats import FORMAT_NAMES, get_format


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_names_are_canonical(name: str) -> None:
    assert get_format(name).name == name
    assert get_format(name) == get_format(name)


@pytest.mark.parametrize(("wrong", "nearest"), [("q8_0", "q8"), ("raw+lz5", "raw+lz4"), ("Q4", "q4"), ("fp16", "fp8"), ("", "")])
def test_unknown_names_are_errors_that_name_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"did you mean '{nearest}")) as caught:
        get_format(wrong)
    assert all(name in str(caught.value) for name in FORMAT_NAMES)


def test_formats_do_not_need_hypothesis() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import kvtier.formats"
    subprocess.run([sys.executable, "-c", code], check=True)
