"""The same model with outlier channels in its keys: ``python benchmarks/outliers.py FROM TO`` writes a checkpoint.

Keys of real models have channels that are much larger than the others. Here three RoPE pairs of every key head become
12 times as large, and those of its queries as many times smaller: scores, and so the model, stay what they are.
`python -m kvnumba quality --model TO` then shows what formats cost such keys. Needs Hugging Face's layout, and
safetensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FACTOR, PAIRS = 12.0, 3


def scaled(weight: np.ndarray, head_dim: int, factor: float, num_kv_heads: int) -> np.ndarray:
    """A projection (heads * D, hidden) with some rows of each head multiplied; heads of one KV head have the same."""
    rows = weight.astype(np.float32).reshape(-1, head_dim, weight.shape[1])
    group = len(rows) // num_kv_heads
    for kv_head in range(num_kv_heads):
        pairs = np.random.default_rng(kv_head).choice(head_dim // 2, PAIRS, replace=False)
        for channels in (pairs, pairs + head_dim // 2):
            rows[kv_head * group : (kv_head + 1) * group, channels] *= np.float32(factor)
    return rows.reshape(weight.shape)


def main(source: Path, target: Path) -> None:
    """Write the checkpoint, in float32: the factors are not powers of two."""
    config = json.loads((source / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, weight in tensors.items():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    factor = FACTOR if name.endswith("k_proj.weight") else 1 / FACTOR
                    tensors[name] = scaled(weight, head_dim, factor, config["num_key_value_heads"])
            save_file(tensors, target / path.name)
        elif path.suffix == ".json":
            shutil.copy(path, target / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
