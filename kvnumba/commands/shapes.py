"""The attention of well-known models: one table for the memory and bench commands and for all benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """What a model's KV cache and its attention depend on."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES: dict[str, Shape] = {
    "llama-2-7b":  Shape(num_layers=32, num_qo_heads=32, num_kv_heads=32, head_dim=128),
    "llama-3-8b":  Shape(num_layers=32, num_qo_heads=32, num_kv_heads=8,  head_dim=128),
    "llama-3-70b": Shape(num_layers=80, num_qo_heads=64, num_kv_heads=8,  head_dim=128),
    "mistral-7b":  Shape(num_layers=32, num_qo_heads=32, num_kv_heads=8,  head_dim=128),
    "qwen3-8b":    Shape(num_layers=36, num_qo_heads=32, num_kv_heads=8,  head_dim=128),
    "qwen3-32b":   Shape(num_layers=64, num_qo_heads=64, num_kv_heads=8,  head_dim=128),
    "gemma-2-9b":  Shape(num_layers=42, num_qo_heads=16, num_kv_heads=8,  head_dim=256),
}  # fmt: skip
"""Model name -> shape, from the model's own config.json. Half of Gemma 2's layers have a sliding window, and
keep fewer tokens than the others; here they are counted as if they kept every token."""
