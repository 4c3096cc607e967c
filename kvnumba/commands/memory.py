"""How much memory caches take: arithmetic only, nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvnumba import arguments
from kvnumba.formats import FORMATS
from kvnumba.storage import Layout

DEFAULT_SEQ_LENS = (128, 512, 1024, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Preset:
    """The cache's shape in a well-known model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


PRESETS: dict[str, Preset] = {
    "llama-2-7b":   Preset(num_layers=32, num_kv_heads=32, head_dim=128),
    "llama-3-8b":   Preset(num_layers=32, num_kv_heads=8,  head_dim=128),
    "llama-3-70b":  Preset(num_layers=80, num_kv_heads=8,  head_dim=128),
    "mistral-7b":   Preset(num_layers=32, num_kv_heads=8,  head_dim=128),
    "qwen3-8b":     Preset(num_layers=36, num_kv_heads=8,  head_dim=128),
    "gemma-2-9b":   Preset(num_layers=42, num_kv_heads=8,  head_dim=256),
}  # fmt: skip
"""From the models' own config.json. Sliding layers (Gemma 2) are counted as if they kept every token."""


def memory_analysis(
    num_layers: int,
    num_heads: int,
    head_dim: int,
    batch_size: int,
    seq_len: int,
    bytes_per_element: float = 4,
) -> dict[str, Any]:
    """Bytes of a cache of one plain element type.

    Parameters
    ----------
    num_layers, num_heads, head_dim, batch_size, seq_len : int
        `num_heads` counts key/value heads.
    bytes_per_element : float
        4 for float32, 2 for float16, 0.5 for bare 4-bit codes. Scales are not counted here: see
        `memory_growth_table` and the caches' own `bytes_per_token`.

    Returns
    -------
    dict
        ``per_token_per_layer_B``, ``per_layer_bytes``, ``per_layer_MB``, ``total_bytes``, ``total_MB``,
        ``total_GB`` and ``params``, the arguments; MB is 1e6 and GB 1e9 bytes, all batch elements counted
        but in the first.
    """
    params = {
        "num_layers": arguments.integer("num_layers", num_layers, minimum=1),
        "num_heads": arguments.integer("num_heads", num_heads, minimum=1),
        "head_dim": arguments.integer("head_dim", head_dim, minimum=1),
        "batch_size": arguments.integer("batch_size", batch_size, minimum=1),
        "seq_len": arguments.integer("seq_len", seq_len, minimum=0),
        "bytes_per_element": bytes_per_element,
    }
    if not bytes_per_element > 0:
        raise ValueError(f"bytes_per_element: expected more than 0; got {bytes_per_element}")
    per_token = 2 * num_heads * head_dim * bytes_per_element
    per_layer = per_token * batch_size * seq_len
    total = per_layer * num_layers
    return {
        "per_token_per_layer_B": per_token,
        "per_layer_bytes": per_layer,
        "per_layer_MB": per_layer / 1e6,
        "total_bytes": total,
        "total_MB": total / 1e6,
        "total_GB": total / 1e9,
        "params": params,
    }


def memory_growth_table(
    num_layers: int = 32,
    num_heads: int = 32,
    head_dim: int = 128,
    batch_size: int = 1,
    seq_lens: Sequence[int] | None = None,
) -> str:
    """A text table of a cache's size by length and format, scales included.

    Parameters
    ----------
    num_layers, num_heads, head_dim, batch_size : int
        `num_heads` counts key/value heads.
    seq_lens : sequence of int, optional
        Default: 128 to 65536.
    """
    num_layers = arguments.integer("num_layers", num_layers, minimum=1)
    num_heads = arguments.integer("num_heads", num_heads, minimum=1)
    head_dim = arguments.integer("head_dim", head_dim, minimum=1)
    batch_size = arguments.integer("batch_size", batch_size, minimum=1)
    seq_lens = DEFAULT_SEQ_LENS if seq_lens is None else seq_lens
    per_token = {}
    for name, fmt in FORMATS.items():
        per_token[name] = Layout.of(
            1, 1, num_heads, head_dim, fmt.name, num_layers=num_layers
        ).bytes_per_token()
    header = f"{'tokens':>10}" + "".join(f"{name:>12}" for name in per_token)
    lines = [
        f"KV cache: {num_layers} layers, {num_heads} KV heads of {head_dim}, batch {batch_size}",
        header,
        "-" * len(header),
        f"{'per token':>10}" + "".join(f"{_bytes(size):>12}" for size in per_token.values()),
    ]
    for seq_len in seq_lens:
        tokens = arguments.integer("seq_lens", seq_len, minimum=0) * batch_size
        lines.append(
            f"{seq_len:>10,}" + "".join(f"{_bytes(tokens * size):>12}" for size in per_token.values())
        )
    float32 = per_token["float32"]
    lines.append(f"{'/ float32':>10}" + "".join(f"{size / float32:>12.3f}" for size in per_token.values()))
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
