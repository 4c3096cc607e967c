"""The paged cache over several workers."""

from __future__ import annotations

import functools
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvnumba import arguments
from kvnumba.blocks.dealing import PLACEMENTS, DealingAllocator
from kvnumba.blocks.integrity import check_pool
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.recent import RecentTokens
from kvnumba.errors import WorkerLost
from kvnumba.integrations.ray import saving
from kvnumba.integrations.ray.backend import ShardedBackend
from kvnumba.integrations.ray.workers import TIMEOUT, Workers
from kvnumba.storage import Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class WorkerStats(NamedTuple):
    """One worker of a cache.

    Attributes
    ----------
    worker : int
    host : str
    process : int
    cpus : tuple of int
        The processors that it stays on; none where the system does not let it choose.
    state : str
        "alive", or what became of it.
    num_blocks, used_blocks : int
        Blocks of the cache in its shard, and those that sequences hold. Replicas are not counted.
    used_bytes : int
    """

    worker: int
    host: str
    process: int
    cpus: tuple[int, ...]
    state: str
    num_blocks: int
    used_blocks: int
    used_bytes: int


class ShardedKVCache(PagedKVCache):
    """A `PagedKVCache` whose blocks lie in several processes, on this machine or on many, by Ray.

    Every call is that of `PagedKVCache`, with the same answers and errors. Which sequence has which blocks is known
    here, in one place, so that what is booked is booked everywhere or nowhere. Workers store blocks and attend to what
    they have; queries, outputs and lse travel, and of new keys and values each worker gets its own.

    Parameters
    ----------
    num_blocks, block_size, num_kv_heads, head_dim, max_num_seqs, dtype, **options
        As in `PagedKVCache`; `num_blocks` of all workers together.
    workers : int, sequence of mapping, or Workers
        How many to start, or the resources of each, or those that are there: see `Workers`.
    placement : {"turn", "sequence"}
        "turn", the default: the blocks of a sequence go to one worker after the other, so that all read for each token.
        "sequence": to one, where there is room; it is good for many short sequences.
    replicas : int
        Workers that keep each block: with 2, any one may be lost without losing a sequence. Default: 1.
    backend, timeout
        Of workers that are started here, as in `Workers`.

    Raises
    ------
    WorkerLost
        From any call: a worker died, failed, or did not answer within the timeout. The error names it and the sequences
        that had blocks there; they are lost, and can be finished or brought back by `restore`. Others go on.
    """

    @arguments.also_called(num_heads="num_kv_heads")
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_num_seqs: int,
        dtype: Any = np.float32,
        *,
        workers: int | Sequence[Mapping[str, float]] | Workers = 2,
        placement: str = "turn",
        replicas: int = 1,
        backend: str | None = None,
        timeout: float | None = TIMEOUT,
        **options: Unpack[LayoutOptions],
    ) -> None:
        layout = Layout.of(num_blocks, block_size, num_kv_heads, head_dim, dtype, **options)
        self._begin(layout, max_num_seqs, workers, placement, replicas, backend, timeout)

    @classmethod
    def from_layout(  # type: ignore[override]
        cls,
        layout: Layout,
        max_num_seqs: int,
        *,
        workers: int | Sequence[Mapping[str, float]] | Workers = 2,
        placement: str = "turn",
        replicas: int = 1,
        backend: str | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Self:
        """A cache of this layout."""
        cache = cls.__new__(cls)
        cache._begin(layout, max_num_seqs, workers, placement, replicas, backend, timeout)
        return cache

    def _begin(
        self,
        layout: Layout,
        max_num_seqs: int,
        workers: int | Sequence[Mapping[str, float]] | Workers,
        placement: str,
        replicas: int,
        backend: str | None,
        timeout: float | None,
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}; got {placement!r}")
        max_num_seqs = arguments.integer("max_num_seqs", max_num_seqs, minimum=1)
        replicas = arguments.integer("replicas", replicas, minimum=1)
        self._own = not isinstance(workers, Workers)
        if isinstance(workers, Workers):
            for name, given, default in (("backend", backend, None), ("timeout", timeout, TIMEOUT)):
                if given != default:
                    raise TypeError(
                        f"{name}: expected none with workers that are there, which have it; got {given!r}"
                    )
            self.workers = workers
        else:
            self.workers = Workers(workers, backend=backend, timeout=timeout)
        try:
            if replicas > len(self.workers):
                raise ValueError(
                    f"replicas: expected at most the {len(self.workers)} workers; got {replicas}"
                )
            sharded = ShardedBackend(self.workers, replicas)
            allocator = functools.partial(DealingAllocator, num_shards=len(self.workers), placement=placement)
            self._start(layout, max_num_seqs, sharded, allocator)
        except BaseException:
            self.close()
            raise
        self._sharded = sharded
        self._name = secrets.token_hex(8)  # in what is saved: ids are those of this cache
        here = weakref.ref(self)
        sharded.on_loss = lambda gone, error: _told(here, lambda cache: cache._lose(gone, error)) or []
        sharded.on_return = lambda shards: _told(here, lambda cache: cache._reopen(shards))
        if sharded.gone.any():
            self._lose(sharded.gone, WorkerLost("lost before", self.workers.lost))

    def close(self) -> None:
        """Stop the workers, if this cache has started them. Its blocks are gone then."""
        if self._own:
            self.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lose(self, gone: np.ndarray, error: WorkerLost) -> list[int]:
        """Shards (num_shards,) bool are gone: so are the sequences that had blocks there; returns their ids.

        What others keep in float is dealt out over all shards. They go on without it: their blocks have all tokens.
        """
        with self._pool.lock:
            self._dealer.close(np.flatnonzero(gone))
            if self._recent is not None:
                self._recent = None
                self._pool.expire()
            blocks = np.arange(self.num_blocks)
            ids = self._pool.lose(gone[blocks % len(self.workers)], error)
            for seq_id in ids:
                self._steps.pop(seq_id, None)
            return ids

    def _reopen(self, shards: np.ndarray) -> None:
        """Shards are there again, empty."""
        with self._pool.lock:
            self._dealer.open(np.flatnonzero(shards))
            if self._layout.recent_tokens:
                self._recent = RecentTokens(self._backend, self._layout, self._max_num_seqs)
                self._start_recent(seq_id for seq_id in self._pool.live() if not self._pool.is_away(seq_id))

    @property
    def _dealer(self) -> DealingAllocator:
        assert isinstance(self._pool.allocator, DealingAllocator)
        return self._pool.allocator

    def save(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Write all sequences and all findable blocks to a folder: a file for each worker, which it writes itself.

        As `PagedKVCache.save`. All workers must see the folder under this path. What was saved there before stays as it
        is until all is written.
        """
        self._sharded.again(
            saving.save,
            Path(path).absolute(),
            self._sharded,
            self._buffers,
            self._pool,
            fingerprint,
            self._name,
        )

    def load(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> dict[int, int]:
        """Add the sequences and findable blocks of a folder that `save` wrote, all or nothing.

        As `PagedKVCache.load`. The cache that was saved may have had more or fewer workers.
        """
        with self._pool.lock:
            ids = self._sharded.again(
                saving.load, Path(path).absolute(), self._sharded, self._buffers, self._pool, fingerprint
            )
            self._start_recent(ids.values())
        return ids

    def restore(self, path: str | os.PathLike[str] | None = None, *, fingerprint: str = "") -> list[int]:
        """Start workers in the places of lost ones, and bring lost sequences back as they were saved.

        Nothing else may use the workers meanwhile.

        Parameters
        ----------
        path : path, optional
            What `save` of this cache wrote. None: blocks come from replicas alone.
        fingerprint : str
            As it was given to `save`.

        Returns
        -------
        list of int
            The sequences that were brought back, under their old ids. Lost ones that are not in the file stay lost, and
            can be finished.

        Raises
        ------
        CacheFull, ValueError, OSError
            As `load`. The workers are there again, and what was lost is lost still.
        """
        with self._pool.lock:
            self.workers.replace()
            lost = [int(self._pool.ids[row]) for row in self._pool.lost]
            if path is None or not lost:
                return []
            where = Path(path).absolute()
            into = saving.Into(self._name, lost)
            back = list(
                self._sharded.again(
                    saving.load, where, self._sharded, self._buffers, self._pool, fingerprint, into
                )
            )
            self._start_recent(back)
            return back

    def worker_stats(self) -> list[WorkerStats]:
        """Where the workers are, and how full."""
        used = self._dealer.used_blocks()
        each = np.bincount(np.arange(self.num_blocks) % len(self.workers), minlength=len(self.workers))
        block_bytes = self.block_size * self.bytes_per_token()
        return [
            WorkerStats(
                number,
                identity.host,
                identity.process,
                identity.cpus,
                self.workers.state(number),
                int(each[number]),
                int(used[number]),
                int(used[number]) * block_bytes,
            )
            for number, identity in enumerate(map(self.workers.identity, range(len(self.workers))))
        ]

    def check_integrity(self) -> None:
        """As `PagedKVCache.check_integrity`; also asks all workers for an answer, and raises WorkerLost without one."""
        check_pool(self._pool)
        self._sharded.ping()

    def __repr__(self) -> str:
        lost = f", {len(self.workers.lost)} of them lost" if self.workers.lost else ""
        return f"Sharded{super().__repr__()[len('Paged') : -1]}, {len(self.workers)} workers{lost})"


def _told(here: weakref.ref[ShardedKVCache], what: Any) -> Any:
    """Call what with a cache, if it is still there."""
    cache = here()
    return None if cache is None else what(cache)
