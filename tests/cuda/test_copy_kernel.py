"""The kernel that copies by address, in Triton's interpreter: every stretch whole, nothing beside it, and wide accesses where compiled.

On a GPU, which is given only memory that it was told of, `test_contract.py` runs it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import DeviceError
from kvtier.memory.region import aligned_array
from tests.compiled import found_by, needs_triton

pytestmark = needs_triton
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_contract.py runs the kernel there")
CPU = torch.device("cpu")


@interpreted
@settings(deadline=None, max_examples=10, derandomize=True)
@given(count=st.integers(0, 19), units=st.integers(1, 2100), gap=st.integers(0, 3), seed=st.integers(0, 99))
def test_every_stretch_arrives_whole_and_nothing_else_is_written(count, units, gap, seed):
    from kvtier.cuda.copy_kernel import copy_all

    random, size, stride = np.random.default_rng(seed), units * 16, (units + gap) * 16
    source, target = aligned_array(20 * 2200 * 16), aligned_array(20 * 2200 * 16)
    source[:] = random.integers(0, 256, len(source), np.uint8)
    target[:] = 0xA5
    to, of = random.permutation(20)[:count] * stride, random.permutation(20)[:count] * stride
    wanted = target.copy()
    for there, here in zip(to.tolist(), of.tolist(), strict=True):
        wanted[there : there + size] = source[here : here + size]
    copy_all(target.ctypes.data + to, source.ctypes.data + of, size, CPU)
    assert np.array_equal(target, wanted)


@interpreted
@pytest.mark.parametrize(("shift", "size"), [(8, 64), (0, 72)])
def test_what_is_no_multiple_of_16_is_refused(shift, size):
    from kvtier.cuda.copy_kernel import copy_all

    memory = aligned_array(4096)
    places = memory.ctypes.data + np.array([0, 1024])
    with pytest.raises(DeviceError, match="a kernel copies multiples of 16 bytes"):
        copy_all(places + 2048, places + shift, size, CPU)


@pytest.mark.slow
def test_compiled_for_a_gpu_each_thread_carries_16_bytes_at_once(tmp_path):
    """Needs no GPU, as in `tests/formats/test_triton.py`."""
    instructions = found_by(Path(__file__).with_name("compile_copy_kernel.py"), tmp_path)
    for way in ("ld", "st"):
        assert [name for name in instructions if name.startswith(f"{way}.global.v4")], f"{way}: words go one by one"
