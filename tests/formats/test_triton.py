"""Laws checked: the Triton kernels give the torch reference's bytes and numbers, bit by bit, from and into every engine layout; nothing
else is written; what is compiled for GPUs fuses and approximates nothing.

On a GPU where there is one, else in Triton's interpreter, which takes a tenth of a second for each head of each block: pages are tiny.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.formats import get_format, on_device
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.on_device import decode_pages, encode_pages
from kvtier.formats.paged import PagedKV
from kvtier.layout import PageLayout
from tests.compiled import DEVICE, ON_GPU, found_by, needs_triton

pytestmark = [pytest.mark.timeout(300), needs_triton]
FORMATS = ["raw", "fp8", "q8", "q4", "sparse24!"]
HARD = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-30, -65504.0, 3e-5]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(on_device, "why_missing", lambda device: "")


def block_format(name: str) -> BlockFormat:
    found = get_format(name)
    assert isinstance(found, BlockFormat)
    return found


def hard_pages(layout: PageLayout, count: int, seed: int = 0) -> torch.Tensor:
    """Pages with vectors of all sizes, a common mean in the keys of page 0, a silent head, and some numbers that are none."""
    random = torch.Generator().manual_seed(seed)
    pages = torch.randn((count, *layout.shape), generator=random)
    pages *= torch.exp2(torch.randint(-9, 3, (count, *layout.shape[:4], 1), generator=random).float())
    pages[0, :, 0] += 2 * torch.randn(layout.head_dim, generator=random)
    pages[-1, 0, -1, :, 0] = 0
    flat = pages.view(-1)
    places = torch.randint(flat.numel(), (len(HARD),), generator=random)
    flat[places] = torch.tensor(HARD)
    return pages.to(layout.torch_dtype)


def reference(name: str, pages: torch.Tensor, layout: PageLayout, first: list[int]) -> torch.Tensor:
    """Payloads of the codecs as they stand, on a CPU."""
    rows = []
    for index, page in enumerate(pages.cpu()):
        blocks = []
        for layer, row in enumerate(block_format(name).places(layout)):
            for plane, place in enumerate(row):
                encode = place.codec.encode_first if index in first else place.codec.encode
                blocks.append(encode(page[None, layer, plane], place.shape)[0])
        rows.append(torch.cat(blocks))
    return torch.stack(rows)


def reference_numbers(name: str, payloads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    pages = torch.empty((len(payloads), *layout.shape), dtype=layout.torch_dtype)
    for layer, row in enumerate(block_format(name).places(layout)):
        for plane, place in enumerate(row):
            pages[:, layer, plane] = place.codec.decode(payloads[:, place.offset : place.offset + place.size], place.shape)
    return pages


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.cpu().contiguous().view(torch.uint8), right.cpu().contiguous().view(torch.uint8))


def check_both_ways(name: str, layout: PageLayout, seed: int, first: list[int], spare: int = 3) -> None:
    pages = hard_pages(layout, 2, seed)
    page_format = block_format(name)
    size = page_format.payload_bytes(layout)
    out = torch.full((3, size + spare), 0xA5, dtype=torch.uint8, device=DEVICE)
    encode_pages(page_format, PagedKV.of_pool(pages.to(DEVICE), layout), [0, 1], out, rows=[2, 0], first=first)
    expected = reference(name, pages, layout, first)
    assert torch.equal(out[[2, 0], :size].cpu(), expected)
    assert bool((out[:, size:] == 0xA5).all())
    assert bool((out[1] == 0xA5).all())
    pool = torch.zeros((3, *layout.shape), dtype=layout.torch_dtype, device=DEVICE)
    decode_pages(page_format, out, PagedKV.of_pool(pool, layout), [1, 2], rows=[2, 0])
    assert same_bits(pool[1:], reference_numbers(name, expected, layout))
    assert not pool[0].any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_and_numbers_are_those_of_the_reference(name, dtype):
    check_both_ways(name, PageLayout(1, 2, 16, 1, 128 if dtype == "bf16" else 64, dtype), 1, [1])


@settings(max_examples=12, derandomize=True)
@given(
    name=st.sampled_from([*FORMATS, "q8/q4"]),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 40, 96]),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    planes=st.sampled_from([1, 2]),
    first=st.sampled_from([[], [0], [0, 1]]),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_references_bytes(name, tokens, heads, head_dim, dtype, planes, first, seed):
    check_both_ways(name, PageLayout(1, planes, tokens, heads, head_dim, dtype), seed, first)


@pytest.mark.parametrize("name", ["q8", "fp8"])
def test_an_odd_head_dim_puts_scales_at_odd_places(name):
    check_both_ways(name, PageLayout(1, 1, 3, 1, 5, "fp16"), 3, [])


def engine_tensors(kind: str, layout: PageLayout, blocks: int, block_tokens: int) -> tuple[list[torch.Tensor], PagedKV]:
    heads, dim = layout.kv_heads, layout.head_dim
    shapes = {
        "pbthd": (2, blocks, block_tokens, heads, dim),
        "bpthd": (blocks, 2, block_tokens, heads, dim),
        "bphtd": (blocks, 2, heads, block_tokens, dim),
        "side by side": (blocks, heads, block_tokens, 2 * dim),
        "token pools": (2, blocks * block_tokens + 1, heads, dim),
    }
    caches = [torch.zeros(shapes[kind], dtype=layout.torch_dtype, device=DEVICE) for _ in range(layout.layers)]
    if kind == "token pools":
        return caches, PagedKV.of_token_pools([c[0] for c in caches], [c[1] for c in caches], layout, block_tokens)
    if kind == "side by side":
        views = tuple((c[..., :dim].transpose(1, 2), c[..., dim:].transpose(1, 2)) for c in caches)
        return caches, PagedKV(layout, views)
    return caches, PagedKV.of_axes(caches, layout, kind)


@pytest.mark.parametrize("block_tokens", [8, 4, 1])
@pytest.mark.parametrize("kind", ["pbthd", "bpthd", "bphtd", "side by side", "token pools"])
def test_every_engine_layout_gives_the_same_bytes_and_gets_only_its_own_pages(kind, block_tokens):
    layout = PageLayout(2, 2, 8, 2, 16, "bf16")
    pages = hard_pages(layout, 2, 5)
    per_page = 8 // block_tokens
    order = torch.randperm(3 * per_page, generator=torch.Generator().manual_seed(2))[: 2 * per_page].view(2, per_page)
    caches, paged = engine_tensors(kind, layout, 3 * per_page, block_tokens)
    raw, q8 = block_format("raw"), block_format("q8")
    payloads = reference("raw", pages, layout, []).to(DEVICE)
    table = order[:, 0].tolist() if per_page == 1 else order.tolist()
    decode_pages(raw, payloads, paged, table)
    assert same_bits(paged.gather(order.to(DEVICE), 0, 2), pages)
    paged.scatter(order.to(DEVICE), 0, torch.zeros_like(pages, device=DEVICE))
    assert not any(cache.any() for cache in caches)
    paged.scatter(order.to(DEVICE), 0, pages.to(DEVICE))
    out = torch.empty((2, q8.payload_bytes(layout)), dtype=torch.uint8, device=DEVICE)
    encode_pages(q8, paged, order, out)
    assert torch.equal(out.cpu(), reference("q8", pages, layout, []))


def test_layer_by_layer_writes_what_all_at_once_does_and_mixed_codecs_go_together():
    layout = PageLayout(3, 2, 6, 1, 16, "fp16")
    page_format, pages = block_format("q8/q4;1:raw"), hard_pages(layout, 2, 7)
    payloads = torch.empty((2, page_format.payload_bytes(layout)), dtype=torch.uint8, device=DEVICE)
    encode_pages(page_format, PagedKV.of_pool(pages.to(DEVICE), layout), [0, 1], payloads, first=[0])
    assert torch.equal(payloads.cpu(), reference("q8/q4;1:raw", pages, layout, [0]))
    pool = torch.zeros((2, *layout.shape), dtype=layout.torch_dtype, device=DEVICE)
    target = PagedKV.of_pool(pool, layout)
    expected = reference_numbers("q8/q4;1:raw", payloads.cpu(), layout)
    for layer in range(3):
        decode_pages(page_format, payloads, target, [0, 1], layers=slice(layer, layer + 1))
        assert same_bits(pool[:, : layer + 1], expected[:, : layer + 1])
        assert not pool[:, layer + 1 :].any()


@pytest.mark.parametrize("name", ["q4", "q6", "q4_0"])
def test_without_kernels_torch_gives_the_same_bytes(name, monkeypatch):
    monkeypatch.setattr(on_device, "why_missing", lambda device: "not here")
    check_both_ways(name, PageLayout(2, 2, 16, 2, 32, "bf16"), 4, [1])


def test_what_does_not_fit_is_refused_before_anything_is_written():
    layout = PageLayout(1, 2, 4, 1, 8, "bf16")
    q8, pool = block_format("q8"), torch.zeros((2, *layout.shape), dtype=torch.bfloat16, device=DEVICE)
    paged = PagedKV.of_pool(pool, layout)
    size = q8.payload_bytes(layout)
    out = torch.zeros((2, size), dtype=torch.uint8, device=DEVICE)
    with pytest.raises(LayoutError, match="blocks from 0 to 2; there are 2"):
        encode_pages(q8, paged, [0, 2], out)
    with pytest.raises(LayoutError, match=f"needs uint8 \\[pages, at least {size}\\]"):
        encode_pages(q8, paged, [0, 1], out[:, 1:])
    with pytest.raises(LayoutError, match="rows from 0 to 2; out has 2"):
        encode_pages(q8, paged, [0, 1], out, rows=[0, 2])
    with pytest.raises(LayoutError, match="first names page 2 of 2"):
        encode_pages(q8, paged, [0, 1], out, first=[2])
    with pytest.raises(LayoutError, match=r"meta.*; expected"):
        decode_pages(q8, out.to("meta"), paged, [0, 1])
    with pytest.raises(LayoutError, match="each letter of 'pbthd' once"):
        PagedKV.of_axes([pool[:, 0]], layout, "bpth")
    with pytest.raises(LayoutError, match="no whole number"):
        PagedKV.of_axes([torch.zeros((2, 5, 3, 1, 8), dtype=torch.bfloat16)], layout, "pbthd")
    with pytest.raises(LayoutError, match="layer 0, plane 0 is torch.float32"):
        PagedKV.of_axes([torch.zeros((2, 5, 4, 1, 8))], layout, "pbthd")
    assert not out.any()


@pytest.mark.slow
def test_compiled_for_gpus_nothing_is_fused_flushed_or_approximated(tmp_path):
    """Needs no GPU: Triton compiles for one all the same."""
    found = found_by(Path(__file__).with_name("compile_kernels.py"), tmp_path)
    assert len(found) == 2 * 6, "a kernel each way for raw, fp8, q8, sparse24, and q4 with and without a mean"
    for what, instructions in found.items():
        wide = "st.global.v4" if what.startswith("decode") else "ld.global.v4"
        assert any(name.startswith(wide) for name in instructions), f"{what} moves the engine's numbers one by one"
        for name in instructions:
            assert not name.startswith(("fma.", "mad.f", "mad.rn.f")), f"{what}: {name}"
            assert "ftz" not in name, f"{what}: {name}"
            assert "approx" not in name, f"{what}: {name}"
            assert "full" not in name.split("."), f"{what}: {name}"
