"""Calls of the native codecs' extension: bad input is refused before anything is written, other threads run on, `supports` is right."""

from __future__ import annotations

import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtier.formats.blocks import USUAL
from kvtier.layout import PageLayout
from tests.formats.rig import GUARD, decode, encode, needs_native, plan_of, reference_payloads, usual_pages

pytestmark = pytest.mark.timeout(120)


def at_an_odd_address(pages: torch.Tensor) -> torch.Tensor:
    memory = bytearray(1) + bytes(pages.flatten().view(torch.uint8).numpy())
    return torch.frombuffer(memory, dtype=pages.dtype, offset=1).view(pages.shape)


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
                codecs.encode(plan, pages.data_ptr(), range(4), payloads, bytes(4), 0)
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
                codecs.encode(bad, address, rows, outs, bytes(2), 0)
        for bad_rows, bad_outs, error in [
            ([0], outs, ValueError),
            ([0, -1], outs, ValueError),
            (rows, [outs[0], outs[1][:-1]], ValueError),
            (rows, [outs[0], "text"], TypeError),
            (["0", 1], outs, TypeError),
        ]:
            with pytest.raises(error):
                codecs.encode(plan, address, bad_rows, bad_outs, bytes(2), 0)
            with pytest.raises(error):
                codecs.decode(plan, bad_outs, address, bad_rows, 0, 2, layout.page_bytes)
        with pytest.raises(ValueError, match="read-only"):
            codecs.encode(plan, address, rows, [outs[0], read_only], bytes(2), 0)
        for begins, error in ((b"\0", ValueError), (bytes(3), ValueError), (None, TypeError)):
            with pytest.raises(error):
                codecs.encode(plan, address, rows, outs, begins, 0)
        for first, stop in ((-1, 1), (1, 0), (0, 3)):
            with pytest.raises(ValueError, match="layers"):
                codecs.decode(plan, outs, address, rows, first, stop, layout.page_bytes)
        for call in (codecs.encode, codecs.encode_all, codecs.decode, codecs.decode_all, codecs.supports):
            with pytest.raises(TypeError):
                call(plan)
        with pytest.raises(TypeError):
            codecs.encode(plan, address, rows, outs, bytes(2), None)
        for expected in (None, (torch.Tensor,), (torch.Tensor, None, torch.Tensor.is_neg)):
            with pytest.raises((TypeError, ValueError)):
                codecs.encode_all(plan, expected, pages, outs, 0)
            with pytest.raises((TypeError, ValueError)):
                codecs.decode_all(plan, expected, outs, pages)
        assert (room == GUARD).all()
        assert torch.equal(pages, usual_pages(layout, 2))

    def test_the_usual_case_in_one_call_gives_what_the_general_one_gives(self, codecs):
        pages = usual_pages(self.LAYOUT, 3)
        plan, size = plan_of("q8", self.LAYOUT)
        room = list(np.zeros((3, size), np.uint8))
        assert codecs.encode_all(plan, USUAL, pages, room, 0) == []
        assert np.array_equal(room, encode(codecs, "q8", pages, self.LAYOUT))
        target = torch.zeros_like(pages)
        assert codecs.decode_all(plan, USUAL, room, target)
        assert torch.equal(target, decode(codecs, "q8", room, self.LAYOUT))

    @pytest.mark.parametrize("name", ["raw", "q8", "q6", "q4", "q3", "q8_0", "q4_0"])
    def test_many_pages_at_once_are_what_each_is_alone_wherever_they_go(self, codecs, name):
        """Large batches go past the caches, into whole lines of memory where places are made of them."""
        layout, count = PageLayout(2, 2, 16, 8, 128, "bf16"), 70
        plan, _ = plan_of(name, layout)
        page = layout.page_bytes
        payloads = list(encode(codecs, name, usual_pages(layout, 5), layout)) * (count // 5)
        alone = decode(codecs, name, payloads[:5], layout).view(torch.uint8).view(5, page).numpy()
        for features in codecs.available():
            codecs.use(features)
            for row_bytes, offset in ((page, 0), (page + 64, 0), (page + 64, 64), (page + 2, 0), (page, 2), (page + 6, 34)):
                memory = np.full(count * row_bytes + 192, GUARD, np.uint8)
                start = -memory.ctypes.data % 64 + offset
                codecs.decode(plan, payloads, memory.ctypes.data + start, range(count), 0, layout.layers, row_bytes)
                rows = memory[start : start + count * row_bytes].reshape(count, row_bytes)
                assert (rows[:, :page].reshape(count // 5, 5, page) == alone).all(), (features, row_bytes, offset)
                assert (rows[:, page:] == GUARD).all()
                assert (memory[:start] == GUARD).all()
                assert (memory[start + count * row_bytes :] == GUARD).all()

    @pytest.mark.parametrize("name", ["q4", "q3"])
    def test_scales_of_every_ratio_to_the_largest_get_the_step_of_the_reference(self, codecs, name):
        """One vector again and again, at the middle of each of 256 parts of the upper two octaves, beside itself as it is."""
        ratios = torch.cat([octave * (1 + (torch.arange(256) + 0.5) / 256) for octave in (0.5, 0.25)] + [torch.ones(1)])
        layout = PageLayout(1, 1, len(ratios), 1, 64, "fp32")
        vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
        pages = (ratios[:, None] * vector).reshape(1, *layout.shape)
        steps = slice(2, 2 + len(ratios))  # behind the scale of the largest
        expected = reference_payloads(name, pages, layout)[0][steps]
        assert set(expected.tolist()) == set(range(65))
        for features in codecs.available():
            codecs.use(features)
            assert encode(codecs, name, pages, layout)[0][steps].tolist() == expected.tolist(), features

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
            pytest.param(lambda pages, room: (at_an_odd_address(pages), room), id="address"),
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
        assert codecs.encode_all(plan, USUAL, pages, places, 0) is None
        assert (room == GUARD).all()
        assert all((place.view(np.uint8) == GUARD).all() for place in places)

    @pytest.mark.parametrize("change", ["rows", "dtype", "payload"])
    def test_decoding_leaves_any_other_case_to_the_general_call_too(self, codecs, change):
        plan, size = plan_of("q8", self.LAYOUT)
        target = torch.full((3, *self.LAYOUT.shape), 7.0, dtype=torch.float16 if change == "dtype" else torch.bfloat16)
        payloads = [np.zeros(size - (change == "payload"), np.uint8)] * (2 if change == "rows" else 3)
        assert not codecs.decode_all(plan, USUAL, payloads, target)
        assert (target == 7).all()

    def test_a_sign_that_torch_has_put_off_is_left_to_the_general_call(self, codecs):
        layout = replace(self.LAYOUT, dtype="fp32")
        put_off = torch._neg_view(usual_pages(layout, 1))
        plan, size = plan_of("q8", layout)
        room = np.full((1, size), GUARD, np.uint8)
        assert codecs.encode_all(plan, USUAL, put_off, list(room), 0) is None
        assert (room == GUARD).all()

    @pytest.mark.parametrize("pages", [1, 3])
    def test_a_list_that_changes_while_torch_is_asked_writes_nothing(self, codecs, pages):
        """Torch answers without the interpreter's lock: what was counted before may be more or less afterwards."""
        assert USUAL is not None
        plan, size = plan_of("q8", self.LAYOUT)
        memory = torch.full((3, *self.LAYOUT.shape), 7.0, dtype=torch.bfloat16)
        room = np.full((3, size), GUARD, np.uint8)
        for call in (codecs.decode_all, codecs.encode_all):
            payloads = list(room[:pages])

            def changed(_: torch.Tensor, payloads: list[np.ndarray] = payloads) -> bool:
                payloads[:] = room[: 4 - pages]
                return False

            usual = (*USUAL[:2], changed)
            if call is codecs.decode_all:
                assert call(plan, usual, payloads, memory[:pages]) is False
            else:
                assert call(plan, usual, memory[:pages], payloads, 0) is None
        assert (memory == 7).all()
        assert (room == GUARD).all()

    def test_no_pages_are_no_work(self, codecs):
        codecs.encode(plan_of("q8", self.LAYOUT)[0], 0, [], [], b"", 0)
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
        for strange in ("mmx", 5, None, b"avx2"):
            with pytest.raises(ValueError, match="available"):
                codecs.use(strange)
