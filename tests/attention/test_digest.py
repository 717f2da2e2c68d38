"""Laws checked: digests fit their bounds, estimate what they stand for, rank pages better than bounds do, and are the same everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.attention.digest import DigestLayout, digest_page_bytes, encode, key_logits, page_logits
from kvtier.errors import LayoutError
from kvtier.layout import PageLayout


def make_keys(pages=5, layers=2, tokens=16, heads=3, width=64, seed=0):
    """Keys with the habits of real ones: a constant mean in few channels, neighbours alike, single tokens that stand out."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(pages, layers, tokens, heads, width, generator=generator)
    keys += 8 * torch.nn.functional.one_hot(torch.tensor(width // 3), width) + torch.randn(
        pages, layers, 1, heads, width, generator=generator
    )
    for page in range(pages):
        keys[page, :, page * 7 % tokens] += 4 * torch.randn(layers, heads, width, generator=generator)
    return keys


def exact_logits(keys, queries):
    """`[tokens, heads, pages]` from one layer's keys `[pages, page_tokens, kv_heads, head_dim]`."""
    return torch.cat([key_logits(page, queries) for page in keys], 2)


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("page_tokens", "share"), [(16, 0.032), (64, 0.016)])
def test_digests_are_small(page_tokens, share, head_dim, heads):
    layout = PageLayout(2, 2, page_tokens, heads, head_dim, "bf16")
    assert digest_page_bytes(layout) <= share * layout.page_bytes
    digests = encode(make_keys(1, 2, page_tokens, heads, head_dim).bfloat16())
    assert digests.dtype == torch.uint8
    assert digests.numel() == digest_page_bytes(layout)


@pytest.mark.parametrize(("tokens", "pieces"), [(1, 1), (4, 1), (16, 1), (32, 1), (37, 1), (48, 2), (64, 2), (128, 4), (1024, 32)])
def test_pieces_are_equal_and_of_at_most_32_tokens_where_they_can_be(tokens, pieces):
    shape = DigestLayout(tokens, 64)
    assert shape.pieces == pieces
    assert shape.pieces * shape.piece_tokens == tokens


@pytest.mark.parametrize("tokens", [16, 64])
def test_pages_are_ranked_better_than_by_channel_bounds(tokens):
    """Quest's exact bounds take at least as many bytes in 8 bits."""
    keys = make_keys(40, 1, tokens, 2, seed=1)
    queries = torch.randn(64, 6, 64, generator=torch.Generator().manual_seed(2)) * 2
    truth = exact_logits(keys[:, 0], queries)
    low, high = keys[:, 0].amin(1).repeat_interleave(3, 1), keys[:, 0].amax(1).repeat_interleave(3, 1)
    bounds = torch.einsum("qhd,phd->qhp", queries.clamp_min(0), high) + torch.einsum("qhd,phd->qhp", queries.clamp_max(0), low)
    mass = truth.softmax(2)

    def kept(scores):
        return float(mass.gather(2, scores.topk(8, 2).indices).sum(2).mean())

    estimate = page_logits(encode(keys)[:, 0], queries, DigestLayout(tokens, 64))
    assert kept(bounds) < kept(estimate) <= kept(truth)
    assert kept(estimate) > 0.9 * kept(truth)


def test_pages_of_two_directions_are_estimated_almost_exactly():
    """What the digest leaves out is nothing here, so that only 4-bit rounding is left."""
    generator = torch.Generator().manual_seed(3)
    plane = torch.randn(4, 1, 1, 2, 2, 64, generator=generator)
    keys = torch.einsum("pltr,plxhrd->plthd", torch.randn(4, 1, 16, 2, generator=generator), plane)
    queries = torch.randn(9, 4, 64, generator=generator)
    estimate = page_logits(encode(keys)[:, 0], queries, DigestLayout(16, 64))
    error = (estimate - exact_logits(keys[:, 0], queries)).abs()
    assert float(error.mean()) < 0.25


