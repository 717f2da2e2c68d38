"""Triton kernels compiled for a GPU that need not be there: what a program beside a test finds when it looks at them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def found_by(program: Path, cache: Path) -> dict[str, Any]:
    """What `program` prints as JSON, run in a process of its own, in which Triton does not interpret; `cache`: an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
