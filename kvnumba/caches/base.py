"""What all caches are: a layout, a backend, and the buffers that the backend allocates for the layout.

Every cache is a pool of blocks plus a block table. A contiguous cache (`contiguous.py`) is the case with one
block of ``max_seq_len`` tokens per batch element; a paged one (`paged.py`) shares its blocks between sequences;
a quantised one is the case whose blocks hold codes and scales.
"""

from __future__ import annotations

from typing import Any

from kvnumba import arguments
from kvnumba.backends.registry import get_backend
from kvnumba.formats import resolve_format
from kvnumba.storage import Layout


class Cache:
    """What the caches that users hold have in common."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        key_format: Any,
        value_format: Any,
        group_size: int | None,
        num_layers: int,
        backend: str | None,
    ) -> None:
        default = resolve_format("dtype", dtype)
        keys = default if key_format is None else resolve_format("key_format", key_format)
        values = default if value_format is None else resolve_format("value_format", value_format)
        head_dim = arguments.integer("head_dim", head_dim, minimum=1)
        self._layout = Layout(
            num_layers=arguments.integer("num_layers", num_layers, minimum=1),
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=arguments.integer("num_kv_heads", num_kv_heads, minimum=1),
            head_dim=head_dim,
            key_format=keys,
            value_format=values,
            group_size=arguments.group_size(group_size, head_dim, (keys, values)),
        )
        self._backend = get_backend(backend)
        self._buffers = self._backend.allocate(self._layout)

    @property
    def backend(self) -> str:
        """The name of the backend that holds the storage."""
        return self._backend.name

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
        """Elements of a head (D)."""
        return self._layout.head_dim

    @property
    def key_format(self) -> str:
        """The name of the keys' storage format."""
        return self._layout.key_format.name

    @property
    def value_format(self) -> str:
        """The name of the values' storage format."""
        return self._layout.value_format.name

    def memory_bytes(self) -> int:
        """Bytes of the storage, scales and zero points included."""
        return self._layout.memory_bytes()

    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers and heads, scales and zero points included."""
        return self._layout.bytes_per_token()

    @property
    def k_scale(self) -> Any:
        """The keys' scales, float32, writable, shaped as the stored keys with one element a group.

        A format that is not quantised has no groups.
        """
        return self._stored(self._buffers.keys.scale)

    @property
    def k_zp(self) -> Any:
        """The keys' zero points, as `k_scale`: value = code * scale + zero point."""
        return self._stored(self._buffers.keys.zero)

    @property
    def v_scale(self) -> Any:
        """The values' scales, as `k_scale`."""
        return self._stored(self._buffers.values.scale)

    @property
    def v_zp(self) -> Any:
        """The values' zero points, as `k_scale`."""
        return self._stored(self._buffers.values.zero)

    def _stored(self, part: Any) -> Any:
        """A part of the storage; without the layer axis where there is one layer."""
        return part[0] if self.num_layers == 1 else part

    def _describe(self) -> str:
        layout = self._layout
        layers = f"layers={layout.num_layers}, " if layout.num_layers > 1 else ""
        return (
            f"{layers}H={layout.num_kv_heads}, D={layout.head_dim}, {layout.describe_formats()}, "
            f"{self.backend}, {self.memory_bytes() / 1e6:.1f} MB"
        )
