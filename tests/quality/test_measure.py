"""Laws checked: an untouched cache loses exactly nothing, damage shows where it was done, and bad input is told before any work."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtier.errors import ConfigError, LayoutError, ModelError
from kvtier.formats import get_format
from kvtier.quality.measure import measure_quality, page_layout, repeat_from
from kvtier.quality.protocol import Protocol
from kvtier.quality.untouched import play_untouched
from tests.quality.rig import Noise, Research, Varying, Watching, Zeros, ZeroValues, make_documents, make_model

SMALL = Protocol(tokens=256)


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_raw_pages_lose_exactly_nothing(model):
    (row,) = measure_quality(model, make_documents(), [get_format("raw")], SMALL)
    assert row.bits_per_value == 16
    assert row.top1_agreement == 1.0
    assert (row.kl_mean, row.kl_p99, row.delta_nll, row.delta_nll_standard_error, row.recall_nll) == (0, 0, 0, 0, 0)
    assert (row.k_error, row.v_error, row.attention_output_error) == (0, 0, 0)


def test_a_format_that_loses_everything_has_a_large_kl(model):
    (row,) = measure_quality(model, make_documents(), [Zeros()], SMALL)
    assert row.kl_mean > 0.3
    assert row.kl_p99 > row.kl_mean
    assert row.top1_agreement < 0.7
    assert row.k_error == row.v_error == 1
    assert row.attention_output_error is not None
    assert row.attention_output_error > 0.5


def test_more_damage_is_more_of_everything(model):
    less, more = measure_quality(model, make_documents(), [Noise(0.01), Noise(0.1)], SMALL)
    assert 0 < less.kl_mean < more.kl_mean / 10
    assert less.kl_p99 < more.kl_p99
    assert less.top1_agreement >= more.top1_agreement
    assert less.attention_output_error is not None
    assert more.attention_output_error is not None
    assert less.attention_output_error < more.attention_output_error
    assert more.k_error == pytest.approx(0.1**2 / 3, rel=0.05)
    assert less.k_error == pytest.approx(0.01**2 / 3, rel=0.2)  # rounding to bf16 adds to it


def test_damage_to_values_is_counted_as_theirs(model):
    (row,) = measure_quality(model, make_documents(), [ZeroValues()], SMALL)
    assert (row.k_error, row.v_error) == (0, 1)
    assert row.attention_output_error is not None
    assert row.attention_output_error > 0.1


def test_rows_come_in_the_order_of_the_formats(model):
    formats = [Zeros(), get_format("raw"), Noise(0.1)]
    assert [row.format for row in measure_quality(model, make_documents(1), formats, SMALL)] == ["zeros", "raw", "noise 0.1"]


def test_a_format_is_measured_alike_in_any_company(model):
    documents = make_documents()
    alone = measure_quality(model, documents, [Noise(0.1)], SMALL)
    assert measure_quality(model, documents, [Zeros(), Noise(0.1)], SMALL)[1:] == alone


def test_bits_are_those_of_the_real_payloads(model):
    (row,) = measure_quality(model, make_documents(), [Varying()], SMALL)
    pages = 12
    assert row.bits_per_value == pytest.approx(32 + (pages - 1) / 2 * 8 / page_layout(model, SMALL).values)


def test_a_format_sees_the_pages_of_each_context_in_order_and_nothing_else(model):
    protocol, watching = Protocol(tokens=512), Watching()
    documents = make_documents(2, 512)
    measure_quality(model, documents, [watching], protocol)
    layout = page_layout(model, protocol)
    assert [tuple(pages.shape) for pages in watching.seen] == [(16, *layout.shape), (8, *layout.shape)] * 2
    assert watching.first == [(0,), ()] * 2
    first_keys = untiered_keys(model, documents[1])[:, :384].to(torch.bfloat16).float()
    assert torch.equal(torch.cat(watching.seen[2:])[:, 0, 0].flatten(0, 1).float(), first_keys[0])


def untiered_keys(model, document):
    """Keys of the first layer `[1, tokens, kv_heads, head_dim]`."""
    with torch.inference_mode():
        return model(torch.tensor([document])).past_key_values.layers[0].keys.transpose(1, 2)


def test_the_reference_is_what_the_model_predicts_without_a_cache(model):
    exact = Protocol(tokens=256, page_dtype="fp32")
    document = make_documents(1)[0]
    untouched = play_untouched(model, page_layout(model, exact), document, exact, 24)
    with torch.inference_mode():
        whole = model(torch.tensor([document[:232]])).logits[0]
        repeated = model(torch.tensor([document[:192] + document[24:40]])).logits[0]
    assert untouched.text == document[192:232]
    torch.testing.assert_close(untouched.logits, whole[192:231], rtol=1e-3, atol=1e-3)
    assert untouched.repeated == document[24:40]
    assert untouched.repeated_logits is not None
    torch.testing.assert_close(untouched.repeated_logits, repeated[192:207], rtol=1e-3, atol=1e-3)


def test_repeated_attention_is_the_attention_that_was_recorded(model):
    document = make_documents(1)[0]
    untouched = play_untouched(model, page_layout(model, SMALL), document, SMALL, None)
    assert len(untouched.calls) == 3
    keys, values = untouched.pages[:, 1].permute(1, 3, 0, 2, 4).flatten(2, 3).float()
    own_keys, own_values = untouched.own[1]
    output = untouched.calls[1].repeat(model, torch.cat((keys[None], own_keys), 2), torch.cat((values[None], own_values), 2))
    assert torch.equal(output, untouched.calls[1].output)


def test_recording_leaves_no_trace(model):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    measure_quality(model, make_documents(1), [get_format("raw")], SMALL)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_attention_that_cannot_be_recorded_is_not_reported():
    model = make_model()
    model.set_attn_implementation("eager")
    (row,) = measure_quality(model, make_documents(), [Zeros()], SMALL)
    assert row.attention_output_error is None
    assert row.kl_mean > 0.3


def test_one_document_has_no_standard_error(model):
    (row,) = measure_quality(model, make_documents(1), [Noise(0.1)], SMALL)
    assert row.delta_nll_standard_error is None


def test_repeated_passages_lie_in_the_context():
    for protocol in (SMALL, Protocol(), Protocol(tokens=1024, page_tokens=64)):
        starts = [repeat_from(number, protocol) for number in range(8)]
        assert starts[6:] == [None, None]
        passages = [start for start in starts if start is not None]
        assert passages == sorted(set(passages))
        assert max(passages) + protocol.repeated_tokens <= protocol.context_tokens
        assert math.isclose(protocol.context_tokens / protocol.tokens, 0.75)


class Unfit(Research):
    name = "unfit"

    def payload_bytes(self, layout):
        raise LayoutError("head_dim is 16; expected a multiple of 256")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"documents": []}, ConfigError, "0 documents"),
        ({"formats": []}, ConfigError, "0 formats"),
        ({"documents": [[1] * 255]}, ConfigError, "255 tokens; expected at least 256"),
        ({"documents": [[1] * 255 + [200]]}, ModelError, "token 200.*vocabulary has 200"),
        ({"documents": [[1] * 2048], "protocol": Protocol()}, ModelError, "1024 positions"),
        ({"formats": [get_format("raw"), Unfit()]}, LayoutError, "unfit cannot hold.*multiple of 256"),
    ],
)
def test_bad_input_is_told_before_the_model_is_asked(model, monkeypatch, change, error, said):
    @functools.wraps(type(model).forward)  # what it takes is looked at
    def asked(*_, **__):
        pytest.fail("the model was asked")

    monkeypatch.setattr(type(model), "forward", asked)
    given = {"documents": make_documents(), "formats": [get_format("raw")], "protocol": SMALL} | change
    with pytest.raises(error, match=said):
        measure_quality(model, **given)


def test_kv_that_overflows_the_page_dtype_is_an_error():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    with pytest.raises(ModelError, match="does not fit into fp16"):
        measure_quality(model, make_documents(1), [get_format("raw")], Protocol(tokens=256, page_dtype="fp16"))