def test_the_means_rounding_is_made_good_by_the_second_direction():
    """Keys of a large mean and one direction: what 4 bits leave of the mean is the same for all tokens, a direction like any other."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(8, 1, 16, 2, 1, generator=generator) * torch.randn(8, 1, 1, 2, 64, generator=generator) * 0.3
    keys = torch.randn(8, 1, 1, 2, 64, generator=generator) * 2 + spread
    queries = torch.randn(9, 4, 64, generator=generator)
    error = (page_logits(encode(keys)[:, 0], queries, DigestLayout(16, 64)) - exact_logits(keys[:, 0], queries)).abs()
    assert float(error.mean()) < 0.06


@settings(max_examples=40)
@given(
    tokens=st.sampled_from([1, 2, 3, 16, 37, 64]),
    width=st.sampled_from([1, 7, 16, 80]),
    size=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 300.0, 1e30]),
    seed=st.integers(0, 9),
)
def test_any_finite_keys_give_finite_estimates(tokens, width, size, seed):
    keys = make_keys(2, 1, tokens, 1, width, seed) * size
    shape = DigestLayout(tokens, width)
    digests = encode(keys)
    assert digests.shape == (2, 1, 1, shape.digest_bytes)
    assert bool(page_logits(digests[:, 0], torch.ones(1, 2, width), shape).isfinite().all())


def test_all_tokens_count():
    """A page of equal keys: the log of how many there are stands above the logit of one."""
    keys = torch.ones(1, 1, 16, 1, 64)
    logits = page_logits(encode(keys)[:, 0], torch.zeros(1, 1, 64), DigestLayout(16, 64))
    torch.testing.assert_close(logits, torch.full((1, 1, 1), 16.0).log())


def test_keys_that_are_not_finite_count_as_zeros():
    keys = make_keys()
    broken, zeroed = keys.clone(), keys.clone()
    broken[1, 0, 3, 0, 5], zeroed[1, 0, 3, 0, 5] = float("nan"), 0.0
    broken[1, 0, 4, 0, 5], zeroed[1, 0, 4, 0, 5] = float("inf"), 0.0
    assert torch.equal(encode(broken), encode(zeroed))


def test_batches_do_not_change_digests():
    keys = make_keys(6)
    alone = torch.cat([encode(keys[page : page + 1]) for page in range(6)])
    differing = (alone != encode(keys)).float().mean()
    assert float(differing) < 0.01  # sums in another order may round a code to its neighbour
    queries = torch.randn(4, 6, 64)
    shape = DigestLayout(16, 64)
    torch.testing.assert_close(page_logits(alone[:, 1], queries, shape), page_logits(encode(keys)[:, 1], queries, shape), atol=0.1, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_and_device_agree():
    keys, queries, shape = make_keys(30), torch.randn(8, 6, 64), DigestLayout(16, 64)
    host, device = encode(keys), encode(keys.cuda())
    assert float((host != device.cpu()).float().mean()) < 0.01
    torch.testing.assert_close(page_logits(host[:, 0].cuda(), queries.cuda(), shape).cpu(), page_logits(host[:, 0], queries, shape))
    torch.testing.assert_close(
        page_logits(device[:, 0], queries.cuda(), shape).cpu(), page_logits(host[:, 0], queries, shape), atol=0.1, rtol=0
    )


def test_wrong_shapes_are_refused():
    shape = DigestLayout(16, 64)
    digests = encode(make_keys())[:, 0]
    with pytest.raises(LayoutError, match=r"expected \[pages, layers, page_tokens, kv_heads, head_dim\]"):
        encode(torch.zeros(16, 3, 64))
    with pytest.raises(LayoutError, match=r"digests have shape"):
        page_logits(digests[..., 1:], torch.zeros(1, 3, 64), shape)
    for queries in (torch.zeros(3, 64), torch.zeros(1, 4, 64), torch.zeros(1, 3, 63)):
        with pytest.raises(LayoutError, match=r"expected \[tokens, a multiple of 3 heads, 64\]"):
            page_logits(digests, queries, shape)
