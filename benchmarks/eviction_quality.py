"""What a model loses when each KV head drops half of its tokens: ``python benchmarks/eviction_quality.py FOLDER``.

A byte-level model reads `PROMPT` bytes of each of `TEXTS`, drops half of them by a policy, and goes on with as many
bytes again, as they stand. Then it reads names with numbers, drops half, and is asked for the numbers: after it has
dropped them, as nobody knows beforehand what will be asked; or before, one name at a time, at the end of the prompt.

Rows "dense" are the same from plain NumPy: full matrices of attention weights, which say what is masked from then on.
Nothing of a cache is in them but the rounding of int4. Where an element lies on the border between two codes, that
makes a step of the smallest difference, from layer to layer more: how much, the row shows in which all tokens stay. So
both are compared layer by layer too, where each layer of the dense one is given the inputs of the other.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvnumba import PerHeadKVCache, dequantize, policies, quantize
from kvnumba.commands.texts import registry_task
from kvnumba.models.llama import IncrementalDecoder
from kvnumba.models.sampling import log_softmax
from kvnumba.transforms import rotate

# the model has not learnt them
TEXTS = ("argparse", "textwrap", "statistics", "shelve", "queue", "fractions")
PROMPT, CHUNK, BLOCK_SIZE = 2048, 512, 16
OPTIONS: dict[str, Any] = {"float32": {}, "int4": {"rotation": True, "scale_dtype": "float16"}}
POLICIES = {
    "StreamingLLM": policies.StreamingLLM,
    "H2O": policies.H2O,
    "TOVA": policies.TOVA,
    "SnapKV": policies.SnapKV,
    "KeyDiff": policies.KeyDiff,
    "KnormPress": policies.KnormPress,
}
WINDOW = {"TOVA": 1, "SnapKV": 32}  # tokens of the step before an eviction, where it matters
DENSE = (None, "H2O", "SnapKV")

Watch = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class Cached:
    """A text in a cache, and its policy, if it has one."""

    def __init__(self, decoder: IncrementalDecoder, fmt: str, policy: str | None, length: int) -> None:
        config = decoder.config
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        blocks = -(-length // BLOCK_SIZE) * heads * layers
        shape = (BLOCK_SIZE, heads, config.head_dim, 2, fmt)
        self.decoder = decoder
        self.cache = PerHeadKVCache(2 * blocks, *shape, num_layers=layers, **OPTIONS[fmt])
        self.policy: Any = None if policy is None else POLICIES[policy](self.cache)
        self.seq_id = self.cache.add_sequence()

    def read(self, tokens: np.ndarray, watch: Watch | None = None) -> np.ndarray:
        """Append tokens; their logits. `watch` is called with what each layer attends with, and the output."""
        step = self.cache.step([self.seq_id], [len(tokens)])
        attend = (
            step.attend if self.policy is None else lambda q, layer: self.policy.attend(step, q, layer=layer)
        )

        def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            step.write(k, v, layer=layer)
            out = attend(q, layer=layer)
            if watch is not None:
                watch(layer, q, k, v, out)
            return out

        return self.decoder.logits(self.decoder.forward(tokens, step.positions, attention))

    def evict(self, budget: int) -> None:
        """Let the policy drop tokens."""
        if self.policy is not None:
            self.policy.evict(self.seq_id, budget)

    def fork(self) -> Cached:
        """The same text, to go on otherwise; `close` it before the next."""
        twin = copy.copy(self)
        twin.seq_id = (self.cache if self.policy is None else self.policy).fork(self.seq_id)
        return twin

    def close(self) -> None:
        """Give the text's blocks back."""
        self.cache.finish_sequence(self.seq_id)


