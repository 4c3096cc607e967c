"""Whole blocks from one place to another."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvnumba.backends.cpu.jit import kernel, plain


class CopyJob(NamedTuple):
    """Of `copy`: (source, destination) pairs (N, 2) int64, and all arrays as (num_layers * num_blocks, bytes) uint8."""

    pairs: Any
    num_layers: int
    num_blocks: int
    arrays: Any


@plain
def copy_row(array, source, destination):
    """Copy a row of an array to another."""
    for i in range(array.shape[1]):
        array[destination, i] = array[source, i]


@kernel
def copy(static, worker, workers, job):
    """Copy blocks of all layers."""
    pairs, num_layers, num_blocks, arrays = job
    count = pairs.shape[0] * num_layers
    for item in range(worker * count // workers, (worker + 1) * count // workers):
        first_block = item % num_layers * num_blocks
        source = first_block + pairs[item // num_layers, 0]
        destination = first_block + pairs[item // num_layers, 1]
        for array in arrays:
            copy_row(array, source, destination)
