"""Laws checked: parts of an attention merge to the whole within 1e-5, however the keys are cut, also where a part sees nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.attention.partial import attend, merge, nothing
from kvtier.errors import LayoutError


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full(queries, keys, values, scaling=None):
    group = queries.shape[1] // keys.shape[1]
    k, v = (each.double().repeat_interleave(group, 1).transpose(0, 1)[None] for each in (keys, values))
    q = queries.double().transpose(0, 1)[None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)[0].transpose(0, 1)


@given(
    st.integers(0, 99), st.integers(1, 3), st.sampled_from([(2, 2), (6, 2), (4, 1)]), st.lists(st.integers(0, 30), min_size=1, max_size=5)
)
def test_parts_merge_to_the_whole(seed, tokens, heads, lengths):
    queries, count = numbers(seed, tokens, heads[0], 16) * 4, sum(lengths)
    keys, values = numbers(seed + 1, count, heads[1], 16), numbers(seed + 2, count, heads[1], 16)
    merged = merge([attend(queries, k, v) for k, v in zip(keys.split(lengths), values.split(lengths), strict=True)])
    if not count:
        assert torch.equal(merged.out, torch.zeros_like(queries))
        assert bool((merged.lse == -torch.inf).all())
        return
    torch.testing.assert_close(merged.out.double(), full(queries, keys, values), atol=1e-5, rtol=1e-5)
    again = merge([merged, nothing(queries)])
    torch.testing.assert_close(again.out, merged.out)
    torch.testing.assert_close(again.lse, merged.lse)


def test_the_scaling_counts_and_large_logits_do_not_overflow():
    queries, keys, values = numbers(0, 1, 2, 8) * 300, numbers(1, 40, 2, 8) * 300, numbers(2, 40, 2, 8)
    part = merge([attend(queries, keys[:7], values[:7], 1.0), attend(queries, keys[7:], values[7:], 1.0)])
    assert bool(part.out.isfinite().all())
    torch.testing.assert_close(part.out.double(), full(queries, keys, values, 1.0), atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="do not fit"):
        attend(numbers(0, 1, 2, 8), numbers(0, 3, 2, 4), numbers(0, 3, 2, 4))
    with pytest.raises(LayoutError, match="3 heads for 2 KV heads"):
        attend(numbers(0, 1, 3, 8), numbers(0, 3, 2, 8), numbers(0, 3, 2, 8))
    with pytest.raises(LayoutError, match="no parts"):
        merge([])
