"""The states of a block: held, idle, free. Integers only."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from kvnumba.blocks.prefix import PrefixIndex
from kvnumba.errors import CacheFull

logger = logging.getLogger("kvnumba")

Fill = Callable[[np.ndarray], None]
"""Called with blocks that are taken but not yet anyone's, to fill them; if it raises, they are given back."""


class BlockAllocator:
    """Reference counts and free blocks; every operation costs O(blocks touched).

    A block is in one of three states: held by sequences, as many as it has references; idle, held by none but
    findable by its tokens until it is evicted; or on the stack of free blocks.

    Attributes
    ----------
    references : (num_blocks,) int32
    """

    def __init__(self, num_blocks: int, block_size: int, prefixes: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self.references = np.zeros(num_blocks, np.int32)
        self._prefixes = prefixes
        self._block_size = block_size
        self._stack = np.arange(num_blocks, dtype=np.int32)[::-1].copy()
        self._height = num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds: free and idle ones."""
        return self._height + len(self._prefixes.idle)

    @property
    def free_blocks(self) -> np.ndarray:
        """Blocks on the stack, the next to be taken last."""
        return self._stack[: self._height]

    def require(self, needed: int, available: int) -> None:
        """Raise CacheFull unless so many blocks are available."""
        if needed > available:
            raise CacheFull(
                f"{needed} more blocks of {self._block_size} tokens are needed, "
                f"{available} of {self.num_blocks} are free"
            )

    def take_after(self, last: np.ndarray, counts: np.ndarray, fill: Fill | None = None) -> np.ndarray:
        """Take so many blocks for each of some sequences, each with one reference, and fill them.

        `last` are the blocks that they stand after, NO_BLOCK for none. Free blocks are taken first, then idle ones,
        which are evicted.
        """
        return self._hand_out(self._take(int(counts.sum())), fill)

    def take_like(self, blocks: np.ndarray, fill: Fill | None = None) -> np.ndarray:
        """Take a block in place of each of these, likewise."""
        return self._hand_out(self._take(len(blocks)), fill)

    def _take(self, count: int) -> np.ndarray:
        from_stack = min(count, self._height)
        taken = np.empty(count, np.int32)
        taken[:from_stack] = self._stack[self._height - from_stack : self._height][::-1]
        self._height -= from_stack
        for n in range(from_stack, count):
            taken[n] = self._prefixes.evict()
        if from_stack < count:
            logger.debug("%d cached blocks evicted", count - from_stack)
        return taken

    def _hand_out(self, taken: np.ndarray, fill: Fill | None) -> np.ndarray:
        if fill is not None:
            try:
                fill(taken)
            except BaseException:
                self._push(taken[::-1])
                raise
        self.references[taken] = 1
        return taken

    def hold(self, blocks: np.ndarray) -> None:
        """Add a reference to each block; no block may occur twice."""
        if self._prefixes.idle:
            for block in blocks[self.references[blocks] == 0].tolist():
                del self._prefixes.idle[block]
        self.references[blocks] += 1

    def release(self, blocks: np.ndarray) -> None:
        """Take a reference from each block; no block may occur twice. The first is the first to be evicted."""
        left = self.references[blocks] - 1
        self.references[blocks] = left
        self._retire(blocks[left == 0])

    def release_each(self, blocks: np.ndarray) -> None:
        """`release` for blocks that may repeat, once for each time."""
        np.subtract.at(self.references, blocks, 1)
        self._retire(np.unique(blocks[self.references[blocks] == 0]))

    def _retire(self, unheld: np.ndarray) -> None:
        findable = self._prefixes.findable[unheld]
        if findable.any():
            self._prefixes.idle.update(dict.fromkeys(unheld[findable].tolist()))
            unheld = unheld[~findable]
        self._push(unheld)

    def _push(self, blocks: np.ndarray) -> None:
        self._stack[self._height : self._height + len(blocks)] = blocks
        self._height += len(blocks)
