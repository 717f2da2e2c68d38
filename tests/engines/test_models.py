"""Law checked: a model that cannot be used is one clear error, and other weights are another revision."""

from __future__ import annotations

import json

import pytest

from kvtier.engines.models import load_model, weights_revision
from kvtier.errors import ModelError


def test_a_folder_that_is_no_model_folder(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path / "missing")


def test_a_folder_with_a_strange_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ModelError, match="does not load as a causal language model"):
        load_model(tmp_path)


def test_one_changed_byte_of_the_weights_is_another_revision(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"0" * 1000)
    before = weights_revision(tmp_path)
    assert weights_revision(tmp_path) == before
    weights.write_bytes(b"0" * 500 + b"1" + b"0" * 499)
    assert weights_revision(tmp_path) != before
