"""``python -m kvnumba quality``: what the formats of a cache cost a model, on a text and layer by layer.

A text runs through the model as it stands (teacher forcing), from a cache of each recipe, and predictions are compared
with those from a cache in float32. It is read in chunks of `CHUNK` tokens: nearly all keys and values that a token sees
then come out of the storage, as when the model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvnumba.arguments import integers
from kvnumba.backends.registry import get_backend, use_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.calibration import Calibration
from kvnumba.commands.extras import progress, require_extra
from kvnumba.commands.texts import HELD_OUT, lookups_right, registry_task
from kvnumba.formats import FORMATS
from kvnumba.models.checkpoint import BUNDLED_MODEL
from kvnumba.models.llama import IncrementalDecoder
from kvnumba.models.sampling import log_softmax
from kvnumba.storage import Layout

CHUNK = 32
CALIBRATION_TOKENS = 4000
RECENT = 128
NAME = 46  # characters of the longest recipe


@dataclass(frozen=True)
class Recipe:
    """One way to keep keys and values; rows of quantised formats have so many groups, each with a scale."""

    fmt: str
    scale_dtype: str = "float32"
    rotation: bool = False
    calibrated: bool = False
    recent_tokens: int = 0
    groups: int = 1

    @property
    def name(self) -> str:
        """The format, and what is done besides."""
        parts = [
            *(["rotated"] if self.rotation else []),
            *(["calibrated"] if self.calibrated else []),
            *([f"{self.recent_tokens} recent"] if self.recent_tokens else []),
            *([f"{self.groups} groups"] if self.groups > 1 else []),
        ]
        return f"{self.fmt} {', '.join(parts)}".rstrip()

    @property
    def options(self) -> dict[str, Any]:
        """How a cache is made of it, the calibration left out; nothing is left to defaults."""
        return {
            "dtype": self.fmt,
            "scale_dtype": self.scale_dtype,
            "rotation": self.rotation,
            "recent_tokens": self.recent_tokens,
        }

    def group_size(self, head_dim: int) -> int | None:
        """Elements of a group."""
        return head_dim // self.groups if FORMATS[self.fmt].has_scale else None

    def bits(self, head_dim: int) -> float:
        """Bits of an element in the storage, scales and zeros included."""
        group_size = self.group_size(head_dim)
        layout = Layout.of(1, 1, 1, head_dim, self.fmt, scale_dtype=self.scale_dtype, group_size=group_size)
        return 8 * layout.bytes_per_token() / (2 * head_dim)


RECIPES = (
    Recipe("float32"),
    Recipe("float16"),
    Recipe("fp8_e4m3"),
    Recipe("int8"),
    Recipe("int8", "float16", rotation=True, recent_tokens=RECENT),
    Recipe("int8", "float16", rotation=True, calibrated=True, recent_tokens=RECENT),
    Recipe("int4"),
    Recipe("int4", "float16", rotation=True),
    Recipe("int4", "float16", rotation=True, calibrated=True),
    Recipe("int4", "float16", rotation=True, recent_tokens=RECENT),
    Recipe("int4", "float16", rotation=True, calibrated=True, recent_tokens=RECENT),
    Recipe("int4", "float16", rotation=True, calibrated=True, recent_tokens=RECENT, groups=2),
)
"""The first is what the others are compared with."""


@dataclass(frozen=True)
class Result:
    """What one recipe did to the model's predictions.

    Attributes
    ----------
    recipe : Recipe
    bits : float
        Of an element.
    surprise : float
        Nats a token: the mean of -log p of the token that came.
    divergence : float
        KL from the predictions in float32, nats a token.
    lookups : float, optional
        The share of look-ups that are right, of a byte-level model.
    """

    recipe: Recipe
    bits: float
    surprise: float
    divergence: float
    lookups: float | None


def run(
    model: Path,
    text: Path | None,
    num_tokens: int,
    calibration: Path | None,
    calibrate_on: Path | None,
    backend: str | None,
    plot: Path | None,
) -> None:
    """Measure every recipe, and print the tables, and perhaps draw a picture."""
    require_extra("quality", "demo", "tqdm", *(["matplotlib"] if plot else []))
    decoder = IncrementalDecoder.from_pretrained(model)
    byte_level = decoder.config.vocab_size == 256
    limit = decoder.config.max_position_embeddings
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"--plot: expected a file in a folder that exists; got {plot}")
    if not 2 <= num_tokens <= limit:
        raise ValueError(f"--bytes: expected 2 to {limit}, the model's positions; got {num_tokens}")
    if text is None and not byte_level:
        raise ValueError(
            "--text: expected a file of token ids (.npy, or integers with white space between them): "
            "the model's tokens are not bytes, and there is no tokenizer here"
        )
    path = text or HELD_OUT
    tokens = _read_tokens("--text", path, byte_level)[:num_tokens]
    if len(tokens) < 2:
        raise ValueError(f"--text: expected a file of at least 2 tokens; {path} has {len(tokens)}")
    backend = get_backend(backend).name
    with use_backend(backend):
        found = _find_calibration(decoder, calibration, calibrate_on, byte_level)
    recipes = [recipe for recipe in RECIPES if found is not None or not recipe.calibrated]
    name = "the bundled model" if model == BUNDLED_MODEL else str(model)
    unit = "bytes" if byte_level else "tokens"
    print(f"{name} reads {len(tokens):,} {unit} of {path} in chunks of {CHUNK} on backend {backend}")
    print(
        "rows with a calibration are left out: --calibrate-on FILE measures one" if found is None else found
    )

    def make_caches(recipes: Sequence[Recipe], length: int) -> list[PagedKVCache]:
        head_dim = decoder.config.head_dim
        return [
            decoder.make_cache(
                length,
                group_size=recipe.group_size(head_dim),
                calibration=found if recipe.calibrated else None,
                backend=backend,
                **recipe.options,
            )
            for recipe in recipes
        ]

    results = measure(decoder, recipes, tokens, byte_level, make_caches)
    print(f"\n{table(results, byte_level)}\n")
    int4 = [result for result in results if result.recipe.fmt == "int4"]
    compared = [int4[0].recipe, min(int4, key=lambda result: result.divergence).recipe]
    errors = layer_errors(decoder, tokens, make_caches([RECIPES[0], *compared], len(tokens)))
    print(layer_table(compared, errors))
    if plot is not None:
        draw(results, compared, errors, plot)
        print(f"\ndrawn in {plot}")


def measure(
    decoder: IncrementalDecoder,
    recipes: Sequence[Recipe],
    tokens: np.ndarray,
    byte_level: bool,
    make_caches: Callable[[Sequence[Recipe], int], list[PagedKVCache]],
) -> list[Result]:
    """The result of each recipe; the first is what the others are compared with."""
    surprise, divergence = np.zeros((2, len(recipes)))
    exact = np.empty(0)
    for n, begin, logits in _read(decoder, make_caches(recipes, len(tokens)), tokens, "reads"):
        log_q = log_softmax(logits)
        exact = log_q if n == 0 else exact
        following = tokens[begin + 1 : begin + 1 + len(log_q)]
        surprise[n] -= log_q[np.arange(len(following)), following].sum()
        divergence[n] += (np.exp(exact) * (exact - log_q)).sum()
    lookups: list[Any] = [None] * len(recipes)
    if byte_level:
        text, answers = registry_task(np.random.default_rng(0))
        task = np.frombuffer(text, np.uint8).astype(np.int64)
        likeliest = np.empty((len(recipes), len(task)), np.int64)
        for n, begin, logits in _read(decoder, make_caches(recipes, len(task)), task, "looks up"):
            likeliest[n, begin : begin + len(logits)] = logits.argmax(axis=-1)
        lookups = [lookups_right(row, text, answers) for row in likeliest]
    return [
        Result(
            recipe,
            recipe.bits(decoder.config.head_dim),
            surprise[n] / (len(tokens) - 1),
            divergence[n] / len(tokens),
            lookups[n],
        )
        for n, recipe in enumerate(recipes)
    ]


def layer_errors(
    decoder: IncrementalDecoder, tokens: np.ndarray, caches: Sequence[PagedKVCache]
) -> np.ndarray:
    """How far each layer's attention is off by itself: its inputs are those of the first cache, which is exact.

    Returns
    -------
    (len(caches) - 1, num_layers) float64
        Mean squared error of the attention's output, of its mean square.
    """
    squares = np.zeros((len(caches), decoder.config.num_hidden_layers))
    ids = [cache.add_sequence() for cache in caches]

    def read(chunk: np.ndarray) -> None:
        steps = [cache.step([seq_id], [len(chunk)]) for cache, seq_id in zip(caches, ids, strict=True)]
        exact, *others = (decoder.attention_of(step) for step in steps)

        def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            out = exact(layer, q, k, v)
            squares[0, layer] += np.square(out, dtype=np.float64).sum()
            for n, other in enumerate(others, 1):
                squares[n, layer] += np.square(other(layer, q, k, v) - out, dtype=np.float64).sum()
            return out

        decoder.forward(chunk, steps[0].positions, attention)

    with progress(len(tokens), "layer by layer") as bar:
        for begin in range(0, len(tokens), CHUNK):
            read(tokens[begin : begin + CHUNK])
            bar.update(len(tokens[begin : begin + CHUNK]))
    return squares[1:] / squares[0]


def table(results: Sequence[Result], byte_level: bool) -> str:
    """The results as text, a recipe a line."""
    unit = "bits a byte" if byte_level else " perplexity"
    lines = [
        f"{'':<{NAME}}   bits an   float  {unit}   change   KL from  look-ups",
        f"{'keys and values':<{NAME}}   element  tokens                       float32     right",
    ]
    lines.append("-" * len(lines[0]))
    first = _score(results[0], byte_level)
    for r in results:
        score = _score(r, byte_level)
        change = f"{score / first - 1:+.2%}"
        lookups = "" if r.lookups is None else f"{r.lookups:.0%}"
        lines.append(
            f"{r.recipe.name:<{NAME}} {r.bits:>9.2f} {r.recipe.recent_tokens:>7} {score:>12.4f} {change:>8} "
            f"{r.divergence:>9.1e} {lookups:>9}".rstrip()
        )
    return "\n".join(lines)


def layer_table(recipes: Sequence[Recipe], errors: np.ndarray) -> str:
    """What `layer_errors` returned, as text, a layer a line."""
    lines = ["squared error of the attention's output, of its mean square"]
    lines.append("layer " + "".join(f"{recipe.name:>{NAME + 2}}" for recipe in recipes))
    lines.append("-" * len(lines[-1]))
    for layer, row in enumerate(errors.T):
        lines.append(f"{layer:>5} " + "".join(f"{error:>{NAME + 2}.2e}" for error in row))
    return "\n".join(lines)


def draw(results: Sequence[Result], compared: Sequence[Recipe], errors: np.ndarray, path: Path) -> None:
    """Both tables as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    others = results[1:]
    bars = left.barh(
        [f"{r.recipe.name} ({r.bits:.3g} bits)" for r in others],
        [r.divergence for r in others],
        color="#4c72b0",
    )
    left.bar_label(bars, fmt="%.1e", padding=2)
    left.invert_yaxis()
    left.set(xscale="log", title="KL from float32, nats a token")
    left.set_xlim(right=10 * max(r.divergence for r in others))  # room for the numbers
    width = 0.4
    for n, (recipe, row) in enumerate(zip(compared, errors, strict=True)):
        right.bar(np.arange(len(row)) + (n - 0.5) * width, row, width, label=recipe.name)
    right.set(title="squared error of a layer's attention", xlabel="layer", ylabel="of its mean square")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _read(
    decoder: IncrementalDecoder, caches: Sequence[PagedKVCache], tokens: np.ndarray, label: str
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Run a text through the model from several caches, a chunk from each in turn.

    Yields the number of the cache, where the chunk begins, and its logits (chunk, vocab_size): all logits of a text may
    be too many to keep.
    """
    ids = [cache.add_sequence() for cache in caches]
    with progress(len(caches) * len(tokens), label) as bar:
        for begin in range(0, len(tokens), CHUNK):
            chunk = tokens[begin : begin + CHUNK]
            for n, (cache, seq_id) in enumerate(zip(caches, ids, strict=True)):
                yield n, begin, decoder.extend(cache, [seq_id], [chunk])
                bar.update(len(chunk))


def _score(result: Result, byte_level: bool) -> float:
    """Bits a byte, or perplexity."""
    return result.surprise / np.log(2) if byte_level else float(np.exp(result.surprise))


def _find_calibration(
    decoder: IncrementalDecoder, calibration: Path | None, calibrate_on: Path | None, byte_level: bool
) -> Calibration | None:
    """What the user gave, or the decoder's own."""
    if calibration is not None:
        return Calibration.load(calibration)
    if calibrate_on is not None:
        count = min(CALIBRATION_TOKENS, decoder.config.max_position_embeddings)
        tokens = _read_tokens("--calibrate-on", calibrate_on, byte_level)[:count]
        try:
            return decoder.calibrate(tokens, source=calibrate_on.name)
        except ValueError as error:
            raise ValueError(f"--calibrate-on: {calibrate_on}: {error}") from error
    return decoder.calibration


def _read_tokens(option: str, path: Path, byte_level: bool) -> np.ndarray:
    """The bytes of a file, or the token ids in it."""
    if byte_level:
        return np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)
    try:
        ids = np.load(path) if path.suffix == ".npy" else np.array([int(x) for x in path.read_text().split()])
    except (ValueError, EOFError) as error:
        raise ValueError(f"{option}: expected token ids in {path}: {error}") from error
    return integers(option, ids)
