"""What backends do with whole blocks."""

import numpy as np
import pytest

from kvnumba.backends.registry import get_backend
from kvnumba.storage import Encoded, Layout, array_specs


@pytest.fixture(
    params=[
        ("float32", 8, 8, 8),
        ("float16", 6, 6, 6),
        ("bfloat16", 8, 12, 4),
        ("fp8_e4m3", 8, 8, 8),
        ("int8", 8, 4, 4),
        ("int4", 128, 64, 64),
    ]
)
def layout(request):
    """Three layers of 40 blocks, keys in each format, values in int8."""
    name, head_dim, value_head_dim, group_size = request.param
    return Layout.of(
        40,
        16,
        2,
        head_dim,
        name,
        value_format="int8",
        value_head_dim=value_head_dim,
        group_size=group_size,
        scale_dtype="float16" if name == "int8" else "float32",
        num_layers=3,
    )


def noise(layout, num_blocks, rng):
    """Bytes at random, also such as are no numbers."""
    parts = []
    for shape, dtype in array_specs(layout, num_blocks):
        parts.append(rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype))
    return Encoded(*parts[:3]), Encoded(*parts[3:])


def assert_bits(one, other):
    for a, b in zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
        )


def at(parts, blocks):
    return tuple(Encoded(*(part[:, blocks] for part in kept)) for kept in parts)


def test_written_read_and_copied_bit_for_bit(backend, layout, rng):
    backend = get_backend(backend)
    buffers = backend.allocate(layout)
    blocks = rng.permutation(40).astype(np.int32)
    parts = noise(layout, 40, rng)
    backend.write_blocks(buffers, blocks, *parts)
    assert_bits(backend.read_blocks(buffers, blocks), parts)
    assert_bits(backend.read_blocks(buffers, blocks[7:9]), at(parts, slice(7, 9)))
    sources, destinations = np.array([0, 0, 3, 5]), np.array([10, 39, 12, 4])  # one source twice
    backend.copy_blocks(buffers, np.stack([blocks[sources], blocks[destinations]], axis=1).astype(np.int64))
    want = np.arange(40)
    want[destinations] = sources
    assert_bits(backend.read_blocks(buffers, blocks), at(parts, want))


def test_no_blocks_at_all(backend, layout):
    backend = get_backend(backend)
    buffers = backend.allocate(layout)
    none = np.empty(0, np.int32)
    parts = backend.read_blocks(buffers, none)
    assert [part.shape[1] for part in (*parts[0], *parts[1])] == [0] * 6
    backend.write_blocks(buffers, none, *parts)
    backend.copy_blocks(buffers, np.empty((0, 2), np.int64))
