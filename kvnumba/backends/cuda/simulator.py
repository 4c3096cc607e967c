"""The names of `hardware` where numba's simulator takes the place of a device: memory is the host's."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numpy as np

from kvnumba.formats import FORMATS, bfloat16_to_float, float_to_bfloat16


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


def loader(fmt, width):
    dtype = FORMATS[fmt].code_dtype
    count = FORMATS[fmt].row_length(width)

    def load(address, values):
        codes = memory(address, count, dtype)
        if fmt == "int4":
            values[0::2], values[1::2] = codes >> 4, codes & 15
        else:
            values[:] = bfloat16_to_float(codes) if fmt == "bfloat16" else codes

    return load


def fresh_loader(width):
    def load(address, values, at):
        values[at : at + width] = memory(address, width, np.float32)

    return load


def storer(fmt, width):
    dtype = FORMATS[fmt].code_dtype
    count = FORMATS[fmt].row_length(width)

    def store(address, values):
        codes = memory(address, count, dtype)
        if fmt == "int4":
            whole = values.astype(np.uint8)
            codes[:] = (whole[0::2] << 4) | whole[1::2]
        else:
            codes[:] = float_to_bfloat16(values) if fmt == "bfloat16" else values

    return store


def index(i):
    return i


def barrier():
    threading.current_thread().syncthreads()  # type: ignore[attr-defined]


def warp_min(x):
    return x


def warp_max(x):
    return x


def warp_sum(x):
    return x
