"""One trip of new tokens through the layers: what every cache does to write and to attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kvnumba.arrays import DeviceView, in_precision_of, is_bfloat16
from kvnumba.attention.block_masks import without_skipped
from kvnumba.attention.cascade import split_prefixes
from kvnumba.attention.windows import apart, begin_in_window
from kvnumba.backends.protocol import Backend, Decoding
from kvnumba.blocks.kept import Kept
from kvnumba.mods import UserFunction
from kvnumba.options import AttentionOptions, Scoring, scoring_of
from kvnumba.storage import Batch, Buffers, Part

ROWS_TOGETHER = 64  # about which a block mask is asked at once, where the backend has no tiles


class FloatTokens(NamedTuple):
    """The keys and values that a pass keeps, and attends to, in float beside the cache's format.

    Attributes
    ----------
    batch : Batch
        Of the pass.
    begin : (B,) int64
        From which key on new tokens attend in float.
    newest : list of Part
        The keys from `begin` on; the pass writes its new tokens there.
    sinks : list of Part
        The first keys, where they are kept in float and are not among the newest.
    rows : (B,) int64
        Whose they are, for `RecentTokens`.
    """

    batch: Batch
    begin: np.ndarray
    newest: list[Part]
    sinks: list[Part]
    rows: np.ndarray

    def others(self, batch: Batch) -> Batch:
        """The batch of a pass for the keys that are attended to in the cache's format."""
        begins = self.sinks[0].batch.seq_lens if self.sinks else None
        return Batch(
            batch.block_table,
            self.begin.astype(np.int32),
            batch.query_start_loc,
            batch.block_size,
            batch.positions,
            begins,
        )

    def seen_by(self, batch: Batch) -> FloatTokens:
        """The same keys, for other ones of the new tokens of these sequences, or for their queries alone."""

        def of(part: Part) -> Part:
            positions = part.batch.positions + (batch.positions - self.batch.positions)
            return part._replace(
                batch=replace(part.batch, query_start_loc=batch.query_start_loc, positions=positions, kept={})
            )

        return self._replace(batch=batch, newest=[*map(of, self.newest)], sinks=[*map(of, self.sinks)])


