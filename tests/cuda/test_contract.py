"""What every accelerator promises, asked of the stand-in and, where there is one, of the GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.cuda.find import find_accelerator
from kvtier.errors import DeviceError
from kvtier.layout import PageLayout
from kvtier.memory.region import aligned_array
from kvtier.testing.accelerator import LateAccelerator
from kvtier.tiers.gpu import GpuPool

HAS_GPU = torch.cuda.is_available()
SIZE = 1 << 20


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device"))])
def gpu(request):
    return LateAccelerator() if request.param == "stand-in" else find_accelerator("cuda")


@pytest.fixture
def host(gpu):
    memory = aligned_array(SIZE)
    assert gpu.register(memory.ctypes.data, SIZE) is None
    yield memory
    gpu.unregister(memory.ctypes.data)


def addresses(*numbers):
    return np.array(numbers, np.int64)


def test_copies_go_there_and_back_in_any_number(gpu, host):
    stream, device = gpu.new_stream(), gpu.allocate(SIZE)
    host[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    wanted = host.reshape(256, -1).copy()
    order = np.random.default_rng(1).permutation(256)
    rows = np.arange(256) * 4096
    stream.copy(device.data_ptr() + order * 4096, host.ctypes.data + rows, 4096)
    stream.record().wait()
    host[:] = 0
    stream.copy(host.ctypes.data + rows, device.data_ptr() + order * 4096, 4096)
    stream.copy(addresses(), addresses(), 4096)
    stream.record().wait()
    assert np.array_equal(host.reshape(256, -1), wanted)


def test_neighbours_go_together_but_not_across_two_registrations(gpu):
    memory, stream = aligned_array(3 * 4096), gpu.new_stream()
    for start in (0, 4096, 8192):
        assert gpu.register(memory.ctypes.data + start, 4096) is None
    device = gpu.allocate(3 * 4096)
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    rows = np.arange(12) * 1024
    stream.copy(device.data_ptr() + rows, memory.ctypes.data + rows, 1024)
    stream.record().wait()
    assert np.array_equal(device.cpu().numpy(), memory)
    for start in (0, 4096, 8192):
        gpu.unregister(memory.ctypes.data + start)


@pytest.mark.parametrize("size", [16, 4096, 20000])
def test_a_kernel_copies_what_the_copy_engines_copy_and_times_are_told(gpu, host, size):
    if isinstance(gpu, LateAccelerator):
        gpu.why_no_kernels = ""
    if gpu.why_no_kernel_copies():
        pytest.skip(gpu.why_no_kernel_copies())
    stream, device = gpu.new_stream(), gpu.allocate(SIZE)
    count = 40
    host[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    wanted, order, rows = host[: count * size].copy(), np.random.default_rng(1).permutation(count) * size, np.arange(count) * size
    stream.run(lambda: device.fill_(7))
    down_s = stream.seconds(lambda: stream.copy_by_kernel(device.data_ptr() + order, host.ctypes.data + rows, size, to_host=False))
    host[:] = 9
    up_s = stream.seconds(lambda: stream.copy_by_kernel(device.data_ptr() + order, host.ctypes.data + rows, size, to_host=True))
    assert np.array_equal(host[: count * size], wanted)
    assert bool((host[count * size :] == 9).all())
    assert device[count * size :].unique().tolist() == [7], "nothing else is written"
    assert min(down_s, up_s) > 0
    outside = aligned_array(4096)
    with pytest.raises(DeviceError):
        stream.copy_by_kernel(device.data_ptr() + rows[:1], outside.ctypes.data + rows[:1], 16, to_host=True)


def test_address_arrays_may_be_reused_at_once(gpu, host):
    stream, device = gpu.new_stream(), gpu.allocate(8192)
    host[:4096], host[4096:8192] = 3, 4
    targets, sources = addresses(device.data_ptr(), device.data_ptr() + 4096), addresses(host.ctypes.data, host.ctypes.data + 4096)
    stream.copy(targets, sources, 4096)
    targets[:], sources[:] = 0, 0
    stream.record().wait()
    assert device[[0, 4095, 4096, 8191]].tolist() == [3, 3, 4, 4]


def test_a_stream_that_waits_sees_what_another_did_and_the_thread_goes_on(gpu):
    first, second, memory = gpu.new_stream(), gpu.new_stream(), gpu.allocate(1 << 16)
    for number in range(20):
        first.run(lambda number=number: memory.fill_(number))
        second.wait(first.record())
        found = second.result(lambda: memory.max() + 0)
        first.wait(second.record())
        assert int(found) == number
    event = first.record()
    event.wait()
    assert event.done()


def test_streams_are_told_apart_by_their_keys(gpu):
    assert gpu.engine_stream().key == gpu.engine_stream().key
    others = [gpu.new_stream() for _ in range(40)]  # torch alone has 32
    assert len({gpu.engine_stream().key, *(stream.key for stream in others)}) == 41


def test_memory_grows_and_shrinks_and_keeps_what_is_in_front(gpu):
    span, stream = gpu.span(1, 1 << 28), gpu.new_stream()
    step, tensor = span.step_bytes, span.tensor
    assert tensor.numel() >= 1 << 28
    assert span.mapped_bytes == step
    stream.run(lambda: tensor[:step].fill_(7))
    span.resize(2 * step + 1)
    assert span.mapped_bytes == 3 * step
    stream.run(lambda: tensor[step : 3 * step].fill_(8))
    stream.record().wait()
    span.resize(step)
    assert (int(tensor[:step].min()), int(tensor[:step].max())) == (7, 7)
    before = span.mapped_bytes
    with pytest.raises(DeviceError):
        span.resize(tensor.numel() + step)
    assert span.mapped_bytes == before
    span.close()
    span.close()


@pytest.mark.parametrize("copies", [1, 3])
def test_copies_cross_from_one_piece_of_memory_that_grew_into_the_next(gpu, host, copies):
    """Pages of a pool do: its memory is mapped in steps that no page divides. Alone and as a batch, which are different calls."""
    span, stream = gpu.span(1, 1 << 28), gpu.new_stream()
    span.resize(copies * span.step_bytes + 1)
    host[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    rows = np.arange(copies) * 65536
    borders = span.tensor.data_ptr() + (1 + np.arange(copies)) * span.step_bytes - 16384
    stream.copy(borders, host.ctypes.data + rows, 49152)
    stream.copy(host.ctypes.data + SIZE // 2 + rows, borders, 49152)
    stream.record().wait()
    down, up = host.reshape(2, -1, 65536)[:, :copies, :49152]
    assert np.array_equal(down, up)
    span.close()


def test_what_does_not_fit_is_refused(gpu):
    free, total = gpu.memory()
    assert 0 < free <= total
    with pytest.raises(DeviceError):
        gpu.allocate(total + (1 << 30))


def test_a_pool_gives_back_what_was_written_through_every_way(gpu):
    layout = PageLayout(2, 2, 4, 1, 32, "bf16")
    pool = GpuPool(layout, 8 * layout.page_bytes, gpu)
    pages = torch.randn(3, *layout.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool.scatter([5, 0, 2], pages)
    assert torch.equal(pool.gather([0, 5, 2]), pages[[1, 0, 2]])
    pool.write_tokens(3, 1, pages[0, :, :, :2])
    pool.copy(3, 4, 3)
    assert torch.equal(pool.gather([4])[0, :, :, 1:3], pages[0, :, :, :2])
    pool.copy_to([5, 0], pool, [6, 7])
    assert torch.equal(pool.gather([6, 7]), pages[:2])
    pool.scatter([6], pages[2:, 1:], slice(1, 2))
    assert torch.equal(pool.gather([6])[0], torch.stack([pages[0, 0], pages[2, 1]]))
    assert torch.equal(pool.keys([0, 5]).cpu(), pages[[1, 0], :, 0])
    pool.close()


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_captured_graph_replays_over_a_pool_and_kvtier_refuses_to_be_captured():
    gpu = find_accelerator("cuda")
    assert gpu is not None
    layout = PageLayout(2, 2, 4, 1, 32, "bf16")
    pool = GpuPool(layout, 8 * layout.page_bytes, gpu)
    pool.scatter([1], torch.ones(1, *layout.shape).bfloat16())
    out, index = torch.empty((1, *layout.shape[1:]), dtype=torch.bfloat16, device=gpu.device), torch.tensor([1], device=gpu.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.index_select(pool.layer(0), 0, index, out=out)
        with pytest.raises(DeviceError, match="a CUDA graph is being captured"):
            pool.leave()
    pool.scatter([1], torch.full((1, *layout.shape), 2.0).bfloat16())
    pool.reach(16)
    pool.extend(16)
    graph.replay()
    assert out.unique().tolist() == [2.0]


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_every_format_goes_down_and_up_on_the_gpu():
    from benchmarks.gpu_check import FORMATS, check

    gpu = find_accelerator("cuda")
    assert gpu is not None
    assert check(gpu) >= 2 * len(FORMATS)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_whole_cache_on_the_gpu_brings_back_what_was_put():
    from tests.cache.rig import LAYOUT, PAGE, hold, kv_of, make_cache, push_out, put, run

    with make_cache(device__place="cuda", device_pages=16, host_pages=64) as cache:
        for round_number in range(20):
            tokens = run(round_number, 8)
            put(cache, tokens)
            push_out(cache, 900 + round_number)
            with hold(cache, tokens) as lease:
                assert lease.tokens == 8 * PAGE
                slots = torch.as_tensor(lease.slots(), device="cuda")
                found = torch.stack([lease.layer(layer)[slots] for layer in range(LAYOUT.layers)])
                wanted = kv_of(tokens).view(LAYOUT.layers, 2, 8, PAGE, 1, 32).transpose(1, 2)
                assert torch.equal(found.cpu(), wanted)
        cache.check_integrity()
