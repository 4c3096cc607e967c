"""Functions of one's own beside what is built in, and beside torch's FlexAttention on the CPU.

``PYTHONPATH=tests python benchmarks/bench_mods.py`` prints the tables of README.md. All calls of a row take turns. With
torch and a C++ compiler FlexAttention is compiled, and its results are compared with ours before it is timed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import ours
from peers import NEEDED, _torch
from shapes import Problem, problem

from kvnumba import Scoring
from kvnumba.backends import cpu
from kvnumba.commands.timing import Timing, in_turns

CAP = 30.0
DOCUMENTS = 8  # of equal length

PROBLEMS = {
    "decode, 32,768 tokens": ("llama-3-8b", 1, 32768, 1, 128),
    "prompt, 512 on 8,192": ("llama-3-8b", 1, 8192, 512, 128),
}
LENGTHS = (2048, 8192, 32768)
FORMATS = ("float32", "int8", "int4")


def soft_cap(score, q_head, q_pos, kv_pos):
    return CAP * math.tanh(score / CAP)


def alibi(score, q_head, q_pos, kv_pos, slopes):
    return score - slopes[q_head] * np.float32(q_pos - kv_pos)


def same_document(q_head, q_pos, kv_pos, length):
    return q_pos // length == kv_pos // length


def blocks_of(length: int) -> Callable[[int, int, int, int], int]:
    """The block mask of `same_document`."""

    def block_mask(q_low: int, q_high: int, kv_low: int, kv_high: int) -> int:
        first, last, low, high = (x // length for x in (q_low, q_high, kv_low, kv_high))
        if last < low or high < first:
            return 0
        return 1 if first == last == low == high else 2

    return block_mask


def calls_of(p: Problem, fmt: str, **options: dict[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """The attention of a problem with several options, by their names."""
    step = ours.paged(p, fmt, "cpu").step
    num_qo_heads, head_dim = p.q.shape[2:]
    q = p.q.reshape(-1, num_qo_heads, head_dim)

    def call(scoring: Scoring) -> Callable[[], np.ndarray]:
        return lambda: step.attend(q, scoring=scoring)

    return {name: call(Scoring.of(num_qo_heads, head_dim, **given)) for name, given in options.items()}


def row(name: str, times: dict[str, Timing], *ratios: tuple[str, str]) -> None:
    """Milliseconds, and how many times as fast the second of two is as the first."""
    cells = [f"{key} {timing.cell()}" for key, timing in times.items()]
    found = [f"{of} / {by}: {times[of].median / times[by].median:.2f}x" for of, by in ratios]
    print(f"| {name} | {' | '.join(cells + found)} |", flush=True)


def built_in() -> None:
    """Soft cap, ALiBi and an eighth of the keys, of each format."""
    for name, spec in PROBLEMS.items():
        p = problem(*spec)
        slopes = np.geomspace(0.5, 2**-8, p.q.shape[2])
        length = p.k.shape[1] // DOCUMENTS
        documents = {"mask_mod": same_document, "aux": (length,)}
        for fmt in FORMATS:
            calls = calls_of(
                p,
                fmt,
                cap={"logits_soft_cap": CAP},
                own_cap={"score_mod": soft_cap},
                ALiBi={"alibi_slopes": slopes},
                own_ALiBi={"score_mod": alibi, "aux": (slopes,)},
                mask=documents,
                all={},
                blocks={**documents, "block_mask": blocks_of(length)},
            )
            rounds = 41 if spec[3] == 1 else 5
            for several in (("cap", "own_cap"), ("ALiBi", "own_ALiBi"), ("all", "mask"), ("all", "blocks")):
                times = in_turns({key: calls[key] for key in several}, rounds)
                row(f"{name}, {fmt}", times, several)


def flex_attention() -> None:
    """torch's, with the soft cap as a score_mod, and a causal block mask for prompts."""
    torch = _torch()
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention) if shutil.which("g++") else flex_attention
    for new in (1, 512):
        for length in LENGTHS:
            p = problem("llama-3-8b", 1, length, new, 128)
            q, k, v = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in p[:3])
            mask = None
            if new > 1:
                mask = create_block_mask(
                    lambda b, h, i, j, at=length - new: j <= i + at, None, None, new, length, device="cpu"
                )

            def theirs(q=q, k=k, v=v, mask=mask):
                out = compiled(
                    q,
                    k,
                    v,
                    score_mod=lambda score, b, h, i, j: CAP * torch.tanh(score / CAP),
                    block_mask=mask,
                    enable_gqa=True,
                )
                return out.transpose(1, 2).numpy()

            with torch.no_grad():
                calls = calls_of(p, "float32", kvnumba={"score_mod": soft_cap})
                calls["FlexAttention"] = theirs
                mine, other = (call().reshape(p.q.shape) for call in calls.values())
                assert np.abs(mine - other).max() < 1e-4
                times = in_turns(calls, 15 if new == 1 else 5)
            row(f"{new} new on {length:,}", times, ("FlexAttention", "kvnumba"))


if __name__ == "__main__":
    for name, value in cpu.describe():
        print(f"{name}: {value}")
    built_in()
    try:
        flex_attention()
    except ImportError as error:
        print(f"FlexAttention left out: {error}; {NEEDED['torch SDPA'][0][1]}")
