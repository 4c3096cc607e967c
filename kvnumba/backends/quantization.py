"""Quantisation of whole arrays with the formats that caches use: INT8 and INT4, asymmetric, per row or group."""

from __future__ import annotations

import numpy as np

from kvnumba import arguments
from kvnumba.backends.registry import get_backend
from kvnumba.formats import FORMATS, Format, uint8_array
from kvnumba.storage import Encoded


def quantize(
    x: np.ndarray, bits: int = 8, *, group_size: int | None = None, backend: str | None = None
) -> Encoded:
    """Quantise the last axis: ``x ~ code * scale + zero``, codes from 0 to ``2**bits - 1``.

    Parameters
    ----------
    x : (..., D) float32, float16, float64 or bfloat16
        Finite. D even for 4 bits.
    bits : {8, 4}
    group_size : int, optional
        Elements that share a scale and a zero point; divides D. Default: D.
    backend : str, optional
        As everywhere: default is the chosen one.

    Returns
    -------
    codes : (..., D) uint8, or (..., D / 2) packed as `kvnumba.pack_int4` does
    scale, zero : (..., D / group_size) float32
        The step between codes, and the value of code 0. A constant group has scale 0 and is exact.
    """
    fmt = _quantized_format(bits)
    x = arguments.float_array("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last axis of at least one element; got shape {x.shape}")
    arguments.check_finite("x", x, fmt)
    group_size = arguments.group_size(group_size, x.shape[-1], (fmt,))
    rows = get_backend(backend).encode(x.reshape(-1, x.shape[-1]), fmt, group_size)
    return Encoded(*(part.reshape(*x.shape[:-1], part.shape[-1]) for part in rows))


def dequantize(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int = 8, *, backend: str | None = None
) -> np.ndarray:
    """The inverse of `quantize`: (..., D) float32 from codes, scales and zero points shaped as it returns them."""
    fmt = _quantized_format(bits)
    codes = uint8_array("codes", codes)
    scale, zero = arguments.float_array("scale", scale), arguments.float_array("zero", zero)
    head_dim = codes.shape[-1] * 8 // fmt.bits
    groups = scale.shape[-1] if scale.ndim else 0
    if scale.shape != zero.shape or scale.shape[:-1] != codes.shape[:-1] or not groups or head_dim % groups:
        raise ValueError(
            f"scale, zero: expected one shape {codes.shape[:-1]} + (groups,), groups a divisor of {head_dim}; "
            f"got {scale.shape} and {zero.shape}"
        )
    arguments.group_size(head_dim // groups, head_dim, (fmt,))
    flat = Encoded(*(part.reshape(-1, part.shape[-1]) for part in (codes, scale, zero)))
    return get_backend(backend).decode(flat, fmt).reshape(*codes.shape[:-1], head_dim)


def _quantized_format(bits: int) -> Format:
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 8 or 4; got {bits!r}")
    return FORMATS[f"int{bits}"]
