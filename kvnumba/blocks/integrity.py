"""What must be true of a block pool at all times."""

from __future__ import annotations

import numpy as np

from kvnumba.blocks.pool import BlockPool
from kvnumba.blocks.prefix import NO_BLOCK, TOKEN_DTYPE


def check_pool(pool: BlockPool) -> None:
    """Raise RuntimeError unless reference counts, free blocks, tables and the prefix index agree."""
    with pool.lock:
        live = np.flatnonzero(pool.ids >= 0)
        _check_rows(pool, live)
        held = [pool.table[row, pool.begin[row] : pool.end[row]] for row in live]
        counted = np.bincount(np.concatenate([np.empty(0, np.int32), *held]), minlength=pool.num_blocks)
        wrong = np.flatnonzero(counted != pool.allocator.references)
        if len(wrong):
            block = wrong[0]
            raise RuntimeError(
                f"block {block}: {counted[block]} sequences hold it, {pool.allocator.references[block]} references"
            )
        pool.prefixes.check()
        idle = np.array(list(pool.prefixes.idle), np.int64)
        if not pool.prefixes.findable[idle].all() or pool.prefixes.findable[pool.allocator.free_blocks].any():
            raise RuntimeError("an idle block cannot be found, or a free one can")
        unheld = np.sort(np.concatenate([idle, pool.allocator.free_blocks]))
        if not np.array_equal(unheld, np.flatnonzero(pool.allocator.references == 0)):
            raise RuntimeError("idle and free blocks are not those without references, each once")


def _check_rows(pool: BlockPool, live: np.ndarray) -> None:
    blocks = -(-pool.lens[live] // pool.block_size)
    here = ~pool.away[live]
    if (pool.begin[live] > pool.end[live]).any() or (pool.end[live] < blocks)[here].any():
        raise RuntimeError("a sequence holds fewer blocks than its tokens need")
    if (pool.ids[live] % pool.max_num_seqs != live).any():
        raise RuntimeError("a sequence is in another's row")
    empty = np.setdiff1d(np.arange(pool.max_num_seqs), live)
    if pool.end[empty].any() or pool.lens[empty].any() or set(pool.chains) != set(live.tolist()):
        raise RuntimeError("a row without a sequence is not empty")
    if not set(pool.kept) <= set(live.tolist()):
        raise RuntimeError("a row without a sequence has positions of tokens")
    if pool.num_windowed != (pool.windows[live] >= 0).sum() or (pool.windows[empty] >= 0).any():
        raise RuntimeError("sequences with a window are counted wrongly")
    for row in live.tolist():
        table = pool.table[row, : pool.end[row]]
        if len(set(table[pool.begin[row] :].tolist())) != pool.end[row] - pool.begin[row]:
            raise RuntimeError(f"sequence {pool.ids[row]} holds a block twice")
        if (table[: pool.begin[row]] != NO_BLOCK).any():
            raise RuntimeError(f"sequence {pool.ids[row]} still lists a block that it has given back")
        _check_chain(pool, row)
        _check_kept(pool, row)


def _check_chain(pool: BlockPool, row: int) -> None:
    chain = pool.chains[row]
    known = len(chain.entries) * pool.block_size + len(chain.tail) // TOKEN_DTYPE.itemsize
    if not known == chain.length <= pool.lens[row]:
        raise RuntimeError(
            f"sequence {pool.ids[row]}: more tokens are known than it has, or their count is wrong"
        )
    parent: int | str = chain.salt
    for entry in chain.entries:
        if entry.key.parent != parent:
            raise RuntimeError(f"sequence {pool.ids[row]}: its known tokens do not follow each other")
        parent = entry.number


def _check_kept(pool: BlockPool, row: int) -> None:
    kept = pool.kept.get(row)
    if kept is None:
        return
    if len(kept) - 1 > pool.lens[row] or (np.diff(kept, prepend=-1) < 1).any() or kept[-1] < len(kept):
        raise RuntimeError(f"sequence {pool.ids[row]}: its tokens do not stand one after the other")
    known = pool.chains[row].length
    if known > len(kept) - 1 or (kept[:known] != np.arange(known)).any():
        raise RuntimeError(f"sequence {pool.ids[row]}: tokens are known beyond the first that it has dropped")
