"""What the formats made of sections share: batches, saturation, the order of sections."""

from __future__ import annotations

import pytest
import torch

from kvtier.formats import get_format, sections
from kvtier.layout import PageLayout
from kvtier.testing.strategies import make_pages

LAYOUT = PageLayout(5, 2, 4, 2, 64, "fp32")


@pytest.mark.parametrize("name", ["raw", "fp8", "q8", "q4"])
@pytest.mark.parametrize("chunk_values", [1, 2 * LAYOUT.values // 5, LAYOUT.values, 3 * LAYOUT.values])
def test_how_pages_are_cut_into_batches_does_not_show(name: str, chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    format, pages = get_format(name), make_pages(LAYOUT, "outlier channels", 4, seed=0)
    payloads = format.encode(pages, LAYOUT)
    at_once = format.decode(payloads, LAYOUT)
    monkeypatch.setattr(sections, "CHUNK_VALUES", chunk_values)
    assert torch.equal(format.decode(payloads, LAYOUT), at_once)
    assert torch.equal(format.decode(payloads, LAYOUT, slice(1, 4)), at_once[:, 1:4])
    # The rotation before encoding may round differently in another batch, so a code may differ, but hardly any.
    differing = (format.decode(format.encode(pages, LAYOUT), LAYOUT) != at_once).float().mean()
    assert differing <= (0.0 if name in ("raw", "fp8") else 0.05)


@pytest.mark.parametrize("name", ["fp8", "q8", "q4"])
def test_payloads_do_not_hold_on_to_their_batch(name: str) -> None:
    """A tier that keeps one page of a batch must not keep the memory of all."""
    for payload in get_format(name).encode(make_pages(LAYOUT, "gaussian", 3, seed=0), LAYOUT):
        assert payload.base is None


@pytest.mark.parametrize(("name", "limit", "error"), [("fp8", 448 * 65504.0, 0.07), ("q8", 127 * 65504.0 / 8, 0.02), ("q4", 65504.0, 0.3)])
def test_magnitudes_saturate_one_by_one_where_the_file_says(name: str, limit: float, error: float) -> None:
    page = torch.zeros(1, *LAYOUT.shape)
    page[..., 3], page[..., 40] = -1e12, limit / 2
    decoded = get_format(name).decode(get_format(name).encode(page, LAYOUT), LAYOUT)
    torch.testing.assert_close(decoded[..., 3], torch.full_like(decoded[..., 3], -limit), rtol=error, atol=0)
    torch.testing.assert_close(decoded[..., 40], torch.full_like(decoded[..., 40], limit / 2), rtol=error, atol=0)


@pytest.mark.parametrize("name", ["raw", "fp8", "q8", "q4"])
def test_layers_must_be_a_slice_with_step_one(name: str) -> None:
    payloads = get_format(name).encode(make_pages(LAYOUT, "gaussian", 1, seed=0), LAYOUT)
    with pytest.raises(ValueError, match="step 1"):
        get_format(name).decode(payloads, LAYOUT, slice(None, None, 2))
