"""A cache on workers under random use, while workers are killed before and in the middle of any call.

``pytest --hypothesis-profile=long`` goes on for longer.
"""

import contextlib
from pathlib import Path

import oracle
import pytest

pytest.importorskip("ray", reason="the ray extra is not installed")

from contract.test_random_use import LAYERS, MAX_SEQS, NUM_BLOCKS, CacheMachine, D, H, rule
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, run_state_machine_as_test
from workers import killing, workers

import kvnumba
from kvnumba.integrations.ray import ShardedKVCache

NUM_WORKERS = 2


class LossMachine(CacheMachine):
    """The machine on workers, one of which is killed now and then."""

    def __init__(self, placement, *formats):
        super().__init__("numpy", *formats)
        self.group = workers(NUM_WORKERS, "numpy")
        self.group.replace()
        self.placement = placement
        self.lost = {}
        self.saved = None  # the cache that was saved, and its models
        self.victim = self.killing = None

    def new_cache(self, num_blocks):
        return ShardedKVCache(
            num_blocks,
            self.block_size,
            H,
            D,
            MAX_SEQS,
            num_layers=LAYERS,
            workers=self.group,
            placement=self.placement,
            **self.formats,
        )

    def teardown(self):
        self.spare()
        with contextlib.suppress(kvnumba.WorkerLost):  # so that the next machine knows who is lost
            self.cache.check_integrity()
        super().teardown()

    def spare(self):
        """Do not kill any more."""
        if self.killing is not None:
            self.killing.__exit__(None, None, None)
            self.killing = None

    break_backend = None  # no rule here

    @precondition(lambda self: self.killing is None and not self.group.lost)
    @rule(victim=st.integers(0, NUM_WORKERS - 1), after=st.integers(0, 9))
    def kill(self, victim, after):
        """At once, or after some more messages, in the middle of what comes."""
        self.victim = victim
        self.killing = killing(self.group, victim, after, at_the_end=False)
        self.killing.__enter__()

    def lose(self, error):
        """Exactly those sequences are lost that had tokens there; they are refused, and the error names all."""
        self.spare()
        assert error.workers == self.group.lost == (self.victim,)
        assert f"worker {self.victim} (" in str(error)
        pool = self.cache._pool
        lost = set()
        for i, model in self.models.items():
            filled = pool.table[i % MAX_SEQS, : -(-len(model.tokens) // self.block_size)]
            if not model.swapped and (filled[filled >= 0] % NUM_WORKERS == self.victim).any():
                lost.add(i)
            model.kept_from = len(model.tokens)  # it may have had its blocks
        assert {int(pool.ids[row]) for row in pool.lost} == lost
        assert set(error.seq_ids) in (lost, set())  # none: of the cache that `restart` has made
        self.lost = {i: self.models.pop(i) for i in lost}
        self.refused()

    def refused(self):
        for i in self.lost:
            for call in (
                self.cache.fork,
                self.cache.get_kv,
                self.cache.swap_in,
                lambda i: self.cache.step([i], [1]),
            ):
                with pytest.raises(
                    kvnumba.WorkerLost, match=rf"sequence {i} is lost: .*worker {self.victim} "
                ):
                    call(i)

    @precondition(lambda self: not self.lost and not any(model.swapped for model in self.models.values()))
    @rule()
    def keep(self):
        self.cache.save(Path(self.folder.name, "kept"))
        self.saved = (self.cache, {i: model.copy() for i, model in self.models.items()})

    @precondition(lambda self: self.group.lost)
    @rule(from_file=st.booleans())
    def bring_back(self, from_file):
        """Start the worker again, and read what was saved; finish the others."""
        saved = self.saved[1] if from_file and self.saved is not None and self.saved[0] is self.cache else {}
        try:
            back = self.cache.restore(Path(self.folder.name, "kept") if saved else None)
        except kvnumba.CacheFull:
            assert saved.keys() & self.lost.keys()
        else:
            assert set(back) == saved.keys() & self.lost.keys()
            for i in back:
                del self.lost[i]
                self.models[i] = saved[i].copy()
                self.models[i].kept_from = len(saved[i].tokens)
        assert self.group.lost == ()
        self.refused()
        for i in self.lost:
            self.cache.finish_sequence(i)
        self.lost = {}

    @precondition(lambda self: self.passes >= 5 and not self.group.lost)
    @rule(num_blocks=NUM_BLOCKS)
    def restart(self, num_blocks):
        super().restart(num_blocks=num_blocks)

    @invariant()
    def as_the_model_says(self):
        if not hasattr(self, "models"):
            return
        try:
            self.check()
        except kvnumba.WorkerLost as error:
            self.lose(error)
            self.check()

    def check(self):
        self.cache.check_integrity()
        everyone = {**self.models, **self.lost}
        assert self.cache.seq_lens == {i: len(model.tokens) for i, model in everyone.items()}
        for i, model in self.models.items():
            for layer in range(0 if model.swapped else LAYERS):
                kept = self.cache.get_kv(i, layer=layer)
                count, length = kept[0].shape[1], len(model.tokens)
                assert count >= model.least()
                for n, name in enumerate(("key_format", "value_format")):
                    want = model.rows[length - count :, n, layer].swapaxes(0, 1)
                    oracle.assert_stored(kept[n], want, self.formats[name])
        stats = self.cache.stats()
        used = sum(each.used_blocks for each in self.cache.worker_stats())
        assert stats.used_blocks == used
        if not self.models and not self.group.lost:
            assert self.cache.num_free_blocks == self.cache.num_blocks


@pytest.mark.parametrize(
    ("placement", "formats"),
    [("turn", ("float32", "float32")), ("sequence", ("int8", "int4"))],
    ids=["turn", "sequence"],
)
def test_random_loss(placement, formats):
    def machine():
        return LossMachine(placement, *formats)

    examples = settings.default.max_examples // 12
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None)
    )
