"""Quantisation of whole arrays with the formats that caches use: INT8 and INT4, asymmetric, per row or group."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvnumba.arguments import integer
from kvnumba.arrays import check_finite, float_array, norm_of
from kvnumba.backends.registry import get_backend
from kvnumba.formats import FORMATS, Format, uint8_array
from kvnumba.storage import Encoded, RowLayout


def quantize(
    x: np.ndarray,
    bits: int = 8,
    *,
    group_size: int | None = None,
    scale_dtype: Any = "float32",
    backend: str | None = None,
) -> Encoded:
    """Quantise the last axis: ``x ~ code * scale + zero``, codes from 0 to ``2**bits - 1``.

    Parameters
    ----------
    x : (..., D) float32, float16, float64 or bfloat16
        Finite. D even for 4 bits.
    bits : {8, 4}
    group_size : int, optional
        Elements that share a scale and a zero; divides D. Default: D.
    scale_dtype : {"float32", "float16"}
        Of scale and zero.
    backend : str, optional
        As everywhere: default is the chosen one.

    Returns
    -------
    codes : (..., D) uint8, or (..., D / 2) packed as `kvnumba.pack_int4` does
    scale, zero : (..., D / group_size) scale_dtype
        The step between codes, and the value of code 0. A constant group has scale 0, and is exact where its value
        is one of `scale_dtype`.
    """
    fmt = code_format(bits)
    x = float_array("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last axis of at least one element; got shape {x.shape}")
    rows = RowLayout.of("x: last axis", fmt, x.shape[-1], group_size, scale_dtype)
    check_finite("x", x, rows, norm_of(x))
    encoded = get_backend(backend).encode(x.reshape(-1, x.shape[-1]), rows)
    return Encoded(*(array.reshape(*x.shape[:-1], array.shape[-1]) for array in encoded))


def dequantize(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int = 8, *, backend: str | None = None
) -> np.ndarray:
    """The inverse of `quantize`: (..., D) float32 from codes, scales and zeros shaped as it returns them."""
    fmt = code_format(bits)
    codes = uint8_array("codes", codes)
    scale, zero = np.asarray(scale), np.asarray(zero)
    dtype = np.float16 if scale.dtype == zero.dtype == np.float16 else np.float32
    scale, zero = (
        float_array(name, x).astype(dtype, copy=False) for name, x in (("scale", scale), ("zero", zero))
    )
    head_dim = fmt.head_dim(codes.shape[-1])
    groups = scale.shape[-1] if scale.ndim else 0
    if scale.shape != zero.shape or scale.shape[:-1] != codes.shape[:-1] or not groups or head_dim % groups:
        raise ValueError(
            f"scale, zero: expected one shape {codes.shape[:-1]} + (groups,), groups a divisor of {head_dim}; "
            f"got {scale.shape} and {zero.shape}"
        )
    rows = RowLayout.of("codes: last axis", fmt, head_dim, head_dim // groups, dtype)
    flat = Encoded(*(array.reshape(-1, array.shape[-1]) for array in (codes, scale, zero)))
    return get_backend(backend).decode(flat, rows).reshape(*codes.shape[:-1], head_dim)


def code_format(bits: int) -> Format:
    """The format whose codes have so many bits."""
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 8 or 4; got {bits!r}")
    return FORMATS[f"int{integer('bits', bits, minimum=4)}"]
