"""Arrays that other libraries hold on a GPU, as the caches see them: an address, a shape and strides.

Taken from torch tensors, from anything with ``__cuda_array_interface__`` (CuPy, Numba, JAX), and through DLPack.
Nothing is copied and none of these libraries is imported.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from typing import Any

from kvnumba.formats import FORMATS

_TYPE_STRINGS = {"<f4": "float32", "<f2": "float16", "<V2": "bfloat16", "<u2": "bfloat16"}


class DeviceView:
    """An array on a GPU.

    Attributes
    ----------
    address : int
        Of the first element.
    shape, strides : tuple of int
        Strides in elements.
    dtype : str
        "float32", "float16" or "bfloat16"; anything else is the owner's name of it.
    owner : object
        The array of the other library.
    stream : int
        The stream that the library works on now, as the driver knows it; 0 where it has none.
    device : int or None
        Number of the GPU; None where the library does not say.
    """

    __slots__ = ("address", "device", "dtype", "owner", "shape", "stream", "strides")

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        owner: Any,
        stream: int,
        device: int | None,
    ) -> None:
        self.address = address
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.owner = owner
        self.stream = stream
        self.device = device

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def swapaxes(self, a: int, b: int) -> DeviceView:
        """The same elements with two axes exchanged."""
        shape, strides = list(self.shape), list(self.strides)
        shape[a], shape[b] = shape[b], shape[a]
        strides[a], strides[b] = strides[b], strides[a]
        return self._reshaped(tuple(shape), tuple(strides))

    def __getitem__(self, index: None) -> DeviceView:
        """With an axis of length 1 in front: ``view[None]``, as of a NumPy array."""
        return self._reshaped((1, *self.shape), (0, *self.strides))

    def _reshaped(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceView:
        return DeviceView(self.address, shape, strides, self.dtype, self.owner, self.stream, self.device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceView:
        """A new C-contiguous array of the same library, on the same device."""
        kind = type(self.owner).__module__.partition(".")[0]
        if kind == "torch":
            torch = sys.modules["torch"]
            made = self.owner.new_empty(shape, dtype=getattr(torch, dtype))
            address = made.data_ptr()
        else:
            made = _empty(kind, shape, dtype)
            address = made.__cuda_array_interface__["data"][0]
        return DeviceView(address, shape, contiguous_strides(shape), dtype, made, self.stream, self.device)

    def nowhere(self, shape: tuple[int, ...], dtype: str) -> DeviceView:
        """An array that is not there, at address 0."""
        return DeviceView(0, shape, contiguous_strides(shape), dtype, None, self.stream, self.device)


def device_view(x: Any) -> DeviceView | None:
    """`x` as a view where it lies on a GPU, else None."""
    kind = type(x).__module__.partition(".")[0]
    if kind == "numpy":
        return None
    if kind == "torch":
        return _of_torch(x) if x.is_cuda else None
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is not None:
        return _of_interface(x, kind, interface)
    locate = getattr(x, "__dlpack_device__", None)
    if locate is not None and locate()[0] == _DLPACK_CUDA:
        return _of_dlpack(x)
    return None


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of C order, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return tuple(strides)


def _of_torch(x: Any) -> DeviceView:
    stream_of = sys.modules["torch"]._C._cuda_getCurrentRawStream
    device = x.get_device()
    return DeviceView(
        x.data_ptr(), tuple(x.shape), x.stride(), _torch_name(x.dtype), x, stream_of(device), device
    )


@functools.cache
def _torch_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _of_interface(x: Any, kind: str, interface: dict[str, Any]) -> DeviceView:
    shape, typestr = tuple(interface["shape"]), interface["typestr"]
    dtype = _TYPE_STRINGS.get(typestr, typestr)
    strides = contiguous_strides(shape)
    if interface.get("strides") is not None and dtype in FORMATS:
        itemsize = FORMATS[dtype].bits // 8
        strides = tuple(stride // itemsize for stride in interface["strides"])
    stream, device = interface.get("stream") or 0, None
    if kind == "cupy":
        stream, device = sys.modules["cupy"].cuda.get_current_stream().ptr, x.device.id
    # the interface's own names of the two default streams are the driver's
    return DeviceView(interface["data"][0], shape, strides, dtype, x, stream, device)


def _empty(kind: str, shape: tuple[int, ...], dtype: str) -> Any:
    name = "uint16" if dtype == "bfloat16" else dtype
    if kind == "cupy":
        return sys.modules["cupy"].empty(shape, name)
    if kind in ("numba", "numba_cuda"):
        return sys.modules["numba.cuda"].device_array(shape, name)
    from kvnumba.backends.cuda.memory import DeviceArray

    return DeviceArray.empty(shape, name)


_DLPACK_CUDA = 2
_DLPACK_NAMES = {(2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16"}  # type code, bits


class _DLTensor(ctypes.Structure):
    """As dlpack.h has it (https://dmlc.github.io/dlpack/latest/c_api.html)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _of_dlpack(x: Any) -> DeviceView:
    capsule = x.__dlpack__(stream=1)  # the legacy default stream, which is where the work will be
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(pointer_of(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape)
    dtype = _DLPACK_NAMES.get((tensor.code, tensor.bits), f"DLPack type {tensor.code} of {tensor.bits} bits")
    # the capsule is not consumed: it frees what it holds when it goes, and `x` owns the memory
    return DeviceView((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, x, 0, tensor.device_id)
