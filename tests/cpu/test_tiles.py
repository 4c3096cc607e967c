"""Tile instructions: their stand-in, and real ones where there are some, against formulas in NumPy."""

import numpy as np
import pytest
from conftest import TESTED

if "cpu" not in TESTED:
    pytest.skip("another backend is chosen", allow_module_level=True)

from numba import njit, types
from numba.extending import intrinsic
from oracle import bfloat16

from kvnumba.backends.cpu import tiles
from kvnumba.backends.cpu.simd import Emitter
from kvnumba.backends.cpu.tiles import AMX, STAND_IN, Tiles

INSTRUCTIONS = [
    STAND_IN,
    pytest.param(AMX, marks=pytest.mark.skipif(not tiles.instructions(), reason="no tiles")),
]
KINDS = {
    "busd": (np.uint8, np.int8),
    "buud": (np.uint8,) * 2,
    "bssd": (np.int8,) * 2,
    "bsud": (np.int8, np.uint8),
}


def product(instructions, kind):
    """A function of memory (3, 16, 64) uint8 that computes tile 0 += tile 1 * tile 2."""

    @intrinsic
    def multiply(typing, memory):
        def generate(context, builder, signature, args):
            e = Emitter(context, builder)
            (memory,) = e.arguments(signature, args)
            tile = Tiles(e, instructions)
            tile.configure()
            for n in range(3):
                tile.load(n, memory.start + n * tiles.TILE, 64)
            if kind == "bfloat16":
                tile.dot_bfloat16(0, 1, 2)
            else:
                tile.dot_bytes(kind, 0, 1, 2)
            tile.store(0, memory.start, 64)
            tile.release()
            return context.get_dummy_value()

        return types.void(memory), generate

    @njit
    def run(memory):
        multiply(memory)

    return run


def floats(memory):
    """bfloat16 bits as they lie, as float32."""
    return (memory.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_bytes(instructions, kind, rng):
    memory = rng.integers(0, 256, (3, 16, 64), np.uint8)
    start = memory[0].view(np.int32).astype(np.int64)
    x = memory[1].view(KINDS[kind][0]).reshape(16, 64).astype(np.int64)
    y = memory[2].view(KINDS[kind][1]).reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16).astype(np.int64)
    want = (start + x @ y).astype(np.int32)  # 32 bits, that wrap around
    product(instructions, kind)(memory)
    np.testing.assert_array_equal(memory[0].view(np.int32), want)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_products_of_bfloat16(instructions, rng):
    """Bit for bit: the first and second numbers of pairs are summed apart, in float32."""
    x, y = (bfloat16(rng.normal(size=(16, 32))) for _ in range(2))
    start = rng.normal(size=(16, 16)).astype(np.float32)
    memory = np.empty((3, 16, 64), np.uint8)
    memory[0].view(np.float32)[:] = start
    for n, bits in ((1, x), (2, y)):
        memory[n].view(np.uint16)[:] = bits.view(np.uint32) >> 16
    first, second = np.zeros((16, 16), np.float32), np.zeros((16, 16), np.float32)
    for k in range(16):
        pairs = y[k].reshape(16, 2)
        first += x[:, 2 * k, None] * pairs[:, 0]
        second += x[:, 2 * k + 1, None] * pairs[:, 1]
    product(instructions, "bfloat16")(memory)
    np.testing.assert_array_equal(memory[0].view(np.float32), start + (first + second))


def test_why_there_are_no_tiles():
    assert (tiles.instructions() is None) == bool(tiles.unavailable_reason())
