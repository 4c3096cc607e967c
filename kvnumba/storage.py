"""What a cache is made of: a layout (numbers only) and the buffers that a backend allocates for it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvnumba.formats import SCALE_DTYPE, Format


@dataclass(frozen=True)
class Layout:
    """The shape of a cache's storage: blocks of ``block_size`` tokens, for every layer the same."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    key_format: Format
    value_format: Format
    group_size: int

    def codes_shape(self, fmt: Format) -> tuple[int, ...]:
        """``(num_layers, num_blocks, H, block_size, row length)``: a block's tokens of a head lie in one run."""
        return (*self._rows_shape(), fmt.row_length(self.head_dim))

    def scales_shape(self, fmt: Format) -> tuple[int, ...]:
        """``(num_layers, num_blocks, H, block_size, groups)``, of the scales and of the zero points."""
        return (*self._rows_shape(), fmt.scales_per_row(self.head_dim, self.group_size))

    def bytes_per_token(self) -> int:
        """Bytes that a token takes: keys, values, scales and zero points over all layers and heads."""
        formats = (self.key_format, self.value_format)
        row_bytes = sum(fmt.row_bytes(self.head_dim, self.group_size) for fmt in formats)
        return self.num_layers * self.num_kv_heads * row_bytes

    def memory_bytes(self) -> int:
        """Bytes of the whole storage."""
        return self.num_blocks * self.block_size * self.bytes_per_token()

    def describe_formats(self) -> str:
        """``int8``, or ``keys int8, values int4``."""
        if self.key_format == self.value_format:
            return self.key_format.name
        return f"keys {self.key_format.name}, values {self.value_format.name}"

    def _rows_shape(self) -> tuple[int, ...]:
        return (self.num_layers, self.num_blocks, self.num_kv_heads, self.block_size)


class Encoded(NamedTuple):
    """Rows in a storage format; `scale` and `zero` have no groups where the format is not quantised."""

    codes: Any
    scale: Any
    zero: Any


def empty_rows(count: int, head_dim: int, fmt: Format, group_size: int) -> Encoded:
    """Room on the host for rows (count, ...) of a format, to be written."""
    groups = fmt.scales_per_row(head_dim, group_size)
    codes = np.empty((count, fmt.row_length(head_dim)), fmt.code_dtype)
    scale, zero = (np.empty((count, groups), SCALE_DTYPE) for _ in range(2))
    return Encoded(codes, scale, zero)


@dataclass(frozen=True)
class Buffers:
    """The arrays of one cache, shaped as its layout says, on the backend's own device."""

    layout: Layout
    keys: Encoded
    values: Encoded


def allocate_on_host(
    layout: Layout, zeros: Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray] = np.zeros
) -> Buffers:
    """Zeroed NumPy buffers, made by ``zeros(shape, dtype)``; pages that are never written take no memory."""

    def encoded(fmt: Format) -> Encoded:
        shape = layout.scales_shape(fmt)
        return Encoded(
            zeros(layout.codes_shape(fmt), fmt.code_dtype),
            zeros(shape, SCALE_DTYPE),
            zeros(shape, SCALE_DTYPE),
        )

    return Buffers(layout, encoded(layout.key_format), encoded(layout.value_format))


def host_memory_bytes() -> int:
    """The machine's memory; 16 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 34


def part_shapes(layout: Layout, num_blocks: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of what `Backend.read_blocks` returns, keys before values: codes, scales, zero points."""
    parts = []
    for fmt in (layout.key_format, layout.value_format):
        codes, scales = layout.codes_shape(fmt), layout.scales_shape(fmt)
        parts += [(codes, fmt.code_dtype), (scales, SCALE_DTYPE), (scales, SCALE_DTYPE)]
    return [((shape[0], num_blocks, *shape[2:]), dtype) for shape, dtype in parts]


def copy_blocks_on_host(buffers: Buffers, pairs: np.ndarray) -> None:
    """Copy whole blocks of NumPy buffers, as `Backend.copy_blocks`."""
    source, destination = pairs.T
    for part in (*buffers.keys, *buffers.values):
        part[:, destination] = part[:, source]


def read_blocks_on_host(buffers: Buffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
    """Copies of whole blocks of NumPy buffers, as `Backend.read_blocks`."""
    keys, values = (Encoded(*(part[:, blocks] for part in kept)) for kept in (buffers.keys, buffers.values))
    return keys, values


def write_blocks_on_host(buffers: Buffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
    """Whole blocks into NumPy buffers, as `Backend.write_blocks`."""
    for part, new in zip((*buffers.keys, *buffers.values), (*keys, *values), strict=True):
        part[:, blocks] = new


@dataclass(frozen=True)
class Batch:
    """The new tokens of some sequences and the blocks that these lie in: integers only.

    Attributes
    ----------
    block_table : (B, max_blocks) int32
        Block ids of each sequence, in order; entries past its length are not read.
    seq_lens : (B,) int32
        Tokens of each sequence, the new ones included.
    query_start_loc : (B + 1,) int32
        Where each sequence's new tokens begin among all T of them.
    block_size : int
        Tokens of a block.
    """

    block_table: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    block_size: int

    @classmethod
    def of(cls, block_table: np.ndarray, seq_lens: np.ndarray, num_new_tokens: Any, block_size: int) -> Batch:
        """A batch from what each sequence adds; `seq_lens` counts these tokens already."""
        query_start_loc = np.zeros(len(seq_lens) + 1, np.int32)
        np.cumsum(num_new_tokens, out=query_start_loc[1:])
        return cls(block_table, seq_lens, query_start_loc, block_size)

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together (T)."""
        return int(self.query_start_loc[-1])

    @functools.cached_property
    def slot_mapping(self) -> np.ndarray:
        """``block * block_size + offset`` of each new token, (T,) int64."""
        block_size = self.block_size
        num_new_tokens = np.diff(self.query_start_loc)
        sequence = np.repeat(np.arange(len(num_new_tokens)), num_new_tokens)
        first_position = self.seq_lens - self.query_start_loc[1:]
        position = np.arange(len(sequence)) + first_position[sequence]
        block = self.block_table[sequence, position // block_size].astype(np.int64)
        return block * block_size + position % block_size


@dataclass(frozen=True)
class Scoring:
    """How scores are made from ``q . k``; checked, every default filled in."""

    sm_scale: float
    window_left: int
    logits_soft_cap: float
    sinks: np.ndarray | None
    alibi_slopes: np.ndarray | None
    arithmetic: str
