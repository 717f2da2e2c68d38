"""The byte layouts that the files promise, read by small decoders in NumPy that share no code with kvtier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.testing.strategies import make_pages

Array = NDArray[np.float64]
LAYOUTS = [PageLayout(3, planes, 9, 2, head_dim, "fp32") for planes in (1, 2) for head_dim in (64, 80, 96)]
LEVELS: dict[int, tuple[list[int], float]] = {
    4: ([-122, -92, -72, -56, -42, -30, -18, -6, 6, 18, 30, 42, 56, 72, 92, 122], 44.64),
    3: ([14, 42, 76, 120, -14, -42, -76, -120], 56.0),
    2: ([-120, -36, 36, 120], 79.5),
}


class Reader:
    """Takes one section after the other."""

    def __init__(self, payload: NDArray[np.uint8]) -> None:
        self.rest = payload.tobytes()

    def take(self, dtype: str, *shape: int) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        section, self.rest = self.rest[:size], self.rest[size:]
        return np.frombuffer(section, dtype).reshape(shape).astype(np.float64)

    def codes(self, bits: int, tokens: int, heads: int, head_dim: int) -> NDArray[np.int64]:
        """Packed codes: (bits of the plane, where they go) plane by plane; the planes of 6 bits vector by vector, those of 3 bits apart."""
        codes = np.zeros((tokens, heads, head_dim), np.int64)
        sixes = self.take("u1", tokens, heads, head_dim * 6 // 8).astype(np.int64) if bits == 6 else np.zeros(0)
        for width, shift in {2: [(2, 0)], 3: [(2, 0), (1, 2)], 4: [(4, 0)], 6: [(4, 0), (2, 4)]}[bits]:
            part, size = 8 // width, head_dim * width // 8
            plane, sixes = (sixes[..., :size], sixes[..., size:]) if bits == 6 else (self.take("u1", tokens, heads, size), sixes)
            for code in range(head_dim):
                byte, place = code % (head_dim // part), code // (head_dim // part)
                codes[..., code] |= (plane[..., byte].astype(np.int64) >> (place * width) & (2**width - 1)) << shift
        return codes


def hadamard(head_dim: int) -> Array:
    """Normalised block Hadamard matrix: the sign is the parity of the bits that row and column share."""
    block = next(b for b in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if head_dim % b == 0)
    parity = np.array([[(-1.0) ** (row & column).bit_count() for column in range(block)] for row in range(block)])
    return np.asarray(np.kron(np.eye(head_dim // block), parity / np.sqrt(block)), np.float64)


def read_levels(reader: Reader, bits: int, tokens: int, heads: int, head_dim: int) -> Array:
    levels, per_rms = LEVELS[bits]
    return np.asarray(np.array(levels)[reader.codes(bits, tokens, heads, head_dim)] / per_rms, np.float64)


def read_mean(reader: Reader, heads: int, head_dim: int) -> Array:
    scales = reader.take("<f2", heads)
    return read_levels(reader, 4, 1, heads, head_dim) * np.abs(scales)[:, None]


def read_q8(reader: Reader, tokens: int, heads: int, head_dim: int, keys: bool) -> Array:
    codes = reader.take("i1", tokens, heads, head_dim)
    return codes * reader.take("<f2", tokens, heads)[..., None]


def read_q6(reader: Reader, tokens: int, heads: int, head_dim: int, keys: bool) -> Array:
    mean = read_mean(reader, heads, head_dim) if keys else np.zeros(1)
    scales = reader.take("<f2", tokens, heads)[..., None]
    codes = reader.codes(6, tokens, heads, head_dim) - 32
    return np.asarray(codes * np.abs(scales) + np.signbit(scales) * mean, np.float64)


def read_gaussian(bits: int, reader: Reader, tokens: int, heads: int, head_dim: int, keys: bool) -> Array:
    mean = read_mean(reader, heads, head_dim) if keys else np.zeros(1)
    supers = reader.take("<f2", heads)
    steps = reader.take("u1", tokens, heads).astype(int)
    scales = np.abs(supers) * np.where(steps % 128 == 127, 0, 2.0 ** (-(steps % 128) / 32))
    if np.signbit(supers).all():
        first = reader.take("i1", 1, heads, head_dim) / LEVELS[bits][1]
        paying = read_levels(reader, bits - 1, 8 - bits, heads, head_dim)
        vectors = np.concatenate([first, paying, read_levels(reader, bits, tokens - 9 + bits, heads, head_dim)])
    else:
        vectors = read_levels(reader, bits, tokens, heads, head_dim)
    return np.asarray(vectors * scales[..., None] + (steps // 128)[..., None] * mean, np.float64)


def read_q4(*given) -> Array:
    return read_gaussian(4, *given)


def read_q3(*given) -> Array:
    return read_gaussian(3, *given)


READERS = {"q8": read_q8, "q6": read_q6, "q4": read_q4, "q3": read_q3}


def read_page(names: tuple[str, str], payload: NDArray[np.uint8], layout: PageLayout) -> Array:
    """Layer by layer, keys (by the first reader) before values."""
    reader, page = Reader(payload), np.zeros(layout.shape)
    for layer in range(layout.layers):
        for plane in range(layout.planes):
            keys = layout.planes == 2 and plane == 0
            page[layer, plane] = READERS[names[not keys]](reader, layout.page_tokens, layout.kv_heads, layout.head_dim, keys)
    assert not reader.rest
    return np.asarray(page @ hadamard(layout.head_dim), np.float64)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("names", [*((name, name) for name in READERS), ("q8", "q4"), ("q3", "q6")])
@pytest.mark.parametrize("begins", [False, True])
def test_an_independent_reader_sees_the_same_numbers(names: tuple[str, str], layout: PageLayout, begins: bool) -> None:
    page = make_pages(layout, "outlier channels", 1, seed=7)
    format = get_format("/".join(names))
    payloads = format.encode(page, layout, first=[0] if begins else [])
    decoded = format.decode(payloads, layout)
    np.testing.assert_allclose(decoded[0].numpy(), read_page(names, payloads[0], layout), rtol=1e-5, atol=1e-4)


def test_fp8_is_codes_then_scales_layer_by_layer() -> None:
    layout = PageLayout(2, 2, 3, 2, 8, "fp32")
    page = make_pages(layout, "gaussian", 1, seed=0)
    payload = get_format("fp8").encode(page, layout)[0]
    blocks = torch.from_numpy(payload).view(4, 3 * 2 * (8 + 2))
    codes = blocks[:, :48].contiguous().view(torch.float8_e4m3fn).float().view(layout.shape)
    scales = blocks[:, 48:].contiguous().view(torch.float16).float().view(*layout.shape[:4], 1)
    assert torch.equal(scales, (page[0].abs().amax(-1, keepdim=True) / 448).half().float())
    assert torch.equal(get_format("fp8").decode([payload], layout)[0], codes * scales)


def test_raw_is_the_page() -> None:
    layout = PageLayout(2, 1, 3, 2, 5, "bf16")
    page = make_pages(layout, "bits", 1, seed=0)
    assert get_format("raw").encode(page, layout)[0].tobytes() == page.view(torch.uint8).numpy().tobytes()


def test_sparse24_is_the_two_largest_of_four_and_their_places() -> None:
    layout = PageLayout(2, 1, 3, 2, 16, "bf16")
    page = make_pages(layout, "gaussian", 1, seed=3)
    reader, expected = Reader(get_format("q8/sparse24").encode(page, layout)[0]), np.zeros(layout.shape)
    for layer in range(2):
        kept = np.frombuffer((reader.take("<u2", 6, 8).astype("<u4") * 65536).astype("<u4").tobytes(), "<f4").reshape(6, 4, 2)
        places = reader.take("u1", 6, 2).astype(int)
        for vector in range(6):
            for four in range(4):
                half = places[vector, four // 2] >> 4 * (four % 2) & 15
                assert half & 3 < half >> 2
                for number, place in enumerate((half & 3, half >> 2)):
                    expected[layer, 0, vector // 2, vector % 2, 4 * four + place] = kept[vector, four, number]
    assert not reader.rest
    assert np.array_equal(get_format("q8/sparse24").decode(get_format("q8/sparse24").encode(page, layout), layout)[0].float(), expected)
    fours, kept_fours = page.float().view(-1, 4).abs().numpy(), np.abs(expected).reshape(-1, 4)
    assert np.array_equal(np.sort(kept_fours, -1)[:, 2:], np.sort(fours, -1)[:, 2:])
    assert ((kept_fours > 0).sum(-1) == 2).all()


def test_sparse24_keeps_the_first_of_equals_exactly() -> None:
    layout = PageLayout(1, 1, 1, 1, 8, "fp16")
    page = torch.tensor([3.0, -3.0, 3.0, 3.0, 0.0, 65504.0, -0.1, 0.1], dtype=torch.float16).view(1, *layout.shape)
    decoded = get_format("q8/sparse24").decode(get_format("q8/sparse24").encode(page, layout), layout)
    assert decoded.flatten().tolist() == [3.0, -3.0, 0.0, 0.0, 0.0, 65504.0, page.flatten()[6].item(), 0.0]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("raw", 16.0),
        ("fp8", 8.25),
        ("q8", 8.25),
        ("q6", 6 + 16 / 64 + (32 * 8 + 16) / (16 * 64) / 2),
        ("q4", 4 + 8 / 64 + 16 / 1024 + (32 * 8 + 16) / (16 * 64) / 2),
        ("q3", 3 + 8 / 64 + 16 / 1024 + (32 * 8 + 16) / (16 * 64) / 2),
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("q8_k", 9.125),
        ("q4_k", 4.5),
        ("sparse24!", 9.0),
        ("q8/sparse24", 8.625),
    ],
)
def test_bits_per_value(name: str, bits: float) -> None:
    assert get_format(name).bits_per_value(PageLayout(30, 2, 16, 3, 64, "bf16")) == bits


@pytest.mark.parametrize(("name", "dtype", "offset"), [("q8", "i1", 0), ("q6", "u1", 32)])
def test_even_steps_are_within_half_a_step_of_the_rotated_vector(name: str, dtype: str, offset: int) -> None:
    layout = PageLayout(1, 1, 9, 2, 80, "fp32")
    page = make_pages(layout, "outlier channels", 1, seed=2)
    payload = get_format(name).encode(page, layout)[0]
    reader = Reader(payload[9 * 2 * 80 :] if name == "q8" else payload)
    scales = reader.take("<f2", *layout.shape[:4])
    error = (read_page((name, name), payload, layout) - page[0].double().numpy()) @ hadamard(80)
    assert (np.abs(error) <= 0.501 * scales[..., None]).all()


@pytest.mark.parametrize(("name", "bits"), [("q4", 4), ("q3", 3)])
def test_gaussian_formats_pick_the_nearest_level(name: str, bits: int) -> None:
    layout = PageLayout(1, 1, 16, 4, 64, "fp32")
    page = make_pages(layout, "gaussian", 1, seed=2)
    reader = Reader(get_format(name).encode(page, layout)[0][4 * 2 + 16 * 4 :])
    levels, per_rms = np.array(LEVELS[bits][0]), LEVELS[bits][1]
    chosen = levels[reader.codes(bits, 16, 4, 64)]
    rotated = page[0, 0, 0].double().numpy() @ hadamard(64)
    wanted = rotated / np.sqrt((rotated**2).mean(-1, keepdims=True)) * per_rms
    best = np.abs(wanted[..., None] - levels).min(-1)
    assert (np.abs(wanted - chosen) <= best + 1e-3).all()


@pytest.mark.parametrize("name", ["q4", "q3"])
def test_gaussian_scales_keep_the_inner_product_with_the_original_up_to_half_a_scale_step(name: str) -> None:
    layout = PageLayout(2, 1, 16, 4, 64, "fp32")
    page = make_pages(layout, "gaussian", 1, seed=2)
    decoded = get_format(name).decode(get_format(name).encode(page, layout), layout)
    torch.testing.assert_close((decoded * page).sum(-1), (page * page).sum(-1), rtol=2 ** (1 / 64) - 1 + 1e-3, atol=0)


@pytest.mark.parametrize(("bits", "error", "close"), [(4, 0.009501, 0.02), (3, 0.03454, 0.015), (2, 0.1175, 0.06)])
def test_levels_are_those_of_lloyd_and_max(bits: int, error: float, close: float) -> None:
    """At most 0.3 % more squared error than the optimum (Max 1960, table I), each level near its own."""
    optimum = {
        4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
        3: [0.2451, 0.7560, 1.3439, 2.1519],
        2: [0.4528, 1.5104],
    }[bits]
    levels = np.sort(LEVELS[bits][0]) / LEVELS[bits][1]
    assert np.abs(levels[len(levels) // 2 :] - np.array(optimum)).max() < close
    grid = np.linspace(-8, 8, 400_001)
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    assert float(((grid - nearest) ** 2 * density).sum() * (grid[1] - grid[0])) < error * 1.003


def sink_errors(name: str, begins: bool) -> tuple[Array, Array]:
    """Relative error of the first key of a page that begins a sequence, and that of the others."""
    layout = PageLayout(1, 2, 16, 1, 64, "fp32")
    page = make_pages(layout, "outlier channels", 1, seed=11)
    payload = get_format(name).encode(page, layout, first=[0] if begins else [])[0]
    error = (get_format(name).decode([payload], layout) - page)[0, 0, 0, :, 0].norm(dim=-1) / page[0, 0, 0, :, 0].norm(dim=-1)
    return error[:1].numpy(), error[1:].numpy()


@pytest.mark.parametrize(("name", "offset"), [("q6", 34), ("q4", 34 + 2), ("q3", 34 + 2)])
def test_the_mean_is_kept_out_of_attention_sinks(name: str, offset: int) -> None:
    """The first key of such a page has none of the others' mean: its bit is clear."""
    layout = PageLayout(1, 2, 16, 1, 64, "fp32")
    payload = get_format(name).encode(make_pages(layout, "outlier channels", 1, seed=11), layout)[0]
    flags = payload[offset:][1:32:2] if name == "q6" else payload[offset:][:16]
    assert (flags >= 128).tolist() == [False] + [True] * 15


