"""The names of `hardware` where numba's simulator takes the place of a device: memory is the host's."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numpy as np

from kvnumba.formats import (
    FORMATS,
    bfloat16_to_float,
    float_to_bfloat16,
    float_to_fp8_e4m3,
    fp8_e4m3_to_float,
    pack_int4,
    unpack_int4,
)


@functools.cache
def _bytes(count: int) -> Any:
    return ctypes.c_char * count


def memory(address: int, count: int, dtype: Any) -> np.ndarray:
    """The host memory at an address as a vector."""
    dtype = np.dtype(dtype)
    return np.frombuffer(_bytes(count * dtype.itemsize).from_address(int(address)), dtype)


def load_int(address):
    return ctypes.c_int32.from_address(int(address)).value


def load_float(address):
    return np.float32(ctypes.c_float.from_address(int(address)).value)


load_fresh = load_float


def load_half(address):
    return np.float32(memory(address, 1, np.float16)[0])


def store_half(address, value):
    memory(address, 1, np.float16)[0] = value


def round_to_half(x):
    return np.float32(np.float16(x))


def multiply(a, b):
    return a * b


def store_float(address, value):
    ctypes.c_float.from_address(int(address)).value = value


def store_int(address, value):
    ctypes.c_int32.from_address(int(address)).value = value


def count_up(address):
    before = load_int(address)  # one block runs at a time, and one thread of it counts
    store_int(address, before + 1)
    return before


def round_to_int(x):
    return int(np.rint(x))


def quotient(a, b):
    return a // b


def remainder(a, b):
    return a % b


_LOAD = {"bfloat16": bfloat16_to_float, "fp8_e4m3": fp8_e4m3_to_float, "int4": unpack_int4}
_STORE = {
    "bfloat16": float_to_bfloat16,
    "fp8_e4m3": float_to_fp8_e4m3,
    "int4": lambda values: pack_int4(values.astype(np.uint8)),
}
"""Stored elements -> numbers, and back, for formats whose elements are not numbers of NumPy's."""


def bytes_at(address, count):
    return memory(address, count, np.uint8)


def floats_at(address, count):
    return memory(address, count, np.float32)


def loader(name, width):
    fmt = FORMATS[name]
    count = fmt.row_length(width)

    def load(address, values):
        stored = memory(address, count, fmt.code_dtype)
        values[:] = _LOAD[name](stored) if name in _LOAD else stored

    return load


def fresh_loader(width):
    def load(address, values, at):
        values[at : at + width] = memory(address, width, np.float32)

    return load


def storer(name, width):
    fmt = FORMATS[name]
    count = fmt.row_length(width)

    def store(address, values):
        memory(address, count, fmt.code_dtype)[:] = _STORE[name](values) if name in _STORE else values

    return store


def index(i):
    return i


def barrier():
    threading.current_thread().syncthreads()  # type: ignore[attr-defined]


def warp_barrier():
    """A warp is one thread."""


def warp_min(x):
    return x


def warp_max(x):
    return x


def warp_sum(x):
    return x
