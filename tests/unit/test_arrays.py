"""Arrays of other libraries, as far as they can be seen without a GPU: nothing here is read, only described."""

import ctypes

import numpy as np
import pytest

from kvnumba import arrays as views
from kvnumba.arrays import device_view


class WithInterface:
    def __init__(self, **interface):
        self.__cuda_array_interface__ = {"version": 3, "data": (4096, False), **interface}


class WithDLPack:
    """A capsule over made-up memory of a GPU; nobody owns it, so nothing is freed."""

    def __init__(self, code, bits, shape, strides, device=2, number=0):
        self.device = device
        self.dims = (ctypes.c_int64 * len(shape))(*shape)
        self.steps = (ctypes.c_int64 * len(shape))(*strides) if strides else None
        pointer = ctypes.POINTER(ctypes.c_int64)
        self.tensor = views._DLTensor(
            4096, device, number, len(shape), code, bits, 1,
            ctypes.cast(self.dims, pointer), ctypes.cast(self.steps, pointer), 64,
        )  # fmt: skip

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self, stream=None):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


def test_the_hosts_arrays_are_none():
    assert device_view(np.zeros(3)) is None
    assert device_view([1.0, 2.0]) is None
    assert device_view(WithDLPack(2, 32, (3,), None, device=1)) is None


@pytest.mark.parametrize(
    ("typestr", "dtype"), [("<f4", "float32"), ("<f2", "float16"), ("<u2", "bfloat16"), ("<f8", "<f8")]
)
def test_the_array_interface(typestr, dtype):
    view = device_view(WithInterface(shape=(2, 3, 8), typestr=typestr, strides=None, stream=7))
    assert (view.address, view.shape, view.strides, view.dtype) == (4096, (2, 3, 8), (24, 8, 1), dtype)
    assert (view.stream, view.ndim, view.size) == (7, 3, 48)


def test_views_of_views():
    view = device_view(WithInterface(shape=(2, 3, 8), typestr="<f2", strides=(2, 64, 8)))
    assert view.strides == (1, 32, 4)
    assert (view.swapaxes(0, 2).shape, view.swapaxes(0, 2).strides) == ((8, 3, 2), (4, 32, 1))
    assert (view[None].shape, view[None].strides[1:]) == ((1, 2, 3, 8), (1, 32, 4))


@pytest.mark.parametrize(
    ("code", "bits", "dtype"),
    [(2, 32, "float32"), (2, 16, "float16"), (4, 16, "bfloat16"), (0, 32, "DLPack type 0 of 32 bits")],
)
def test_dlpack(code, bits, dtype):
    view = device_view(WithDLPack(code, bits, (2, 3, 8), None))
    assert (view.address, view.shape, view.strides, view.dtype) == (4096 + 64, (2, 3, 8), (24, 8, 1), dtype)
    assert device_view(WithDLPack(code, bits, (2, 3, 8), (1, 2, 6))).strides == (1, 2, 6)
    assert view.device == 0
    assert device_view(WithDLPack(code, bits, (2, 3, 8), None, number=3)).swapaxes(0, 1).device == 3
