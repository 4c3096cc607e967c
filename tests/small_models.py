"""What the tests of Hugging Face models have in common."""

from conftest import ON_GPU

DEVICE = "cuda" if ON_GPU else "cpu"

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Of a config: a model that is made in milliseconds, and whose tokens differ from each other."""
