"""Whole blocks from place to place."""

from __future__ import annotations

from kvnumba.backends.cpu.jit import kernel, plain


@plain
def copy_row(part, source, destination):
    for i in range(part.shape[1]):
        part[destination, i] = part[source, i]


@kernel
def copy(static, worker, workers, job):
    """Copy blocks of all layers: parts of the storage are (num_layers * num_blocks, bytes of a block)."""
    pairs, num_layers, num_blocks, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = job
    count = pairs.shape[0] * num_layers
    for item in range(worker * count // workers, (worker + 1) * count // workers):
        first_block = item % num_layers * num_blocks
        source = first_block + pairs[item // num_layers, 0]
        destination = first_block + pairs[item // num_layers, 1]
        copy_row(k_codes, source, destination)
        copy_row(k_scale, source, destination)
        copy_row(k_zero, source, destination)
        copy_row(v_codes, source, destination)
        copy_row(v_scale, source, destination)
        copy_row(v_zero, source, destination)
