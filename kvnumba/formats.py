"""Storage formats: how one number of a key or a value is stored. A format is one row of the table below."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Format:
    """One row of the table below; everything else about a format follows from it.

    Attributes
    ----------
    name : str
    bits : int
        Of one stored element.
    kind : {"float", "code", "registered"}
        Whether the stored bits are a number themselves, or an integer that counts steps of a scale, or what functions
        of the user's make of them.
    code_dtype : dtype
        Of the arrays that hold it. Several elements may share one of its elements, as in int4.
    has_scale, has_zero : bool
        Whether a group of elements has a scale, and a zero, the float that code 0 stands for:
        value = code * scale + zero.
    codec : Codec, optional
        The functions of a registered format.
    """

    name: str
    bits: int
    kind: str
    code_dtype: np.dtype[Any]
    has_scale: bool
    has_zero: bool
    codec: Any = None

    @property
    def number(self) -> int:
        """The format's index in the table, on which kernels switch; registered formats have the one that follows."""
        return list(FORMATS).index(self.name) if self.codec is None else len(FORMATS)

    @property
    def max_code(self) -> int:
        """The largest code, of the kind "code"."""
        return (1 << self.bits) - 1

    @property
    def multiple(self) -> int:
        """How many elements are stored together: lengths of rows and groups are multiples of it."""
        return 8 // gcd(8, self.bits)

    def row_length(self, head_dim: int) -> int:
        """Elements of `code_dtype` that hold `head_dim` elements."""
        return head_dim * self.bits // (8 * self.code_dtype.itemsize)

    def head_dim(self, row_length: int) -> int:
        """The inverse of `row_length`."""
        return row_length * 8 * self.code_dtype.itemsize // self.bits


_UINT8, _UINT16 = np.dtype(np.uint8), np.dtype(np.uint16)

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("float32",  32, "float", np.dtype(np.float32), has_scale=False, has_zero=False),
        Format("float16",  16, "float", np.dtype(np.float16), has_scale=False, has_zero=False),
        Format("bfloat16", 16, "float", _UINT16,              has_scale=False, has_zero=False),
        Format("fp8_e4m3",  8, "float", _UINT8,               has_scale=False, has_zero=False),
        Format("int8",      8, "code",  _UINT8,               has_scale=True,  has_zero=True),
        Format("int4",      4, "code",  _UINT8,               has_scale=True,  has_zero=True),
    )
}  # fmt: skip
"""Codes are unsigned. NumPy has no bfloat16 and no fp8: these are kept as their bits. int4 has two neighbours in a
byte, the first in the high four bits."""

REGISTERED: dict[str, Format] = {}
"""Formats of the user's own, see `register_format`."""


def resolve_format(argument: str, value: Any) -> Format:
    """The format that `value`, a name or a NumPy dtype, stands for; `argument` names it in the error."""
    if isinstance(value, str):
        name = value
    else:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = repr(value)
    known = FORMATS | REGISTERED
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}; got {value!r}")
    return known[name]


def float_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 values rounded to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def bfloat16_to_float(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


FP8_E4M3_MAX = 448.0
"""The largest number of fp8_e4m3."""


def float_to_fp8_e4m3(x: np.ndarray) -> np.ndarray:
    """The bits (uint8) of float32 values in the OCP format E4M3, rounded to nearest even.

    There is no infinity: what is larger than 448, infinity too, becomes 448 of its sign. A NaN stays a NaN
    (0x7f or 0xff). As PTX's ``cvt.rn.satfinite.e4m3x2.f32``; the format is that of "FP8 Formats for Deep Learning"
    (Micikevicius et al., 2022).
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    nan = np.isnan(x)
    size = np.where(nan, np.float32(0), np.minimum(np.abs(x), np.float32(FP8_E4M3_MAX)))
    # three bits after the leading one, but never finer than 2**-9, the smallest subnormal number
    exponent = np.where(size < 2.0**-6, -6, np.frexp(size)[1] - 1)
    units = np.rint(np.ldexp(size, 3 - exponent))  # 8 to 16; less where the number is subnormal
    # the leading one adds to the exponent by itself, and so does a carry
    code = np.where(nan, 0x7F, (exponent + 6) * 8 + units).astype(np.uint8)
    return code | (np.signbit(x).astype(np.uint8) << np.uint8(7))


def fp8_e4m3_to_float(bits: np.ndarray) -> np.ndarray:
    """The float32 values of E4M3 bits (uint8)."""
    return _FP8_E4M3_VALUES[bits]


def _fp8_e4m3_values() -> np.ndarray:
    """The value of each of the 256 codes."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(
        exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7)
    ).astype(np.float32)
    value[127] = np.nan
    return np.concatenate((value, -value))


_FP8_E4M3_VALUES = _fp8_e4m3_values()


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, the first of each pair in the high nibble.

    Parameters
    ----------
    codes : (..., D) uint8
        D even, values 0 to 15.

    Returns
    -------
    packed : (..., D / 2) uint8
    """
    codes = uint8_array("codes", codes)
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: expected an even last axis to pack in pairs; got shape {codes.shape}")
    if codes.size and codes.max() > 15:
        raise ValueError(f"codes: expected values 0 to 15; got {codes.max()}")
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_int4`: (..., D / 2) uint8 -> (..., D) uint8."""
    packed = uint8_array("packed", packed)
    return np.stack((packed >> 4, packed & 15), axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def uint8_array(argument: str, x: np.ndarray) -> np.ndarray:
    """`x` as an array of at least one axis, after the check that it holds codes."""
    x = np.asarray(x)
    if x.dtype != np.uint8 or x.ndim == 0:
        raise TypeError(f"{argument}: expected a uint8 array; got {x.dtype} of shape {x.shape}")
    return x
