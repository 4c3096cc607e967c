"""One row (head_dim values of a token and head) into and out of its storage format.

Codes are handled as bytes, whatever their type, and the format as a number: one compiled kernel serves
every pair of formats. The conversions are integer arithmetic, which vectorises on every processor; codes
equal NumPy's bit for bit.
"""

from __future__ import annotations

import numpy as np

from kvnumba.backends.cpu.jit import orderless, plain
from kvnumba.formats import FORMATS

FORMAT_ID = {name: number for number, name in enumerate(FORMATS)}
FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 = FORMAT_ID.values()


@plain
def bits_of(x):
    """The bits of a float32, as uint32."""
    return np.float32(x).view(np.uint32)


@plain
def float_of(bits):
    """The float32 of some bits; Numba's integer arithmetic is 64 bits wide, so they are cut to 32 first."""
    return np.uint32(bits).view(np.float32)


@plain
def float_to_half(x):
    """float16 bits, rounded to nearest even (after F. Giesen's float_to_half_fast3_rtne)."""
    bits = bits_of(x)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    bits = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # adding 0.5 aligns a subnormal result to the last bits of the mantissa and rounds it
    tiny = np.uint32(bits_of(float_of(bits) + np.float32(0.5)) - np.uint32(0x3F000000))
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(bits - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    large = np.uint32(0x7E00) if bits > np.uint32(0x7F800000) else np.uint32(0x7C00)
    half = tiny if bits < np.uint32(0x38800000) else normal
    half = half if bits < np.uint32(0x47800000) else large
    return np.uint16(half | sign)


@plain
def half_to_float(half):
    """The float32 value of float16 bits: the exponent is mended by an exact product."""
    bits = np.uint32(half)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    finite = bits_of(float_of(magnitude) * np.float32(2.0**112))
    special = (bits & np.uint32(0x7C00)) == np.uint32(0x7C00)
    value = magnitude | np.uint32(0x7F800000) if special else finite
    return float_of(value | ((bits & np.uint32(0x8000)) << np.uint32(16)))


@plain
def float_to_bfloat16(x):
    """bfloat16 bits, rounded to nearest even."""
    bits = bits_of(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(nan if is_nan else rounded)


@plain
def bfloat16_to_float(bits):
    """The float32 value of bfloat16 bits."""
    return float_of(np.uint32(bits) << np.uint32(16))


@plain
def place(token, head, strides):
    """Where a token's head lies in the memory of a view (B, n, heads, ...), whose strides are in elements."""
    per_batch, batch_stride, token_stride, head_stride = strides
    return token // per_batch * batch_stride + token % per_batch * token_stride + head * head_stride


@plain
def encode_row(x, format_id, codes, scale, zero):
    """Store the float32 row x in `codes` (bytes), and its groups' `scale` and `zero`."""
    size = x.shape[0]
    if format_id == FLOAT32:
        values = codes.view(np.float32)
        for d in range(size):
            values[d] = x[d]
    elif format_id == FLOAT16:
        halves = codes.view(np.uint16)
        for d in range(size):
            halves[d] = float_to_half(x[d])
    elif format_id == BFLOAT16:
        halves = codes.view(np.uint16)
        for d in range(size):
            halves[d] = float_to_bfloat16(x[d])
    else:
        group_size = size // scale.shape[0]
        bytes_per_group = group_size if format_id == INT8 else group_size // 2
        largest = np.float32(255) if format_id == INT8 else np.float32(15)
        for group in range(scale.shape[0]):
            # slices, whose indices start at 0, vectorise where offsets into the whole do not
            values = x[group * group_size : (group + 1) * group_size]
            run = codes[group * bytes_per_group : (group + 1) * bytes_per_group]
            low, high = limits(values)
            step = (high - low) / largest
            scale[group] = step
            zero[group] = low
            divisor = step if step > 0 else np.float32(1)
            if format_id == INT8:
                for d in range(group_size):
                    run[d] = code_of(values[d], low, divisor, largest)
            else:
                for pair in range(bytes_per_group):
                    even = code_of(values[2 * pair], low, divisor, largest)
                    odd = code_of(values[2 * pair + 1], low, divisor, largest)
                    run[pair] = (even << np.uint8(4)) | odd


@orderless
def limits(x):
    """The least and the greatest of some finite values."""
    low, high = x[0], x[0]
    for d in range(x.shape[0]):
        low = min(low, x[d])
        high = max(high, x[d])
    return low, high


@plain
def code_of(x, zero, divisor, largest):
    """The code of one value, rounded to nearest even."""
    return np.uint8(min(np.rint((x - zero) / divisor), largest))


@plain
def decode_rows(codes, scale, zero, format_id, out):
    """Read rows that lie in one run: `codes` is their bytes, out (n, D) float32."""
    count, size = out.shape
    if format_id == FLOAT32:
        values = codes.view(np.float32)
        for r in range(count):
            for d in range(size):
                out[r, d] = values[r * size + d]
    elif format_id == FLOAT16:
        halves = codes.view(np.uint16)
        for r in range(count):
            for d in range(size):
                out[r, d] = half_to_float(halves[r * size + d])
    elif format_id == BFLOAT16:
        halves = codes.view(np.uint16)
        for r in range(count):
            for d in range(size):
                out[r, d] = bfloat16_to_float(halves[r * size + d])
    else:
        group_size = size // scale.shape[1]
        bytes_per_group = group_size if format_id == INT8 else group_size // 2
        for r in range(count):
            for group in range(scale.shape[1]):
                step, low = scale[r, group], zero[r, group]
                first = (r * scale.shape[1] + group) * bytes_per_group
                run = codes[first : first + bytes_per_group]
                row = out[r, group * group_size : (group + 1) * group_size]
                if format_id == INT8:
                    for d in range(group_size):
                        row[d] = np.float32(run[d]) * step + low
                else:
                    for pair in range(bytes_per_group):
                        row[2 * pair] = np.float32(run[pair] >> np.uint8(4)) * step + low
                        row[2 * pair + 1] = np.float32(run[pair] & np.uint8(15)) * step + low