class Dense:
    """A text, all of its keys, and which each head still sees; H2O and SnapKV in the words of their papers."""

    def __init__(self, decoder: IncrementalDecoder, fmt: str, policy: str | None, length: int) -> None:
        config = decoder.config
        self.decoder, self.fmt, self.policy, self.length = decoder, fmt, policy, 0
        shape = (config.num_hidden_layers, config.num_key_value_heads, length)
        self.keys, self.values = np.empty((2, *shape, config.head_dim), np.float32)
        self.seen = np.ones(shape, bool)
        self.all_queries, self.latest_step = np.zeros((2, *shape), np.float32)

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens; their logits."""
        positions = np.arange(self.length, self.length + len(tokens))
        hidden = self.decoder.forward(tokens, positions, self.attend)
        return self.decoder.logits(hidden)

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Append the keys and values (T, H, D) of a layer; the attention of queries (T, Hq, D)."""
        if layer == 0:
            self.length += len(q)
        new = slice(self.length - len(q), self.length)
        for everything, x in ((self.keys, k), (self.values, v)):
            everything[layer, :, new] = self._rounded(x).swapaxes(0, 1)
        keys, values, seen = (x[layer, :, : self.length] for x in (self.keys, self.values, self.seen))
        queries = q.reshape(len(q), len(keys), -1, q.shape[-1]).transpose(1, 2, 0, 3)  # (H, Hq / H, T, D)
        scores = queries @ keys[:, None].swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
        causal = np.arange(self.length) <= np.arange(new.start, new.stop)[:, None]
        scores[~np.broadcast_to(seen[:, None, None] & causal, scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        self.latest_step[layer, :, : self.length] = weights.sum(axis=(1, 2))
        self.all_queries[layer] += self.latest_step[layer]
        out: np.ndarray = (weights @ values[:, None]).transpose(2, 0, 1, 3).reshape(q.shape)
        return out

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        if self.fmt == "float32":
            return x
        return rotate(dequantize(*quantize(rotate(x), 4, scale_dtype="float16", backend="numpy"), 4))

    def evict(self, budget: int) -> None:
        """Hide all keys of each head but those that the policy keeps, if there is one."""
        if self.policy is None:
            return
        window = 32 if self.policy == "SnapKV" else budget - budget // 2
        for seen, total, latest in zip(
            *(
                x.reshape(-1, x.shape[-1])[:, : self.length]
                for x in (self.seen, self.all_queries, self.latest_step)
            ),
            strict=True,
        ):
            before = np.flatnonzero(seen)[:-window]
            if self.policy == "SnapKV":
                padded = np.pad(latest[before].astype(float), 3)
                worth = np.mean([padded[n : n + len(before)] for n in range(7)], axis=0)
            else:
                worth = total[before]
            order = sorted(range(len(before)), key=lambda n: -worth[n])
            seen[before[order[budget - window :]]] = False

    def fork(self) -> Dense:
        """The same text, to go on otherwise."""
        return copy.deepcopy(self, {id(self.decoder): self.decoder})

    def close(self) -> None:
        """Nothing is to be given back."""


Reader = Cached | Dense


def read_and_evict(reader: Reader, tokens: np.ndarray, length: int, budget: int, window: int) -> None:
    """Read up to `length`, the last `window` tokens in a step of their own, and drop all but `budget`."""
    for begin in range(reader_length(reader), length - window, CHUNK):
        reader.read(tokens[begin : min(begin + CHUNK, length - window)])
    reader.read(tokens[length - window : length])
    reader.evict(budget)


def reader_length(reader: Reader) -> int:
    """Tokens that it has read."""
    return reader.length if isinstance(reader, Dense) else reader.cache.seq_len(reader.seq_id)


def surprise(reader: Reader, tokens: np.ndarray, window: int) -> float:
    """Bits a byte of the second half of a text, of whose first half every head has dropped half."""
    read_and_evict(reader, tokens, PROMPT, PROMPT // 2, window)
    rest = tokens[PROMPT:]
    logits = np.concatenate([reader.read(rest[n : n + CHUNK]) for n in range(0, len(rest), CHUNK)])
    return float(-log_softmax(logits[:-1])[np.arange(len(rest) - 1), rest[1:]].mean() / np.log(2))


def asked_after(reader: Reader, task: tuple[np.ndarray, np.ndarray], window: int) -> np.ndarray:
    """Which numbers (names, 4) are answered that are asked for once half of the list is dropped."""
    tokens, answers = task
    begin = answers[0, 0] - len("name = ")
    read_and_evict(reader, tokens, begin, begin // 2, window)
    return reader.read(tokens[begin:]).argmax(axis=-1)[answers - 1 - begin]


def asked_before(reader: Reader, task: tuple[np.ndarray, np.ndarray], window: int, count: int) -> np.ndarray:
    """The same of names that are asked for before half of the list is dropped, each as if it were the only one."""
    tokens, answers = task
    begin = answers[0, 0] - len("name = ")
    reader.read(tokens[: begin - 32])
    found = []
    for first in answers[:count, 0].tolist():
        twin = reader.fork()
        asked = np.concatenate((tokens[:begin], tokens[first - len("name = ") : first + 3]))
        length = begin + len("name =")
        read_and_evict(twin, asked, length, length // 2, window)
        found.append(twin.read(asked[length:]).argmax(axis=-1))
        twin.close()
    return np.array(found)


def layer_by_layer(
    decoder: IncrementalDecoder, fmt: str, policy: str, tokens: np.ndarray
) -> tuple[int, float]:
    """Of a text whose dense layers are given the inputs of the others: tokens kept otherwise, and the error after that.

    The error is the mean square of what outputs differ by, of their mean square.
    """
    window = WINDOW.get(policy, 1)
    cached, dense = (kind(decoder, fmt, policy, len(tokens)) for kind in (Cached, Dense))
    squares = np.zeros(2)

    def watch(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        error = dense.attend(layer, q, k, v) - out
        squares[:] += np.square(error, dtype=float).sum(), np.square(out, dtype=float).sum()

    for begin, end in ((0, PROMPT - window), (PROMPT - window, PROMPT)):
        cached.read(tokens[begin:end], watch)
    cached.evict(PROMPT // 2)
    dense.evict(PROMPT // 2)
    otherwise = sum(
        (~dense.seen[layer, head, at]).sum()
        for layer in range(cached.cache.num_layers)
        for head, at in enumerate(cached.cache.positions(cached.seq_id, layer=layer))
    )
    squares[:] = 0
    cached.read(tokens[PROMPT:], watch)
    return int(otherwise), float(squares[0] / squares[1])


def main() -> None:
    """Print a row for each policy, and what the dense ones differ in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint of a byte-level model")
    parser.add_argument("--format", default="float32", choices=OPTIONS)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=2, help="lists of 100 names")
    parser.add_argument("--questions", type=int, default=25, help="asked before, of each list")
    args = parser.parse_args()
    decoder = IncrementalDecoder.from_pretrained(args.folder)
    texts = [as_tokens(source(name)[: 2 * PROMPT]) for name in TEXTS[: args.texts]]
    tasks = []
    for seed in range(args.tasks):
        text, answers = registry_task(np.random.default_rng(seed))
        tasks.append((as_tokens(text), answers))
    rows: list[tuple[str | None, Callable[..., Reader]]] = [
        *((policy, Cached) for policy in (None, *POLICIES)),
        *((policy, Dense) for policy in DENSE),
    ]
    print(f"{args.format}, half of the tokens of each head")
    print("| policy | bits a byte | change | asked after | asked before |")
    print("|---|---|---|---|---|")
    results: dict[Any, Any] = {}
    for policy, kind in rows:
        window = WINDOW.get(policy or "", 1)
        bits = [surprise(kind(decoder, args.format, policy, len(t)), t, window) for t in texts]
        of_tasks = [
            (
                asked_after(kind(decoder, args.format, policy, len(task[0])), task, window),
                asked_before(kind(decoder, args.format, policy, len(task[0])), task, window, args.questions),
                task[0][task[1]],
            )
            for task in tasks
        ]
        after = np.mean([(found == right).all(axis=1) for found, _, right in of_tasks])
        before = np.mean([(found == right[: args.questions]).all(axis=1) for _, found, right in of_tasks])
        results[policy, kind] = (
            np.array(bits),
            np.concatenate([x.ravel() for pair in of_tasks for x in pair[:2]]),
        )
        change = np.mean(bits) / np.mean(results[None, Cached][0]) - 1
        name = (policy or "all tokens") + (", dense" if kind is Dense else "")
        print(
            f"| {name} | {np.mean(bits):.4f} | {change:+.2%} | {after:.1%} | {before:.1%} |",
            flush=True,
        )
    for policy in DENSE:
        (bits, digits), (dense_bits, dense_digits) = results[policy, Cached], results[policy, Dense]
        print(
            f"{policy or 'all tokens'} beside dense: bits a byte of each text differ by up to "
            f"{np.abs(bits - dense_bits).max():.1e}, {(digits != dense_digits).sum()} of {digits.size} digits"
        )
        if policy is not None:
            otherwise, error = layer_by_layer(decoder, args.format, policy, texts[0])
            print(
                f"    layer by layer: {otherwise} tokens kept otherwise, squared error {error:.1e} of the output's"
            )


def source(module: str) -> bytes:
    """The text of a module of the standard library."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()


def as_tokens(text: bytes) -> np.ndarray:
    """Bytes as the model's tokens."""
    return np.frombuffer(text, np.uint8).astype(np.int64)


if __name__ == "__main__":
    main()
