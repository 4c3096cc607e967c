"""``python -m kvnumba memory``: how much memory caches take. Arithmetic only, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvnumba import arguments
from kvnumba.commands.shapes import SHAPES
from kvnumba.formats import FORMATS, REGISTERED
from kvnumba.recipes import INT4_RECIPE
from kvnumba.storage import Layout, LayoutOptions

COLUMNS: dict[str, tuple[str, LayoutOptions]] = {
    **{name: (name, LayoutOptions()) for name in FORMATS},
    "int4 model": ("int4", INT4_RECIPE),
}
"""What the growth table shows: formats, and int4 as `IncrementalDecoder` and `KVNumbaCache` keep it; then those that
are registered."""

DEFAULT_SEQ_LENS = (128, 512, 1024, 4096, 8192, 16384, 32768, 65536)


def run(
    preset: str, num_layers: int | None, num_kv_heads: int | None, head_dim: int | None, batch: int
) -> None:
    """Print how a model's cache grows; a number that is given replaces the preset's."""
    shape = SHAPES[preset]
    given = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    shape = shape._replace(**{name: value for name, value in given.items() if value is not None})
    print(memory_growth_table(shape.num_layers, shape.num_kv_heads, shape.head_dim, batch))


def memory_analysis(
    num_layers: int,
    num_heads: int,
    head_dim: int,
    batch_size: int,
    seq_len: int,
    bytes_per_element: float = 4,
) -> dict[str, Any]:
    """Bytes of a cache whose elements all take the same room.

    Parameters
    ----------
    num_layers, num_heads, head_dim, batch_size, seq_len : int
        `num_heads` counts key/value heads.
    bytes_per_element : float
        4 for float32, 2 for float16, 0.5 for 4-bit codes. Scales are not counted here; `memory_growth_table` and
        `Layout.memory_bytes` count them.

    Returns
    -------
    dict
        ``per_token_per_layer_B``, ``per_layer_bytes``, ``per_layer_MB``, ``total_bytes``, ``total_MB``,
        ``total_GB`` and ``params``, the arguments. MB is 1e6 and GB 1e9 bytes. The first counts one batch element,
        the others all of them.
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

    After the formats comes int4 as models keep it, with float16 scales and the newest tokens of each sequence in float
    besides; what these take stands in a row of its own, and is counted in the sizes. Then registered formats.

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
    layouts = {}
    columns = COLUMNS | {name: (name, LayoutOptions()) for name in REGISTERED}
    for name, (fmt, options) in columns.items():
        of_model: LayoutOptions = {**options, "num_layers": num_layers}
        layouts[name] = Layout.of(1, 1, num_heads, head_dim, fmt, **of_model)
    token = {name: layout.memory() for name, layout in layouts.items()}
    floats = {name: layout.memory(1).floats for name, layout in layouts.items()}

    def line(label: str, sizes: Iterable[float]) -> str:
        return f"{label:>14}" + "".join(f"{_bytes(size):>12}" for size in sizes)

    header = f"{'tokens':>14}" + "".join(f"{name:>12}" for name in columns)
    lines = [
        f"KV cache: {num_layers} layers, {num_heads} KV heads of {head_dim}, batch {batch_size}",
        header,
        "-" * len(header),
        line("per token", (sum(use) for use in token.values())),
        line("its scales", (use.scales for use in token.values())),
        line("floats besides", floats.values()),
    ]
    for seq_len in seq_lens:
        count = arguments.integer("seq_lens", seq_len, minimum=0)
        sizes = (batch_size * (count * sum(token[name]) + floats[name]) for name in columns)
        lines.append(line(f"{count:,}", sizes))
    float32 = sum(token["float32"])
    lines.append(f"{'/ float32':>14}" + "".join(f"{sum(use) / float32:>12.3f}" for use in token.values()))
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
