"""Decoding and prompts, out of shuffled blocks: kvnumba in every format, its peers, and the machine's ceilings.

``pytest benchmarks`` runs all of it; each result is checked against the float64 oracle before it is timed.
"""

import time

import numpy as np
import oracle
import ours
import peers
import pytest
from shapes import DECODE, PREFILL, problem

from kvnumba.backends.registry import available_backends
from kvnumba.commands.timing import SETTLE
from kvnumba.formats import FORMATS

LONG = 16_384  # tokens of all sequences together, from which a problem is marked `long`

EXACT = {"float32": 2e-6, "float16": 2e-6, "bfloat16": 1e-2, "fp8_e4m3": 2e-6, "int8": 5e-4, "int4": 5e-4}
"""Largest error granted to kvnumba's formats, given what they hold. bfloat16 and codes round queries and weights."""
LOOSE = 0.3  # granted to peers, which may keep fewer bits

OURS = [(f"kvnumba {backend}", fmt) for backend in available_backends() for fmt in FORMATS]
THEIRS = [(name, fmt) for name, (_, formats) in peers.PEERS.items() for fmt in formats]


def cases(problems):
    return [
        pytest.param(name, spec, id=name, marks=[pytest.mark.long] if spec[1] * spec[2] >= LONG else [])
        for name, spec in problems.items()
    ]


def run(benchmark, kind, name, spec, implementation, fmt):
    p = problem(*spec)
    benchmark.group = f"{kind} {name}"
    benchmark.extra_info.update(implementation=implementation, format=fmt)
    if implementation in peers.PEERS:
        reason = peers.unavailable(implementation)
        if reason:
            pytest.skip(reason)
        try:
            call = peers.PEERS[implementation][0](p, fmt)
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"{implementation}, {fmt}: {error}")
        kept = p.k, p.v
    else:
        cache, ids, call, _ = ours.paged(p, fmt, implementation.removeprefix("kvnumba "))
        benchmark.extra_info["bytes"] = p.k.shape[0] * p.k.shape[1] * cache.bytes_per_token()
        pairs = [cache.get_kv(i) for i in ids]
        kept = tuple(np.stack([pair[n] for pair in pairs]).swapaxes(1, 2) for n in range(2))
    out = call()
    check(out, p.q, *kept, LOOSE if implementation in peers.PEERS else EXACT[fmt])
    time.sleep(SETTLE)  # the oracle's matrix products
    rounds = 5 if p.q.shape[1] > 1 else 21
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=2, iterations=1)


def check(out, q, k, v, tolerance):
    """The first and the last sequence's newest tokens against the oracle."""
    for b in {0, len(q) - 1}:
        tail = q[b][-4:]
        want, _ = oracle.attention(tail, k[b].swapaxes(0, 1), v[b].swapaxes(0, 1))
        assert np.abs(out[b][-4:] - want).max() <= tolerance * max(1, np.abs(want).max())


@pytest.mark.parametrize(("implementation", "fmt"), OURS + THEIRS)
@pytest.mark.parametrize(("name", "spec"), cases(DECODE))
def bench_decode(benchmark, name, spec, implementation, fmt):
    if implementation == "kvnumba numpy" and spec[1] * spec[2] >= LONG:
        pytest.skip("the reference is not for speed")
    run(benchmark, "decode", name, spec, implementation, fmt)


@pytest.mark.parametrize(("implementation", "fmt"), OURS + THEIRS)
@pytest.mark.parametrize(("name", "spec"), cases(PREFILL))
def bench_prefill(benchmark, name, spec, implementation, fmt):
    run(benchmark, "prefill", name, spec, implementation, fmt)