@pytest.mark.parametrize(("name", "most"), [("q4", 0.012), ("q3", 0.012)])
def test_the_first_token_of_a_sequence_has_eight_bits(name: str, most: float) -> None:
    (plain, _), (special, others) = sink_errors(name, False), sink_errors(name, True)
    assert special[0] < most < plain[0]
    assert others.max() < 0.35


@pytest.mark.parametrize(
    ("name", "head_dim", "use"),
    [
        ("q6", 62, "use q8"),
        ("q4", 62, "use q8"),
        ("q3", 68, "use q8"),
        ("q8_0", 80, "use q8"),
        ("q4_0", 80, "or q4"),
        ("q8/sparse24", 68, "use q4"),
    ],
)
def test_a_head_dim_that_does_not_fit_is_an_error_that_says_what_to_use(name: str, head_dim: int, use: str) -> None:
    layout = PageLayout(1, 2, 4, 1, head_dim, "fp32")
    with pytest.raises(LayoutError, match=rf"head_dim.*{head_dim}.*{use}"):
        get_format(name).payload_bytes(layout)
    with pytest.raises(LayoutError, match=use):
        get_format(name).encode(torch.zeros(1, *layout.shape), layout)


@pytest.mark.parametrize("name", ["raw", "fp8", "q8"])
def test_any_head_dim_is_coded_by(name: str) -> None:
    for head_dim in (1, 63, 100):
        layout = PageLayout(1, 2, 1, 1, head_dim, "fp32")
        page = make_pages(layout, "gaussian", 1, seed=0)
        decoded = get_format(name).decode(get_format(name).encode(page, layout), layout)
        assert (decoded - page).norm() <= 0.03 * page.norm()


