"""What a backend is: the few operations that touch floats. Arguments are checked before they get here.

New tokens come as views of shape (B, n, heads, D) with adjacent last elements: B sequences of n tokens
each, or B = 1 and the n tokens of a ragged batch. Token t of a batch is ``view[t // n, t % n]``. They are float32
NumPy arrays; where a backend takes device arrays they may be `DeviceView` of any float type, all of one call.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from kvnumba.formats import Format
from kvnumba.storage import Batch, Buffers, Encoded, Layout, Scoring


class Backend(Protocol):
    """One instance a process; `Buffers` hold arrays of the backend's own kind."""

    name: str
    simulated: bool
    """Whether it imitates a device that is not there: ``auto`` passes it over."""
    device: int | None
    """The GPU with its storage, by number, where new tokens and queries may lie too. None: it is the host's."""

    def allocate(self, layout: Layout) -> Buffers:
        """Zeroed storage. Raises MemoryError where there is no room for it."""
        ...

    def memory_bytes(self) -> int:
        """Bytes that storage may take: what is free on a GPU, all that a host has, which gives it page by page."""
        ...

    def encode(self, x: np.ndarray, fmt: Format, group_size: int) -> Encoded:
        """Rows (N, D) float32 in a storage format: codes (N, row length), scale and zero (N, groups)."""
        ...

    def decode(self, rows: Encoded, fmt: Format) -> np.ndarray:
        """The float32 rows (N, D) that `encode` stored."""
        ...

    def place(self, batch: Batch) -> Any:
        """A batch as the methods below take it, made once for all layers."""
        ...

    def write(self, buffers: Buffers, layer: int, k: Any, v: Any, placed: Any) -> None:
        """Encode keys and values (B, n, H, D) into a layer, where the batch's new tokens belong."""
        ...

    def read(
        self, buffers: Buffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (B, H, length, D) float32 of the first `length` tokens in the blocks of B sequences."""
        ...

    def copy_blocks(self, buffers: Buffers, pairs: np.ndarray) -> None:
        """Copy blocks of all layers bit for bit: (source, destination) pairs (N, 2) int64.

        No block is twice a destination, and none both a source and a destination.
        """
        ...

    def read_blocks(self, buffers: Buffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        """Copies of blocks (N,) of all layers as they are stored, in NumPy arrays: keys and values.

        Each part is shaped as its buffer with N blocks: (num_layers, N, H, block_size, row length or groups).
        """
        ...

    def write_blocks(self, buffers: Buffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        """Store what `read_blocks` returned into blocks (N,), bit for bit."""
        ...

    def plan(self, layout: Layout, placed: Any, num_qo_heads: int, window_left: int) -> Any:
        """The part of `attend` that is the same for all layers of a batch.

        `num_qo_heads` is any multiple of H: for a common prefix, the queries of many sequences come as the heads
        of one token (`cascade.py`).
        """
        ...

    def prepare(self, buffers: Buffers, q: Any, plan: Any, scoring: Scoring) -> None:
        """What calls of `write` and `attend` with tokens and queries such as q would do before their kernels run."""
        ...

    def attend(
        self,
        buffers: Buffers,
        layer: int,
        q: Any,
        plan: Any,
        scoring: Scoring,
        out: Any,
        lse: Any,
    ) -> None:
        """Causal attention of the plan's new tokens, lower-right aligned, straight out of the storage.

        q and out are views (B, n, Hq, D) of one type, lse (B, n, Hq) float32; out and lse are written. A value
        that is not finite may reach new tokens before its own: tiles weigh what is masked with 0.
        """
        ...
