"""What a backend is: the few operations that touch floats. Arguments are checked before they get here.

New tokens come as views of shape (B, n, heads, D) with adjacent last elements: B sequences of n tokens each, or B = 1
and the n tokens of a ragged batch. Token t of a batch is ``view[t // n, t % n]``. They are float32 NumPy arrays; where
a backend takes device arrays they may be `DeviceView`s of any float type, the same for all arrays of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvnumba.arrays import DeviceView
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Buffers, Encoded, Layout, Part, RowLayout


class CascadeLimits(NamedTuple):
    """From when on it is faster to read the blocks that several sequences begin with once for all of them.

    Attributes
    ----------
    tile_rows : int
        Rows (tokens times query heads of a KV head) that one read of the keys serves; for more they are read again.
    min_rows : int
        Rows with which a common prefix is worth a part of its own.
    min_bytes : int
        Of a layer's prefix: what is smaller stays in the processor's cache between the reads.
    """

    tile_rows: int
    min_rows: int
    min_bytes: int


class LayerDecoding(Protocol):
    """`write` and `attend` of a layer in one call, see `Backend.decoding`."""

    def run(self, k: int, v: int, q: int, out: int, stream: int) -> None:
        """Given are the addresses of the arrays; out (B, n, Hq, Dv) is contiguous."""
        ...


class Decoding(Protocol):
    """What decode steps of the same sequences share, see `Backend.decoding`."""

    def layer(self, layer: int, scoring: Scoring) -> LayerDecoding | None:
        """That of a layer; None if its options differ in more than the sinks."""
        ...

    def follow(self, written: Sequence[Part], parts: Sequence[Part], stream: int) -> bool:
        """Become the next step's; False if that cannot be, and it is of no use any more.

        `written` is where the step's new tokens are stored, `parts` what they attend to.
        """
        ...


class Backend(Protocol):
    """One instance a process; `Buffers` hold arrays of the backend's own kind."""

    name: str
    simulated: bool
    """Whether it imitates a device that is not there: ``auto`` passes it over."""
    device: int | None
    """The GPU with its storage, by number, where new tokens and queries may lie too. None: it is the host's."""
    cascade: CascadeLimits | None
    """When a common prefix becomes a part of its own; None: never."""
    finds_mass: bool
    """Whether `attend` takes `mass`, and `plan` is asked for it."""

    def allocate(self, layout: Layout) -> Buffers:
        """Zeroed storage. Raises MemoryError where there is no room for it."""
        ...

    def available_bytes(self) -> int:
        """Bytes that storage may take: a GPU's free memory; all of a host's, whose pages are taken when written."""
        ...

    def empty(
        self, like: DeviceView, shape: tuple[int, ...], dtype: str, *, zeros: bool = False
    ) -> DeviceView:
        """A new C-contiguous array of the same library and on the same GPU as `like`, full of `zeros` or anything."""
        ...

    def encode(self, x: np.ndarray, rows: RowLayout) -> Encoded:
        """Rows (N, D) float32 as they are stored: codes (N, row length), scale and zero (N, groups)."""
        ...

    def decode(self, encoded: Encoded, rows: RowLayout) -> np.ndarray:
        """The float32 rows (N, D) that `encode` stored."""
        ...

    def write(self, buffers: Buffers, layer: int, k: Any, v: Any, batch: Batch) -> None:
        """Encode keys (B, n, H, D) and values (B, n, H, Dv) into a layer, where the batch's new tokens belong."""
        ...

    def read(
        self, buffers: Buffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys (B, H, length, D) and values (B, H, length, Dv) of the first `length` tokens of B sequences, float32."""
        ...

    def copy_blocks(self, buffers: Buffers, pairs: np.ndarray) -> None:
        """Copy blocks of all layers bit for bit: (source, destination) pairs (N, 2) int64.

        No block is twice a destination, and none both a source and a destination.
        """
        ...

    def read_blocks(self, buffers: Buffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        """Copies of blocks (N,) of all layers as they are stored, in NumPy arrays: keys and values.

        Each array is shaped as its buffer with N blocks: (num_layers, N, H, block_size, row length or groups).
        """
        ...

    def write_blocks(self, buffers: Buffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        """Store what `read_blocks` returned into blocks (N,), bit for bit."""
        ...

    def plan(self, parts: Sequence[Part], num_qo_heads: int, scoring: Scoring, mass: bool = False) -> Any:
        """What `attend` needs to know of the parts that new tokens attend to, the same for all layers.

        The parts have the same number of KV heads and the same widths; their formats and block sizes may differ. Of
        `scoring` the window and the arithmetic count. `mass` says whether `attend` is given one; then every part has
        all new tokens, in order.
        """
        ...

    def prepare(self, q: Any, plan: Any, scoring: Scoring, written: Sequence[Part]) -> None:
        """Compile and upload now what `attend` with queries such as q, and `write` into some parts, would do first."""
        ...

    def decoding(
        self, q: Any, k: Any, v: Any, written: Sequence[Part], parts: Sequence[Part], scoring: Scoring
    ) -> Decoding | None:
        """`write` and `attend` in one call, for a new token of each sequence and arrays that lie as these do.

        None: this backend, or such a batch, has nothing faster than the two.
        """
        ...

    def attend(
        self, layer: int, q: Any, plan: Any, scoring: Scoring, out: Any, lse: Any, mass: Any = None
    ) -> None:
        """Attention of new tokens over the keys of all parts of a plan, straight out of the storage.

        q (B, n, Hq, D) and out (B, n, Hq, Dv) are of one type, lse (B, n, Hq) is float32; out and lse are written. No
        stride is negative, and the last elements of q and out are adjacent. A token that sees no key gets 0, and an
        lse of -inf. Kernels multiply whole tiles and give what is masked the weight 0; 0 times NaN is NaN, so a key or
        value that is not finite may also reach tokens that do not see it.

        To `mass` (sequences, H, longest sequence) float32, where it is given, each key's weights are added, summed
        over the new tokens and the query heads of its KV head. It is C-contiguous, and where q is.
        """
        ...