class Pass:
    """New tokens on their way through the layers: their batch, how to attend, and which layer is next.

    Internal: keys, values and queries come as views (B, n, heads, D), as `Backend` takes them, and are checked already.

    Parameters
    ----------
    backend : Backend
    buffers : Buffers
    batch : Batch
    widest_window : int, optional
        The widest window with which the tokens may attend, where tokens before it have been given back.
    floats : FloatTokens, optional
        What is kept in float besides.
    kept : sequence of Kept, optional
        Of each sequence, where its tokens stand if it has dropped some. None: none has.
    written : bool
        Whether the batch's tokens are in all layers already: then the pass only attends.
    """

    def __init__(
        self,
        backend: Backend,
        buffers: Buffers,
        batch: Batch,
        widest_window: int | None = None,
        *,
        floats: FloatTokens | None = None,
        kept: Sequence[Kept] | None = None,
        written: bool = False,
    ) -> None:
        self.batch = batch
        self.floats = floats
        self.next_layer = buffers.layout.num_layers if written else 0
        self._backend = backend
        self._buffers = buffers
        self._widest_window = widest_window
        self._kept = kept
        # where new tokens are stored
        self._written = [Part(buffers, batch), *(() if floats is None else floats.newest)]
        self._plans: dict[Any, Any] = {}
        self._tried: Scoring | None = None

    @property
    def complete(self) -> bool:
        """Whether all layers are written."""
        return self.next_layer == self._buffers.layout.num_layers

    def covers(self, layer: int) -> bool:
        """Whether the tokens of a layer are written."""
        return layer < self.next_layer

    def require_next(self, layer: int) -> None:
        """Raise unless a layer is the next one to be written."""
        if layer != self.next_layer:
            due = "none, the pass is complete" if self.complete else f"layer {self.next_layer}"
            raise ValueError(f"layer: layers are written in order, next is {due}; got {layer}")

    def require_written(self, layer: int) -> None:
        """Raise unless the tokens of a layer are written."""
        if not self.covers(layer):
            raise ValueError(f"layer: the new tokens of layer {layer} have not been written yet")

    def write(self, layer: int, k: Any, v: Any) -> None:
        """Store the keys and values of the next layer."""
        self.require_next(layer)
        if k.size or v.size:
            for part in self._written:
                self._backend.write(part.buffers, layer, k, v, part.batch)
        self.next_layer += 1

    def attend(
        self, layer: int, q: Any, out: Any, lse: Any, options: AttentionOptions, dtype: Any = None
    ) -> Any:
        """Write the attention of q into views `out` (B, n, Hq, Dv) and `lse` (B, n, Hq).

        `dtype` is that of the queries as the user gave them, which decides about the arithmetic. Returns the mass,
        (sequences, H, longest sequence) float32, where q is, with `return_mass`.
        """
        scoring = self._scoring(q, options, dtype)
        self._buffers.layout.watch()
        mass = self._room_for_mass(q) if self._finds_mass(q, scoring, options) else None
        returned = mass.owner if isinstance(mass, DeviceView) else mass
        if not q.size:
            return returned
        if scoring.has_mods:
            scoring.watch()
            if scoring is not self._tried:
                scoring.try_at(q.shape[2], *self._positions())
                self._tried = scoring
        plan = self._plan(q.shape[2], scoring, mass is not None)
        self._backend.attend(layer, q, plan, scoring, out, lse, mass)
        return returned

    def plan_ahead(self, q: Any, options: AttentionOptions, dtype: Any = None) -> None:
        """Have the plan ready that `attend` of such queries wants."""
        scoring = self._scoring(q, options, dtype)
        self._plan(q.shape[2], scoring, self._finds_mass(q, scoring, options))

    def _finds_mass(self, q: Any, scoring: Scoring, options: AttentionOptions) -> bool:
        """Whether masses are asked for; raises where there are none to be had."""
        if not options.get("return_mass"):
            return False
        if not self._backend.finds_mass:
            raise ValueError(
                f"return_mass: expected a cache of the backend numpy, cpu or cuda; got one of {self._backend.name}"
            )
        if self._kept is not None and scoring.window_left >= 0:
            raise ValueError("return_mass: expected no window_left, keep has dropped tokens of a sequence")
        if isinstance(q, DeviceView) and options["return_mass"] == "block":
            raise ValueError("return_mass: expected True with arrays on a GPU; got 'block'")
        return True

    def _room_for_mass(self, q: Any) -> Any:
        seq_lens = self.batch.seq_lens
        shape = (len(seq_lens), self._buffers.layout.num_kv_heads, int(seq_lens.max(initial=0)))
        if isinstance(q, DeviceView):
            return self._backend.empty(q, shape, "float32", zeros=True)
        return np.zeros(shape, np.float32)

    def masses(self, mass: Any, options: AttentionOptions) -> list[Any] | None:
        """What `attend` returned, of each sequence: (H, S), or sums over its blocks (H, blocks)."""
        if mass is None:
            return None
        masses = [mass[n, :, :length] for n, length in enumerate(self.batch.seq_lens.tolist())]
        if options.get("return_mass") != "block":
            return masses
        size = self.batch.block_size
        return [np.add.reduceat(x, np.arange(0, x.shape[1], size), axis=1) for x in masses]

    def decoding(self, q: Any, k: Any, v: Any, scoring: Scoring) -> Decoding | None:
        """`write` and `attend` in one call, for arrays that lie as these views do, in this pass and the following."""
        parts = self._parts(q.shape[2], scoring, may_share(scoring))
        return self._backend.decoding(q, k, v, self._written, parts, self._checked(scoring, q.dtype))

    def follow(self, decoding: Decoding, num_qo_heads: int, scoring: Scoring, stream: int) -> bool:
        """Take over a decoding of an earlier pass; False if it cannot serve this one, nor any other any more."""
        parts = self._parts(num_qo_heads, scoring, may_share(scoring))
        return decoding.follow(self._written, parts, stream)

    def prepare(self, q: Any, options: AttentionOptions) -> None:
        """Do what `attend` does once for all layers, and once for all passes."""
        scoring = self._scoring(q, options, q.dtype)
        if q.size:
            mass = self._finds_mass(q, scoring, options)
            self._backend.prepare(q, self._plan(q.shape[2], scoring, mass), scoring, self._written)

    def _scoring(self, q: Any, options: AttentionOptions, dtype: Any) -> Scoring:
        return self._checked(scoring_of(options, q.shape[2], q.shape[3]), dtype)

    def _checked(self, scoring: Scoring, dtype: Any) -> Scoring:
        """Options that fit the pass and its backend, for queries of a dtype."""
        widest = self._widest_window
        if widest is not None and not 0 <= scoring.window_left <= widest:
            raise ValueError(
                f"window_left: expected 0 to {widest}, earlier tokens may be given back; got {scoring.window_left}"
            )
        if self._kept is not None and scoring.of_positions is not None:
            raise ValueError(
                f"{scoring.of_positions}: expected None, keep has dropped tokens of a sequence, and its keys no longer "
                f"lie where they stand"
            )
        if self._backend.device is None:
            for name in ("sinks", "alibi_slopes"):
                if isinstance(getattr(scoring, name), DeviceView):
                    raise TypeError(
                        f"{name}: expected an array in host memory for the {self._backend.name} backend; "
                        f"got one on a GPU"
                    )
        return scoring.in_bfloat16 if dtype is not None and is_bfloat16(dtype) else scoring

    def _positions(self) -> tuple[int, int, int]:
        """Of the first of the new tokens, of the last, and of the last key."""
        new = np.diff(self.batch.query_start_loc)
        first = self.batch.positions[new > 0]
        return int(first.min()), int((first + new[new > 0]).max()) - 1, int(self.batch.seq_lens.max()) - 1

    def _plan(self, num_qo_heads: int, scoring: Scoring, mass: bool) -> Any:
        shared = may_share(scoring) and not mass
        # for masses every part has all new tokens: what a block mask would skip gets 0 from the mask
        blocks = None if mass else scoring.block_mask
        function = None if blocks is None else blocks.function
        key = (num_qo_heads, scoring.window_left, scoring.arithmetic, scoring.causal, shared, function, mass)
        plan = self._plans.get(key)
        if plan is None:
            parts = self._parts(num_qo_heads, scoring, shared)
            if not scoring.causal:
                parts = [part._replace(batch=part.batch.after_all_keys()) for part in parts]
            if blocks is not None:
                parts = self._without_skipped(parts, num_qo_heads, blocks, scoring.window_left)
            plan = self._plans[key] = self._backend.plan(parts, num_qo_heads, scoring, mass)
        return plan

    def _without_skipped(
        self, parts: list[Part], num_qo_heads: int, block_mask: UserFunction, window_left: int
    ) -> list[Part]:
        """The parts as a block mask leaves them; at least one."""
        limits = self._backend.cascade
        rows = ROWS_TOGETHER if limits is None else limits.tile_rows
        tokens = max(1, rows * self._buffers.layout.num_kv_heads // num_qo_heads)
        seen = [each for part in parts for each in without_skipped(part, block_mask, window_left, tokens)]
        return seen or [
            parts[0]._replace(batch=replace(parts[0].batch, seq_lens=0 * parts[0].batch.seq_lens))
        ]

    def _parts(self, num_qo_heads: int, scoring: Scoring, shared: bool) -> list[Part]:
        """The parts of the keys, short ones first; `shared` says whether a common prefix may be one of its own."""
        batch, parts = self.batch, []
        if self.floats is not None:
            parts = [*self.floats.newest, *self.floats.sinks]
            batch = self.floats.others(batch)
            begins = 0 if batch.begins is None else batch.begins
            if (batch.seq_lens == begins).all():
                return parts
        # what is in float was written after all that was kept: there slots are as far from each other as positions
        if self._kept is not None and scoring.window_left >= 0:
            parts = [part._replace(batch=apart(part.batch, self._kept)[0]) for part in parts]
            batch = begin_in_window(*apart(batch, self._kept), scoring.window_left)
            return [*parts, Part(self._buffers, batch)]
        limits = self._backend.cascade
        if shared and limits is not None and batch.begins is None and len(batch.seq_lens) > 1:
            return parts + split_prefixes(self._buffers, batch, num_qo_heads, limits)
        return [*parts, Part(self._buffers, batch)]


def may_share(scoring: Scoring) -> bool:
    """Whether a shared prefix may be a part of its own: that is attended without positions, so not with a window."""
    return (
        scoring.window_left < 0 and scoring.alibi_slopes is None and not scoring.has_mods and scoring.causal
    )


def room_for_results(
    backend: Backend, query: Any, value_head_dim: int, options: AttentionOptions
) -> tuple[Any, Any]:
    """Room for the attention of checked queries (..., D) and for its lse: (..., Dv) and (...), where the queries are.

    On a GPU an lse that nobody asked for has no memory, and the address 0.
    """
    shape, rows = (*query.shape[:-1], value_head_dim), query.shape[:-1]
    if isinstance(query, DeviceView):
        out = backend.empty(query, shape, query.dtype)
        if options.get("return_lse"):
            return out, backend.empty(query, rows, "float32")
        return out, query.nowhere(rows, "float32")
    return np.empty(shape, np.float32), np.empty(rows, np.float32)


def as_returned(q: Any, out: Any, lse: Any, mass: Any, options: AttentionOptions) -> Any:
    """What an ``attend`` of the user's queries `q` returns, of what `room_for_results` made, and of the mass."""
    if isinstance(out, DeviceView):
        out, lse = out.owner, lse.owner
    else:
        out = in_precision_of(q, out)
    more = [x for name, x in (("return_lse", lse), ("return_mass", mass)) if options.get(name)]
    return (out, *more) if more else out


def read(
    backend: Backend,
    buffers: Buffers,
    layer: int,
    block_table: np.ndarray,
    length: int,
    floats: FloatTokens | None = None,
    sequence: int = 0,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as they were written, to the rounding of their formats; otherwise as `Backend.read`.

    What is kept in float is read there: the sequences that are read are those of `floats` from `sequence` on, and what
    is read of them begins at position `first`.
    """
    buffers.layout.watch()
    found = backend.read(buffers, layer, block_table, length)
    if floats is not None:
        for part in (*floats.newest, *floats.sinks):
            before = floats.batch.positions - part.batch.positions  # the position of the part's key 0
            for row in range(len(block_table)):
                n = sequence + row
                _read_over([x[row] for x in found], backend, part, layer, n, int(before[n]) - first)
    transform = buffers.layout.transform
    if transform is None:
        return found
    # the heads are the axis before the last where a transform sees them
    k, v = (x.swapaxes(1, 2) for x in found)
    return transform.load_keys(k, layer).swapaxes(1, 2), transform.load_values(v).swapaxes(1, 2)


def _read_over(
    found: list[np.ndarray], backend: Backend, part: Part, layer: int, sequence: int, offset: int
) -> None:
    """Put a sequence's keys and values of a part in their places, its key j at ``offset + j``."""
    batch = part.batch
    begin, end = 0 if batch.begins is None else int(batch.begins[sequence]), int(batch.seq_lens[sequence])
    begin = max(begin, -offset)
    if begin < end:
        table = np.ascontiguousarray(batch.block_table[sequence : sequence + 1])
        for out, rows in zip(found, backend.read(part.buffers, layer, table, end), strict=True):
            out[:, offset + begin : offset + end] = rows[0, :, begin:]
