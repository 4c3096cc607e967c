"""A backend whose storage is spread over workers: of a pool's blocks, block b is in shard ``b % num_shards``.

A shard is kept by as many workers as there are replicas, from the worker of its number on, and read from the first of
them that lives. Every worker sees the whole block table, with -1 for what it does not read: positions stay what they
are, so causality, windows and biases need no second thought, and results are merged by their lse.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, NoReturn, ParamSpec, TypeVar

import numpy as np

from kvnumba.arrays import DeviceView
from kvnumba.attention.merging import merge_states
from kvnumba.backends.protocol import CascadeLimits
from kvnumba.backends.registry import get_backend
from kvnumba.errors import WorkerLost
from kvnumba.integrations.ray.worker import LocalPart, local_layout, specs_of
from kvnumba.integrations.ray.workers import Workers
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Buffers, Encoded, Layout, Part, RowLayout, array_specs

P = ParamSpec("P")
R = TypeVar("R")


def _with_replicas(
    method: Callable[Concatenate[ShardedBackend, P], R],
) -> Callable[Concatenate[ShardedBackend, P], R]:
    """Let a method that asks workers do it by `ShardedBackend.again`."""

    @functools.wraps(method)
    def asking(self: ShardedBackend, /, *args: P.args, **options: P.kwargs) -> R:
        return self.again(method, self, *args, **options)

    return asking


class Shipped:
    """Something that workers know by a number, as long as this lives."""

    def __init__(self, workers: Workers) -> None:
        self.number = workers.new_number()
        self.sent: dict[int, int] = {}  # worker -> its incarnation
        weakref.finalize(self, _forget, workers, self.number, self.sent)


def _forget(workers: Workers, number: int, sent: dict[int, int]) -> None:
    for worker in sent:
        workers.forget(worker, number)


class ShardedBuffers:
    """Of one pool: what is where, and the number by which the workers know theirs."""

    def __init__(self, layout: Layout, num_shards: int, shipped: Shipped) -> None:
        self.layout = layout
        self.capacity = -(-layout.num_blocks // num_shards)  # blocks of the largest shard
        self.shipped = shipped

    @property
    def keys(self) -> NoReturn:
        """Not here."""
        raise TypeError("the storage is on the workers: get_kv returns copies of keys and values")

    values = keys


class Share(NamedTuple):
    """What a worker does of a write or of an attention: for which tokens (None: all), and with what.

    Of a write `batches` is one, which says where the tokens belong. Of attention it is one for each part of the keys.
    """

    worker: int
    tokens: np.ndarray | None
    batches: list[LocalPart]
    shipped: Shipped


class Shares(NamedTuple):
    """The shares of all workers, as long as each shard is read where it was then."""

    readers: np.ndarray
    shares: list[Share]


class ShardedPlan:
    """What new tokens attend to."""

    def __init__(self, parts: Sequence[Part], num_qo_heads: int, scoring: tuple[Any, ...]) -> None:
        self.parts = parts
        self.num_qo_heads = num_qo_heads
        self.scoring = scoring
        self.shares: Shares | None = None


class ShardedBackend:
    """Workers as the backend of a cache, also of one that takes any: ``KVNumbaCache(config, backend=...)``.

    A `ShardedKVCache` makes its own, and knows which sequences are lost with a worker. With other caches, every call
    that needs blocks of a lost worker raises WorkerLost.

    Parameters
    ----------
    workers : Workers
    replicas : int
        Workers that keep each block.
    """

    name = "ray"
    simulated = False
    device: int | None = None
    cascade: CascadeLimits | None = None
    finds_mass = False

    def __init__(self, workers: Workers, replicas: int = 1) -> None:
        self.workers = workers
        self.replicas = replicas
        # told which shards are gone (num_shards,) bool, and why, the cache says which sequences were there
        self.on_loss: Callable[[np.ndarray, WorkerLost], list[int]] | None = None
        self.on_return: Callable[[np.ndarray], None] | None = None
        self._buffers: weakref.WeakSet[ShardedBuffers] = weakref.WeakSet()
        # of each shard: the worker that reads it, -1 for none, and which of the replicas that one keeps
        self._readers = np.arange(len(workers))
        self._regions = np.zeros(len(workers), np.int64)
        self._lost_ids: list[int] = []
        if workers.lost:
            self.lose(dict.fromkeys(workers.lost, "was lost before"))
        workers.watch(self)

    @property
    def num_shards(self) -> int:
        return len(self.workers)

    @property
    def gone(self) -> np.ndarray:
        """Which shards no living worker keeps: (num_shards,) bool."""
        return self._readers < 0

    def again(self, ask: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """What a call that asks workers returns; made again where others have all that a lost one was asked for."""
        while True:
            before = self._readers
            try:
                return ask(*args, **options)
            except WorkerLost:
                if self._readers is before or (self.gone & (before >= 0)).any():
                    raise

    @_with_replicas
    def ping(self) -> None:
        """Ask all workers that are not lost for an answer."""
        self.call({worker: [("echo",)] for worker in self.alive()})

    def alive(self) -> list[int]:
        """The workers that are not lost."""
        return [worker for worker in range(self.num_shards) if worker not in self.workers.lost]

    # Losses

    def lose(self, reasons: Mapping[int, str]) -> None:
        """Read shards of workers that are lost from other replicas; what has none is gone."""
        before = self._readers
        self._choose_readers()
        gone = (self._readers < 0) & (before >= 0)
        self._lost_ids = []
        if self.on_loss is not None and gone.any():
            text = "; ".join(f"{self.workers.describe(number)} {why}" for number, why in reasons.items())
            self._lost_ids = self.on_loss(gone, WorkerLost(text, tuple(reasons)))

    def _choose_readers(self) -> None:
        lost = self.workers.lost
        readers = np.full(self.num_shards, -1)
        for region in reversed(range(self.replicas)):
            holders = (np.arange(self.num_shards) + region) % self.num_shards
            alive = ~np.isin(holders, lost)
            readers[alive] = holders[alive]
            self._regions[alive] = region
        self._readers = readers

    def refill(self, empty: Sequence[int]) -> None:
        """Give workers that take the places of lost ones what other replicas have; none is read before `reread`."""
        for buffers in list(self._buffers):
            self._allocate(buffers, empty)
            for shard in np.flatnonzero(~self.gone).tolist():
                for region in range(self.replicas):
                    worker = (shard + region) % self.num_shards
                    if worker in empty:
                        self._copy_shard(buffers, shard, worker, region)

    def reread(self) -> None:
        """Read workers that are there again; shards that were gone begin anew."""
        gone = self.gone
        self._choose_readers()
        back = gone & ~self.gone
        if self.on_return is not None and back.any():
            self.on_return(back)

    def _copy_shard(self, buffers: ShardedBuffers, shard: int, worker: int, region: int) -> None:
        blocks = np.arange(shard, buffers.layout.num_blocks, self.num_shards)
        for start in range(0, len(blocks), 64):
            some = blocks[start : start + 64]
            keys, values = self.read_blocks(buffers, some)
            there = region * buffers.capacity + some // self.num_shards
            self.call({worker: [("write_blocks", buffers.shipped.number, there, [*keys, *values])]})

    def call(
        self, commands: Mapping[int, Sequence[tuple[Any, ...]]], *, patient: bool = False
    ) -> dict[int, Any]:
        """`Workers.call`, whose error names the sequences of this cache that had blocks on lost workers."""
        if not commands:
            return {}
        self._lost_ids = []
        try:
            return self.workers.call(commands, patient=patient)
        except WorkerLost as error:
            ids = tuple(self._lost_ids)
            held = f"; it held blocks of sequences {', '.join(map(str, ids))}" if ids else ""
            raise WorkerLost(f"{error}{held}", error.workers, ids) from None

    # Where blocks are

    def local(self, buffers: ShardedBuffers, blocks: np.ndarray) -> np.ndarray:
        """The numbers of blocks where they are read."""
        return self._regions[blocks % self.num_shards] * buffers.capacity + blocks // self.num_shards

    def by_reader(self, blocks: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each worker that reads some of the blocks, and which; raises where none does."""
        readers = self._readers[blocks % self.num_shards]
        for worker in np.unique(readers).tolist():
            if worker < 0:
                self._refuse(blocks[readers < 0])
            yield worker, np.flatnonzero(readers == worker)

    def by_holder(
        self, buffers: ShardedBuffers, blocks: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each living worker that keeps some of the blocks, which, and their numbers there."""
        gone = self._readers[blocks % self.num_shards] < 0
        if gone.any():
            self._refuse(blocks[gone])
        for region in range(self.replicas):
            holders = (blocks + region) % self.num_shards
            for worker in np.unique(holders).tolist():
                if worker not in self.workers.lost:
                    which = np.flatnonzero(holders == worker)
                    yield worker, which, region * buffers.capacity + blocks[which] // self.num_shards

    def _refuse(self, blocks: np.ndarray) -> NoReturn:
        """Raise for blocks that no living worker keeps."""
        shards = np.unique(blocks % self.num_shards)
        self.workers.require(
            [(int(shard) + r) % self.num_shards for shard in shards for r in range(self.replicas)]
        )
        raise WorkerLost(f"blocks {blocks.tolist()}: a worker that kept them was lost; nothing is there")

    # Storage

    @_with_replicas
    def allocate(self, layout: Layout) -> Buffers:
        for name, rows in (("key_format", layout.keys), ("value_format", layout.values)):
            if rows.fmt.codec is not None:
                raise ValueError(
                    f"{name}: {rows.fmt.name} is a format of your own, which workers do not know; caches of the "
                    f"backends numpy and cpu take it"
                )
        buffers = ShardedBuffers(layout, self.num_shards, Shipped(self.workers))
        self._allocate(buffers, self.alive())
        self._buffers.add(buffers)
        return buffers  # type: ignore[return-value]

    def _allocate(self, buffers: ShardedBuffers, workers: Sequence[int]) -> None:
        local = local_layout(buffers.layout, self.replicas * buffers.capacity)
        command = ("attempt", "allocate", buffers.shipped.number, local)
        for worker, found in self.call({worker: [command] for worker in workers}).items():
            if isinstance(found, Exception):
                raise MemoryError(f"{self.workers.describe(worker)}: {found}") from found
            if found != specs_of(local):
                raise RuntimeError(
                    f"{self.workers.describe(worker)}: expected arrays {specs_of(local)} of a block; it made {found}"
                )
            buffers.shipped.sent[worker] = self.workers.incarnation(worker)

    @_with_replicas
    def available_bytes(self) -> int:
        found = self.call({worker: [("available_bytes",)] for worker in self.alive()})
        by_node: dict[str, int] = {}  # workers of one machine share its memory
        for worker, size in found.items():
            node = self.workers.identity(worker).node
            by_node[node] = max(size, by_node.get(node, 0))
        return sum(by_node.values())

    def empty(
        self, like: DeviceView, shape: tuple[int, ...], dtype: str, *, zeros: bool = False
    ) -> DeviceView:
        raise NotImplementedError("device arrays are not taken here")

    def encode(self, x: np.ndarray, rows: RowLayout) -> Encoded:
        return get_backend("numpy").encode(x, rows)

    def decode(self, encoded: Encoded, rows: RowLayout) -> np.ndarray:
        return get_backend("numpy").decode(encoded, rows)

    @_with_replicas
    def copy_blocks(self, buffers: Any, pairs: np.ndarray) -> None:
        moved = pairs[:, 0] % self.num_shards != pairs[:, 1] % self.num_shards
        if moved.any():
            self.write_blocks(buffers, pairs[moved, 1], *self.read_blocks(buffers, pairs[moved, 0]))
        source, target = pairs[~moved].T
        commands: dict[int, list[tuple[Any, ...]]] = {}
        for worker, which, local in self.by_holder(buffers, target):
            region_start = local - target[which] // self.num_shards
            local_pairs = np.stack((region_start + source[which] // self.num_shards, local), axis=1)
            commands.setdefault(worker, []).append(("copy_blocks", buffers.shipped.number, local_pairs))
        self.call(commands)

    @_with_replicas
    def read_blocks(self, buffers: Any, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        parts = [np.empty(shape, dtype) for shape, dtype in array_specs(buffers.layout, len(blocks))]
        local = self.local(buffers, blocks)
        places = dict(self.by_reader(blocks))
        found = self.call(
            {
                worker: [("read_blocks", buffers.shipped.number, local[which])]
                for worker, which in places.items()
            }
        )
        for worker, arrays in found.items():
            for part, array in zip(parts, arrays, strict=True):
                part[:, places[worker]] = array
        return Encoded(*parts[:3]), Encoded(*parts[3:])

    @_with_replicas
    def write_blocks(self, buffers: Any, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        commands: dict[int, list[tuple[Any, ...]]] = {}
        for worker, which, local in self.by_holder(buffers, blocks):
            arrays = [array[:, which] for array in (*keys, *values)]
            commands.setdefault(worker, []).append(("write_blocks", buffers.shipped.number, local, arrays))
        self.call(commands)

    @_with_replicas
    def read(
        self, buffers: Any, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layout = buffers.layout
        size = layout.block_size
        columns = -(-length // size)
        table = block_table[:, :columns]
        shape = (len(table), layout.num_kv_heads, columns * size)
        found = [np.empty((*shape, width), np.float32) for width in (layout.head_dim, layout.value_head_dim)]
        blocks = table.reshape(-1)
        local = self.local(buffers, blocks)
        places = dict(self.by_reader(blocks))
        answers = self.call(
            {
                worker: [
                    ("read", buffers.shipped.number, layer, local[which][:, None].astype(np.int32), size)
                ]
                for worker, which in places.items()
            }
        )
        for worker, arrays in answers.items():
            row, column = np.divmod(places[worker], columns)
            for out, array in zip(found, arrays, strict=True):  # (blocks, H, block_size, D)
                by_block = out.reshape(len(table), layout.num_kv_heads, columns, size, -1)
                by_block[row, :, column] = array
        k, v = (array[:, :, :length] for array in found)
        return k, v

    # Passes

    def write(self, buffers: Any, layer: int, k: np.ndarray, v: np.ndarray, batch: Batch) -> None:
        shares = batch.kept.get("shares")
        if shares is None or shares.readers is not self._readers:
            shares = batch.kept["shares"] = Shares(self._readers, list(self._write_shares(buffers, batch)))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        for worker, tokens, batches, shipped in shares.shares:
            if self._is_new(worker, shipped):
                self.workers.send(worker, "know", shipped.number, batches[0].batch)
            # copies: they wait, and the arrays are the user's
            rows = [x.copy() if tokens is None else x[tokens] for x in (k, v)]
            self.workers.send(worker, "write", buffers.shipped.number, layer, *rows, shipped.number)

    def _write_shares(self, buffers: ShardedBuffers, batch: Batch) -> Iterator[Share]:
        """Which tokens a worker stores, a run of those of one block as a sequence of its own."""
        block, offset = np.divmod(batch.slot_mapping, batch.block_size)
        stored = np.flatnonzero(block >= 0)
        for worker, which, local in self.by_holder(buffers, block[stored]):
            tokens = stored[which]
            first = np.flatnonzero(np.diff(local, prepend=-1) | (np.diff(tokens, prepend=-1) != 1))
            counts = np.diff(first, append=len(tokens))
            ends = offset[tokens[first]] + counts
            table = local[first, None].astype(np.int32)
            batches = [LocalPart(0, Batch.of(table, ends.astype(np.int32), counts, batch.block_size))]
            everything = len(tokens) == batch.num_tokens
            yield Share(worker, None if everything else tokens, batches, Shipped(self.workers))

    def plan(
        self, parts: Sequence[Part], num_qo_heads: int, scoring: Scoring, mass: bool = False
    ) -> ShardedPlan:
        return ShardedPlan(parts, num_qo_heads, _fields(scoring))

    def prepare(self, q: np.ndarray, plan: ShardedPlan, scoring: Scoring, written: Sequence[Part]) -> None:
        pass

    def decoding(
        self, q: Any, k: Any, v: Any, written: Sequence[Part], parts: Sequence[Part], scoring: Scoring
    ) -> None:
        return None

    @_with_replicas
    def attend(
        self,
        layer: int,
        q: np.ndarray,
        plan: ShardedPlan,
        scoring: Scoring,
        out: np.ndarray,
        lse: np.ndarray,
        mass: None = None,
    ) -> None:
        query = q.reshape(-1, *q.shape[2:])
        value_dim = out.shape[-1]
        fields = _fields(scoring)
        shares = self._attention_shares(plan)
        commands = {}
        for worker, tokens, parts, shipped in shares:
            those: list[tuple[Any, ...]] = []
            if self._is_new(worker, shipped):
                those.append(("plan", shipped.number, parts, plan.num_qo_heads, plan.scoring))
            rows = query if tokens is None else query[tokens]
            those.append(("attend", layer, rows, shipped.number, value_dim, fields))
            commands[worker] = those
        try:
            answers = self.call(commands)
        except BaseException:
            plan.shares = None  # it may not have come to the workers
            raise
        states = [
            answers[share.worker]
            if share.tokens is None
            else _spread(answers[share.worker], share.tokens, query)
            for share in shares
        ]
        if scoring.sinks is not None or not states:  # a key that every query sees, whose value is 0
            sinks = np.float32(-np.inf) if scoring.sinks is None else scoring.sinks
            nothing = np.zeros((*query.shape[:2], value_dim), np.float32)
            states.append((nothing, np.broadcast_to(sinks, query.shape[:2])))
        found, found_lse = states[0] if len(states) == 1 else merge_states(*zip(*states, strict=True))
        out[...] = found.reshape(out.shape)
        lse[...] = found_lse.reshape(lse.shape)

    def _attention_shares(self, plan: ShardedPlan) -> list[Share]:
        if plan.shares is None or plan.shares.readers is not self._readers:
            plan.shares = Shares(self._readers, list(self._attend_shares(plan.parts)))
        return plan.shares.shares

    def _attend_shares(self, parts: Sequence[Part]) -> Iterator[Share]:
        """What each worker reads of the parts' keys: the same tables, without the blocks of others."""
        readers, seen = [], []
        for part in parts:
            batch: Any = part.batch
            columns = np.arange(batch.block_table.shape[1], dtype=np.int32) * batch.block_size
            here = (batch.block_table >= 0) & (columns < batch.seq_lens[:, None])
            if batch.begins is not None:
                here &= columns + batch.block_size > batch.begins[:, None]
            reader = np.where(here, self._readers[batch.block_table % self.num_shards], -2)
            if (reader == -1).any():
                self._refuse(batch.block_table[reader == -1])
            readers.append(reader)
            seen.append(np.unique(reader))
        start = parts[0].batch.query_start_loc
        for worker in np.unique(np.concatenate(seen)).tolist():
            if worker < 0:
                continue
            masks = [reader == worker for reader in readers]
            sequences = np.flatnonzero(
                np.any([mask.any(axis=1) for mask in masks], axis=0) & (np.diff(start) > 0)
            )
            tokens = None
            if len(sequences) < len(start) - 1:
                tokens = np.concatenate([np.arange(start[s], start[s + 1]) for s in sequences] or [start[:0]])
                if not len(tokens):
                    continue
            local = []
            for part, mask in zip(parts, masks, strict=True):
                if mask.any():
                    buffers: Any = part.buffers
                    table = np.where(mask, self.local(buffers, part.batch.block_table), -1).astype(np.int32)
                    batch = _of_sequences(part.batch, table, None if tokens is None else sequences)
                    local.append(LocalPart(buffers.shipped.number, batch))
            yield Share(worker, tokens, local, Shipped(self.workers))

    def _is_new(self, worker: int, shipped: Shipped) -> bool:
        """Whether a worker does not know a thing yet; from now on it does."""
        now = self.workers.incarnation(worker)
        before = shipped.sent.get(worker)
        shipped.sent[worker] = now
        return before != now


def _fields(scoring: Scoring) -> tuple[Any, ...]:
    """A scoring as it travels. Sinks do not: the driver counts them, once."""
    if scoring.has_mods or not scoring.causal:
        raise ValueError(
            "score_mod, mask_mod, causal: expected none for a cache on workers; caches of the backends numpy, cpu and "
            "cuda take them"
        )
    return (
        scoring.sm_scale, scoring.window_left, scoring.logits_soft_cap, scoring.arithmetic, scoring.alibi_slopes
    )  # fmt: skip


def _of_sequences(batch: Batch, table: np.ndarray, sequences: np.ndarray | None) -> Batch:
    """A batch with other blocks, of all or some of its sequences."""
    begins = batch.begins
    if sequences is None:
        return Batch(table, batch.seq_lens, batch.query_start_loc, batch.block_size, batch.positions, begins)
    start = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(np.diff(batch.query_start_loc)[sequences], out=start[1:])
    return Batch(
        np.ascontiguousarray(table[sequences]),
        batch.seq_lens[sequences],
        start,
        batch.block_size,
        batch.positions[sequences],
        None if begins is None else begins[sequences],
    )


def _spread(
    state: tuple[np.ndarray, np.ndarray], tokens: np.ndarray, query: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The state of some tokens as that of all: the others have seen nothing."""
    some, some_lse = state
    out = np.zeros((*query.shape[:2], some.shape[-1]), np.float32)
    lse = np.full(query.shape[:2], -np.inf, np.float32)
    out[tokens], lse[tokens] = some, some_lse
    return out, lse
