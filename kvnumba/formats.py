"""Storage formats: how one row (``head_dim`` values of one token and head) lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SCALE_DTYPE = np.dtype(np.float32)
"""Of scales and zero points. float32 keeps constant rows exact and the full range of the input; float16
would save 4 of 72 bytes a row in int4 at head_dim 128."""


@dataclass(frozen=True)
class Format:
    """One row of the table below."""

    name: str
    bits: int
    code_dtype: np.dtype[Any]
    quantized: bool

    @property
    def max_code(self) -> int:
        """The largest code of a quantised format."""
        return (1 << self.bits) - 1

    def row_length(self, head_dim: int) -> int:
        """Elements of ``code_dtype`` that hold one row."""
        return head_dim * self.bits // (8 * self.code_dtype.itemsize)

    def scales_per_row(self, head_dim: int, group_size: int) -> int:
        """Scales of one row, and as many zero points."""
        return head_dim // group_size if self.quantized else 0

    def row_bytes(self, head_dim: int, group_size: int) -> int:
        """Bytes of one row, scales and zero points included."""
        scales = 2 * self.scales_per_row(head_dim, group_size) * SCALE_DTYPE.itemsize
        return self.row_length(head_dim) * self.code_dtype.itemsize + scales


FORMATS: dict[str, Format] = {
    "float32":  Format("float32",  32, np.dtype(np.float32), quantized=False),
    "float16":  Format("float16",  16, np.dtype(np.float16), quantized=False),
    "bfloat16": Format("bfloat16", 16, np.dtype(np.uint16),  quantized=False),
    "int8":     Format("int8",      8, np.dtype(np.uint8),   quantized=True),
    "int4":     Format("int4",      4, np.dtype(np.uint8),   quantized=True),
}  # fmt: skip
"""Codes of the quantised formats are unsigned: value = code * scale + zero. bfloat16 is kept as its bits,
int4 two neighbours a byte, the first in the high nibble."""


def resolve_format(argument: str, value: Any) -> Format:
    """The format that `value`, a name or a NumPy dtype, stands for; `argument` names it in the error."""
    if isinstance(value, str):
        name = value
    else:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = repr(value)
    if name not in FORMATS:
        raise ValueError(f"{argument}: expected one of {', '.join(FORMATS)}; got {value!r}")
    return FORMATS[name]


def float_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 values rounded to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def bfloat16_to_float(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


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
