"""Blocks that lie in several places, dealt out to them in turn or place by place. Integers only."""

from __future__ import annotations

import numpy as np

from kvnumba.blocks.allocator import BlockAllocator, Fill
from kvnumba.blocks.prefix import NO_BLOCK, PrefixIndex

PLACEMENTS = ("turn", "sequence")


class DealingAllocator(BlockAllocator):
    """An allocator of blocks in several shards: block b is in shard ``b % num_shards``.

    With the placement "turn" the blocks of a sequence are in one shard after the other, with "sequence" in one. A new
    sequence begins where the most blocks are free. A shard that is full is passed over: what is placed elsewhere is as
    good, though not as even.

    Shards may be closed. Then their blocks cannot be taken, nor found.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefixes: PrefixIndex, *, num_shards: int, placement: str
    ) -> None:
        super().__init__(num_blocks, block_size, prefixes)
        self.num_shards = num_shards
        self._step = {"turn": 1, "sequence": 0}[placement]
        self.closed = np.zeros(num_shards, bool)
        # of each shard the free blocks, the next to be taken last
        self._free = [
            np.arange(shard, num_blocks, num_shards, dtype=np.int32)[::-1].tolist()
            for shard in range(num_shards)
        ]

    @property
    def num_free_blocks(self) -> int:
        return sum(map(len, self._free)) + len(self._prefixes.idle)

    @property
    def free_blocks(self) -> np.ndarray:
        free = np.array([block for free in self._free for block in free], np.int32)
        unheld = np.flatnonzero(self.references == 0)
        return np.concatenate((free, unheld[self.closed[unheld % self.num_shards]]))

    def take_after(self, last: np.ndarray, counts: np.ndarray, fill: Fill | None = None) -> np.ndarray:
        wanted: list[int] = []
        room = np.where(self.closed, -1, [len(free) for free in self._free])
        for block, count in zip(last.tolist(), counts.tolist(), strict=True):
            first = int(room.argmax()) if block == NO_BLOCK else block % self.num_shards + self._step
            shards = (first + self._step * np.arange(count)) % self.num_shards
            room = room - np.bincount(shards, minlength=self.num_shards)
            wanted += shards.tolist()
        return self._hand_out(self._take_in(wanted), fill)

    def take_like(self, blocks: np.ndarray, fill: Fill | None = None) -> np.ndarray:
        return self._hand_out(self._take_in((blocks % self.num_shards).tolist()), fill)

    def _take_in(self, wanted: list[int]) -> np.ndarray:
        """Blocks of these shards, or of those with the most room where they have none."""
        for _ in range(len(wanted) - sum(map(len, self._free))):
            self._push(np.array([self._prefixes.evict()]))
        taken = [(self._free[shard] or max(self._free, key=len)).pop() for shard in wanted]
        return np.array(taken, np.int32)

    def _push(self, blocks: np.ndarray) -> None:
        for block in blocks.tolist():
            if not self.closed[block % self.num_shards]:
                self._free[block % self.num_shards].append(block)

    def close(self, shards: np.ndarray) -> None:
        """Let no block of these shards be taken or found any more."""
        self.closed[shards] = True
        for shard in shards.tolist():
            self._free[shard] = []
        for block in np.flatnonzero(self._prefixes.findable).tolist():
            if self.closed[block % self.num_shards]:
                self._prefixes.forget(block)
                self._prefixes.idle.pop(block, None)

    def open(self, shards: np.ndarray) -> None:
        """Let the blocks of closed shards be taken again; those that sequences still hold are free when they let go."""
        for shard in shards[self.closed[shards]].tolist():
            self.closed[shard] = False
            self._push(
                np.flatnonzero(self.references[shard :: self.num_shards] == 0)[::-1] * self.num_shards + shard
            )

    def used_blocks(self) -> np.ndarray:
        """Of each shard the blocks that sequences hold: (num_shards,) int64."""
        return np.bincount(np.flatnonzero(self.references) % self.num_shards, minlength=self.num_shards)
