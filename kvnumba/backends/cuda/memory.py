"""Memory on the device, and copies to and from it; in the simulator it is the host's."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from kvnumba.arrays import DEVICE_DTYPES, DeviceView, contiguous_strides
from kvnumba.backends.cuda.jit import SIMULATED, cuda, driver_call
from kvnumba.formats import FORMATS
from kvnumba.storage import host_memory_bytes

_thread = threading.local()


def enter() -> None:
    """Make the device's context the current one of this thread; every use of the driver needs one."""
    if not SIMULATED and not hasattr(_thread, "entered"):
        cuda.current_context()
        _thread.entered = True


class Memory:
    """Bytes on the device, given back when nothing refers to them any more."""

    def __init__(self, nbytes: int, *, zeros: bool = False) -> None:
        self.nbytes = nbytes
        if SIMULATED:
            self._host = (np.zeros if zeros else np.empty)(max(nbytes, 1), np.uint8)
            self.address = self._host.ctypes.data
            return
        try:
            self.address = int(driver_call("cuMemAlloc", max(nbytes, 1)))
        except MemoryError:
            free, total = _free_and_total_bytes()
            raise MemoryError(
                f"{nbytes:,} bytes are needed on the device, {free:,} of {total:,} are free"
            ) from None
        weakref.finalize(self, _free, self.address)
        if zeros:
            driver_call("cuMemsetD8", self.address, 0, nbytes)
            synchronize()


def free_bytes() -> int:
    """Memory of the device that nobody has taken; in the simulator, of the host."""
    if SIMULATED:
        return host_memory_bytes()
    enter()
    return _free_and_total_bytes()[0]


def _free_and_total_bytes() -> tuple[int, int]:
    free, total = cuda.current_context().get_memory_info()
    return int(free), int(total)


def _free(address: int) -> None:
    enter()
    driver_call("cuMemFree", address)


def synchronize() -> None:
    """Wait for everything that any stream of this process has to do."""
    if not SIMULATED:
        driver_call("cuCtxSynchronize")


def upload(address: int, host: np.ndarray, stream: int) -> None:
    """Copy a C-contiguous array to the device; it may be changed as soon as this returns."""
    if SIMULATED:
        ctypes.memmove(address, host.ctypes.data, host.nbytes)
    elif host.nbytes:
        driver_call("cuMemcpyHtoDAsync", address, host.ctypes.data, host.nbytes, stream)


def clear(address: int, nbytes: int, stream: int) -> None:
    """Fill memory of the device with zeros."""
    if SIMULATED:
        ctypes.memset(address, 0, nbytes)
    elif nbytes:
        driver_call("cuMemsetD8Async", address, 0, nbytes, stream)


def download(host: np.ndarray, address: int, stream: int) -> None:
    """Copy from the device into a C-contiguous array, after all that the stream has to do."""
    if SIMULATED:
        ctypes.memmove(host.ctypes.data, address, host.nbytes)
    elif host.nbytes:
        driver_call("cuMemcpyDtoHAsync", host.ctypes.data, address, host.nbytes, stream)
        driver_call("cuStreamSynchronize", stream)


class Loan:
    """Memory of a pool, which takes it back when nothing refers to this any more."""

    __slots__ = ("_free", "address")

    def __init__(self, address: int, free: list[int]) -> None:
        self.address = address
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.address)


