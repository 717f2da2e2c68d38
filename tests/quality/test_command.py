"""Laws checked: the command measures the packaged model end to end, its JSON has what its documentation says, bad input is one line."""

from __future__ import annotations

import json

import pytest

from kvtier.cli import main

COLUMNS = [
    "format",
    "bits_per_value",
    "kl_mean",
    "kl_p99",
    "delta_nll",
    "delta_nll_standard_error",
    "top1_agreement",
    "recall_nll",
    "k_error",
    "v_error",
    "attention_output_error",
]


@pytest.mark.slow
def test_tiny_end_to_end(capsys, tmp_path):
    plot, text = tmp_path / "plot.svg", tmp_path / "own.txt"
    text.write_text("A page is read often, and written once. " * 100)
    assert main(["quality", "--tiny", "--formats", "q8,raw,q8", "--json", "-", "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result) == ["machine", "model", "protocol", "rows"]
    assert result["model"]["name"] == "SmolLM2-135M-Instruct"
    protocol = {key: result["protocol"][key] for key in ("documents", "tokens", "context_tokens", "page_tokens", "page_dtype")}
    assert protocol == {"documents": 2, "tokens": 256, "context_tokens": 192, "page_tokens": 16, "page_dtype": "bf16"}
    q8, raw = result["rows"]
    assert list(q8) == list(raw) == COLUMNS
    assert (raw["format"], raw["kl_mean"], raw["top1_agreement"], raw["bits_per_value"]) == ("raw", 0, 1, 16)
    assert 0 < q8["kl_mean"] < 1e-3
    assert "KL p99" in err
    assert ">q8<" in plot.read_text()

    assert main(["quality", "--tiny", "--formats", "raw", "--texts", str(text), "--json", str(tmp_path / "rows.json")]) == 0
    own = json.loads((tmp_path / "rows.json").read_text())
    assert own["protocol"]["texts"] == str(text)
    assert own["rows"][0]["delta_nll_standard_error"] is None
    assert main(["quality", "--formats", "raw", "--texts", str(text)]) == 2
    assert "own.txt has" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_end_to_end(capsys):
    assert main(["quality", "--tiny", "--page-tokens", "4", "--budget", "25%", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["protocol"]["budget"] == 0.25
    assert list(result["rows"][0]) == [
        *("select", "pages", "kl_mean", "kl_p99", "delta_nll", "delta_nll_standard_error"),
        *("perplexity_increase", "top1_agreement", "recalled_pages"),
    ]
    ours, _, window, h2o, _ = result["rows"]
    assert ours["pages"] == 12
    assert ours["kl_mean"] < min(window["kl_mean"], h2o["kl_mean"])
    assert "recalled" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "q9"], "unknown page format 'q9'"),
        (["--formats", ""], "page format '': it is empty"),
        (["--tokens", "2050"], "multiple of 64"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--tiny", "--page-tokens", "17"], "multiple of 68"),
        (["--budget", "1.5"], "--budget is '1.5'; expected a share"),
        (["--budget", "some"], "--budget is 'some'"),
        (["--budget", "25%", "--formats", "q8"], "leave --formats and --plot out"),
        (["--texts", "/nowhere/text"], "/nowhere/text cannot be read"),
        (["--texts", __file__, "--documents", "3"], "leave it out"),
        (["--json", "/nowhere/rows.json"], "/nowhere/rows.json"),
        (["--plot", "/nowhere/plot.svg"], "/nowhere/plot.svg"),
        (["--model", "/nowhere"], "no config.json"),
    ],
)
def test_bad_input_is_one_line_before_any_work(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("kvtier.quality.measure.measure_quality", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("kvtier.engines.models.packaged_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["quality", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert error[-1].startswith("kvtier: error: ")
