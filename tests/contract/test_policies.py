"""Policies of eviction against the same computed from all keys, queries and attention weights."""

import copy
import itertools
from pathlib import Path

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba import policies

LAYERS, H, HQ, D = 2, 2, 4, 8
WINDOW, KERNEL, SINKS = 4, 3, 2
POLICIES = {
    "StreamingLLM": lambda cache: policies.StreamingLLM(cache, SINKS),
    "H2O": policies.H2O,
    "TOVA": policies.TOVA,
    "SnapKV": lambda cache: policies.SnapKV(cache, WINDOW, KERNEL),
    "KeyDiff": policies.KeyDiff,
    "KnormPress": policies.KnormPress,
}
LATEST = {"TOVA": 1, "SnapKV": WINDOW}
"""Tokens of the step before an eviction, where it matters."""


def make(backend, fmt="float32"):
    return kvnumba.PerHeadKVCache(120, 4, H, D, 3, fmt, num_layers=LAYERS, backend=backend)


class Dense:
    """One sequence: everything there ever was of it, and which of it each head still has.

    Keys and values are (LAYERS, H, tokens, D); masses, of all queries and of the latest step, (LAYERS, H, tokens).
    """

    def __init__(self):
        self.keys, self.values = np.zeros((2, LAYERS, H, 0, D))
        self.alive = np.zeros((LAYERS, H, 0), bool)
        self.total = np.zeros((LAYERS, H, 0))

    def grow(self, count):
        """Room for new tokens, which all heads have."""
        end = ((0, 0), (0, 0), (0, count))
        self.keys, self.values = (np.pad(x, (*end, (0, 0))) for x in (self.keys, self.values))
        self.alive = np.pad(self.alive, end, constant_values=True)
        self.total = np.pad(self.total, end)
        self.latest = np.zeros_like(self.total)

    def truncate(self, length):
        """Forget the tokens from `length` on, but not what they looked at."""
        self.keys, self.values, self.alive, self.total = (
            x[:, :, :length] for x in (self.keys, self.values, self.alive, self.total)
        )

    def attend(self, layer, q):
        """Attention of the newest tokens q (n, Hq, D), out (n, Hq, D) and lse."""
        found = []
        for head in range(H):
            one, mine = slice(head, head + 1), slice(head * HQ // H, (head + 1) * HQ // H)
            keys, present = self.keys[layer, one], {"present": self.alive[layer, head]}
            found.append(oracle.attention(q[:, mine], keys, self.values[layer, one], **present))
            self.latest[layer, one] = oracle.mass(q[:, mine], keys, **present)
        self.total[layer] += self.latest[layer]
        return [np.concatenate(x, axis=1) for x in zip(*found, strict=True)]

    def scores(self, name, layer, head, budget):
        """What a policy has to think of each token that a head has, in plain words."""
        held = np.flatnonzero(self.alive[layer, head])
        keys = self.keys[layer, head, held]
        if name == "StreamingLLM":
            return held, [np.inf if position < SINKS else position for position in held]
        if name == "H2O":
            newest = len(held) - (budget - budget // 2)
            return held, [np.inf if n >= newest else self.total[layer, head, at] for n, at in enumerate(held)]
        if name == "TOVA":
            return held, self.latest[layer].mean(axis=0)[held]
        if name == "SnapKV":
            mass = self.latest[layer, head, held[:-WINDOW]]
            around = [mass[max(n - KERNEL // 2, 0) : n + KERNEL // 2 + 1] for n in range(len(mass))]
            return held, [*(sum(some) for some in around), *[np.inf] * WINDOW]
        if name == "KeyDiff":
            cosines = [
                [a @ b / np.sqrt((a @ a) * (b @ b)) for b in keys] for a in keys
            ]  # of all pairs, of which the policy needs to make none
            return held, -np.mean(cosines, axis=1)
        return held, [-np.sqrt(key @ key) for key in keys]

    def evict(self, name, budget, chosen, tolerance):
        """Check that what the heads of all layers have kept is what is worth most, and drop the rest."""
        for layer, head in itertools.product(range(LAYERS), range(H)):
            held, scores = self.scores(name, layer, head, budget)
            kept = np.isin(held, chosen[layer][head])
            assert kept.sum() == len(chosen[layer][head]) == min(budget, len(held))
            scores = np.asarray(scores)
            assert scores[kept].min() >= scores[~kept].max(initial=-np.inf) - tolerance
            self.alive[layer, head, held[~kept]] = False


def run(cache, policy, ids, counts, dense, normal):
    """A pass through all layers by way of the policy, whose outputs are those of dense attention."""
    step = cache.step(ids, counts)
    ends = np.cumsum(counts)
    for seq_id, count in zip(ids, counts, strict=True):
        dense[seq_id].grow(count)
    for layer in range(LAYERS):
        k, v = normal(2, step.num_tokens, H, D)
        q = 3 * normal(step.num_tokens, HQ, D)
        step.write(k, v, layer=layer)
        out, lse = policy.attend(step, q, layer=layer, return_lse=True)
        for seq_id, end, count in zip(ids, ends.tolist(), counts, strict=True):
            of, new = dense[seq_id], slice(end - count, end)
            of.keys[layer, :, of.keys.shape[2] - count :] = k[new].swapaxes(0, 1)
            of.values[layer, :, of.keys.shape[2] - count :] = v[new].swapaxes(0, 1)
            for have, want in zip((out, lse), of.attend(layer, q[new]), strict=True):
                np.testing.assert_allclose(have[new], want, rtol=1e-4, atol=1e-5)


def held(cache, seq_id):
    return [cache.positions(seq_id, layer=layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("name", POLICIES)
def test_policy(backend, name, normal):
    """Two sequences are evicted several times, one of them alone, and go on in between."""
    cache = make(backend)
    policy = POLICIES[name](cache)
    ids = [cache.add_sequence() for _ in range(2)]
    dense = {seq_id: Dense() for seq_id in ids}
    last = LATEST.get(name, 3)
    for counts in ([13, 9], [0, 5], [6, 1], [last, last]):
        run(cache, policy, ids, counts, dense, normal)
    for budget, evicted in ((30, ids), (11, ids), (9, ids[1:]), (7, ids)):
        for seq_id in evicted:
            policy.evict(seq_id, budget)
            cache.check_integrity()
            dense[seq_id].evict(name, budget, held(cache, seq_id), 1e-5)
        if budget < 30:
            run(cache, policy, ids, [3, 2], dense, normal)
            run(cache, policy, ids, [last, last], dense, normal)
    assert cache.head_lens(ids[0]).tolist() == [[7 + 3 + last] * H] * LAYERS


@pytest.mark.parametrize("name", ["H2O", "SnapKV", "KeyDiff", "KnormPress"])
def test_keys_and_masses_are_those_of_what_is_stored(backend, name, normal):
    cache = make(backend, "int4")
    policy, seq_id, dense = POLICIES[name](cache), cache.add_sequence(), Dense()
    queries = []
    for count in (17, WINDOW):
        step = cache.step([seq_id], [count])
        dense.grow(count)
        queries.append(3 * normal(LAYERS, count, HQ, D))
        for layer, q in enumerate(queries[-1]):
            step.write(*normal(2, count, H, D), layer=layer)
            policy.attend(step, q, layer=layer)
    for layer in range(LAYERS):
        stored = dense.keys[layer] = [keys for keys, _ in cache.get_kv(seq_id, layer=layer)]
        masses = [
            oracle.mass(q[layer], np.array(stored)[:, :end]) for q, end in zip(queries, (17, 21), strict=True)
        ]
        dense.latest[layer] = masses[1]
        dense.total[layer] = masses[1] + np.pad(masses[0], ((0, 0), (0, WINDOW)))
    policy.evict(seq_id, 9)
    dense.evict(name, 9, held(cache, seq_id), 1e-3)


def test_streaming_in_blocks_of_all_heads(backend, normal):
    """The cache of all heads and the cache of each drop the same, and go on alike."""
    caches = [make(backend), kvnumba.PagedKVCache(40, 4, H, D, 3, num_layers=LAYERS, backend=backend)]
    found = []
    for cache in caches:
        rng = np.random.default_rng(1)
        policy, seq_id = policies.StreamingLLM(cache, SINKS), cache.add_sequence()
        for count in (20, 1, 9, 1):
            step = cache.step([seq_id], [count])
            for layer in range(LAYERS):
                q, k, v = np.split(
                    rng.standard_normal((count, HQ + 2 * H, D), np.float32), [HQ, HQ + H], axis=1
                )
                step.write(k, v, layer=layer)
                found.append(policy.attend(step, q, layer=layer))
            policy.evict(seq_id, 8)
    for one, other in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert caches[1].positions(0).tolist() == [0, 1, *range(25, 31)]
    assert [at.tolist() for at in caches[0].positions(0)] == [[0, 1, *range(25, 31)]] * H
    assert caches[1].stats().num_tokens == 8


class TestWhatIsRemembered:
    def seen(self, backend, normal):
        cache = make(backend)
        policy, seq_id = policies.H2O(cache), cache.add_sequence()
        dense = {seq_id: Dense()}
        for count in (14, 6):
            run(cache, policy, [seq_id], [count], dense, normal)
        return cache, policy, seq_id, dense

    def test_a_fork_by_the_policy_is_known_to_it(self, backend, normal):
        cache, policy, seq_id, dense = self.seen(backend, normal)
        stranger, twin = cache.fork(seq_id), policy.fork(seq_id)
        dense[twin] = copy.deepcopy(dense[seq_id])
        for each, count in ((seq_id, 2), (twin, 3)):
            run(cache, policy, [each], [count], dense, normal)
            policy.evict(each, 9)
            dense[each].evict("H2O", 9, held(cache, each), 1e-5)
        with pytest.raises(ValueError, match=f"that of sequence {stranger} has not in layer 0"):
            policy.evict(stranger, 9)

    def test_reordered_sequences_are_known(self, backend, normal):
        cache, policy, seq_id, dense = self.seen(backend, normal)
        other = cache.add_sequence()
        dense[other] = Dense()
        run(cache, policy, [other], [20], dense, normal)
        policy.reorder([seq_id], [other])
        dense[seq_id] = copy.deepcopy(dense[other])
        policy.evict(seq_id, 9)
        dense[seq_id].evict("H2O", 9, held(cache, seq_id), 1e-5)

    def test_tokens_that_were_taken_back(self, backend, normal):
        cache, policy, seq_id, dense = self.seen(backend, normal)
        cache.truncate(seq_id, 15)
        with pytest.raises(ValueError, match="whose latest step has attended by way of H2O.attend"):
            policy.evict(seq_id, 9)
        dense[seq_id].truncate(15)
        run(cache, policy, [seq_id], [8], dense, normal)
        policy.evict(seq_id, 9)
        dense[seq_id].evict("H2O", 9, held(cache, seq_id), 1e-5)

    def test_the_latest_step_has_to_be_of_a_window(self, backend, normal):
        cache = make(backend)
        policy, seq_id = POLICIES["SnapKV"](cache), cache.add_sequence()
        dense = {seq_id: Dense()}
        run(cache, policy, [seq_id], [14], dense, normal)
        run(cache, policy, [seq_id], [WINDOW], dense, normal)
        cache.truncate(seq_id, 17)
        dense[seq_id].truncate(17)
        run(cache, policy, [seq_id], [1], dense, normal)  # as far as the window was
        with pytest.raises(
            ValueError, match="latest step is of 4 tokens and has attended by way of SnapKV.attend"
        ):
            policy.evict(seq_id, 9)

    def test_tokens_that_somebody_else_dropped(self, backend, normal):
        cache, policy, seq_id, dense = self.seen(backend, normal)
        mine = [[0, 3, 4, *range(8, 20)], [*range(2, 18), 19]]
        cache.keep(seq_id, mine)
        for head, at in enumerate(mine):
            dense[seq_id].alive[:, head, np.setdiff1d(np.arange(20), at)] = False
        policy.evict(seq_id, 13)
        dense[seq_id].evict("H2O", 13, held(cache, seq_id), 1e-5)
        run(cache, policy, [seq_id], [3], dense, normal)
        policy.evict(seq_id, 9)
        dense[seq_id].evict("H2O", 9, held(cache, seq_id), 1e-5)

    def test_finished_sequences_are_forgotten(self, backend, normal):
        cache, policy, seq_id, dense = self.seen(backend, normal)
        cache.finish_sequence(seq_id)
        other = cache.add_sequence()
        dense[other] = Dense()
        run(cache, policy, [other], [3], dense, normal)
        assert list(policy._seen) == [other]
        twins = []
        for _ in range(3):
            twins.append(policy.fork(other))
            cache.finish_sequence(twins[-1])
        assert set(policy._seen) <= {other, twins[-1]}


def test_without_room_nothing_changes(backend, normal):
    cache = kvnumba.PerHeadKVCache(16, 4, H, D, 2, num_layers=LAYERS, backend=backend)
    a, policy = cache.add_sequence(), policies.KnormPress(cache)
    step = cache.step([a], [16])
    for layer in range(LAYERS):
        step.write(*normal(2, 16, H, D), layer=layer)
    b = cache.fork(a)  # holds all blocks too: none may be written to, and none is free
    with pytest.raises(kvnumba.CacheFull):
        policy.evict(b, 9)
    assert cache.head_lens(b).tolist() == [[16] * H] * LAYERS
    cache.finish_sequence(a)
    policy.evict(b, 9)
    assert cache.head_lens(b).tolist() == [[9] * H] * LAYERS


BAD_CALLS = {
    "budget of nothing": ("H2O", lambda p, c, i: p.evict(i, 0), ValueError, "budget: expected at least 1; got 0"),
    "no number": ("H2O", lambda p, c, i: p.evict(i, 0.5), TypeError, "budget: expected an integer"),
    "sinks": ("StreamingLLM", lambda p, c, i: p.evict(i, 2), ValueError, "budget: expected at least 3, which Str"),
    "window": ("SnapKV", lambda p, c, i: p.evict(i, 3), ValueError, "budget: expected at least 4, which SnapKV keeps"),
    "one step": ("SnapKV", lambda p, c, i: p.evict(i, 5), ValueError, "latest step is of 4 tokens and has"),
    "one query": ("TOVA", lambda p, c, i: p.evict(i, 5), ValueError, "latest step is of 1 tokens and has"),
    "unknown": ("KeyDiff", lambda p, c, i: p.evict(i + 1, 5), ValueError, "seq_id: sequence 1 is unknown"),
    "unseen": (
        "H2O",
        lambda p, c, i: policies.H2O(c).evict(i, 5),
        ValueError,
        "seq_id: expected a sequence whose latest step has attended by way of H2O.attend; that of sequence 0 has not",
    ),
    "masses": (
        "H2O",
        lambda p, c, i: p.attend(c.step([i], [1]), np.ones((1, HQ, D)), return_mass=True),
        ValueError,
        "return_mass: expected none, the policy asks for masses itself",
    ),
    "paged": (
        "H2O",
        lambda p, c, i: policies.TOVA(kvnumba.PagedKVCache(1, 4, H, D, 1, backend="numpy")),
        TypeError,
        "cache: expected a PerHeadKVCache for TOVA; got a PagedKVCache",
    ),
    "contiguous": (
        "H2O",
        lambda p, c, i: policies.StreamingLLM(kvnumba.KVCache(1, 4, H, D, backend="numpy")),
        TypeError,
        "cache: expected a PagedKVCache or a PerHeadKVCache for StreamingLLM; got a KVCache",
    ),
    "kernel": ("H2O", lambda p, c, i: policies.SnapKV(c, kernel=4), ValueError, "kernel: expected an odd number"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(name, call, error, message, normal):
    cache = make("numpy")
    policy, seq_id = POLICIES[name](cache), cache.add_sequence()
    run(cache, policy, [seq_id], [9], {seq_id: Dense()}, normal)
    with pytest.raises(error, match=message):
        call(policy, cache, seq_id)
    assert cache.head_lens(seq_id).tolist() == [[9] * H] * LAYERS


class Unequal(policies.Policy):
    """Does not say of each token what it is worth."""

    def scores(self, seq_id, layer, held, budget):
        return [np.arange(3) for _ in held]


def test_scores_are_of_each_token(normal):
    cache = make("numpy")
    seq_id = cache.add_sequence()
    run(cache, Unequal(cache), [seq_id], [9], {seq_id: Dense()}, normal)
    with pytest.raises(ValueError, match=r"scores: expected one for each token .*\(9,\).*; got \[\(3,\)"):
        Unequal(cache).evict(seq_id, 5)
    assert cache.head_lens(seq_id).tolist() == [[9] * H] * LAYERS


def test_steps_of_another_cache_are_refused(normal):
    cache, other = make("numpy"), make("numpy")
    step = other.step([other.add_sequence()], [1])
    step.write(normal(1, H, D), normal(1, H, D))
    with pytest.raises(ValueError, match="step: expected one of the policy's cache"):
        policies.H2O(cache).attend(step, normal(1, HQ, D))


def test_policies_are_short():
    for path in Path(policies.__file__).parent.glob("*.py"):
        if path.stem not in ("base", "masses"):
            assert len(path.read_text().splitlines()) < 50, path