class Pool:
    """Memory that is used again by the stream that used it last: what one call frees the next overwrites in order."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        # here, not in loans: these may become garbage in a cycle, whose members Python tears down in any order
        self._memory: list[Memory] = []

    def take(self, nbytes: int, stream: int, *, zeros: bool = False) -> Loan:
        """So many bytes. `zeros`: of memory that its users leave full of zeros."""
        kind = (stream, (1 << max(nbytes - 1, 255).bit_length()) * (-1 if zeros else 1))
        free = self._free[kind]
        try:
            return Loan(free.pop(), free)
        except IndexError:
            memory = Memory(abs(kind[1]), zeros=zeros)
        self._memory.append(memory)
        return Loan(memory.address, free)

    def put(self, host: np.ndarray, stream: int) -> Loan:
        """A copy of an array."""
        host = np.ascontiguousarray(host)
        loan = self.take(host.nbytes, stream)
        upload(loan.address, host, stream)
        return loan


class DeviceArray:
    """An array on the device, such as a part of the storage: CuPy and torch take it without a copy.

    Indexing it and assigning to it go through a copy of the memory that it spans: convenient, not fast, and not
    to be done while other threads use that memory.

    Parameters
    ----------
    memory : Memory
    offset : int
        Where in it the first element lies, in bytes.
    shape : tuple of int
    strides : tuple of int
        In bytes.
    dtype : dtype
    """

    def __init__(
        self,
        memory: Memory,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._memory = memory
        self._offset = offset
        self.shape = shape
        self.strides = strides
        self.dtype = dtype

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """An array with memory of its own, not initialised."""
        enter()
        dtype = np.dtype(dtype)
        strides = tuple(stride * dtype.itemsize for stride in contiguous_strides(shape))
        return cls(Memory(math.prod(shape) * dtype.itemsize), 0, tuple(shape), strides, dtype)

    @classmethod
    def of(cls, host: np.ndarray) -> DeviceArray:
        """A copy of an array of the host's."""
        made = cls.empty(host.shape, host.dtype)
        made[...] = host
        return made

    @property
    def address(self) -> int:
        """Of the first element."""
        return self._memory.address + self._offset

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": self.strides,
            "version": 3,
        }

    def _spanned(self) -> tuple[np.ndarray, np.ndarray]:
        """A copy of the bytes from the first element to the last, and the array as a view of them."""
        enter()
        synchronize()
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        span = np.empty(last + self.dtype.itemsize if self.size else 0, np.uint8)
        download(span, self.address, 0)
        return span, np.ndarray(self.shape, self.dtype, span, 0, self.strides)

    def copy(self) -> np.ndarray:
        """A copy on the host."""
        return np.ascontiguousarray(self._spanned()[1])

    def tobytes(self) -> bytes:
        """A copy of the elements' bytes."""
        return self.copy().tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on the device cannot be a NumPy array without a copy")
        host = self.copy()
        return host if dtype is None else host.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and self.ndim > 1:  # as the storage of a layer is taken out of all layers'
            offset = self._offset + range(len(self))[index] * self.strides[0]
            return DeviceArray(self._memory, offset, self.shape[1:], self.strides[1:], self.dtype)
        return self._spanned()[1][index]

    def __setitem__(self, index: Any, value: Any) -> None:
        span, host = self._spanned()
        host[index] = value
        upload(self.address, span, 0)
        synchronize()

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {self.shape}, at {self.address:#x})"


def view_of(address: int, shape: tuple[int, ...], dtype: str, like: DeviceView) -> DeviceView:
    """A C-contiguous array at an address, on the device and the stream of another."""
    return DeviceView(address, shape, contiguous_strides(shape), dtype, None, like.stream, like.device)


def row_strides(x: DeviceView) -> tuple[int, int, int]:
    """Of the batch, the tokens and the heads of a view (B, n, heads, ...), in elements."""
    return x.strides[0], x.strides[1], x.strides[2]


def alignment_of(x: DeviceView) -> tuple[int, ...]:
    """Numbers of elements whose greatest common divisor may be read together from where each row begins."""
    if SIMULATED:  # which reads any number from anywhere
        return ()
    itemsize = FORMATS[x.dtype].bits // 8
    return x.address // itemsize, *row_strides(x)


def empty_like(like: DeviceView, shape: tuple[int, ...], dtype: str) -> DeviceView:
    """A new C-contiguous array of the library that another one is of, on the same device."""
    made, address = _maker(type(like.owner).__module__.partition(".")[0])(like.owner, shape, dtype)
    return DeviceView(address, shape, contiguous_strides(shape), dtype, made, like.stream, like.device)


@functools.cache
def _maker(library: str) -> Callable[[Any, tuple[int, ...], str], tuple[Any, int]]:
    """``make(owner, shape, dtype)``: an array of a library, and its address."""
    if library == "torch":
        dtypes = {name: getattr(sys.modules["torch"], name) for name in DEVICE_DTYPES}

        def of_torch(owner: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
            made = owner.new_empty(shape, dtype=dtypes[dtype])
            return made, made.data_ptr()

        return of_torch
    if library == "cupy":
        make = sys.modules["cupy"].empty
    elif library in ("numba", "numba_cuda"):
        make = cuda.device_array
    else:
        make = DeviceArray.empty

    def of_interface(owner: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        made = make(shape, "uint16" if dtype == "bfloat16" else dtype)
        return made, made.__cuda_array_interface__["data"][0]

    return of_interface
