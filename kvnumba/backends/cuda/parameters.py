"""The kernels' parameters, each list written once: named tuples, passed by value.

The first tuple of a kernel is what differs from call to call, addresses for the most part; the rest is packed once for
all layers.
Strides are counted in elements.
"""

from __future__ import annotations

from typing import NamedTuple

from kvnumba.backends.cuda.jit import Long


class WriteAddresses(NamedTuple):
    """New keys and values, and the layer's storage; 0: there is none."""

    k: Long
    v: Long
    keys: Long
    key_scales: Long
    values: Long
    value_scales: Long
    channel_shifts: Long
    channel_scales: Long


class WriteShape(NamedTuple):
    """The batch, and where its rows begin: that of token t and head h at
    ``t // tokens_per_row * batch + t % tokens_per_row * token + h * head``.
    """

    tables: Long
    k_batch: Long
    k_token: Long
    k_head: Long
    v_batch: Long
    v_token: Long
    v_head: Long
    slab_bytes: Long
    tokens_per_row: int
    num_tokens: int
    num_seqs: int
    max_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    key_group: int
    value_group: int


class ReadAddresses(NamedTuple):
    """Block ids (B, max_blocks), stored rows and out (B, H, length, D) float32."""

    blocks: Long
    codes: Long
    scales: Long
    out: Long


class ReadShape(NamedTuple):
    """`num_rows` is B * H * length."""

    slab_bytes: Long
    num_rows: int
    length: int
    max_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    group_size: int


class CopyAddresses(NamedTuple):
    """Pairs (source, destination) int32 of blocks, and the storage of all layers."""

    pairs: Long
    storage: Long


class CopyShape(NamedTuple):
    """Blocks are multiples of 4 bytes."""

    layer_bytes: Long
    block_bytes: Long
    num_pairs: int


class AttendAddresses(NamedTuple):
    """Queries, results and their strides, numbers for each query head, and the layer's storage; 0: there is none."""

    q: Long
    out: Long
    out_batch: Long
    out_token: Long
    out_head: Long
    lse: Long
    sinks: Long
    slopes: Long
    keys: Long
    key_scales: Long
    values: Long
    value_scales: Long
    channel_shifts: Long
    channel_scales: Long


class MassAddresses(NamedTuple):
    """Queries, the strides of results, the lse and slopes as in `AttendAddresses`, masses, and the layer's storage.

    A row of masses (sequences, H, longest) float32 has `longest` keys.
    """

    q: Long
    out_batch: Long
    out_token: Long
    out_head: Long
    lse: Long
    slopes: Long
    mass: Long
    longest: Long
    keys: Long
    key_scales: Long
    values: Long
    value_scales: Long
    channel_shifts: Long
    channel_scales: Long


class StorageAddresses(NamedTuple):
    """A layer's storage alone, of a second part of the keys; 0: there is none."""

    keys: Long
    key_scales: Long
    values: Long
    value_scales: Long
    channel_shifts: Long
    channel_scales: Long


class AttendShape(NamedTuple):
    """Tables of the batch and of its pieces (`plan.py`), shapes, and how scores are made.

    `tokens` says which packed token each of the batch's tokens is; 0: they are all of them, in order. `offsets` and
    `shifts` are those of the batch, `aux` is what users' functions are given besides; 0: there are none. `group` query
    heads share a KV head, of which a block takes `heads`.
    """

    tables: Long
    pieces: Long
    tokens: Long
    partials: Long
    counters: Long
    aux: Long
    offsets: Long
    shifts: Long
    q_batch: Long
    q_token: Long
    q_head: Long
    slab_bytes: Long
    num_pieces: int
    tokens_per_row: int
    num_seqs: int
    max_blocks: int
    block_size: int
    num_kv_heads: int
    num_qo_heads: int
    group: int
    heads: int
    head_dim: int
    value_head_dim: int
    key_group: int
    value_group: int
    window_left: int
    sm_scale: float
    soft_cap: float


class MergeAddresses(NamedTuple):
    """Results and their strides, and a sink for each query head; 0: there is none."""

    out: Long
    out_batch: Long
    out_token: Long
    out_head: Long
    lse: Long
    sinks: Long


class MergeShape(NamedTuple):
    """Which partial results belong to which packed token t: those numbered ``rows[starts[t]:starts[t + 1]]``."""

    starts: Long
    rows: Long
    partials: Long
    num_tokens: int
    tokens_per_row: int
    num_qo_heads: int
    value_head_dim: int
