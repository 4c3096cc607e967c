"""Arrays at the public edge: checked, brought to float32 on the host, or taken as they lie on a GPU.

On a GPU an array is seen as an address, a shape and strides (`DeviceView`). Views are taken of torch tensors, of
anything with ``__cuda_array_interface__`` (CuPy, Numba, JAX), and through DLPack. Nothing is copied and none of these
libraries is imported.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvnumba.arguments import check_shape
from kvnumba.formats import FORMATS, bfloat16_to_float, float_to_bfloat16

if TYPE_CHECKING:
    from kvnumba.storage import Layout, RowLayout

_FLOAT32 = np.dtype(np.float32)
DEVICE_DTYPES = ("float32", "float16", "bfloat16")

_TYPE_STRINGS = {"<f4": "float32", "<f2": "float16", "<V2": "bfloat16", "<u2": "bfloat16"}

_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)

_LARGEST = {
    np.dtype(np.float32): np.float32(np.finfo(np.float32).max / 2),  # their differences are finite
    np.dtype(np.float16): np.float32(_LARGEST_FLOAT16),
}
"""Dtype of scales -> the largest value that rows with scales can hold."""


class Destination(Protocol):
    """What is asked here of the backend that will take an array."""

    name: str
    device: int | None


def float_array(argument: str, x: Any) -> np.ndarray:
    """`x` as float32: from float32 itself, float16, float64, or bfloat16 (its own dtype or uint16 bits)."""
    x = np.asarray(x)
    if x.dtype == _FLOAT32:
        return x
    if is_bfloat16(x.dtype):
        return bfloat16_to_float(x.view(np.uint16))
    if x.dtype in (np.float16, np.float64):
        with np.errstate(over="ignore"):
            return x.astype(np.float32)
    raise TypeError(
        f"{argument}: expected float32, float16, float64 or bfloat16 (its bits as uint16); got {x.dtype}"
    )


@functools.lru_cache(64)  # NumPy takes microseconds to name a dtype
def is_bfloat16(dtype: Any) -> bool:
    """Whether a dtype stands for bfloat16, of which NumPy knows the bits only."""
    return dtype == np.uint16 or getattr(dtype, "name", dtype) == "bfloat16"


def new_tokens(
    names: tuple[str, str],
    k: Any,
    v: Any,
    shape: tuple[int | None, ...],
    axes: str,
    layout: Layout,
    backend: Destination,
) -> tuple[Any, Any]:
    """New keys (*shape, D) and values (*shape, Dv), fit for the layout; None in `shape` is any length.

    float32 arrays, or views of what lies on the backend's device: these are taken as they are, and nobody looks whether
    they are finite.
    """
    layout.watch()
    views = on_device(names[0], k, backend), on_device(names[1], v, backend)
    if (views[0] is None) != (views[1] is None):
        raise TypeError(
            f"{names[1]}: expected an array on the same device as {names[0]}; got a {type(v).__name__} "
            f"beside a {type(k).__name__}"
        )
    keys = float_array(names[0], k) if views[0] is None else views[0]
    check_shape(names[0], keys, (*shape, layout.keys.head_dim), axes)
    values = float_array(names[1], v) if views[1] is None else views[1]
    check_shape(names[1], values, (*keys.shape[:-1], layout.values.head_dim), axes)
    if views[0] is None:
        _check_rows(names[0], keys, layout.keys, layout, axes)
        _check_rows(names[1], values, layout.values, layout, axes)
    return keys, values


def queries(
    argument: str,
    x: Any,
    shape: tuple[int | None, ...],
    axes: str,
    head_axis: int,
    num_kv_heads: int,
    backend: Destination,
) -> Any:
    """Queries of a shape in which None is any length, their heads a multiple of `num_kv_heads`.

    A float32 array, or a view of what lies on the backend's device.
    """
    view = on_device(argument, x, backend)
    array = float_array(argument, x) if view is None else view
    check_shape(argument, array, shape, axes)
    num_qo_heads = array.shape[head_axis]
    if num_qo_heads == 0 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"{argument}: expected a multiple of num_kv_heads={num_kv_heads} query heads; "
            f"got {num_qo_heads} in shape {array.shape}"
        )
    return array


def in_precision_of(x: Any, out: np.ndarray) -> np.ndarray:
    """`out`, which is float32, in the precision of the user's array `x`; float64 stays float32."""
    dtype = getattr(x, "dtype", _FLOAT32)
    if dtype == _FLOAT32:
        return out
    if dtype == np.float16:
        with np.errstate(over="ignore"):  # beyond float16's range is infinity, as everywhere in NumPy
            return out.astype(np.float16)
    if is_bfloat16(dtype):
        return float_to_bfloat16(out).view(dtype)
    return out


