"""A Llama-family decoder on NumPy matrix products, whose keys and values live in this library's caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments
from kvnumba.caches.contiguous import KVCache
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.step import Step
from kvnumba.calibration import Calibration
from kvnumba.models.calibrating import ChannelStatistics, calibration_of
from kvnumba.models.checkpoint import BUNDLED_MODEL, CALIBRATION, Tensors, read_config
from kvnumba.models.config import LlamaConfig
from kvnumba.models.sampling import checked_temperature, sample
from kvnumba.recipes import with_recipe
from kvnumba.storage import Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

CALIBRATION_CHUNK = 512

# Called for each layer with packed queries (T, Hq, D), keys and values (T, H, D); returns (T, Hq, D).
LayerAttention = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Layer:
    """One layer's weights. Matrices are (in, out); those that multiply the same input stand side by side in one."""

    input_norm: np.ndarray
    qkv: np.ndarray
    output: np.ndarray
    mlp_norm: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray


class IncrementalDecoder:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    The constructor makes a model with random weights; `from_pretrained` loads one.

    Parameters
    ----------
    d_model, num_heads, num_layers, max_seq_len, vocab_size : int
        `d_model` is a multiple of `num_heads`, and each head's share of it is even.
    num_kv_heads : int, optional
        A divisor of `num_heads`. Default: `num_heads`.
    seed : int
        Of the random weights.

    Attributes
    ----------
    config : LlamaConfig
    calibration : Calibration or None
        What `from_pretrained` found beside the weights.
    """

    calibration: Calibration | None = None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_layers: int,
        max_seq_len: int,
        vocab_size: int,
        *,
        num_kv_heads: int | None = None,
        seed: int = 0,
    ) -> None:
        d_model = arguments.integer("d_model", d_model, minimum=1)
        num_heads = arguments.integer("num_heads", num_heads, minimum=1)
        if d_model % (2 * num_heads):
            raise ValueError(f"d_model: expected an even multiple of num_heads={num_heads}; got {d_model}")
        num_kv_heads = (
            num_heads if num_kv_heads is None else arguments.integer("num_kv_heads", num_kv_heads, minimum=1)
        )
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}; got {num_kv_heads}")
        config = LlamaConfig(
            vocab_size=arguments.integer("vocab_size", vocab_size, minimum=1),
            hidden_size=d_model,
            intermediate_size=4 * d_model,
            num_hidden_layers=arguments.integer("num_layers", num_layers, minimum=1),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=d_model // num_heads,
            max_position_embeddings=arguments.integer("max_seq_len", max_seq_len, minimum=1),
            tie_word_embeddings=True,
        )
        self._load(config, _random_weights(config, np.random.default_rng(seed)))

    @classmethod
    def from_pretrained(cls, folder: str | Path = BUNDLED_MODEL) -> IncrementalDecoder:
        """Load a checkpoint folder of Hugging Face's layout.

        Parameters
        ----------
        folder : path
            Holds config.json and model.safetensors, or shards and an index, and perhaps calibration.npz, which
            becomes the attribute `calibration`. Default: the small byte-level model of this package, whose tokens are
            bytes.

        Raises
        ------
        FileNotFoundError
            A file is missing.
        ValueError
            The config asks for something that is not supported, or a tensor is missing or misshapen.
        """
        folder = Path(folder)
        config = LlamaConfig.from_dict(read_config(folder))
        decoder = cls.__new__(cls)
        decoder._load(config, Tensors(folder))
        path = folder / CALIBRATION
        if path.is_file():
            decoder.calibration = Calibration.load(path)
            shape = (config.num_key_value_heads, config.head_dim)
            if [array.shape for array in decoder.calibration.shifts] != [shape] * config.num_hidden_layers:
                raise ValueError(f"{path}: of another model than the checkpoint: {decoder.calibration!r}")
        return decoder

    def _load(self, config: LlamaConfig, weights: Mapping[str, np.ndarray]) -> None:
        self.config = config
        shapes = _weight_shapes(config)

        def weight(name: str) -> np.ndarray:
            if name not in weights:
                raise ValueError(f"{name}: not in the checkpoint")
            array = weights[name]
            if array.shape != shapes[name]:
                raise ValueError(f"{name}: expected shape {shapes[name]}; got {array.shape}")
            return array

        def side_by_side(*names: str) -> np.ndarray:
            return np.concatenate([weight(name) for name in names]).T

        self._embedding = weight("model.embed_tokens.weight")
        self._norm = weight("model.norm.weight")
        self._head = self._embedding.T if config.tie_word_embeddings else weight("lm_head.weight").T
        self._layers = []
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}"
            self._layers.append(
                _Layer(
                    input_norm=weight(f"{at}.input_layernorm.weight"),
                    qkv=side_by_side(*(f"{at}.self_attn.{part}_proj.weight" for part in "qkv")),
                    output=weight(f"{at}.self_attn.o_proj.weight").T,
                    mlp_norm=weight(f"{at}.post_attention_layernorm.weight"),
                    gate_up=side_by_side(*(f"{at}.mlp.{part}_proj.weight" for part in ("gate", "up"))),
                    down=weight(f"{at}.mlp.down_proj.weight").T,
                )
            )
        self._inverse_frequencies = config.inverse_frequencies()

    def make_cache(
        self,
        num_tokens: int,
        *,
        block_size: int = 16,
        max_num_seqs: int = 1,
        dtype: Any = "float32",
        backend: str | None = None,
        **options: Unpack[LayoutOptions],
    ) -> PagedKVCache:
        """A paged cache of this model's shape with room for `num_tokens` tokens.

        Parameters
        ----------
        num_tokens, block_size, max_num_seqs, dtype, **options
            As in `layout`.
        backend : str, optional
            As in `PagedKVCache`.
        """
        layout = self.layout(
            num_tokens, block_size=block_size, max_num_seqs=max_num_seqs, dtype=dtype, **options
        )
        return PagedKVCache.from_layout(layout, max_num_seqs, backend=backend)

    def layout(
        self,
        num_tokens: int,
        *,
        block_size: int = 16,
        max_num_seqs: int = 1,
        dtype: Any = "float32",
        **options: Unpack[LayoutOptions],
    ) -> Layout:
        """The layout of a paged cache of this model's shape with room for `num_tokens` tokens.

        int4 here means rotated, with float16 scales, the newest 128 tokens in float and, where the model has a
        calibration, calibrated; options change each of these, and ``rotation=False, recent_tokens=0`` makes it plain.

        Parameters
        ----------
        num_tokens, block_size, max_num_seqs : int
            The tokens are rounded up to whole blocks, and every sequence but the first adds a block.
        dtype, **options
            As in `PagedKVCache`.
        """
        config = self.config
        num_tokens = arguments.integer("num_tokens", num_tokens, minimum=1)
        block_size = arguments.integer("block_size", block_size, minimum=1)
        max_num_seqs = arguments.integer("max_num_seqs", max_num_seqs, minimum=1)
        options = with_recipe(dtype, options, self.calibration)
        options["num_layers"] = config.num_hidden_layers
        recent_tokens = options.get("recent_tokens")
        if recent_tokens and config.sliding_window is not None:
            options["recent_tokens"] = min(recent_tokens, config.sliding_window)
        num_blocks = -(-num_tokens // block_size) + max_num_seqs - 1
        return Layout.of(
            num_blocks, block_size, config.num_key_value_heads, config.head_dim, dtype, **options
        )

    def forward(self, token_ids: np.ndarray, positions: np.ndarray, attention: LayerAttention) -> np.ndarray:
        """Run packed tokens through the model.

        Parameters
        ----------
        token_ids, positions : (T,) int
        attention : callable
            ``attention(layer, q, k, v)`` with q (T, Hq, D), k and v (T, H, D), rotated; stores the keys and
            values and returns the attention's output (T, Hq, D).

        Returns
        -------
        (T, hidden_size) float32
            The last layer's output after the final norm; `logits` takes it.
        """
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        count = len(token_ids)
        angles = positions.astype(np.float32)[:, None] * self._inverse_frequencies
        rotation = (np.cos(angles)[:, None], np.sin(angles)[:, None])
        x = self._embedding[token_ids]
        for i, layer in enumerate(self._layers):
            qkv = _rms_norm(x, layer.input_norm, config.rms_norm_eps) @ layer.qkv
            q, k, v = np.split(qkv.reshape(count, -1, head_dim), (heads, heads + kv_heads), axis=1)
            attended = attention(i, _rotate(q, *rotation), _rotate(k, *rotation), v)
            x = x + attended.reshape(count, -1) @ layer.output
            gate, up = np.split(_rms_norm(x, layer.mlp_norm, config.rms_norm_eps) @ layer.gate_up, 2, axis=1)
            x = x + (_silu(gate) * up) @ layer.down
        return _rms_norm(x, self._norm, config.rms_norm_eps)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits (..., vocab_size) of what `forward` returns (..., hidden_size)."""
        return hidden @ self._head

    def extend(self, cache: PagedKVCache, seq_ids: Sequence[int], token_ids: Sequence[Any]) -> np.ndarray:
        """Append tokens to sequences of a paged cache: one ragged forward pass.

        The tokens are registered with the cache, so that `PagedKVCache.add_sequence` finds them later.

        Parameters
        ----------
        cache : PagedKVCache
            Of this model's shape, as `make_cache` makes it.
        seq_ids : sequence of B ints
        token_ids : sequence of B sequences of int
            Each sequence's new tokens.

        Returns
        -------
        (T, vocab_size) float32
            Logits at every new token, sequence by sequence.

        Raises
        ------
        CacheFull
            There are too few free blocks; nothing has changed.
        ValueError
            A token id is not in the vocabulary, the text becomes longer than the model allows, or `PagedKVCache.step`
            refuses its arguments.
        """
        return self.logits(self._extend(cache, seq_ids, token_ids)[0])

    def next_logits(
        self, cache: PagedKVCache, seq_ids: Sequence[int], token_ids: Sequence[Any]
    ) -> np.ndarray:
        """`extend`, with the logits at each sequence's last new token alone: (B, vocab_size) float32."""
        hidden, step = self._extend(cache, seq_ids, token_ids)
        return self.logits(hidden[step.batch.query_start_loc[1:] - 1])

    def _extend(
        self, cache: PagedKVCache, seq_ids: Sequence[int], token_ids: Sequence[Any]
    ) -> tuple[np.ndarray, Step]:
        """What `forward` returns at every new token, and the step that appended them."""
        self._check_cache(cache, cache.num_layers)
        tokens = [self._checked_tokens(ids) for ids in token_ids]
        new = [len(ids) for ids in tokens]
        lengths = cache.seq_lens
        for seq_id, count in zip(seq_ids, new, strict=False):  # `step` refuses ids and counts that do not fit
            self._check_end((cache.next_position(seq_id) if seq_id in lengths else 0) + count)
        step = cache.step(seq_ids, new, token_ids=tokens)
        return self.forward(np.concatenate(tokens), step.positions, self.attention_of(step)), step

    def attention_of(self, step: Step) -> LayerAttention:
        """The attention of a step of a paged cache, as `forward` calls it."""

        def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            step.write(k, v, layer=layer)
            return step.attend(q, layer=layer, window_left=self.window_left)

        return attention

    def forward_step(
        self, token_ids: Any, caches: KVCache | Sequence[KVCache], is_prefill: bool = False
    ) -> np.ndarray:
        """Append the same number of tokens to every batch element of contiguous caches.

        Parameters
        ----------
        token_ids : (B, T) or, for one token each, (B,) int
        caches : KVCache or sequence of KVCache
            One with all layers, or one of a single layer for each layer.
        is_prefill : bool
            Ignored: prompts and single tokens run alike. It is accepted for callers that pass it.

        Returns
        -------
        (B, vocab_size) float32
            Logits of each element's last token.
        """
        token_ids = np.asarray(token_ids)
        if token_ids.ndim == 1:
            token_ids = token_ids[:, None]
        if token_ids.ndim != 2 or not token_ids.size:
            raise ValueError(f"token_ids: expected shape (B, T) or (B,), not empty; got {token_ids.shape}")
        batch, count = token_ids.shape
        tokens = self._checked_tokens(token_ids.reshape(-1))
        caches = [caches] if isinstance(caches, KVCache) else list(caches)
        layers = [(cache, i) for cache in caches for i in range(cache.num_layers)]
        if not caches:
            raise ValueError(f"caches: expected {self.config.num_hidden_layers} layers; got none")
        lengths = caches[0].seq_lens
        for cache in caches:  # all are checked before the first is written: then none can fail
            self._check_cache(cache, len(layers))
            if cache.batch_size != batch:
                raise ValueError(
                    f"token_ids: expected batch size {cache.batch_size}, the cache's; got {batch}"
                )
            if cache.seq_lens != lengths:
                raise ValueError(f"caches: expected equal lengths; got {lengths} and {cache.seq_lens}")
            cache.require_room(count)
        self._check_end(max(lengths) + count)
        positions = (np.array(lengths)[:, None] + np.arange(count)).reshape(-1)

        def dense(x: np.ndarray) -> np.ndarray:
            return x.reshape(batch, count, *x.shape[1:]).swapaxes(1, 2)

        def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            cache, index = layers[layer]
            cache.update(dense(k), dense(v), layer=index)
            out = cache.attend(dense(q), layer=index, window_left=self.window_left)
            return out.swapaxes(1, 2).reshape(q.shape)

        hidden = self.forward(tokens, positions, attention)
        return self.logits(hidden.reshape(batch, count, -1)[:, -1])

    def prefill(
        self, cache: PagedKVCache, seq_id: int, token_ids: Any, *, chunk_size: int = 512
    ) -> Iterator[np.ndarray]:
        """Append a prompt to one sequence, in chunks; yields the logits (chunk, vocab_size) of each chunk."""
        tokens = self._checked_tokens(token_ids)
        chunk_size = arguments.integer("chunk_size", chunk_size, minimum=1)
        for start in range(0, len(tokens), chunk_size):
            yield self.extend(cache, [seq_id], [tokens[start : start + chunk_size]])

    def calibrate(self, token_ids: Any, *, source: str = "") -> Calibration:
        """Measure the calibration of this model's keys on a text.

        Parameters
        ----------
        token_ids : sequence of int
            At least 64; 1,000 are good and 4,000 better. ``bytes`` for a byte-level model.
        source : str
            What the text is, for those who read the calibration later.
        """
        tokens = self._checked_tokens(token_ids)
        self._check_end(len(tokens))
        layers = [ChannelStatistics(i) for i in range(self.config.num_hidden_layers)]
        cache = self.make_cache(max(len(tokens), 1), dtype="float32")
        seq_id = cache.add_sequence()

        def read(chunk: np.ndarray) -> None:
            step = cache.step([seq_id], [len(chunk)])
            attend = self.attention_of(step)

            def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
                layers[layer].add(k, q)
                return attend(layer, q, k, v)

            self.forward(chunk, step.positions, attention)

        for start in range(0, len(tokens), CALIBRATION_CHUNK):
            read(tokens[start : start + CALIBRATION_CHUNK])
        return calibration_of(layers, source)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        chunk_size: int = 512,
        **cache_options: Any,
    ) -> np.ndarray:
        """Continue a prompt.

        Parameters
        ----------
        prompt : sequence of int
            Token ids, at least one; ``bytes`` for a byte-level model.
        max_new_tokens : int
            Fewer come back where the model ends the text (`eos_token_ids`, which is not returned).
        temperature : float
            0 takes the likeliest token each time; otherwise tokens are drawn from softmax(logits / temperature).
        seed : int, optional
            Makes the draws repeatable.
        chunk_size : int
            Tokens of the prompt that run through the model at once.
        **cache_options
            As in `make_cache`: `dtype` ("float32", "int8", ...), `block_size`, `backend` and so on.

        Returns
        -------
        (n,) int64
            The new tokens.
        """
        prompt, max_new_tokens = self.check_request(prompt, max_new_tokens, temperature)
        cache = self.make_cache(len(prompt) + max_new_tokens, **cache_options)
        seq_id = cache.add_sequence()
        rng = np.random.default_rng(seed)
        new: list[int] = []
        for logits in self.prefill(cache, seq_id, prompt, chunk_size=chunk_size):
            last = logits[-1]
        while len(new) < max_new_tokens:
            token = sample(last, temperature, rng)
            if token in self.eos_token_ids:
                break
            new.append(token)
            if len(new) < max_new_tokens:
                last = self.extend(cache, [seq_id], [[token]])[-1]
        return np.array(new, np.int64)

    def check_request(self, prompt: Any, max_new_tokens: int, temperature: float) -> tuple[np.ndarray, int]:
        """The prompt as (n,) int64 and the number of new tokens, after the checks of `generate`."""
        prompt = self._checked_tokens(prompt)
        if not len(prompt):
            raise ValueError("prompt: expected at least one token; got none")
        max_new_tokens = arguments.integer("max_new_tokens", max_new_tokens, minimum=0)
        checked_temperature(temperature)
        self._check_end(len(prompt) + max_new_tokens)
        return prompt, max_new_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.config.eos_token_ids

    @property
    def window_left(self) -> int:
        """The widest `window_left` with which the model attends, -1 if it sees everything."""
        window = self.config.sliding_window
        return -1 if window is None else window - 1

    def _checked_tokens(self, token_ids: Any) -> np.ndarray:
        tokens = arguments.tokens("token_ids", token_ids)
        outside = (tokens < 0) | (tokens >= self.config.vocab_size)
        if outside.any():
            raise ValueError(
                f"token_ids: expected 0 to {self.config.vocab_size - 1}; got {tokens[outside][0]}"
            )
        return tokens

    def _check_end(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"token_ids: the model takes {limit} positions; got {length}")

    def _check_cache(self, cache: KVCache | PagedKVCache, num_layers: int) -> None:
        """Raise unless a cache fits the model; `num_layers` counts the layers of all caches that are used together."""
        config = self.config
        names = ("layers", "KV heads", "head_dim")
        expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        actual = (num_layers, cache.num_kv_heads, cache.head_dim)
        for name, want, have in zip(names, expected, actual, strict=True):
            if want != have:
                raise ValueError(f"cache: the model has {want} {name}; got a cache with {have}")


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return weight * (x / np.sqrt(mean_square + np.float32(eps)))


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding of (T, heads, D): element i turns with element i + D / 2, as in Hugging Face's layout."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) is infinite far below zero, and x / infinity is right
        return x / (1 + np.exp(-x))


def _weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by its Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_out = config.num_attention_heads * config.head_dim
    kv_out = config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_out, hidden),
        "self_attn.k_proj": (kv_out, hidden),
        "self_attn.v_proj": (kv_out, hidden),
        "self_attn.o_proj": (hidden, q_out),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for i in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    return shapes


def _random_weights(config: LlamaConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint: norms are 1, matrices normal with a variance of 1 / inputs."""
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(shape[1]))
        for name, shape in _weight_shapes(config).items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
