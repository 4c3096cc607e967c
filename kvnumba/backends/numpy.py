"""The reference backend: every operation in plain NumPy, written to be read.

Attention is FlashAttention's online softmax (Dao et al., 2022) over tiles of keys, so that neither the keys
and values in float32 nor the scores of a whole sequence exist at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kvnumba.arrays import DeviceView
from kvnumba.formats import (
    bfloat16_to_float,
    float_to_bfloat16,
    float_to_fp8_e4m3,
    fp8_e4m3_to_float,
    pack_int4,
    unpack_int4,
)
from kvnumba.options import Scoring
from kvnumba.storage import (
    Batch,
    Buffers,
    Encoded,
    Layout,
    Part,
    RowLayout,
    allocate_on_host,
    copy_blocks_on_host,
    host_memory_bytes,
    read_blocks_on_host,
    write_blocks_on_host,
)

QUERY_TILE = 64
KEY_TILE = 256

Convert = Callable[[np.ndarray], np.ndarray]


def _to_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float16's range is infinity, as everywhere in NumPy
        return x.astype(np.float16)


def _same(x: np.ndarray) -> np.ndarray:
    return x


class Codec(NamedTuple):
    """How elements of a format are stored: of floats the numbers themselves, of codes the integers 0 to max_code."""

    store: Convert
    load: Convert


CODECS: dict[str, Codec] = {
    "float32":  Codec(_same,             _same),
    "float16":  Codec(_to_float16,       lambda x: x.astype(np.float32)),
    "bfloat16": Codec(float_to_bfloat16, bfloat16_to_float),
    "fp8_e4m3": Codec(float_to_fp8_e4m3, fp8_e4m3_to_float),
    "int8":     Codec(_same,             _same),
    "int4":     Codec(pack_int4,         unpack_int4),
}  # fmt: skip


class Plan(NamedTuple):
    """What new tokens attend to."""

    parts: Sequence[Part]


class NumpyBackend:
    """Runs anywhere NumPy does."""

    name = "numpy"
    simulated = False
    device: int | None = None
    cascade = None  # the definition: every sequence for itself
    finds_mass = True

    def allocate(self, layout: Layout) -> Buffers:
        return allocate_on_host(layout)

    def available_bytes(self) -> int:
        return host_memory_bytes()

    def empty(
        self, like: DeviceView, shape: tuple[int, ...], dtype: str, *, zeros: bool = False
    ) -> DeviceView:
        raise NotImplementedError("device arrays are not taken here")

    def encode(self, x: np.ndarray, rows: RowLayout) -> Encoded:
        if rows.fmt.codec is not None:
            return _encode_registered(x, rows)
        fmt, codec = rows.fmt, CODECS[rows.fmt.name]
        if not fmt.has_scale:
            none = np.empty((len(x), 0), rows.scale_dtype)
            return Encoded(codec.store(x), none, none)
        groups = x.reshape(len(x), rows.num_groups, rows.group_size)
        low = groups.min(axis=-1)
        zero = low.astype(rows.scale_dtype)
        scale = ((groups.max(axis=-1) - low) / np.float32(fmt.max_code)).astype(rows.scale_dtype)
        # a constant group has scale 0: all its codes are 0, and code * scale + zero is exact
        step, offset = (part.astype(np.float32)[..., None] for part in (scale, zero))
        codes = np.rint((groups - offset) / np.where(step > 0, step, np.float32(1)))
        codes = np.clip(codes, 0, fmt.max_code).astype(np.uint8).reshape(x.shape)
        return Encoded(codec.store(codes), scale, zero)

    def decode(self, encoded: Encoded, rows: RowLayout) -> np.ndarray:
        if rows.fmt.codec is not None:
            return _decode_registered(encoded, rows)
        elements = CODECS[rows.fmt.name].load(encoded.codes)
        if not rows.fmt.has_scale:
            return elements
        groups = elements.reshape(*encoded.scale.shape, rows.group_size).astype(np.float32)
        scale, zero = (part.astype(np.float32)[..., None] for part in (encoded.scale, encoded.zero))
        return (groups * scale + zero).reshape(elements.shape)

    def write(self, buffers: Buffers, layer: int, k: np.ndarray, v: np.ndarray, batch: Batch) -> None:
        layout = buffers.layout
        if layout.transform is not None:
            k, v = layout.transform.store_keys(k, layer), layout.transform.store_values(v)
        stored = batch.slot_mapping >= 0
        block, offset = np.divmod(batch.slot_mapping[stored], layout.block_size)
        both = []
        for new, kept, rows in ((k, buffers.keys, layout.keys), (v, buffers.values, layout.values)):
            by_token = new.reshape(-1, layout.num_kv_heads, rows.head_dim)[stored]
            both.append((self.encode(by_token.reshape(-1, rows.head_dim), rows), kept))
        for encoded, kept in both:  # a user's function that raises has changed nothing
            for array, store in zip(encoded, kept, strict=True):
                store[layer][block, :, offset] = array.reshape(
                    len(block), layout.num_kv_heads, array.shape[1]
                )

    def read(
        self, buffers: Buffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._gather(buffers, layer, block_table, np.arange(length))

    def copy_blocks(self, buffers: Buffers, pairs: np.ndarray) -> None:
        copy_blocks_on_host(buffers, pairs)

    def read_blocks(self, buffers: Buffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        return read_blocks_on_host(buffers, blocks)

    def write_blocks(self, buffers: Buffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        write_blocks_on_host(buffers, blocks, keys, values)

    def plan(self, parts: Sequence[Part], num_qo_heads: int, scoring: Scoring, mass: bool = False) -> Plan:
        return Plan(parts)

    def prepare(self, q: np.ndarray, plan: Plan, scoring: Scoring, written: Sequence[Part]) -> None:
        pass

    def decoding(
        self, q: Any, k: Any, v: Any, written: Sequence[Part], parts: Sequence[Part], scoring: Scoring
    ) -> None:
        return None

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        plan: Plan,
        scoring: Scoring,
        out: np.ndarray,
        lse: np.ndarray,
        mass: np.ndarray | None = None,
    ) -> None:
        transform = plan.parts[0].buffers.layout.transform  # the same of all parts
        offsets = np.zeros(lse.shape, np.float32)
        if transform is not None:
            offsets, q = transform.offsets(q, layer), transform.queries(q, layer)
        # the state of the online softmax of every row: its maximum, the sum of its weights, the weighted sum of values
        row_max = np.full(lse.shape, -np.inf, np.float32)
        row_sum = np.zeros(lse.shape, np.float32)
        if scoring.sinks is not None:  # a key that every query sees, whose value is 0
            row_max[:] = scoring.sinks
            row_sum[:] = 1
        weighted = out
        weighted[...] = 0
        num_kv_heads = plan.parts[0].buffers.layout.num_kv_heads
        for part, sequence, positions, tokens in _query_tiles(plan.parts):
            tile = np.divmod(tokens, q.shape[1])
            scores = self._scores(part, layer, sequence, positions, scoring, q[tile], offsets[tile])
            row_max[tile], row_sum[tile], weighted[tile] = _attend_tile(
                scores, num_kv_heads, row_max[tile], row_sum[tile], weighted[tile]
            )
        # a row that has seen no key has a sum of 0, an output of 0 and an lse of -inf
        np.divide(weighted, row_sum[..., None], out=out, where=row_sum[..., None] != 0)
        with np.errstate(divide="ignore"):
            np.add(row_max, np.log(row_sum), out=lse)
        if transform is not None:
            out[...] = transform.load_values(out)
        if mass is not None:  # a second look at the scores, now that the sums of all weights are known
            for part, sequence, positions, tokens in _query_tiles(plan.parts):
                tile = np.divmod(tokens, q.shape[1])
                scores = self._scores(part, layer, sequence, positions, scoring, q[tile], offsets[tile])
                _add_mass(scores, lse[tile], mass[sequence])

    def _scores(
        self,
        part: Part,
        layer: int,
        sequence: int,
        positions: np.ndarray,
        scoring: Scoring,
        q: np.ndarray,
        offsets: np.ndarray,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of a few keys at a time: their positions in the sequence (m,), values (H, m, D) and scores (H, G, n, m)."""
        num_kv_heads = part.buffers.layout.num_kv_heads
        query, offsets = _by_kv_head(q, num_kv_heads), _by_kv_head(offsets, num_kv_heads)
        block_ids, seq_len = part.batch.block_table[sequence], part.batch.seq_lens[sequence]
        first_key = 0 if part.batch.begins is None else part.batch.begins[sequence]
        if scoring.window_left >= 0:
            first_key = max(first_key, positions[0] - scoring.window_left)
        before = 0 if part.batch.offsets is None else part.batch.offsets[sequence]
        behind = 0 if part.batch.shifts is None else part.batch.shifts[sequence]
        end_key = min(positions[-1] + 1, seq_len)
        for start in range(first_key, end_key, KEY_TILE):
            keys = np.arange(start, min(start + KEY_TILE, end_key))
            keys = keys[block_ids[keys // part.batch.block_size] >= 0]
            if not len(keys):
                continue
            k, v = self._gather(part.buffers, layer, block_ids, keys)
            scores = score(query, k, offsets, positions + before, keys + before, scoring, part.masked, behind)
            yield keys + before, v, scores

    def _gather(
        self, buffers: Buffers, layer: int, block_ids: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (..., H, n, D) float32 at some positions of sequences with blocks (..., max_blocks)."""
        layout = buffers.layout
        block, offset = np.divmod(positions, layout.block_size)
        k, v = (
            self.decode(
                Encoded(*(array[layer][block_ids[..., block], :, offset].swapaxes(-2, -3) for array in kept)),
                rows,
            )
            for kept, rows in ((buffers.keys, layout.keys), (buffers.values, layout.values))
        )
        return k, v


def _encode_registered(x: np.ndarray, rows: RowLayout) -> Encoded:
    codes, *numbers = rows.fmt.codec.encode(x.reshape(-1, rows.group_size), rows.scale_dtype)
    none = np.empty((len(x), 0), rows.scale_dtype)
    scale, zero = (none if each is None else each.reshape(len(x), rows.num_groups) for each in numbers)
    return Encoded(codes.reshape(len(x), rows.row_length), scale, zero)


def _decode_registered(encoded: Encoded, rows: RowLayout) -> np.ndarray:
    groups = rows.head_dim // rows.group_size
    codes = encoded.codes.reshape(-1, rows.row_length // groups)
    numbers = (each.reshape(-1) for each in (encoded.scale, encoded.zero) if each.shape[-1])
    return rows.fmt.codec.decode(codes, *numbers).reshape(*encoded.codes.shape[:-1], rows.head_dim)


def _query_tiles(parts: Sequence[Part]) -> Iterator[tuple[Part, int, np.ndarray, np.ndarray]]:
    """New tokens a few at a time: the part, their sequence, their positions in it, and which of all they are."""
    for part in parts:
        batch = part.batch
        tokens = np.arange(batch.num_tokens) if part.tokens is None else part.tokens
        starts = batch.query_start_loc
        for sequence, (begin, end) in enumerate(pairwise(starts)):
            for first in range(begin, end, QUERY_TILE):
                last = min(first + QUERY_TILE, end)
                positions = batch.positions[sequence] + np.arange(first - begin, last - begin)
                yield part, sequence, positions, tokens[first:last]


TileScores = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""What `NumpyBackend._scores` yields, of a few tokens that attend to a sequence's keys."""


def _attend_tile(
    tile: TileScores, num_kv_heads: int, row_max: np.ndarray, row_sum: np.ndarray, weighted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let a few tokens attend to keys; returns their state after it, (n, Hq, ...) as it was given."""
    row_max, row_sum, weighted = (_by_kv_head(x, num_kv_heads) for x in (row_max, row_sum, weighted))
    for _, v, scores in tile:
        tile_max = np.maximum(row_max, scores.max(axis=-1))
        # a row that has seen no key yet has maximum -inf: subtract 0 there, not -inf from -inf
        shift = np.where(np.isneginf(tile_max), np.float32(0), tile_max)
        weights = np.exp(scores - shift[..., None])
        rescale = np.exp(row_max - shift)
        row_sum = row_sum * rescale + weights.sum(axis=-1)
        weighted = weighted * rescale[..., None] + weights @ v[:, None]
        row_max = tile_max
    return _by_token(row_max), _by_token(row_sum), _by_token(weighted)


def _add_mass(tile: TileScores, lse: np.ndarray, mass: np.ndarray) -> None:
    """Add what keys get from a few tokens, with their `lse` (n, Hq), to `mass` (H, S)."""
    row_lse = _by_kv_head(lse, len(mass))
    # a row that sees no key has only scores of -inf, whose weights are 0 with any finite number here
    shift = np.where(np.isneginf(row_lse), np.float32(0), row_lse)[..., None]
    for places, _, scores in tile:
        mass[:, places] += np.exp(scores - shift).sum(axis=(1, 2))


def _by_kv_head(x: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """(n, Hq, ...) -> (H, G, n, ...): the query heads of a KV head side by side."""
    groups = x.reshape(len(x), num_kv_heads, -1, *x.shape[2:])
    return np.ascontiguousarray(np.moveaxis(groups, 0, 2))


def _by_token(x: np.ndarray) -> np.ndarray:
    """The other way."""
    by_token = np.moveaxis(x, 2, 0)
    return by_token.reshape(len(by_token), -1, *x.shape[3:])


def score(
    query: np.ndarray,
    k: np.ndarray,
    offsets: np.ndarray,
    positions: np.ndarray,
    keys: np.ndarray,
    scoring: Scoring,
    masked: bool,
    shift: int,
) -> np.ndarray:
    """The definition of a score, which every kernel follows: scale, cap, bias, the user's function and masks, in order.

    Parameters
    ----------
    query : (H, G, n, D) float32
    k : (H, m, D) float32
    offsets : (H, G, n) float32
        What is added to the products of each query, see `RowTransform.offsets`.
    positions : (n,) int
        Of the queries.
    keys : (m,) int
        Positions of the keys.
    scoring : Scoring
    masked : bool
        As `Part.masked`.
    shift : int
        As in `Batch.shifts`.

    Returns
    -------
    (H, G, n, m) float32
        -inf where a query does not see a key.
    """
    products = query @ k[:, None].swapaxes(-1, -2) + offsets[..., None]
    scores = products * np.float32(scoring.sm_scale)
    if scoring.logits_soft_cap > 0:
        cap = np.float32(scoring.logits_soft_cap)
        scores = cap * np.tanh(scores / cap)
    distance = positions[:, None] - keys
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.reshape(*scores.shape[:2], 1, 1)
        scores = scores - slopes * distance.astype(np.float32)
    seen = distance >= 0
    if scoring.window_left >= 0:
        seen &= distance <= scoring.window_left
    heads = np.arange(scores.shape[0] * scores.shape[1]).reshape(*scores.shape[:2], 1, 1)
    # users' functions need not know of keys that a token does not see for coming after it
    where = heads, positions[:, None] - shift, np.minimum(keys, positions[:, None])
    if scoring.score_mod is not None:
        scores = scoring.score_mod.on_arrays((scores, *where), scoring.aux, np.float32)
    if masked and scoring.mask_mod is not None:
        seen = seen & scoring.mask_mod.on_arrays(where, scoring.aux, np.bool_)
    return np.where(seen, scores, np.float32(-np.inf))
