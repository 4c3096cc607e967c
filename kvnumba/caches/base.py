"""What all caches are: a layout, a backend, and the buffers that the backend allocates for the layout.

Every cache is a pool of blocks plus a block table. A contiguous cache (`contiguous.py`) is the case with one
block of ``max_seq_len`` tokens per batch element; a paged one (`paged.py`) shares its blocks between sequences;
a quantised one is the case whose blocks hold codes and scales.
"""

from __future__ import annotations

from typing import Any

from kvnumba.attention.passes import Pass
from kvnumba.backends.protocol import Backend
from kvnumba.caches.recent import RecentTokens
from kvnumba.storage import Layout, MemoryUse


class Cache:
    """What the caches that users hold have in common."""

    def __init__(self, layout: Layout, max_num_seqs: int, backend: Backend) -> None:
        self._layout = layout
        self._max_num_seqs = max_num_seqs
        self._backend = backend
        self._buffers = self._backend.allocate(layout)
        self._recent = RecentTokens(self._backend, layout, max_num_seqs) if layout.recent_tokens else None
        # the latest pass and its key: later layers, and `attend` after `update`, use the same plan
        self._latest: tuple[Any, Pass] | None = None

    @property
    def layout(self) -> Layout:
        """The shape of the storage."""
        return self._layout

    @property
    def backend(self) -> str:
        """The name of the backend that holds the storage."""
        return self._backend.name

    @property
    def device(self) -> int | None:
        """The GPU that holds the storage, by number; None where it is in host memory."""
        return self._backend.device

    @property
    def num_layers(self) -> int:
        """Layers that the cache holds."""
        return self._layout.num_layers

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads (H)."""
        return self._layout.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Elements of a key, and of a query (D)."""
        return self._layout.head_dim

    @property
    def value_head_dim(self) -> int:
        """Elements of a value, and of an output (Dv)."""
        return self._layout.value_head_dim

    @property
    def key_format(self) -> str:
        """The name of the keys' storage format."""
        return self._layout.keys.fmt.name

    @property
    def value_format(self) -> str:
        """The name of the values' storage format."""
        return self._layout.values.fmt.name

    def memory_bytes(self) -> int:
        """Bytes of the whole storage, filled or not; scales, zeros and tokens kept in float included."""
        return sum(self.memory())

    def memory(self) -> MemoryUse:
        """`memory_bytes` by what they are used for: elements, scales and zeros, tokens kept in float."""
        return self._layout.memory(self._max_num_seqs)

    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers and heads, scales and zeros included."""
        return self._layout.bytes_per_token()

    @property
    def k_scale(self) -> Any:
        """The keys' scales, writable, shaped as the stored keys with one element a group; no groups without scales."""
        return self._stored(self._buffers.keys.scale)

    @property
    def k_zp(self) -> Any:
        """The keys' zeros, as `k_scale`. A zero is what code 0 stands for: value = code * scale + zero."""
        return self._stored(self._buffers.keys.zero)

    @property
    def v_scale(self) -> Any:
        """The values' scales, as `k_scale`."""
        return self._stored(self._buffers.values.scale)

    @property
    def v_zp(self) -> Any:
        """The values' zeros, as `k_scale`."""
        return self._stored(self._buffers.values.zero)

    def _stored(self, array: Any) -> Any:
        """An array of the storage; without the layer axis where there is one layer."""
        return array[0] if self._layout.num_layers == 1 else array

    def _describe(self) -> str:
        layout = self._layout
        layers = f"layers={layout.num_layers}, " if layout.num_layers > 1 else ""
        kept = "" if layout.transform is None else f", {layout.transform.name}"
        kept += f", recent_tokens={layout.recent_tokens}" if layout.recent_tokens else ""
        kept += f", sink_tokens={layout.sink_tokens}" if layout.sink_tokens else ""
        width = f"D={layout.head_dim}"
        if layout.value_head_dim != layout.head_dim:
            width += f", Dv={layout.value_head_dim}"
        return (
            f"{layers}H={layout.num_kv_heads}, {width}, {layout.describe_formats()}{kept}, "
            f"{self.backend}, {self.memory_bytes() / 1e6:.1f} MB"
        )
