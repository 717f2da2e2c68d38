"""Laws checked: what is measured for a device budget is what the Hugging Face integration does on one, and the rivals are what they say."""

from __future__ import annotations

import pytest
import torch

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.engines.budgeted import BudgetedCache
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import layout_of
from kvtier.errors import ConfigError
from kvtier.leases.budget import shares
from kvtier.quality import budget, selections
from kvtier.quality.budget import budget_pages, measure_budget
from kvtier.quality.measure import check_playable
from kvtier.quality.protocol import Protocol
from kvtier.quality.selections import SELECTIONS, Step, by_attention, by_cumulative_attention, by_window
from tests.quality.rig import make_documents, make_model

PROTOCOL = Protocol(tokens=256, page_tokens=4, page_dtype="fp32")
BUDGET = 10


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.inference_mode()
def decoded(model, document, device_pages):
    """Logits of the integration, token by token, on a device of exactly the budget, and what it recalled."""
    layout = layout_of(model, PROTOCOL.page_tokens)
    sizes = {
        "device.capacity_bytes": (device_pages - 1) * layout.page_bytes,
        "device.place": "cpu",
        "host.capacity_bytes": "16MiB",
        "host.format": "raw",
    }
    context = document[: PROTOCOL.context_tokens]
    text = document[PROTOCOL.context_tokens :][: PROTOCOL.scored_tokens]
    with TieredKVCache(load_config(env={}, overrides=sizes), layout) as cache:
        with BudgetedCache(model, cache, context, device_pages) as past:
            model(torch.tensor([context]), **cache_argument(past), logits_to_keep=1)
            logits = [model(torch.tensor([[token]]), **cache_argument(past)).logits[0, 0] for token in text]
        return torch.stack(logits[:-1]), cache.stats()["recalls"]


@pytest.mark.parametrize("device_pages", [4, 5, BUDGET, 40])
def test_what_is_measured_is_what_the_integration_does(model, device_pages):
    document = make_documents(1)[0]
    read = budget.read_context(model, check_playable(model, [document], PROTOCOL), document, PROTOCOL)
    attended: list[torch.Tensor] = []
    measured = budget.decode(model, read, by_attention, device_pages, PROTOCOL, attended)
    logits, recalled = decoded(model, document, device_pages)
    torch.testing.assert_close(logits, measured, atol=2e-3, rtol=0)
    assert not torch.allclose(read.logits, measured, atol=2e-2)
    # The first step fills the frames; later ones recall what the one before did not attend over.
    frames = shares(device_pages)[1]
    later = sum(budget.recalls(mask, PROTOCOL.page_tokens) for mask in attended) * (PROTOCOL.scored_tokens - 1)
    assert recalled >= frames * model.config.num_hidden_layers
    if device_pages == BUDGET:
        assert recalled == pytest.approx(later + frames * model.config.num_hidden_layers, rel=0.1)


def test_everything_attends_over_no_more_than_the_budget_and_never_ahead(model):
    seen: dict[str, torch.Tensor] = {}

    def noting(name, selection):
        def note(step):
            kept = seen[name] = selection(step)
            assert not (kept & ~step.visible).any()
            return kept

        return note

    document = make_documents(1)[0]
    read = budget.read_context(model, check_playable(model, [document], PROTOCOL), document, PROTOCOL)
    for name, selection in SELECTIONS.items():
        budget.decode(model, read, noting(name, selection), BUDGET, PROTOCOL)
    for kept in seen.values():
        assert int(kept.sum(2).max()) <= BUDGET * PROTOCOL.page_tokens
        assert int(kept.sum(2).min()) > (BUDGET - 1) * PROTOCOL.page_tokens
    window, h2o = seen["window"][0], seen["h2o"]
    assert window[0].nonzero()[:, 0].tolist() == [*range(4), *range(4 * (48 - 8), 4 * 48 + 1)]
    for step in range(1, h2o.shape[1]):  # what H2O let go never comes back
        assert not (h2o[:, step, : 4 * 48 + step] & ~h2o[:, step - 1, : 4 * 48 + step]).any()


def test_heavy_hitters_stay():
    """A token that every query looks at outlives the others; one that no query ever looked at goes first."""
    keys = torch.zeros(1, 40, 4)
    keys[0, 3, 0] = 9.0
    queries = torch.zeros(1, 16, 4)
    queries[..., 0] = 1.0
    step = Step(queries, keys, 1.0, torch.zeros(1, 24), page_tokens=4, device_pages=4)
    step.context_attention[0, 5] = -1.0
    step.context_attention[0, 3] = 5.0
    kept = by_cumulative_attention(step)[0]
    assert bool(kept[:, 3].all())
    assert not kept[:, 5].any()


def test_rows_compare_ours_with_the_rivals_and_full_attention(model):
    steps: list[tuple[int, int, str]] = []
    rows = measure_budget(model, make_documents(2), 0.25, PROTOCOL, lambda *step: steps.append(step))
    assert [row.select for row in rows] == ["attention", "quest", "window", "h2o", "all"]
    ours, _, window, _, full = rows
    assert ours.pages == window.pages == 12
    assert ours.kl_mean < window.kl_mean
    assert (full.kl_mean, full.delta_nll, full.perplexity_increase, full.top1_agreement) == (0, 0, 0, 1)
    assert ours.recalled_pages is not None
    assert ours.recalled_pages > 0
    assert window.recalled_pages is None
    assert steps[-1] == (10, 10, "done")


@pytest.mark.parametrize(("share", "said"), [(0.01, "is 0 of the context's 48 pages; expected at least 4"), (0.999, "fewer than all")])
def test_budgets_that_cannot_be_are_refused(share, said, model):
    with pytest.raises(ConfigError, match=said):
        budget_pages(share, PROTOCOL)
    with pytest.raises(ConfigError, match=said):
        measure_budget(model, make_documents(1), share, PROTOCOL)


def test_no_documents_are_refused(model):
    with pytest.raises(ConfigError, match="no documents"):
        measure_budget(model, [], 0.25, PROTOCOL)


def test_the_window_is_the_first_page_and_the_most_recent():
    step = Step(torch.zeros(1, 2, 4), torch.zeros(1, 42, 4), 1.0, torch.zeros(1, 40), page_tokens=4, device_pages=4)
    assert by_window(step)[0, 1].nonzero()[:, 0].tolist() == [*range(4), *range(32, 42)]


def test_bounds_never_fall_short(monkeypatch):
    """The control for the rival: a page's bound is at least the logit of each of its tokens."""
    generator = torch.Generator().manual_seed(0)
    step = Step(torch.randn(4, 6, 8, generator=generator), torch.randn(2, 46, 8, generator=generator), 0.5, torch.zeros(2, 40), 4, 4)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(selections, "_recalled", lambda _, logits: seen.append(logits))
    selections.by_bounds(step)
    exact = torch.einsum("hqd,hpd->qhp", step.queries * 0.5, step.keys[:, :44].repeat_interleave(2, 0)).unflatten(2, (11, 4)).amax(3)
    assert bool((seen[0] >= exact - 1e-6).all())
