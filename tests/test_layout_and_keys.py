"""Laws checked: equal layouts and equal histories have equal names everywhere, different ones never do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.keys import namespace, page_keys, root_key
from kvtier.layout import PageLayout

LAYOUT = PageLayout(30, 2, 16, 3, 64, "bf16")
ROOT = root_key(namespace("m", "r1", LAYOUT), "tenant")


def test_layout_counts_bytes():
    assert LAYOUT.token_bytes == 23_040
    assert LAYOUT.page_bytes == 16 * 23_040
    assert PageLayout(61, 1, 64, 1, 576, "fp32").page_bytes == 61 * 64 * 576 * 4


@pytest.mark.parametrize(
    "change",
    [{"layers": 31}, {"planes": 1}, {"page_tokens": 32}, {"kv_heads": 4}, {"head_dim": 128}, {"dtype": "fp16"}],
)
def test_every_field_changes_the_fingerprint(change):
    values: dict[str, Any] = {"layers": 30, "planes": 2, "page_tokens": 16, "kv_heads": 3, "head_dim": 64, "dtype": "bf16"}
    assert PageLayout(**(values | change)).fingerprint != LAYOUT.fingerprint
    assert PageLayout(**values).fingerprint == LAYOUT.fingerprint


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"planes": 3}, {"page_tokens": -1}, {"kv_heads": 1.5}, {"head_dim": True}, {"dtype": "int8"}]
)
def test_impossible_layouts_are_refused_with_the_field_named(change):
    values = {"layers": 30, "planes": 2, "page_tokens": 16, "kv_heads": 3, "head_dim": 64, "dtype": "bf16"}
    with pytest.raises(LayoutError, match=next(iter(change))):
        PageLayout(**(values | change))


def test_keys_are_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from kvtier.keys import *; from kvtier.layout import PageLayout;"
        "r = root_key(namespace('m', 'r1', PageLayout(30, 2, 16, 3, 64, 'bf16')), 'tenant');"
        "print(page_keys(range(100), 16, r)[-1].hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {page_keys(range(100), 16, ROOT)[-1].hex()}


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=70), st.integers(1, 20))
def test_only_full_pages_have_keys_and_chains_continue(tokens, page_tokens):
    keys = page_keys(tokens, page_tokens, ROOT)
    assert len(keys) == len(tokens) // page_tokens
    assert all(len(key) == 32 for key in keys)
    half = len(keys) // 2
    parent = keys[half - 1] if half else ROOT
    assert page_keys(tokens[half * page_tokens :], page_tokens, parent) == keys[half:]
    assert page_keys(np.array(tokens, np.int64), page_tokens, ROOT) == keys


@given(st.integers(0, 63), st.integers(1, 2**40))
def test_a_changed_token_changes_its_page_and_all_after_it(position, change):
    tokens = list(range(64))
    other = tokens.copy()
    other[position] += change
    before, after = page_keys(tokens, 16, ROOT), page_keys(other, 16, ROOT)
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [page < position // 16 for page in range(4)]


def test_tenants_models_revisions_and_layouts_share_nothing():
    other = PageLayout(30, 2, 16, 3, 64, "fp16")
    roots = [
        root_key(namespace(model, revision, layout), salt)
        for model, revision, layout, salt in [
            ("m", "r1", LAYOUT, "tenant"),
            ("m", "r1", LAYOUT, ""),
            ("m", "r1", LAYOUT, "tenant2"),
            ("m", "r2", LAYOUT, "tenant"),
            ("n", "r1", LAYOUT, "tenant"),
            ("m", "r1", other, "tenant"),
            ("mr", "1", LAYOUT, "tenant"),
        ]
    ]
    assert len({page_keys(range(16), 16, root)[0] for root in roots}) == len(roots)
