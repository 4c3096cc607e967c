"""Attention shapes of well-known models: query heads, key/value heads, head_dim."""

SHAPES = {
    "llama-3-8b": (32, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "gemma-2-9b": (16, 8, 256),
}
