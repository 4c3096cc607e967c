"""The reference backend: every operation in plain NumPy, written to be read.

Attention is FlashAttention's online softmax (Dao et al., 2022) over tiles of keys, so that neither the keys
and values in float32 nor the scores of a whole sequence exist at any time.
"""

from __future__ import annotations

import numpy as np

from kvnumba.formats import (
    SCALE_DTYPE,
    Format,
    bfloat16_to_float,
    float_to_bfloat16,
    pack_int4,
    unpack_int4,
)
from kvnumba.storage import (
    Batch,
    Buffers,
    Encoded,
    Layout,
    Scoring,
    allocate_on_host,
    copy_blocks_on_host,
    host_memory_bytes,
    read_blocks_on_host,
    write_blocks_on_host,
)

QUERY_TILE = 64
KEY_TILE = 256


class NumpyBackend:
    """Runs anywhere NumPy does."""

    name = "numpy"
    simulated = False
    device: int | None = None

    def allocate(self, layout: Layout) -> Buffers:
        return allocate_on_host(layout)

    def memory_bytes(self) -> int:
        return host_memory_bytes()

    def encode(self, x: np.ndarray, fmt: Format, group_size: int) -> Encoded:
        no_scales = np.empty((len(x), 0), SCALE_DTYPE)
        if fmt.name == "bfloat16":
            return Encoded(float_to_bfloat16(x), no_scales, no_scales)
        if not fmt.quantized:
            with np.errstate(over="ignore"):  # beyond float16's range is infinity, as everywhere in NumPy
                return Encoded(x.astype(fmt.code_dtype), no_scales, no_scales)
        groups = x.reshape(len(x), x.shape[1] // group_size, group_size)
        zero = groups.min(axis=-1)
        scale = (groups.max(axis=-1) - zero) / np.float32(fmt.max_code)
        # a constant group has scale 0: all its codes are 0, and code * scale + zero is exact
        divisor = np.where(scale > 0, scale, np.float32(1))
        codes = np.rint((groups - zero[..., None]) / divisor[..., None])
        codes = np.clip(codes, 0, fmt.max_code).astype(np.uint8).reshape(x.shape)
        return Encoded(pack_int4(codes) if fmt.bits == 4 else codes, scale, zero)

    def decode(self, rows: Encoded, fmt: Format) -> np.ndarray:
        if fmt.name == "bfloat16":
            return bfloat16_to_float(rows.codes)
        if not fmt.quantized:
            return rows.codes.astype(np.float32)
        codes = unpack_int4(rows.codes) if fmt.bits == 4 else rows.codes
        groups = codes.reshape(*rows.scale.shape, codes.shape[-1] // rows.scale.shape[-1]).astype(np.float32)
        return (groups * rows.scale[..., None] + rows.zero[..., None]).reshape(codes.shape)

    def place(self, batch: Batch) -> Batch:
        return batch

    def write(self, buffers: Buffers, layer: int, k: np.ndarray, v: np.ndarray, placed: Batch) -> None:
        layout, slot_mapping = buffers.layout, placed.slot_mapping
        block, offset = np.divmod(slot_mapping, layout.block_size)
        for new, kept, fmt in (
            (k, buffers.keys, layout.key_format),
            (v, buffers.values, layout.value_format),
        ):
            rows = self.encode(new.reshape(-1, layout.head_dim), fmt, layout.group_size)
            for part, store in zip(rows, kept, strict=True):
                store[layer][block, :, offset] = part.reshape(len(slot_mapping), layout.num_kv_heads, -1)

    def read(
        self, buffers: Buffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(length)
        return (
            self._gather(buffers, buffers.keys, layer, block_table, positions),
            self._gather(buffers, buffers.values, layer, block_table, positions),
        )

    def copy_blocks(self, buffers: Buffers, pairs: np.ndarray) -> None:
        copy_blocks_on_host(buffers, pairs)

    def read_blocks(self, buffers: Buffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        return read_blocks_on_host(buffers, blocks)

    def write_blocks(self, buffers: Buffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        write_blocks_on_host(buffers, blocks, keys, values)

    def plan(self, layout: Layout, placed: Batch, num_qo_heads: int, window_left: int) -> Batch:
        return placed

    def prepare(self, buffers: Buffers, q: np.ndarray, plan: Batch, scoring: Scoring) -> None:
        pass

    def attend(
        self,
        buffers: Buffers,
        layer: int,
        q: np.ndarray,
        plan: Batch,
        scoring: Scoring,
        out: np.ndarray,
        lse: np.ndarray,
    ) -> None:
        tokens_per_row = q.shape[1]
        for block_ids, seq_len, begin, end in zip(
            plan.block_table, plan.seq_lens, plan.query_start_loc[:-1], plan.query_start_loc[1:], strict=True
        ):
            for first in range(begin, end, QUERY_TILE):
                count = min(QUERY_TILE, end - first)
                row, column = divmod(first, tokens_per_row)
                tile = np.s_[row, column : column + count]
                positions = np.arange(count) + (seq_len - end + first)
                out[tile], lse[tile] = self._attend_tile(
                    buffers, layer, block_ids, q[tile], positions, scoring
                )

    def _attend_tile(
        self,
        buffers: Buffers,
        layer: int,
        block_ids: np.ndarray,
        q: np.ndarray,
        positions: np.ndarray,
        scoring: Scoring,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attention of a few tokens (n, Hq, D) of one sequence at consecutive `positions` (n,)."""
        count, num_qo_heads, head_dim = q.shape
        num_kv_heads = buffers.layout.num_kv_heads
        heads = (num_kv_heads, num_qo_heads // num_kv_heads)
        # query heads of one KV head side by side: scores are (H, G, n, keys)
        query = q.reshape(count, *heads, head_dim).transpose(1, 2, 0, 3)
        row_max = np.full((*heads, count), -np.inf, np.float32)
        row_sum = np.zeros((*heads, count), np.float32)
        if scoring.sinks is not None:  # a key that every query sees, whose value is 0
            row_max[:] = scoring.sinks.reshape(*heads, 1)
            row_sum[:] = 1
        weighted = np.zeros((*heads, count, head_dim), np.float32)

        first_key = 0 if scoring.window_left < 0 else max(0, positions[0] - scoring.window_left)
        for start in range(first_key, positions[-1] + 1, KEY_TILE):
            keys = np.arange(start, min(start + KEY_TILE, positions[-1] + 1))
            k = self._gather(buffers, buffers.keys, layer, block_ids, keys)
            v = self._gather(buffers, buffers.values, layer, block_ids, keys)
            scores = _scores(query, k, positions, keys, scoring)
            tile_max = np.maximum(row_max, scores.max(axis=-1))
            # a row that has seen no key yet has maximum -inf: subtract 0 there, not -inf from -inf
            shift = np.where(np.isneginf(tile_max), np.float32(0), tile_max)
            weights = np.exp(scores - shift[..., None])
            rescale = np.exp(row_max - shift)
            row_sum = row_sum * rescale + weights.sum(axis=-1)
            weighted = weighted * rescale[..., None] + weights @ v[:, None]
            row_max = tile_max

        out = weighted / row_sum[..., None]
        lse = row_max + np.log(row_sum)
        return out.transpose(2, 0, 1, 3).reshape(q.shape), lse.transpose(2, 0, 1).reshape(count, num_qo_heads)

    def _gather(
        self, buffers: Buffers, kept: Encoded, layer: int, block_ids: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Keys or values (..., H, n, D) float32 at some positions of sequences with blocks (..., max_blocks)."""
        layout = buffers.layout
        fmt = layout.key_format if kept is buffers.keys else layout.value_format
        block, offset = np.divmod(positions, layout.block_size)
        rows = Encoded(*(part[layer][block_ids[..., block], :, offset].swapaxes(-2, -3) for part in kept))
        return self.decode(rows, fmt)


def _scores(
    query: np.ndarray, k: np.ndarray, positions: np.ndarray, keys: np.ndarray, scoring: Scoring
) -> np.ndarray:
    """Scores (H, G, n, keys), -inf where a query does not see a key."""
    scores = (query @ k[:, None].swapaxes(-1, -2)) * np.float32(scoring.sm_scale)
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
    return np.where(seen, scores, np.float32(-np.inf))