@pytest.mark.parametrize("name", ["fp8", "q8", "q6", "q4", "q3"])
def test_one_infinity_does_not_touch_other_tokens(name: str) -> None:
    layout = PageLayout(1, 1, 4, 2, 64, "bf16")
    page = make_pages(layout, "gaussian", 1, seed=0)
    spoiled = page.clone()
    spoiled[0, 0, 0, 0, 0, 3] = torch.inf
    plain, odd = (get_format(name).decode(get_format(name).encode(p, layout), layout) for p in (page, spoiled))
    assert torch.equal(plain[0, 0, 0, :, 1], odd[0, 0, 0, :, 1])
    if name not in ("q4", "q3"):
        assert torch.equal(plain[0, 0, 0, 1:], odd[0, 0, 0, 1:])


@pytest.mark.parametrize(
    ("name", "limit", "error"),
    [
        ("fp8", 448 * 65504.0, 0.07),
        ("q8", 127 * 65504.0 / 8, 0.02),
        ("q6", 65504.0, 0.05),
        ("q4", 65504.0, 0.3),
        ("q8_0", 127 * 65504.0, 0.01),
        ("q4_0", 8 * 65504.0, 0.1),
        ("q8_k", 1e12, 0.01),
        ("q4_k", 63 * 65504.0, 0.1),
        ("sparse24!", 65504.0, 0.0),
    ],
)
def test_magnitudes_saturate_one_by_one_where_the_file_says(name: str, limit: float, error: float) -> None:
    layout = PageLayout(5, 2, 4, 2, 64, "fp32")
    page = torch.zeros(1, *layout.shape)
    page[..., 3], page[..., 40] = -1e12, limit / 2
    decoded = get_format(name).decode(get_format(name).encode(page, layout), layout)
    torch.testing.assert_close(decoded[..., 3], torch.full_like(decoded[..., 3], -limit), rtol=error, atol=0)
    torch.testing.assert_close(decoded[..., 40], torch.full_like(decoded[..., 40], limit / 2), rtol=error, atol=0)
