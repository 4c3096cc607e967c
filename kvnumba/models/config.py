"""The shape of a Llama-family model, read from the config.json of a Hugging Face checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODEL_TYPES = ("llama", "mistral")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LlamaConfig:
    """What the decoder needs to know of a model, in the words of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # empty, or the parameters of type "llama3"
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a config.json, or raise ValueError that says what in it is missing or not supported."""

        def expect(name: str, value: Any, *allowed: Any) -> Any:
            if value not in allowed:
                raise ValueError(
                    f"config.json: {name} {value!r} is not supported; expected "
                    + " or ".join(repr(choice) for choice in allowed)
                )
            return value

        expect("model_type", config.get("model_type"), *MODEL_TYPES)
        expect("hidden_act", config.get("hidden_act", "silu"), "silu")
        expect("attention_bias", config.get("attention_bias", False), False)
        expect("mlp_bias", config.get("mlp_bias", False), False)
        expect("quantization_config", config.get("quantization_config"), None)
        count = functools.partial(_count, config)
        # transformers 5 keeps rope_theta in rope_parameters, earlier versions beside rope_scaling
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope_type = expect(
            "rope_type", rope.get("rope_type", rope.get("type", "default")), "default", "llama3"
        )
        missing = [name for name in LLAMA3_ROPE if name not in rope] if rope_type == "llama3" else []
        if missing:
            raise ValueError(f"config.json: {missing[0]} is missing for rope_type 'llama3'")
        heads = count("num_attention_heads")
        kv_heads = count("num_key_value_heads", heads)
        head_dim = count("head_dim", count("hidden_size") // heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: num_key_value_heads {kv_heads} does not divide {heads} heads")
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim {head_dim} is odd, rotary positions turn pairs")
        # Llama has no sliding window, whatever its config says; Mistral's may be null
        sliding = config.get("model_type") == "mistral" and config.get("sliding_window") is not None
        eos = config.get("eos_token_id")
        return cls(
            vocab_size=count("vocab_size"),
            hidden_size=count("hidden_size"),
            intermediate_size=count("intermediate_size"),
            num_hidden_layers=count("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=count("max_position_embeddings"),
            rms_norm_eps=config.get("rms_norm_eps", cls.rms_norm_eps),
            rope_theta=rope.get("rope_theta", config.get("rope_theta", cls.rope_theta)),
            rope_scaling=rope if rope_type == "llama3" else {},
            sliding_window=count("sliding_window") if sliding else None,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    def inverse_frequencies(self) -> np.ndarray:
        """Of the rotary embedding (Su et al., 2021), (D / 2,) float32, with Llama 3.1's scaling if any."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = 1 / np.float32(self.rope_theta) ** exponents
        if not self.rope_scaling:
            return frequencies
        # long wavelengths are stretched by `factor`, short ones kept, those between interpolated
        factor, low, high, trained = (self.rope_scaling[name] for name in LLAMA3_ROPE)
        turns = trained * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return (frequencies * (kept + (1 - kept) / factor)).astype(np.float32)


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of a config.json; absent or null, the default."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json: {name} is missing")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {name}: expected a positive integer; got {value!r}")
    return value
