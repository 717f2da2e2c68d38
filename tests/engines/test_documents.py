"""What the documents tell to write into an engine's configuration is what the tests in real engines run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("document", "test"),
    [("vllm-offloading.md", "test_vllm_tier.py"), ("sglang.md", "test_sglang.py"), ("lmcache.md", "test_lmcache.py")],
)
def test_the_configuration_in_the_document_is_the_one_that_is_run(document, test):
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)
    source = (ROOT / "tests" / "engines_real" / test).read_text()
    run = re.search(rf"# --- docs/{document}.*?\n\s*(?:\w+ = |return )(.*?)\n    # ---", source, re.DOTALL)
    assert shown is not None
    assert run is not None
    assert eval(shown[1], {"__builtins__": {}}) == eval(run[1], {"path": "/var/lib/kvtier", "str": str})


def test_the_front_page_and_the_page_on_vllm_configure_the_connector_alike():  # as the engines of test_vllm_connector.py do
    front = re.search(r"```python\n(kv_connector=.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    page = re.search(r"KVTransferConfig\(\n(.*?)\n\)\)", (ROOT / "docs" / "vllm.md").read_text(), re.DOTALL)
    assert front is not None
    assert page is not None
    shown = eval(f"dict({front[1]})", {"__builtins__": {"dict": dict}})
    assert shown == eval(f"dict({page[1]})", {"__builtins__": {"dict": dict}})
