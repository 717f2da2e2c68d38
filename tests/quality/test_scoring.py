"""Laws checked: KL is the KL of the textbook, and sums over texts are means over their tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvtier.quality.scoring import Quality, compare

TEXT = [3, 1, 4, 1, 5, 9]


def logits(seed):
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_the_textbook():
    reference, changed = logits(0), logits(1)
    scores = compare(reference, changed, TEXT)
    expected = functional.kl_div(changed.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(scores.kl, expected)
    targets = torch.tensor(TEXT[1:])
    torch.testing.assert_close(scores.nll, functional.cross_entropy(changed, targets, reduction="none"))
    torch.testing.assert_close(scores.nll_reference, functional.cross_entropy(reference, targets, reduction="none"))
    assert torch.equal(scores.top1, reference.argmax(-1) == changed.argmax(-1))


def test_equal_predictions_do_not_differ_at_all():
    scores = compare(logits(0), logits(0), TEXT)
    assert not scores.kl.any()
    assert scores.top1.all()


def test_sums_over_texts_are_means_over_tokens():
    runs = [(logits(0), logits(1)), (logits(2), logits(3))]
    quality = Quality()
    for reference, changed in runs:
        quality.add(reference, changed, TEXT)
    both = [compare(reference, changed, TEXT) for reference, changed in runs]
    result = quality.result()
    assert result["scored_tokens"] == 10
    assert result["kl"] == pytest.approx(float(torch.cat([scores.kl for scores in both]).mean()))
    assert result["delta_nll"] == pytest.approx(float(torch.cat([scores.nll - scores.nll_reference for scores in both]).mean()), abs=1e-5)
    assert result["top1_agreement"] == pytest.approx(float(torch.cat([scores.top1 for scores in both]).float().mean()))
