"""Our ggml blocks are those of ggml: the independent `gguf` package reads the numbers we read and writes the bytes we write."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.testing.strategies import make_pages

TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_k": gguf.GGMLQuantizationType.Q4_K}
LAYOUTS = [
    PageLayout(2, planes, 16, 2, head_dim, dtype) for planes in (1, 2) for head_dim in (64, 96) for dtype in ("fp32", "bf16", "fp16")
]


def page_of(kind: str, layout: PageLayout) -> torch.Tensor:
    return make_pages(layout, kind, 1, seed=5)


def in_page_dtype(numbers: NDArray[np.float32], layout: PageLayout) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(numbers)).view(1, *layout.shape)
    return tensor.clamp(-65504, 65504).half() if layout.dtype == "fp16" else tensor.to(layout.torch_dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "outlier channels", "special"])
@pytest.mark.parametrize("name", TYPES)
def test_gguf_reads_exactly_our_numbers(name: str, kind: str, layout: PageLayout) -> None:
    payload = get_format(name).encode(page_of(kind, layout), layout)[0]
    theirs = dequantize(payload.reshape(1, -1), TYPES[name])
    assert torch.equal(get_format(name).decode([payload], layout), in_page_dtype(theirs, layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "outlier channels"])
@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_gguf_writes_exactly_our_bytes(name: str, kind: str, layout: PageLayout) -> None:
    page = page_of(kind, layout)
    theirs = quantize(page.float().numpy().reshape(1, -1), TYPES[name])
    assert np.array_equal(get_format(name).encode(page, layout)[0], theirs.reshape(-1))


def test_halves_round_away_from_zero_in_q8_0_and_up_in_q4_0() -> None:
    layout = PageLayout(1, 1, 1, 1, 32, "fp32")
    numbers = torch.tensor([127.0, 0.5, -0.5, 1.5, -1.5, 2.5, *range(26)])
    codes = get_format("q8_0").encode(numbers.view(1, *layout.shape), layout)[0][2:].view(np.int8)
    assert codes[:6].tolist() == [127, 1, -1, 2, -2, 3]
    numbers = torch.tensor([-8.0, 0.5, -0.5, 1.5, -1.5, 7.5, 8.0, *[0.0] * 25])
    packed = get_format("q4_0").encode(numbers.view(1, *layout.shape), layout)[0][2:]
    assert (packed[:7] & 15).tolist() == [0, 9, 8, 10, 7, 15, 15]


@pytest.mark.parametrize("kind", ["gaussian", "outlier channels", "special"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_q8_k_is_the_struct_of_ggml(layout: PageLayout, kind: str) -> None:
    """`gguf` does not know block_q8_K: float d; int8_t qs[256]; int16_t bsums[16]."""
    payload = get_format("q8_k").encode(page_of(kind, layout), layout)[0]
    numbers = []
    for d, codes, sums in struct.iter_unpack("<f256s32s", payload.tobytes()):
        whole = np.frombuffer(codes, np.int8)
        assert np.array_equal(whole.reshape(16, 16).sum(-1), np.frombuffer(sums, "<i2"))
        numbers.append(np.float32(d) * whole.astype(np.float32))
    assert torch.equal(get_format("q8_k").decode([payload], layout), in_page_dtype(np.concatenate(numbers), layout))


def test_q8_k_maps_the_largest_magnitude_to_minus_127_whatever_its_sign() -> None:
    layout = PageLayout(1, 1, 4, 1, 64, "fp32")
    for largest in (-3.0, 3.0):
        page = torch.linspace(-1, 1, 256).view(1, *layout.shape).clone()
        page[0, 0, 0, 2, 0, 5] = largest
        payload = get_format("q8_k").encode(page, layout)[0]
        assert payload[4:260].view(np.int8)[2 * 64 + 5] == -127
        assert get_format("q8_k").decode([payload], layout)[0, 0, 0, 2, 0, 5] == pytest.approx(largest, rel=1e-6)


def test_q4_k_searches_better_scales_than_the_extremes_give() -> None:
    """The least squared error of our candidates is well below that of min and max (0.079 on Gaussian numbers)."""
    layout = PageLayout(4, 1, 16, 4, 64, "fp32")
    page = page_of("gaussian", layout)
    decoded = get_format("q4_k").decode(get_format("q4_k").encode(page, layout), layout)
    assert (decoded - page).norm() < 0.0735 * page.norm()


@pytest.mark.parametrize("name", ["q8_k", "q4_k"])
def test_blocks_of_256_run_across_tokens_and_heads(name: str) -> None:
    layout = PageLayout(2, 2, 16, 1, 80, "bf16")
    page = page_of("gaussian", layout)
    payload = get_format(name).encode(page, layout)
    assert len(payload[0]) == layout.values // 256 * {"q8_k": 292, "q4_k": 144}[name]
    assert (get_format(name).decode(payload, layout).float() - page.float()).norm() < 0.1 * page.float().norm()


@pytest.mark.parametrize("name", ["q8_k", "q4_k"])
def test_blocks_of_256_that_do_not_fill_a_plane_are_refused(name: str) -> None:
    layout = PageLayout(1, 2, 3, 1, 64)
    with pytest.raises(LayoutError, match="256 numbers at a time, and 3 tokens \\* 1 heads \\* head_dim 64 is no multiple"):
        get_format(name).payload_bytes(layout)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q8_k", "q4_k"])
@pytest.mark.parametrize("constant", [0.0, 2.5, -2.5])
def test_constant_blocks_come_back(name: str, constant: float) -> None:
    layout = PageLayout(1, 2, 16, 1, 64, "fp32")
    page = torch.full((1, *layout.shape), constant)
    decoded = get_format(name).decode(get_format(name).encode(page, layout), layout)
    torch.testing.assert_close(decoded, page, rtol=1e-3, atol=0)
