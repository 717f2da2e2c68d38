"""What formats made of blocks share: order of blocks, keys and values, layers that differ, batches. Laws of out and rows: the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.errors import LayoutError
from kvtier.format_spec import parse_format
from kvtier.formats import BLOCK_CODECS, FORMAT_NAMES, BlockFormat, get_format
from kvtier.formats import blocks as blocks_module
from kvtier.formats import places as places_module
from kvtier.layout import PageLayout
from kvtier.testing.strategies import make_pages

LAYOUT = PageLayout(5, 2, 16, 2, 64, "fp32")
LOSSY = [name for name in FORMAT_NAMES if name != "raw"]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats made by the test itself compute with torch, whatever kernels there are."""
    monkeypatch.setattr(places_module, "native_codecs", lambda: None)


def block_format(name: str) -> BlockFormat:
    """A new format, without plans made under other circumstances."""
    return BlockFormat(parse_format(name), BLOCK_CODECS)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", [*FORMAT_NAMES, "q8/q4;1-2:q4/raw;4:q8_0"])
@pytest.mark.parametrize("chunk_values", [1, 2 * LAYOUT.values // 5, LAYOUT.values, 3 * LAYOUT.values])
def test_how_pages_are_cut_into_batches_does_not_show(name: str, chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    format, pages = block_format(name), make_pages(LAYOUT, "outlier channels", 4, seed=0)
    payloads = format.encode(pages, LAYOUT)
    at_once = format.decode(payloads, LAYOUT)
    monkeypatch.setattr(blocks_module, "CHUNK_VALUES", chunk_values)
    assert torch.equal(format.decode(payloads, LAYOUT), at_once)
    assert torch.equal(format.decode(payloads, LAYOUT, slice(1, 4)), at_once[:, 1:4])
    # The rotation before encoding may round differently in another batch, so a code may differ, but hardly any.
    differing = (format.decode(format.encode(pages, LAYOUT), LAYOUT) != at_once).float().mean()
    assert differing <= (0.05 if name.startswith(("q8", "q6", "q4", "q3")) and "_" not in name[:4] else 0.0)


@pytest.mark.parametrize("name", LOSSY)
def test_payloads_do_not_hold_on_to_their_batch(name: str) -> None:
    """A tier that keeps one page of a batch must not keep the memory of all."""
    for payload in get_format(name).encode(make_pages(LAYOUT, "gaussian", 3, seed=0), LAYOUT):
        owner = payload if payload.base is None else payload.base
        assert owner.nbytes == len(payload)


def test_a_payload_is_layers_one_after_the_other_keys_before_values() -> None:
    page = make_pages(LAYOUT, "gaussian", 1, seed=0)
    alone = PageLayout(1, *LAYOUT.shape[1:], LAYOUT.dtype)
    values = PageLayout(1, 1, *LAYOUT.shape[2:], LAYOUT.dtype)
    whole = get_format("q8_0/q4_k").encode(page, LAYOUT)[0]
    layers = [get_format("q8_0/q4_k").encode(page[:, i : i + 1], alone)[0] for i in range(5)]
    assert np.array_equal(np.concatenate(layers), whole)
    keys = get_format("q8_0").encode(page[:, :1, :1], values)[0]
    assert np.array_equal(layers[0], np.concatenate([keys, get_format("q4_k").encode(page[:, :1, 1:], values)[0]]))


@pytest.mark.parametrize(("keys", "values"), [("q8", "q4"), ("raw", "q3"), ("q6", "sparse24"), ("q4_k", "fp8")])
def test_keys_and_values_are_coded_by_their_own_codec(keys: str, values: str) -> None:
    pages = make_pages(LAYOUT, "outlier channels", 2, seed=1)
    both = get_format(f"{keys}/{values}")
    alone = (get_format(keys), get_format("sparse24!" if values == "sparse24" else values))
    mixed, by_keys, by_values = (each.decode(each.encode(pages, LAYOUT), LAYOUT) for each in (both, alone[0], alone[1]))
    assert torch.equal(mixed[:, :, 0], by_keys[:, :, 0])
    assert torch.equal(mixed[:, :, 1], by_values[:, :, 1])


def test_a_single_latent_plane_is_coded_like_values() -> None:
    layout = PageLayout(2, 1, 16, 2, 64, "bf16")
    page = make_pages(layout, "gaussian", 1, seed=0)
    assert np.array_equal(get_format("q8/q4").encode(page, layout)[0], get_format("q4").encode(page, layout)[0])


def test_layers_that_differ_are_coded_by_their_own_codecs() -> None:
    pages = make_pages(LAYOUT, "outlier channels", 2, seed=1)
    format = get_format("q4;0:raw;2-3:q8/q3")
    payloads = format.encode(pages, LAYOUT)
    decoded = format.decode(payloads, LAYOUT)
    for layers, name in ((slice(0, 1), "raw"), (slice(1, 2), "q4"), (slice(2, 4), "q8/q3"), (slice(4, 5), "q4")):
        own = get_format(name)
        assert torch.equal(decoded[:, layers], own.decode(own.encode(pages, LAYOUT), LAYOUT)[:, layers]), name
        assert torch.equal(format.decode(payloads, LAYOUT, layers), decoded[:, layers])
    assert torch.equal(format.decode(payloads, LAYOUT, slice(1, 5)), decoded[:, 1:])


@pytest.mark.parametrize("name", ["q4;5:q8", "q4;3-9:q8", "q8;5:raw+zstd"])
def test_a_format_that_names_layers_the_layout_lacks_is_refused(name: str) -> None:
    layer = 9 if "9" in name else 5
    pages = make_pages(LAYOUT, "gaussian", 1, seed=0)
    with pytest.raises(LayoutError, match=f"names layer {layer}, but the page layout has layers 0 to 4"):
        get_format(name).payload_bytes(LAYOUT)
    with pytest.raises(LayoutError, match=f"names layer {layer}"):
        get_format(name).encode(pages, LAYOUT)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_layers_must_be_a_slice_with_step_one(name: str) -> None:
    payloads = get_format(name).encode(make_pages(LAYOUT, "gaussian", 1, seed=0), LAYOUT)
    with pytest.raises(ValueError, match="step 1"):
        get_format(name).decode(payloads, LAYOUT, slice(None, None, 2))


@pytest.mark.parametrize(
    ("name", "streams"),
    [("raw", 2), ("q4", 7), ("q8/q4", 4), ("q4/q3", 8), ("raw/q6", 3), ("q4;0-1:q8", 9), ("q4;0-1:raw/q4", 8)],
)
def test_streams_are_every_byte_once_by_codec_and_plane_and_kind(name: str, streams: int) -> None:
    format = get_format(name)
    found = format.streams(LAYOUT)
    assert len(found) == streams
    taken = np.zeros(format.payload_bytes(LAYOUT), int)
    for stream in found:
        assert stream.bytes == sum(size for _, size in stream.spans)
        assert list(stream.spans) == sorted(stream.spans)
        for start, size in stream.spans:
            taken[start : start + size] += 1
    assert (taken == 1).all()
    assert {stream.element_bytes for stream in found} == {4 if codec == "raw" else 1 for codec in name.replace(";0-1:", "/").split("/")}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_pages_elsewhere_than_in_the_batch_do_not_matter(name: str) -> None:
    """Each page is coded by itself: what the others are makes no difference to its numbers beyond rounding."""
    pages = make_pages(LAYOUT, "outlier channels", 3, seed=0)
    alone = get_format(name).decode(get_format(name).encode(pages, LAYOUT, [1]), LAYOUT)
    pages[0], pages[2] = torch.nan, 1e30
    beside = get_format(name).decode(get_format(name).encode(pages, LAYOUT), LAYOUT)[1:2]
    assert (alone - beside).norm() <= 0.02 * alone.norm()


@pytest.mark.parametrize("head_dim", [4, 12, 20, 36, 100])
@pytest.mark.parametrize("name", ["q4", "q8/q4"])
def test_first_pages_of_odd_head_dims_are_coded_as_all_others(name: str, head_dim: int) -> None:
    layout, format = PageLayout(2, 2, 16, 2, head_dim), get_format(name)
    pages = torch.randn((3, *layout.shape), generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)
    ours, plain = format.encode(pages, layout, first=[0, 2]), format.encode(pages, layout)
    assert [payload.tobytes() for payload in ours] == [payload.tobytes() for payload in plain]
    decoded = format.decode(ours, layout).float()
    assert float((decoded - pages.float()).norm() / pages.float().norm()) < 0.25


@pytest.mark.parametrize("name", ["raw", "q8", "q4"])
def test_a_sign_that_torch_has_put_off_is_not_lost(name: str) -> None:
    layout, format = PageLayout(2, 2, 16, 2, 64), get_format(name)
    pages = torch.randn((2, *layout.shape), generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)
    lazily = torch._neg_view(pages)  # type: ignore[no-untyped-call,unused-ignore]
    assert lazily.is_neg()
    room = [np.empty(format.payload_bytes(layout), np.uint8) for _ in pages]
    eager = [payload.tobytes() for payload in format.encode(-pages, layout)]
    assert [payload.tobytes() for payload in format.encode(lazily, layout)] == eager
    assert [payload.tobytes() for payload in format.encode(lazily, layout, out=room)] == eager


def test_a_target_that_torch_would_negate_is_refused() -> None:
    layout = PageLayout(1, 2, 16, 1, 32, "fp32")
    pages = torch.ones(1, *layout.shape)
    target = torch.zeros_like(pages, dtype=torch.complex64).conj().imag
    with pytest.raises(LayoutError, match="would negate"):
        get_format("raw").decode(get_format("raw").encode(pages, layout), layout, out=target)


@pytest.mark.parametrize("pages", [[1, 2], None, "meta", "sparse"], ids=str)
def test_what_is_no_dense_tensor_is_one_clear_error(pages: object) -> None:
    layout = PageLayout(1, 2, 4, 1, 32)
    if pages == "meta":
        pages = torch.empty((1, *layout.shape), dtype=layout.torch_dtype, device="meta")
    if pages == "sparse":
        pages = torch.zeros((1, *layout.shape), dtype=layout.torch_dtype).to_sparse()
    with pytest.raises(LayoutError, match="expected a dense tensor"):
        get_format("q8").encode(pages, layout)  # type: ignore[arg-type]
