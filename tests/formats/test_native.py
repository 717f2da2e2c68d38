"""The native codecs against the torch reference, for every instruction set of this machine: decoding gives its numbers, encoding its codes
up to one step; nothing outside the targets is written, bad input is refused before anything is written, all works without the extension.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.errors import ConfigError
from kvtier.format_spec import parse_format
from kvtier.formats import BLOCK_CODECS, native
from kvtier.formats.bits import plane_bytes, unpack, unpack_planes
from kvtier.formats.blocks import BlockFormat, BlockShape
from kvtier.formats.levels import LEVELS2, LEVELS3, LEVELS4
from kvtier.layout import PageLayout

ROOT = Path(__file__).parents[2]
CODECS = {"raw": 0, "q8": 1, "q6": 2, "q4": 3, "q3": 4, "q8_0": 5, "q4_0": 6}
DTYPES = {"bf16": 0, "fp16": 1, "fp32": 2}
BITS = {"q4": 4, "q3": 3}
LEVELS = {levels.bits: levels.values for levels in (LEVELS2, LEVELS3, LEVELS4)}
EXACT = ("raw", "q8", "q8_0", "q4_0")
"""Codecs that give the reference's bytes."""

GUARD = 0xA5
loaded = native.codecs()
INSTRUCTION_SETS = loaded.available() if loaded else []

needs_native = pytest.mark.skipif(loaded is None, reason=f"native codecs: {native.why_missing()}")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def codecs():
    assert loaded is not None
    chosen = loaded.features()
    yield loaded
    loaded.use(chosen)


def plan_of(name: str, layout: PageLayout) -> tuple[bytes, int]:
    entries, offset = b"", 0
    for shape in shapes_of(layout) * layout.layers:
        entries += struct.pack("<iiq", CODECS[name], shape.keys, offset)
        offset += BLOCK_CODECS[name].block_bytes(shape)
    sizes = (layout.layers, layout.planes, layout.page_tokens, layout.kv_heads, layout.head_dim)
    head = struct.pack("<8i", DTYPES[layout.dtype], *sizes, layout.layers * layout.planes, 0)
    return head + entries + struct.pack("<q", offset), offset


def shapes_of(layout: PageLayout) -> list[BlockShape]:
    sizes = (layout.page_tokens, layout.kv_heads, layout.head_dim, layout.dtype)
    return [BlockShape(*sizes, keys) for keys in ((True, False) if layout.planes == 2 else (False,))]


def reference_payloads(name: str, pages: torch.Tensor, layout: PageLayout, begins: bool = False) -> list[np.ndarray]:
    shapes, codec = shapes_of(layout), BLOCK_CODECS[name]
    encode = codec.encode_first if begins else codec.encode
    blocks = [[encode(layer[p][None], shape)[0] for layer in page for p, shape in enumerate(shapes)] for page in pages]
    return [torch.cat(each).numpy() for each in blocks]


def blocks_of(name: str, payload: np.ndarray, layout: PageLayout) -> list[tuple[torch.Tensor, BlockShape]]:
    blocks, offset = [], 0
    for shape in shapes_of(layout) * layout.layers:
        size = BLOCK_CODECS[name].block_bytes(shape)
        blocks.append((torch.from_numpy(payload[offset : offset + size].copy()), shape))
        offset += size
    return blocks


def reference_pages(name: str, payloads: list[np.ndarray], layout: PageLayout) -> torch.Tensor:
    blocks = [[BLOCK_CODECS[name].decode(block[None], shape)[0] for block, shape in blocks_of(name, each, layout)] for each in payloads]
    return torch.stack([torch.stack(each).view(layout.shape) for each in blocks])


