"""The native codecs against the torch reference, for every instruction set of this machine: decoding gives its numbers, encoding its codes
up to one step; nothing outside the targets is written.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtier.layout import PageLayout
from tests.formats.rig import (
    CODECS,
    DTYPES,
    EXACT,
    GUARD,
    INSTRUCTION_SETS,
    codes_of,
    decode,
    encode,
    needs_native,
    plan_of,
    reference_pages,
    reference_payloads,
    usual_pages,
)

pytestmark = pytest.mark.timeout(120)


def special_pages(layout: PageLayout) -> torch.Tensor:
    """Not a number, infinities, the largest and the smallest numbers, zeros, beside usual ones."""
    pages = usual_pages(layout).float()
    first, second, third = pages
    first[0, 0, 0, 0, 3], first[0, 0, 1, 0, 3], first[0, -1, 1, -1, 5] = float("nan"), float("inf"), float("-inf")
    first[-1, -1, 2], second[-1, -1] = 0, second[-1, -1] * 1e-41
    second[0, :, 3] *= 1e37
    third[0, 0, 0, 0, 7] = float("nan")  # with no infinity near
    third[0, 0, 4], third[-1, -1], third[0, -1, 1] = 1e-6, 0, 60000 * third[0, -1, 1].sign()
    return pages.to(layout.torch_dtype)


def check_codes(name, given, expected, layout, begins, share):
    assert np.mean(np.concatenate(given) == np.concatenate(expected)) >= (1 if name in EXACT else share)
    if name in EXACT:
        return
    for mine, reference in zip(given, expected, strict=True):
        difference = codes_of(name, mine, layout, begins) - codes_of(name, reference, layout, begins)
        assert difference.abs().max() <= 1


LAYOUTS = [
    PageLayout(2, planes, tokens, heads, head_dim, "bf16")
    for planes, tokens, heads, head_dim in (
        (2, 16, 3, 64),
        (2, 16, 1, 80),
        (1, 5, 2, 96),
        (2, 21, 5, 128),
        (2, 70, 1, 256),
        (2, 9, 2, 192),
        (2, 9, 1, 384),
        (2, 6, 17, 16),
        (1, 9, 1, 1008),
    )
]


CASES = [
    pytest.param(name, layout, id=f"{name}-{layout.planes}x{layout.page_tokens}x{layout.kv_heads}x{layout.head_dim}")
    for name in CODECS
    for layout in LAYOUTS
    if not (name.endswith("_0") and layout.head_dim % 32)
]


@needs_native
@pytest.mark.parametrize(("name", "layout"), CASES)
class TestAgainstTheReference:
    # What the reference says is computed once for all instruction sets: it takes far longer than they do.

    @pytest.mark.parametrize("begins", [False, True])
    def test_decoding_gives_the_bits_of_the_reference(self, codecs, name, layout, begins):
        for dtype in DTYPES:
            typed = replace(layout, dtype=dtype)
            for pages in (usual_pages(typed), special_pages(typed)):
                payloads = reference_payloads(name, pages, typed, begins)
                expected = reference_pages(name, payloads, typed)
                for features in INSTRUCTION_SETS:
                    codecs.use(features)
                    given = decode(codecs, name, payloads, typed)
                    assert torch.equal(given.view(torch.uint8), expected.view(torch.uint8)), (features, dtype)
                    assert name == "raw" or given.isfinite().all(), (features, dtype)

    @pytest.mark.parametrize("begins", [False, True])
    def test_codes_are_those_of_the_reference_up_to_one_step(self, codecs, name, layout, begins):
        for dtype in DTYPES:
            typed = replace(layout, dtype=dtype)
            for pages, share in ((usual_pages(typed), 0.999), (special_pages(typed), 0.9)):
                expected = reference_payloads(name, pages, typed, begins)
                for features in INSTRUCTION_SETS:
                    codecs.use(features)
                    given = encode(codecs, name, pages, typed, begins)
                    check_codes(name, given, expected, typed, begins, share)
                    if name != "raw":
                        assert decode(codecs, name, given, typed).isfinite().all(), (features, dtype)

    @pytest.mark.parametrize("features", INSTRUCTION_SETS)
    def test_layers_decode_alone_as_they_do_together(self, codecs, features, name, layout):
        codecs.use(features)
        payloads = encode(codecs, name, usual_pages(layout), layout)
        whole = decode(codecs, name, payloads, layout)
        layer = torch.zeros((3, 1, *layout.shape[1:]), dtype=layout.torch_dtype)
        codecs.decode(plan_of(name, layout)[0], payloads, layer.data_ptr(), [2, 0, 1], 1, 2, layout.page_bytes // 2)
        assert torch.equal(layer[[2, 0, 1]], whole[:, 1:2])

    @pytest.mark.parametrize("features", INSTRUCTION_SETS)
    def test_nothing_outside_the_targets_is_written(self, codecs, features, name, layout):
        codecs.use(features)
        pages = usual_pages(layout)
        plan, size = plan_of(name, layout)
        room = np.full((3, size + 128), GUARD, np.uint8)
        codecs.encode(plan, pages.data_ptr(), [2, 0, 1], [row[61 : 61 + size] for row in room], b"\0\1\0", 0)
        assert (room[:, :61] == GUARD).all()
        assert (room[:, 61 + size :] == GUARD).all()
        payloads = [row[61 : 61 + size] for row in room]
        pool = np.full(5 * layout.page_bytes + 128, GUARD, np.uint8)
        codecs.decode(plan, payloads, pool.ctypes.data + 64, [3, 0, 1], 0, layout.layers, layout.page_bytes)
        places = pool[64:-64].reshape(5, -1)
        assert all((part == GUARD).all() for part in (pool[:64], pool[-64:], places[2], places[4]))
        assert np.array_equal(places[[3, 0, 1]], decode(codecs, name, payloads, layout).view(torch.uint8).view(3, -1).numpy())


@needs_native
@pytest.mark.parametrize("name", ["q4", "q3"])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("features", INSTRUCTION_SETS)
def test_blocks_of_too_many_vectors_to_keep_their_scales_are_those_of_the_reference(codecs, features, name, begins):
    codecs.use(features)
    layout = PageLayout(1, 2, 600, 7, 16, "bf16")
    pages = usual_pages(layout, 1)
    given, expected = encode(codecs, name, pages, layout, begins)[0], reference_payloads(name, pages, layout, begins)[0]
    assert np.mean(given == expected) >= 0.999
    difference = codes_of(name, given, layout, begins) - codes_of(name, expected, layout, begins)
    assert difference.abs().max() <= 1
