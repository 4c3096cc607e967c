"""What a user chose for a cache, and the pools that are made of it.

There is no maximum length to declare: a pool is made as large as the memory of the machine. That costs nothing until it
is used, because the operating system gives memory only to the pages that are written. So a cache grows without being
moved, and attention finds all tokens of a sequence in one array. A GPU, however, gives all of a pool's memory at once:
there the pools take half of what is free when the first token comes, and leave the other half to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvnumba.backends.protocol import Backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.storage import Layout, LayoutOptions

BLOCK_SIZE = 128
MAX_NUM_SEQS = 1024
"""Sequences that a pool can hold: those of a batch, its beams, and those of copies of the cache. With blocks of one
head, what the heads of a layer hold counts as a sequence each."""
SHARE_OF_FLOATS = 0.25
"""Of a pool's memory, at the most, for tokens that are kept in float: they have it for every sequence."""
SHARE_OF_GPU = 0.5
"""Of the memory that is free when the first token comes."""


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Without a format that of the model's keys or values is taken; the backend "auto" stands for the one that works where
    they are. With `per_head` the blocks of a pool are of one head.
    """

    options: LayoutOptions
    arithmetic: str | None
    backend: str | Backend
    per_head: bool

    def allocate(
        self,
        num_kv_heads: int,
        head_dims: tuple[int, int],
        defaults: tuple[str, str],
        layers: Sequence[int],
        share: float,
        sliding_window: int | None,
        backend: Backend,
    ) -> PagedKVCache | PerHeadKVCache:
        """A pool for several layers.

        Parameters
        ----------
        num_kv_heads : int
        head_dims, defaults
            Of keys and values: elements, and the format where the user chose none.
        layers : sequence of int
            Their numbers, among the layers that the cache stores.
        share : float
            How much of the memory there is the pool may fill.
        sliding_window : int, optional
            Tokens that a token sees.
        backend : Backend
        """
        options: LayoutOptions = {**self.options, "num_layers": len(layers), "value_head_dim": head_dims[1]}
        options["key_format"] = options.get("key_format") or defaults[0]
        options["value_format"] = options.get("value_format") or defaults[1]
        calibration, recent_tokens = options.get("calibration"), options.get("recent_tokens")
        if calibration is not None:
            options["calibration"] = calibration.select(layers)
        if recent_tokens and sliding_window is not None:
            options["recent_tokens"] = min(recent_tokens, sliding_window)
        layout = Layout.of(1, BLOCK_SIZE, num_kv_heads, head_dims[0], **options)
        if backend.device is not None:
            share *= SHARE_OF_GPU
        room, max_num_seqs = int(backend.available_bytes() * share), MAX_NUM_SEQS
        if layout.recent_tokens:
            most = int(room * SHARE_OF_FLOATS) // layout.memory(1).floats
            max_num_seqs = max(1, min(MAX_NUM_SEQS, most))
            room -= layout.memory(max_num_seqs).floats
        layout = replace(layout, num_blocks=max(1, room // layout.memory_bytes()))
        try:
            if self.per_head:
                heads = layout.num_layers * num_kv_heads
                layout = replace(layout, num_blocks=layout.num_blocks * heads)
                return PerHeadKVCache.from_layout(
                    layout, max(1, max_num_seqs // num_kv_heads), backend=backend
                )
            return PagedKVCache.from_layout(layout, max_num_seqs, backend=backend)
        except MemoryError as error:
            if backend.device is not None:
                raise
            raise MemoryError(
                f"the system refuses to reserve {layout.memory_bytes():,} bytes, though memory would be used only "
                f"as the cache fills: allow it (vm.overcommit_memory, ulimit -v)"
            ) from error
