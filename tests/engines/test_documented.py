"""What the documentation shows for Hugging Face runs, and hits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvtier import TieredKVCache
from kvtier.engines.transformers import layout_of
from tests.engines.rig import PROMPT, llama

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def names(monkeypatch, tmp_path) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    for key, value in {"DEVICE__CAPACITY_BYTES": "1MiB", "HOST__CAPACITY_BYTES": "1MiB", "DISK__CAPACITY_BYTES": "4MiB"}.items():
        monkeypatch.setenv(f"KVTIER_{key}", value)
    return {"model": llama(layers=2), "prompt_ids": PROMPT, "more_ids": PROMPT[:40], "other_ids": PROMPT[50:]}


def test_the_page_on_transformers(names):
    session, resumed, batch, own = blocks("docs/transformers.md")
    exec(session, names)
    assert names["session"].restored == 208
    exec(resumed, names)
    assert names["again"].restored == 304
    exec(batch, names)
    assert [len(answer) for answer in names["answers"]] == [64, 64]
    exec(own, names)
    cache, output = names["cache"], names["output"].tolist()
    assert names["past"].restored == 144 + 94
    assert [cache.lookup(row[:-1] if index < 2 else row[50:-1]).tokens for index, row in enumerate(output)] == [208, 208, 160, 160]
    cache.close()


def test_the_front_page(names):
    block = next(block for block in blocks("README.md") if "transformers" in block)
    exec(block, names)
    assert names["session"].restored == 208
    with TieredKVCache.open(None, layout_of(names["model"]), names["settings"]) as again:
        assert again.lookup(PROMPT, salt="tenant-a").tokens == len(PROMPT) // 16 * 16, "the next process finds what this one kept"
