"""How full a block pool is, and what its prefix cache was good for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvnumba.blocks.pool import BlockPool


@dataclass(frozen=True)
class CacheStats:
    """What `PagedKVCache.stats` returns; counters run from the cache's beginning.

    Attributes
    ----------
    num_blocks : int
        ``free_blocks + used_blocks``.
    free_blocks : int
        Blocks that no sequence holds, as `PagedKVCache.num_free_blocks`.
    cached_blocks : int
        Those of the free blocks that a new sequence may find by its tokens; taken last, the oldest first.
    used_blocks, shared_blocks : int
        Blocks that sequences hold, and those of them that several hold.
    num_sequences, swapped_sequences : int
        Live sequences, and those of them that are swapped out.
    num_tokens : int
        Tokens of all live sequences, a shared one counted for each.
    used_bytes, wasted_bytes : int
        Bytes of the used blocks, and those of them that no token fills.
    queries, hits : int
        Tokens that `add_sequence` looked up, and those that it found.
    evictions, copies : int
        Cached blocks that made room, and blocks copied because they were shared when written to.
    """

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    shared_blocks: int
    num_sequences: int
    swapped_sequences: int
    num_tokens: int
    used_bytes: int
    wasted_bytes: int
    queries: int
    hits: int
    evictions: int
    copies: int

    @property
    def utilization(self) -> float:
        """Fraction of the blocks that sequences hold."""
        return self.used_blocks / self.num_blocks

    @property
    def waste(self) -> float:
        """Fraction of the used bytes that no token fills."""
        return self.wasted_bytes / self.used_bytes if self.used_bytes else 0.0

    @property
    def hit_rate(self) -> float:
        """Fraction of the tokens looked up that were found."""
        return self.hits / self.queries if self.queries else 0.0


def collect(pool: BlockPool, bytes_per_token: int) -> CacheStats:
    """The figures of a pool; O(blocks in the pool)."""
    with pool.lock:
        live = np.flatnonzero(pool.ids >= 0)
        filled = np.zeros(pool.num_blocks, np.int64)
        for row in live.tolist():
            columns = np.arange(pool.begin[row], pool.end[row])
            tokens = np.clip(pool.lens[row] - columns * pool.block_size, 0, pool.block_size)
            blocks = pool.table[row, columns]
            filled[blocks] = np.maximum(filled[blocks], tokens)
        used = int((pool.allocator.references > 0).sum())
        return CacheStats(
            num_blocks=pool.num_blocks,
            free_blocks=pool.num_blocks - used,
            cached_blocks=len(pool.prefixes.idle),
            used_blocks=used,
            shared_blocks=int((pool.allocator.references > 1).sum()),
            num_sequences=len(live),
            swapped_sequences=int(pool.away[live].sum()) - len(pool.lost),
            num_tokens=int(pool.lens[live].sum()),
            used_bytes=used * pool.block_size * bytes_per_token,
            wasted_bytes=(used * pool.block_size - int(filled.sum())) * bytes_per_token,
            queries=pool.prefixes.queries,
            hits=pool.prefixes.hits,
            evictions=pool.prefixes.evictions,
            copies=pool.num_copies,
        )
