"""The calls of libcuda that torch does not offer: many copies in one call, and memory that grows behind addresses that stay.

Plain ctypes over the driver that CUDA needs anyway, so nothing is compiled and nothing is installed. Signatures and structs are those of
cuda.h 12.8 to 13 (`cuMemcpyBatchAsync` lost its `failIdx` in 13.0, where the new form is called `_v2`). Stateless but for the library and
the primary contexts, which torch uses too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ushort, c_void_p
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvtier.cuda.surface import Addresses
from kvtier.errors import DeviceError

LIBRARY = "libcuda.so.1"
_DEVICE, _PINNED, _READ_AND_WRITE, _IN_STREAM_ORDER = 1, 1, 3, 1
_PORTABLE_AND_MAPPED = 1 | 2  # for every device, and for kernels, not only for copies
_HAS_VIRTUAL_MEMORY = 102
_KERNELS_USE_HOST_ADDRESSES = 91  # of registered memory
_MINIMUM_GRANULARITY = 0
_RELAXED = 2
_NOT_WITH_THE_DEFAULT_STREAM = 1
_LEGACY_DEFAULT_STREAMS = (0, 1)  # by its null handle, and by its name CU_STREAM_LEGACY


class _Location(Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _Compression(Structure):
    _fields_ = (("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4))


class _Allocation(Structure):
    """CUmemAllocationProp."""

    _fields_ = (("type", c_int), ("handle_types", c_int), ("location", _Location), ("win32", c_void_p), ("flags", _Compression))


class _Access(Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", c_int))


class _CopyAttributes(Structure):
    """CUmemcpyAttributes."""

    _fields_ = (("order", c_int), ("source_hint", _Location), ("target_hint", _Location), ("flags", c_uint))


_SIGNATURES = {
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(_Allocation), c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(_Allocation), c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(_Access), c_size_t),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
}
_BATCH = (c_void_p, c_void_p, c_void_p, c_size_t, POINTER(_CopyAttributes), POINTER(c_size_t), c_size_t)


class Driver:
    """libcuda for one device, by CUDA's number of it. DeviceError for every call that fails."""

    def __init__(self, index: int) -> None:
        self._library = _library()
        self._device = self._device_of(index)
        self._context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)  # held to the end of the process, as torch does
        self.has_virtual_memory = self._has(_HAS_VIRTUAL_MEMORY)
        self.maps_host_memory = self._has(_KERNELS_USE_HOST_ADDRESSES)
        """Whether kernels find registered host memory at the addresses it has on the host."""
        self._in_stream_order = _CopyAttributes(order=_IN_STREAM_ORDER)
        self._first_copy = c_size_t(0)
        self._batch, self._names_failure = self._find_batch()

    @property
    def has_batch_copies(self) -> bool:
        """Whether many copies are one call (drivers of CUDA 12.8 and newer)."""
        return self._batch is not None

    @contextmanager
    def current(self) -> Iterator[None]:
        """The device's context is the calling thread's inside: a thread that has not used CUDA before has none."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Calls of this thread are allowed inside while another one captures a CUDA graph. Otherwise a mere question for an event fails
        and ruins the capture, whose mode is "global" unless the engine says otherwise."""
        mode = c_int(_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", byref(mode))

    def copy(self, targets: Addresses, sources: Addresses, sizes: NDArray[np.uint64], stream: int) -> None:
        """Launch one copy of each of `sizes` bytes on the stream of that handle."""
        count = len(targets)
        if not count == len(sources) == len(sizes):
            raise DeviceError(f"{count} targets, {len(sources)} sources and {len(sizes)} sizes are given for copies; expected as many")
        with self.current():
            if self._batch is None or count == 1 or stream in _LEGACY_DEFAULT_STREAMS:  # which takes no batches
                for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
                    self._call("cuMemcpyAsync", target, source, size, stream)
                return
            arrays = (targets.ctypes.data, sources.ctypes.data, sizes.ctypes.data, count)
            failed = (byref(c_size_t()),) if self._names_failure else ()
            code = self._batch(*arrays, byref(self._in_stream_order), byref(self._first_copy), 1, *failed, stream)
            self._check("cuMemcpyBatchAsync", code)

    def new_stream(self) -> int:
        """The handle of a stream that nobody else has, and that does not wait for the default stream. It lives as long as the process."""
        stream = c_void_p()
        with self.current():
            self._call("cuStreamCreate", byref(stream), _NOT_WITH_THE_DEFAULT_STREAM)
        if stream.value is None:
            raise DeviceError("cuStreamCreate gave no stream")
        return stream.value

    def granularity(self) -> int:
        """Bytes that memory behind addresses comes in multiples of."""
        size = c_size_t()
        with self.current():
            self._call("cuMemGetAllocationGranularity", byref(size), byref(self._allocation()), _MINIMUM_GRANULARITY)
        return size.value

    def reserve(self, size_bytes: int) -> int:
        """The first of `size_bytes` addresses without memory."""
        address = c_uint64()
        with self.current():
            self._call("cuMemAddressReserve", byref(address), size_bytes, 0, 0, 0)
        return address.value

    def free_addresses(self, address: int, size_bytes: int) -> None:
        """Give reserved addresses back; no memory may be behind them."""
        with self.current():
            self._call("cuMemAddressFree", address, size_bytes)

    def map(self, address: int, size_bytes: int, peers: Sequence[int]) -> None:
        """Put new memory behind reserved addresses, for this device and `peers`. DeviceError, and nothing taken, if there is too little."""
        handle = c_uint64()
        with self.current():
            self._call("cuMemCreate", byref(handle), size_bytes, byref(self._allocation()), 0)
            try:
                self._call("cuMemMap", address, size_bytes, 0, handle.value, 0)
            finally:
                self._call("cuMemRelease", handle.value)  # the mapping keeps the memory; without one it is gone
            try:
                self._grant(address, size_bytes, (self._device, *map(self._device_of, peers)))
            except DeviceError:
                self._call("cuMemUnmap", address, size_bytes)
                raise

    def grant(self, address: int, size_bytes: int, peer: int) -> None:
        """Let another device copy from and to memory of one `map`. DeviceError if it cannot reach it."""
        with self.current():
            self._grant(address, size_bytes, (self._device_of(peer),))

    def unmap(self, address: int, size_bytes: int) -> None:
        """Give the memory of one `map` back; the addresses stay reserved."""
        with self.current():
            self._call("cuMemUnmap", address, size_bytes)

    def register(self, address: int, size_bytes: int) -> str | None:
        """Make host memory reachable; why not, if the driver refuses."""
        with self.current():
            code = self._library.cuMemHostRegister_v2(address, size_bytes, _PORTABLE_AND_MAPPED)
        return None if code == 0 else f"cuMemHostRegister failed with error {code}: {self._text(code)}"

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        with self.current():
            self._call("cuMemHostUnregister", address)

    def _grant(self, address: int, size_bytes: int, devices: Sequence[int]) -> None:
        access = (_Access * len(devices))(*(_Access(_Location(_DEVICE, device), _READ_AND_WRITE) for device in devices))
        self._call("cuMemSetAccess", address, size_bytes, access, len(devices))

    def _has(self, attribute: int) -> bool:
        there = c_int()
        self._call("cuDeviceGetAttribute", byref(there), attribute, self._device)
        return bool(there.value)

    def _device_of(self, index: int) -> int:
        device = c_int()
        self._call("cuDeviceGet", byref(device), index)
        return device.value

    def _allocation(self) -> _Allocation:
        return _Allocation(type=_PINNED, location=_Location(_DEVICE, self._device))

    def _find_batch(self) -> tuple[ctypes._NamedFuncPointer | None, bool]:
        for name, names_failure in (("cuMemcpyBatchAsync_v2", False), ("cuMemcpyBatchAsync", True)):
            function: ctypes._NamedFuncPointer | None = getattr(self._library, name, None)
            if function is not None:
                function.restype = c_int
                function.argtypes = (*_BATCH, *((POINTER(c_size_t),) if names_failure else ()), c_void_p)
                return function, names_failure
        return None, False

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            raise DeviceError(f"{name} failed with error {code}: {self._text(code)}")

    def _text(self, code: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorString(code, byref(text))
        return (text.value or b"unknown").decode()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(f"the CUDA driver cannot be loaded: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = c_int, arguments
    return library