def on_device(argument: str, x: Any, backend: Destination) -> DeviceView | None:
    """A view of an array on the backend's GPU, None for a host array; raises if the backend cannot use it."""
    view = device_view(x)
    if view is None:
        return None
    if backend.device is None:
        raise TypeError(
            f"{argument}: expected an array in host memory for the {backend.name} backend; "
            f"got a {type(x).__name__} on a GPU"
        )
    if view.device not in (None, backend.device):
        raise ValueError(
            f"{argument}: expected an array on GPU {backend.device}, where the {backend.name} backend works; "
            f"got one on GPU {view.device}"
        )
    if view.dtype not in DEVICE_DTYPES:
        raise TypeError(f"{argument}: expected {', '.join(DEVICE_DTYPES)} on a GPU; got {view.dtype}")
    if view.size and view.strides[-1] != 1 and view.shape[-1] != 1:
        raise ValueError(
            f"{argument}: expected adjacent elements along the last axis; got strides {view.strides} elements"
        )
    return view


def require_host(argument: str, x: Any) -> None:
    """Raise for an array on a device, where only host memory serves."""
    if isinstance(x, DeviceView):
        raise TypeError(f"{argument}: expected an array in host memory; got one on a GPU")


def norm_of(array: Any) -> float:
    """The root of the sum of squares, which no element exceeds: one pass over them. NaN and infinity stay."""
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(np.dot(flat, flat))


def check_finite(argument: str, array: Any, rows: RowLayout, norm: float) -> None:
    """Raise if rows with scales cannot hold a value: NaN, infinity, or beyond what their scales reach."""
    limit = _LARGEST[rows.scale_dtype]
    if norm <= limit:  # false of NaN and of a sum that overflows
        return
    if array.min() >= -limit and array.max() <= limit:
        return
    outside = ~(np.abs(array) <= limit)
    raise ValueError(
        f"{argument}: expected finite values up to {limit:.2g} for {rows.fmt.name}"
        f"{'' if rows.scale_dtype == np.float32 else ' with float16 scales'}; got {array[outside][0]}"
    )


def _check_rows(argument: str, array: Any, rows: RowLayout, layout: Layout, axes: str) -> None:
    """Raise if the keys or the values of a layout, whose `rows` they are, cannot hold an array's elements."""
    in_float16 = layout.recent_tokens and rows.fmt.bits < 16
    if not rows.fmt.has_scale and not in_float16:
        return
    norm = norm_of(array)
    if rows.fmt.has_scale:
        check_finite(argument, array, rows, norm)
    if in_float16:
        _check_float16(argument, array, layout, rows is layout.keys, axes.split().index("H"), norm)


def _check_float16(
    argument: str, array: np.ndarray, layout: Layout, keys: bool, head_axis: int, norm: float
) -> None:
    """Raise if rows, transformed as they are stored, are beyond what recent tokens in float16 can hold."""
    transform = layout.transform
    factor, offset = (1.0, 0.0) if transform is None or not keys else transform.bounds
    if factor * norm + offset <= _LARGEST_FLOAT16:
        return
    rows = np.moveaxis(array, head_axis, -2)
    stored = [rows]
    if transform is not None:
        layers = range(layout.num_layers)
        stored = [transform.store_keys(rows, n) for n in layers] if keys else [transform.store_values(rows)]
    largest = max(np.abs(x).max(initial=0) for x in stored)
    if largest > _LARGEST_FLOAT16:
        raise ValueError(
            f"{argument}: expected at most {_LARGEST_FLOAT16:.0f} in rows as they are stored, for recent_tokens keeps "
            f"them in float16; got {largest:.6g}"
        )


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

    def nowhere(self, shape: tuple[int, ...], dtype: str) -> DeviceView:
        """A view without memory (address 0), for a result that nobody wants."""
        return DeviceView(0, shape, contiguous_strides(shape), dtype, None, self.stream, self.device)


def device_view(x: Any) -> DeviceView | None:
    """`x` as a view where it lies on a GPU, else None."""
    if type(x) is np.ndarray:
        return None
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


@functools.lru_cache(1024)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of C order, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return tuple(strides)


def _of_torch(x: Any) -> DeviceView:
    device = x.get_device()
    stream = _torch_stream_of()(device)
    return DeviceView(x.data_ptr(), tuple(x.shape), x.stride(), _torch_name(x.dtype), x, stream, device)


@functools.cache
def _torch_stream_of() -> Callable[[int], int]:
    """The function that gives torch's current stream of a device."""
    return sys.modules["torch"]._C._cuda_getCurrentRawStream


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