def codes_of(name: str, payload: np.ndarray, layout: PageLayout, begins: bool) -> torch.Tensor:
    """Codes in the order of what they stand for."""
    parts = []
    for block, shape in blocks_of(name, payload, layout):
        values = shape.vectors * shape.head_dim
        if name == "q8":
            parts.append(block[:values].view(torch.int8).int())
        elif name == "q6":
            parts.append(unpack(block[-values * 6 // 8 :].view(shape.vectors, -1), 6).flatten().int())
        else:
            parts += level_codes(block[-values * BITS[name] // 8 :], shape, BITS[name], begins)
    return torch.cat(parts)


def level_codes(packed: torch.Tensor, shape: BlockShape, bits: int, begins: bool) -> list[torch.Tensor]:
    """The ranks of levels, run by run; the first token's codes are whole numbers."""
    runs = [(bits, shape.tokens)]
    if begins and shape.tokens > 8 - bits:
        runs = [(8, 1), (bits - 1, 8 - bits), (bits, shape.tokens - 9 + bits)]
    found, start = [], 0
    for width, tokens in runs:
        vectors = tokens * shape.heads
        size = vectors * shape.head_dim * width // 8
        part, start = packed[start : start + size], start + size
        if width == 8:
            found.append(part.view(torch.int8).int())
            continue
        sizes = plane_bytes(shape.head_dim, width)
        planes = part.split_with_sizes([vectors * each for each in sizes])
        codes = unpack_planes([plane.view(vectors, each) for plane, each in zip(planes, sizes, strict=True)], width)
        found.append(LEVELS[width].argsort().argsort()[codes.flatten().int()].int())
    return found


def usual_pages(layout: PageLayout, count: int = 3) -> torch.Tensor:
    """Vectors of many sizes, keys with a common mean."""
    random = torch.Generator().manual_seed(layout.head_dim)
    shape = (count, *layout.shape)
    pages = torch.randn(shape, generator=random) * torch.randn((*shape[:-1], 1), generator=random).exp()
    pages[:, :, 0] += 3 * torch.randn((layout.kv_heads, layout.head_dim), generator=random)
    return pages.to(layout.torch_dtype)


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


def encode(codecs, name: str, pages: torch.Tensor, layout: PageLayout, begins: bool = False) -> list[np.ndarray]:
    plan, size = plan_of(name, layout)
    payloads = list(np.zeros((len(pages), size), np.uint8))
    codecs.encode(plan, pages.data_ptr(), range(len(pages)), payloads, bytes([begins] * len(pages)))
    return payloads


def decode(codecs, name: str, payloads: list[np.ndarray], layout: PageLayout) -> torch.Tensor:
    pages = torch.full((len(payloads), *layout.shape), 7.0).to(layout.torch_dtype)
    codecs.decode(plan_of(name, layout)[0], payloads, pages.data_ptr(), range(len(payloads)), 0, layout.layers, layout.page_bytes)
    return pages


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
        (2, 21, 2, 128),
        (2, 70, 1, 256),
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
        codecs.encode(plan, pages.data_ptr(), [2, 0, 1], [row[61 : 61 + size] for row in room], b"\0\1\0")
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


@needs_native
class TestTheExtension:
    LAYOUT = PageLayout(2, 2, 16, 2, 64, "bf16")

    def test_other_threads_run_while_it_works(self, codecs):
        codecs.use("portable")
        layout, counted, done = PageLayout(16, 2, 16, 8, 128, "bf16"), [0], threading.Event()
        pages, during = usual_pages(layout, 4), 0

        def count() -> None:
            while not done.is_set():
                counted[0] += 1

        other = threading.Thread(target=count)
        other.start()
        try:
            for _ in range(50):  # a busy machine may not let both run at once at the first try
                plan, size = plan_of("q4", layout)
                payloads = list(np.zeros((4, size), np.uint8))
                before = counted[0]
                codecs.encode(plan, pages.data_ptr(), range(4), payloads, bytes(4))
                during = max(during, counted[0] - before)
        finally:
            done.set()
            other.join()
        assert during > 1000

    def test_several_threads_get_what_one_gets(self, codecs):
        pages = usual_pages(self.LAYOUT, 8)
        expected, results = encode(codecs, "q4", pages, self.LAYOUT), {}
        threads = [threading.Thread(target=lambda i=i: results.update({i: encode(codecs, "q4", pages, self.LAYOUT)})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(results[i], expected) for i in range(4))

    def test_bad_input_is_refused_before_anything_is_written(self, codecs):
        layout = self.LAYOUT
        plan, size = plan_of("q8", layout)
        pages, room = usual_pages(layout, 2), np.full((2, size), GUARD, np.uint8)
        address, rows, outs = pages.data_ptr(), [0, 1], list(room)
        read_only = np.zeros(size, np.uint8)
        read_only.flags.writeable = False

        def changed(position: int, value: int, form: str = "<i") -> bytes:
            return plan[:position] + struct.pack(form, value) + plan[position + struct.calcsize(form) :]

        bad_plans = [b"", plan[:-1], plan + b"\0", changed(0, 3), changed(4, 0), changed(8, 3), changed(12, 1025), changed(20, 63)]
        bad_plans += [changed(24, 3), changed(32, 7), changed(32, -1), changed(40, 1 << 40, "<q"), changed(40, -8, "<q")]
        bad_plans += [plan[:-8] + struct.pack("<q", value) for value in (-1, size - 1)]
        for bad in bad_plans:
            with pytest.raises(ValueError, match="plan"):
                codecs.encode(bad, address, rows, outs, bytes(2))
        for bad_rows, bad_outs, error in [
            ([0], outs, ValueError),
            ([0, -1], outs, ValueError),
            (rows, [outs[0], outs[1][:-1]], ValueError),
            (rows, [outs[0], "text"], TypeError),
            (["0", 1], outs, TypeError),
        ]:
            with pytest.raises(error):
                codecs.encode(plan, address, bad_rows, bad_outs, bytes(2))
            with pytest.raises(error):
                codecs.decode(plan, bad_outs, address, bad_rows, 0, 2, layout.page_bytes)
        with pytest.raises(ValueError, match="read-only"):
            codecs.encode(plan, address, rows, [outs[0], read_only], bytes(2))
        for begins, error in ((b"\0", ValueError), (bytes(3), ValueError), (None, TypeError)):
            with pytest.raises(error):
                codecs.encode(plan, address, rows, outs, begins)
        for first, stop in ((-1, 1), (1, 0), (0, 3)):
            with pytest.raises(ValueError, match="layers"):
                codecs.decode(plan, outs, address, rows, first, stop, layout.page_bytes)
        for call in (codecs.encode, codecs.decode, codecs.supports):
            with pytest.raises(TypeError):
                call(plan)
        assert (room == GUARD).all()
        assert torch.equal(pages, usual_pages(layout, 2))

    def test_the_usual_case_in_one_call_gives_what_the_general_one_gives(self, codecs):
        pages = usual_pages(self.LAYOUT, 3)
        plan, size = plan_of("q8", self.LAYOUT)
        room = list(np.zeros((3, size), np.uint8))
        assert codecs.encode_all(plan, (torch.Tensor, torch.strided, torch.bfloat16, self.LAYOUT.shape), pages, room)
        assert np.array_equal(room, encode(codecs, "q8", pages, self.LAYOUT))
        target = torch.zeros_like(pages)
        assert codecs.decode_all(plan, (torch.Tensor, torch.strided, torch.bfloat16, self.LAYOUT.shape), room, target)
        assert torch.equal(target, decode(codecs, "q8", room, self.LAYOUT))

    @pytest.mark.parametrize(
        "spoil",
        [
            pytest.param(lambda pages, room: (pages.half(), room), id="dtype"),
            pytest.param(lambda pages, room: (pages[:, :, :, :8], room), id="tokens"),
            pytest.param(lambda pages, room: (pages[0], room), id="axes"),
            pytest.param(lambda pages, room: (pages[:2], room), id="pages"),
            pytest.param(lambda pages, room: (pages.transpose(0, 1).contiguous().transpose(0, 1), room), id="strides"),
            pytest.param(lambda pages, room: (torch.nn.Parameter(pages), room), id="subclass"),
            pytest.param(lambda pages, room: (pages.to("meta"), room), id="device"),
            pytest.param(lambda pages, room: (pages.to_sparse(), room), id="sparse"),
            pytest.param(lambda pages, room: ("pages", room), id="no tensor"),
            pytest.param(lambda pages, room: (pages, tuple(room)), id="no list"),
            pytest.param(lambda pages, room: (pages, [*room[:2], room[2][:-1]]), id="room"),
            pytest.param(lambda pages, room: (pages, [*room[:2], room[2].view(np.int8)]), id="signed room"),
            pytest.param(lambda pages, room: (pages, [*room[:2], room[2][None]]), id="axes of room"),
            pytest.param(lambda pages, room: (pages, [*room[:2], np.frombuffer(bytes([GUARD]) * room[2].size, np.uint8)]), id="read-only"),
            pytest.param(lambda pages, room: (pages, [*room[:2], np.repeat(room[2], 2)[::2]]), id="strides of room"),
        ],
    )
    def test_any_other_case_is_left_to_the_general_call_before_anything_is_written(self, codecs, spoil):
        plan, size = plan_of("q8", self.LAYOUT)
        room = np.full((3, size), GUARD, np.uint8)
        pages, places = spoil(usual_pages(self.LAYOUT, 3), list(room))
        assert not codecs.encode_all(plan, (torch.Tensor, torch.strided, torch.bfloat16, self.LAYOUT.shape), pages, places)
        assert (room == GUARD).all()
        assert all((place.view(np.uint8) == GUARD).all() for place in places)

    @pytest.mark.parametrize("change", ["rows", "dtype", "payload"])
    def test_decoding_leaves_any_other_case_to_the_general_call_too(self, codecs, change):
        plan, size = plan_of("q8", self.LAYOUT)
        target = torch.full((3, *self.LAYOUT.shape), 7.0, dtype=torch.float16 if change == "dtype" else torch.bfloat16)
        payloads = [np.zeros(size - (change == "payload"), np.uint8)] * (2 if change == "rows" else 3)
        assert not codecs.decode_all(plan, (torch.Tensor, torch.strided, torch.bfloat16, self.LAYOUT.shape), payloads, target)
        assert (target == 7).all()

    def test_a_sign_that_torch_has_put_off_is_left_to_the_general_call(self, codecs):
        layout = replace(self.LAYOUT, dtype="fp32")
        put_off = torch._neg_view(usual_pages(layout, 1))
        plan, size = plan_of("q8", layout)
        room = np.full((1, size), GUARD, np.uint8)
        assert not codecs.encode_all(plan, (torch.Tensor, torch.strided, torch.float32, layout.shape), put_off, list(room))
        assert (room == GUARD).all()

    def test_no_pages_are_no_work(self, codecs):
        codecs.encode(plan_of("q8", self.LAYOUT)[0], 0, [], [], b"")
        codecs.decode(plan_of("q8", self.LAYOUT)[0], [], 0, [], 0, 2, 0)

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((1, 0, 16, 8, 128), True),
            ((0, 2, 1024, 1, 1008), True),
            ((4, 1, 1, 16, 1024), False),  # a Hadamard block of 1024 does not fit 16 bits
            ((1, 0, 16, 8, 72), False),
            ((1, 0, 1025, 8, 64), False),
            ((1, 0, 16, 257, 64), False),
            ((1, 0, 0, 8, 64), False),
            ((5, 0, 16, 8, 96), True),
            ((6, 0, 16, 8, 80), False),
            ((7, 0, 16, 8, 64), False),
            ((1, 3, 16, 8, 64), False),
            ((1, 0, 16, 1 << 40, 64), False),
        ],
    )
    def test_supports_says_what_there_are_kernels_for(self, codecs, arguments, expected):
        assert codecs.supports(*arguments) is expected

    def test_only_available_instruction_sets_can_be_used(self, codecs):
        assert codecs.available()[-1] == "portable"
        for name in codecs.available():
            codecs.use(name)
            assert codecs.features() == name
        with pytest.raises(ValueError, match="available"):
            codecs.use("mmx")


@pytest.fixture
def loaded_anew():
    """The choice that loading makes is made again in the test, and behind it."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()
    if loaded:
        loaded.use(loaded.available()[0])


@needs_native
class TestTheCPUThatTheEnvironmentNames:
    @pytest.mark.parametrize("features", INSTRUCTION_SETS)
    def test_is_the_one_that_is_used(self, loaded_anew, monkeypatch, features):
        monkeypatch.setenv("KVTIER_CPU", features)
        chosen = native.codecs()
        assert chosen is not None
        assert chosen.features() == features

    def test_is_an_error_where_it_is_not_there(self, loaded_anew, monkeypatch):
        monkeypatch.setenv("KVTIER_CPU", "mmx")
        with pytest.raises(ConfigError, match="KVTIER_CPU=mmx: not there; this CPU and build have .*portable"):
            native.codecs()

    def test_is_an_error_where_nothing_is_compiled(self, loaded_anew, monkeypatch):
        monkeypatch.setenv("KVTIER_CPU", "portable")
        monkeypatch.setitem(sys.modules, "kvtier.formats.native._codecs", None)
        with pytest.raises(ConfigError, match="no compiled kernels"):
            native.codecs()

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("features", [name for name in INSTRUCTION_SETS if not name.startswith("avx512")])
    def test_formats_keep_their_contract_on_it(self, features):
        tests = [f"tests/formats/test_contract.py::{name}" for name in ("TestQ8", "TestQ4")]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"KVTIER_CPU": features}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


class TestWithoutTheExtension:
    def test_formats_work_and_it_is_said_why(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "kvtier.formats.native._codecs", None)
        native._load.cache_clear()
        try:
            assert native.codecs() is None
            assert "install a C compiler" in native.why_missing()
            layout = PageLayout(2, 2, 16, 2, 64, "bf16")
            pages, format = usual_pages(layout), BlockFormat(parse_format("q8/q4"), BLOCK_CODECS)
            decoded = format.decode(format.encode(pages, layout), layout)
        finally:
            native._load.cache_clear()
        assert (decoded - pages).float().norm() < 0.1 * pages.float().norm()

    @pytest.mark.slow
    def test_a_compiler_that_fails_does_not_fail_the_installation(self, tmp_path):
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CC": "false"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.rglob("*.so"))
