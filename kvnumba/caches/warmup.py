"""Compile kernels before they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvnumba import arguments
from kvnumba.backends.quantization import dequantize, quantize
from kvnumba.backends.registry import get_backend
from kvnumba.caches.contiguous import KVCache
from kvnumba.caches.paged import PagedKVCache

TILE = 256  # rows of scores (new tokens times query heads of a KV head) of the largest kernel


def tile_counts(group: int) -> range:
    """Numbers of new tokens that together use every kernel, for `group` query heads per KV head."""
    return range(1, max(3, min(TILE, TILE // group + 2)))


def warmup(
    num_qo_heads: int = 32,
    num_kv_heads: int = 8,
    *,
    key_format: str = "float32",
    scale_dtype: Any = "float32",
    arithmetic: str | None = None,
    backend: str | None = None,
) -> None:
    """Compile, or load from disk, the kernels that a model's caches will run.

    On the `cpu` backend they depend on the query heads of a KV head and on the dtype of scales, not on widths or
    lengths; on processors with tile instructions also on the arithmetic, and on whether keys and values are codes.
    Without this call each compiles at its first use: about 25 s in all, once for an installation.

    Parameters
    ----------
    num_qo_heads, num_kv_heads : int
        Of the model; the first is a multiple of the second.
    key_format : str
        Of the keys and values of the caches to come.
    scale_dtype : {"float32", "float16"}
        Of their scales: float16 for int4 as models keep it.
    arithmetic : str, optional
        Of the calls to come, see `ScoringOptions`: "bfloat16" also for queries in bfloat16.
    backend : str, optional
        Default: the one that is chosen.
    """
    num_kv_heads = arguments.integer("num_kv_heads", num_kv_heads, minimum=1)
    num_qo_heads = arguments.integer("num_qo_heads", num_qo_heads, minimum=1)
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads: expected a multiple of num_kv_heads={num_kv_heads}; got {num_qo_heads}"
        )
    group = num_qo_heads // num_kv_heads
    # long rows: a short cache is then work enough for several threads, whose results are merged
    head_dim = 2048 if get_backend(backend).device is None else 128
    kept = {"scale_dtype": scale_dtype, "backend": backend}
    cache = KVCache(1, 1500, 1, head_dim, "int8", recent_tokens=16, **kept)
    k = np.zeros((1, 1, 1400, head_dim), np.float32)
    for new in (k, k[:, :, :1]):
        cache.update(new, new)
    cache.attend(np.zeros((1, group, 1, head_dim), np.float32))
    # every number of new tokens up to a whole tile and what may be left of a prompt
    width = 128  # of which every kernel may be
    short = KVCache(1, TILE, 1, width, key_format, **kept)
    short.update(k[:, :, :TILE, :width], k[:, :, :TILE, :width])
    for count in tile_counts(group):
        short.attend(np.zeros((1, group, count, width), np.float32), arithmetic=arithmetic)
    shared = PagedKVCache(2, 16, 1, 2048, 2, **kept)
    seq_id = shared.add_sequence()
    shared.update(seq_id, k[0, :, :1], k[0, :, :1])
    shared.update(shared.fork(seq_id), k[0, :, :1], k[0, :, :1])  # copies a block
    cache.get_kv(0)
    dequantize(*quantize(k[0, 0, :1], **kept), backend=backend)
