"""A cache whose heads hold different tokens under random use of every operation, against a model of each head."""

import copy
import itertools
import tempfile
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import TESTED
from faults import BackendError, FaultyMachine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvnumba

H, HQ, D, LAYERS, MAX_SEQS = 2, 4, 8, 2, 4
HEADS = list(itertools.product(range(LAYERS), range(H)))


class Model:
    """What one sequence must be: of each head of each layer the tokens that it holds, position -> (key, value)."""

    def __init__(self):
        self.length = 0  # tokens that it has had
        self.heads = {head: {} for head in HEADS}

    def held(self, layer, head):
        """Keys and values (1, tokens, D) of a head."""
        rows = np.array(list(self.heads[layer, head].values()), np.float32).reshape(-1, 2, D)
        return rows[None, :, 0], rows[None, :, 1]


class PerHeadMachine(FaultyMachine):
    """Every operation, with faults, in any order."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        super().teardown()
        self.folder.cleanup()

    @initialize(num_blocks=st.sampled_from([24, 60, 200]), block_size=st.sampled_from([1, 3, 4]))
    def start(self, num_blocks, block_size):
        self.block_size, self.num_blocks = block_size, num_blocks
        self.cache, self.models = self.new_cache(), {}
        self.rng = np.random.default_rng(num_blocks)

    def new_cache(self):
        return kvnumba.PerHeadKVCache(
            self.num_blocks, self.block_size, H, D, MAX_SEQS, num_layers=LAYERS, backend=self.backend
        )

    def attempt(self, call, *args, **options):
        """Whether a call succeeded, and what it returned; one that failed has left the cache as it was."""
        before = self.seen()
        try:
            return True, call(*args, **options)
        except (kvnumba.CacheFull, BackendError):
            assert self.seen() == before
            return False, None

    def seen(self):
        cache = self.cache
        return dict(cache.seq_lens), [cache.head_lens(i).tolist() for i in self.models]

    def some(self, data):
        return data.draw(st.sampled_from(list(self.models)))

    @precondition(lambda self: len(self.models) < MAX_SEQS)
    @rule(count=st.integers(0, 9))
    def add(self, count):
        seq_id = self.cache.add_sequence()
        self.models[seq_id] = Model()
        self.run([seq_id], [count])

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def fork(self, data):
        parent = self.some(data)
        done, seq_id = self.attempt(self.cache.fork, parent)
        assert done == (len(self.models) < MAX_SEQS)
        if done:
            self.models[seq_id] = copy.deepcopy(self.models[parent])
            self.run([parent, seq_id], [1, 2])

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def reorder(self, data):
        ids = data.draw(st.lists(st.sampled_from(list(self.models)), min_size=1, unique=True))
        parents = [self.some(data) for _ in ids]
        self.cache.reorder(ids, parents)
        self.models.update(zip(ids, [copy.deepcopy(self.models[each]) for each in parents], strict=True))

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def finish(self, data):
        seq_id = self.some(data)
        self.cache.finish_sequence(seq_id)
        del self.models[seq_id]
        with pytest.raises(ValueError, match="is finished"):
            self.cache.fork(seq_id)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), layers=st.sampled_from([LAYERS, LAYERS, LAYERS, 1]))
    def step(self, data, layers):
        """A pass over some sequences, which may end before its last layer."""
        ids = data.draw(st.lists(st.sampled_from(list(self.models)), min_size=1, max_size=3, unique=True))
        counts = data.draw(st.lists(st.integers(0, 6), min_size=len(ids), max_size=len(ids)))
        self.run(ids, counts, layers)

    def run(self, ids, counts, layers=LAYERS):
        """New tokens, which in all heads see what these hold."""
        done, step = self.attempt(self.cache.step, ids, counts)
        if not done:
            return
        firsts = [self.models[seq_id].length for seq_id in ids]
        assert step.positions.tolist() == [
            first + n for first, count in zip(firsts, counts, strict=True) for n in range(count)
        ]
        grown = {seq_id: copy.deepcopy(self.models[seq_id]) for seq_id in ids}
        for layer in range(layers):
            rows = self.rng.standard_normal((step.num_tokens, H, 2, D), np.float32)
            q = self.rng.standard_normal((step.num_tokens, HQ, D), np.float32)
            written, _ = self.attempt(step.write, rows[:, :, 0], rows[:, :, 1], layer=layer)
            if not written:
                return
            out, end = step.attend(q, layer=layer), 0
            for seq_id, first, count in zip(ids, firsts, counts, strict=True):
                begin, end = end, end + count
                for head in range(H):
                    of_head = grown[seq_id].heads[layer, head]
                    of_head.update(zip(range(first, first + count), rows[begin:end, head], strict=True))
                    mine = slice(head * HQ // H, (head + 1) * HQ // H)
                    want, _ = oracle.attention(q[begin:end, mine], *grown[seq_id].held(layer, head))
                    np.testing.assert_allclose(out[begin:end, mine], want, rtol=1e-4, atol=1e-5)
        if layers == LAYERS:
            for seq_id, first, count in zip(ids, firsts, counts, strict=True):
                self.models[seq_id] = grown[seq_id]
                self.models[seq_id].length = first + count

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def truncate(self, data):
        seq_id = self.some(data)
        model = self.models[seq_id]
        model.length = data.draw(st.integers(0, model.length))
        self.cache.truncate(seq_id, model.length)
        for head, tokens in model.heads.items():
            model.heads[head] = {at: row for at, row in tokens.items() if at < model.length}

    @precondition(lambda self: self.models)
    @rule(data=st.data(), layers=st.sampled_from([range(LAYERS), [0], [1]]), count=st.integers(0, 2))
    def keep(self, data, layers, count):
        seq_id = self.some(data)
        model = self.models[seq_id]
        stays = {
            each: [at for at in model.heads[each] if data.draw(st.booleans())]
            for each in HEADS
            if each[0] in layers
        }
        of_layers = {layer: [stays[layer, head] for head in range(H)] for layer in layers}
        given = (of_layers, None) if len(layers) > 1 else (of_layers[layers[0]], layers[0])
        done, _ = self.attempt(self.cache.keep, seq_id, given[0], layer=given[1])
        for each, positions in stays.items() if done else ():
            model.heads[each] = {at: model.heads[each][at] for at in positions}
            assert self.cache.head_lens(seq_id)[each] == len(positions)
        self.run([seq_id], [count])

    @precondition(lambda self: self.models)
    @rule()
    def restart(self):
        """Go on in another cache, with what a file holds."""
        path = Path(self.folder.name) / "cache.kvc"
        if not self.attempt(self.cache.save, path)[0]:
            return
        before, self.cache, models = self.cache, self.new_cache(), self.models
        self.models = {}
        done, ids = self.attempt(self.cache.load, path)
        if done:
            self.models = {ids[seq_id]: model for seq_id, model in models.items()}
        else:
            self.cache.check_integrity()
            self.cache, self.models = before, models

    @invariant()
    def as_the_model_says(self):
        if not hasattr(self, "models"):
            return
        cache = self.cache
        cache.check_integrity()
        assert dict(cache.seq_lens) == {i: model.length for i, model in sorted(self.models.items())}
        if self.fault is not None:
            return  # which a look at the keys would meet
        for i, model in self.models.items():
            for layer in range(LAYERS):
                found = zip(cache.positions(i, layer=layer), cache.get_kv(i, layer=layer), strict=True)
                for head, (positions, stored) in enumerate(found):
                    assert positions.tolist() == list(model.heads[layer, head])
                    for have, want in zip(stored, model.held(layer, head), strict=True):
                        np.testing.assert_array_equal(have, want[0])
        held = sum(len(tokens) for model in self.models.values() for tokens in model.heads.values())
        assert cache.stats().num_tokens == held


@pytest.mark.parametrize("backend", [name for name in TESTED if name in ("numpy", "cpu")])
def test_random_eviction(backend):
    run_state_machine_as_test(
        lambda: PerHeadMachine(backend),
        settings=settings(
            max_examples=settings.default.max_examples // 4, stateful_step_count=40, deadline=None
        ),
    )
