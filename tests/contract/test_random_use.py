"""A paged cache under random use of every operation, against a model that remembers every token.

``pytest --hypothesis-profile=long`` goes on for longer.
"""

import functools
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import ON_WORKERS
from faults import BackendError, FaultyMachine
from hypothesis import settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    run_state_machine_as_test,
)

import kvnumba
from kvnumba import storage
from kvnumba.attention import passes
from kvnumba.caches import recent

H, D, LAYERS, MAX_SEQS = 2, 4, 2, 6
FLOAT_BLOCK, SHORT = 2, 3
SALTS = ["", "tenant"]
FLOAT_CALLS = ("read_blocks", "write_blocks")
"""Those that a step makes after its blocks are booked, to have recent tokens in float before new ones."""

FEW_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(bytes)  # of two kinds: histories meet
PROMPTS = st.builds(
    lambda begin, length, end: begin[:length] + end,
    st.sampled_from([bytes(20), bytes([1, 0] * 10)]),
    st.integers(0, 20),
    FEW_TOKENS | st.just(b""),
)
NUM_BLOCKS = st.sampled_from([20, 40, 10, 5])
MOSTLY = st.sampled_from([True, True, True, False])


def rule(**draws):
    """A rule of hypothesis, which ends where a worker is lost: tests/sharded/test_random_loss.py kills some."""

    def as_rule(function):
        @functools.wraps(function)
        def called(self, **drawn):
            try:
                function(self, **drawn)
            except kvnumba.WorkerLost as error:
                self.lose(error)

        return stateful.rule(**draws)(called)

    return as_rule


@dataclass
class Model:
    """What one sequence must be."""

    salt: str
    window_left: int
    tokens: bytes = b""
    wanted: bytes = b""  # what a user would append: the rest of its prompt
    swapped: bool = False
    kept_from: int = 0  # position before which blocks may have been given back
    path: Path | None = None
    float_from: int = 0  # the ring of recent tokens holds those from here on
    num_sinks: int = 0  # and so many first ones are held besides
    positions: tuple[int, ...] = ()
    next_position: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 2, LAYERS, H, D), np.float32))

    def append(self, new):
        self.rows = np.concatenate([self.rows, self.rows_of(new)])
        self.tokens += new
        self.positions += tuple(range(self.next_position, self.next_position + len(new)))
        self.next_position += len(new)

    def rows_of(self, new):
        """Keys and values of tokens to come; others than those of a sequence that has not dropped the same."""
        whole = self.positions == tuple(range(self.next_position))
        return rows_of(self.salt if whole else f"{self.salt} {self.positions}", self.tokens, new)

    def cut(self, length):
        self.wanted = self.tokens[length:] + self.wanted
        self.next_position = (*self.positions, self.next_position)[length]
        self.hold(range(length))

    def least(self):
        """How many tokens must be held, for the next one to see its window."""
        first = 0 if self.window_left < 0 else self.next_position - self.window_left
        return sum(position >= first for position in self.positions)

    def hold(self, slots):
        """Have the tokens in these slots alone."""
        self.tokens, self.rows = bytes(self.tokens[n] for n in slots), self.rows[list(slots)]
        self.positions = tuple(self.positions[n] for n in slots)

    def copy(self):
        return replace(self, wanted=b"", path=None)


def rows_of(salt, before, new):
    """Keys and values of tokens, different for every history and salt: (n, 2, LAYERS, H, D) float32."""
    rows = np.empty((len(new), 2, LAYERS, H, D), np.float32)
    for i in range(len(new)):
        seed = zlib.crc32(before + new[: i + 1], zlib.crc32(salt.encode())) % 99_991
        rows[i] = np.sin(np.arange(1, rows[i].size + 1) * (seed + 1.0)).reshape(rows[i].shape)
    return rows


class CacheMachine(FaultyMachine):
    """Every public operation of a paged cache, with faults, in any order."""

    def __init__(self, backend, key_format, value_format, recent_tokens=0, sink_tokens=0):
        super().__init__()
        self.backend, self.formats = backend, {"key_format": key_format, "value_format": value_format}
        self.recent, self.sinks = recent_tokens, sink_tokens
        self.folder = tempfile.TemporaryDirectory()
        self.files = 0
        self.passes = 0  # forward passes since the last restart

    def lose(self, error):
        raise error

    def teardown(self):
        super().teardown()
        self.folder.cleanup()

    @initialize(num_blocks=NUM_BLOCKS, block_size=st.sampled_from([2, 3, 1, 4]))
    def start(self, num_blocks, block_size):
        self.block_size = block_size
        self.cache = self.new_cache(num_blocks)
        self.models = {}
        self.ever = set()

    def new_cache(self, num_blocks):
        cache = kvnumba.PagedKVCache(
            num_blocks,
            self.block_size,
            H,
            D,
            MAX_SEQS,
            num_layers=LAYERS,
            backend=self.backend,
            recent_tokens=self.recent,
            sink_tokens=self.sinks,
            **self.formats,
        )
        stale = [  # what shows if it is read
            np.full(shape, {"u1": 77, "u2": 0x7FC0}.get(dtype.str[1:], np.nan), dtype)
            for shape, dtype in storage.array_specs(cache.layout, num_blocks)
        ]
        backend = cache._backend
        parts = storage.Encoded(*stale[:3]), storage.Encoded(*stale[3:])
        type(backend).write_blocks(backend, cache._buffers, np.arange(num_blocks), *parts)  # not a broken one
        return cache

    def ids(self, swapped=False):
        return [i for i, model in self.models.items() if model.swapped == swapped]

    def some(self, data, swapped=False):
        return data.draw(st.sampled_from(self.ids(swapped)))

    def attempt(self, call, needed):
        """Whether a call succeeded, and what it returned or raised; a full cache had to be, and is as it was."""
        before = self.seen()
        try:
            return True, call()
        except kvnumba.CacheFull as error:
            assert needed > self.cache.num_free_blocks or len(self.cache.seq_lens) == MAX_SEQS
            assert self.seen() == before
            return False, error
        except BackendError as error:
            assert self.cache.seq_lens == before[0]
            self.less_in_float()
            return False, error

    def less_in_float(self):
        """A call that failed may have left less in float than there was, never more."""
        held = self.cache._recent
        for i, model in self.models.items() if held is not None else ():
            begin, num_sinks = held._begins[i % MAX_SEQS], held._num_sinks[i % MAX_SEQS]
            assert model.float_from <= begin <= len(model.tokens)
            assert num_sinks <= model.num_sinks
            model.float_from, model.num_sinks = int(begin), int(num_sinks)

    def seen(self):
        tables = [self.cache.block_table(i).tolist() for i in self.ids()]
        return self.cache.seq_lens, self.cache.num_free_blocks, tables

    def known(self, seq_id):
        assert seq_id not in self.ever
        self.ever.add(seq_id)
        return seq_id

    # Sequences

    @rule(
        prompt=PROMPTS,
        salt=st.sampled_from(SALTS),
        window=st.sampled_from([-1, -1, 0, 3]),
        look=MOSTLY,
        write=MOSTLY,
    )
    def add(self, prompt, salt, window, look, write):
        window = max(window, self.recent - 1) if window >= 0 else -1

        def call():
            if look:
                seq_id = self.cache.add_sequence(prompt, cache_salt=salt, window_left=window)
                return seq_id, self.cache.seq_len(seq_id)
            return self.cache.add_sequence(cache_salt=salt, window_left=window), 0

        done, result = self.attempt(call, 0)
        if done:
            seq_id, cached = result
            assert cached <= max(len(prompt) - 1, 0)
            assert cached % self.block_size == 0
            model = self.models[self.known(seq_id)] = Model(salt, window)
            model.append(prompt[:cached])
            model.float_from = cached
            model.wanted = prompt[cached:]
            if write:
                self.run([seq_id], [model.wanted], tell=True)

    @precondition(lambda self: self.ids())
    @rule(data=st.data())
    def fork(self, data):
        parent = self.some(data)
        done, seq_id = self.attempt(lambda: self.cache.fork(parent), 0)
        if done:
            self.models[self.known(seq_id)] = self.models[parent].copy()

    @precondition(lambda self: self.ids())
    @rule(data=st.data())
    def reorder(self, data):
        ids = data.draw(st.lists(st.sampled_from(self.ids()), min_size=1, unique=True))
        parents = data.draw(st.lists(st.sampled_from(self.ids()), min_size=len(ids), max_size=len(ids)))
        if self.attempt(lambda: self.cache.reorder(ids, parents), 0)[0]:
            copies = [self.models[parent].copy() for parent in parents]
            self.models.update(zip(ids, copies, strict=True))

    @precondition(lambda self: self.ids())
    @rule(data=st.data())
    def truncate(self, data):
        seq_id = self.some(data)
        model = self.models[seq_id]
        length = data.draw(st.integers(0, len(model.tokens)))
        first = len(model.tokens) - self.kept(seq_id).shape[1]
        next_position = (*model.positions, model.next_position)[length]
        if first and next_position - model.window_left <= model.positions[first - 1]:
            with pytest.raises(ValueError, match="fell out of the window"):
                self.cache.truncate(seq_id, length)
            assert length < model.kept_from  # where the latest step began, at the latest
            return
        self.cut(seq_id, length)

    @precondition(lambda self: self.ids())
    @rule(data=st.data())
    def evict(self, data):
        """Keep some tokens, and drop the others."""
        seq_id = self.some(data)
        model = self.models[seq_id]
        first, length = len(model.tokens) - self.kept(seq_id).shape[1], len(model.tokens)
        drop = data.draw(st.sets(st.integers(first, length - 1))) if first < length else set()
        slots = [n for n in range(first, length) if n not in drop]
        positions = [model.positions[n] for n in slots]
        done, _ = self.attempt(lambda: self.cache.keep(seq_id, positions), -(-len(slots) // self.block_size))
        if done and drop:
            model.hold(slots)
            model.kept_from, model.float_from, model.num_sinks = 0, len(slots), 0
            assert len(self.cache.block_table(seq_id)) == -(-len(slots) // self.block_size)

    def cut(self, seq_id, length):
        model = self.models[seq_id]
        self.cache.truncate(seq_id, length)
        model.cut(length)
        model.float_from, model.num_sinks = min(model.float_from, length), min(model.num_sinks, length)
        assert len(self.cache.block_table(seq_id)) == -(-length // self.block_size)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def finish(self, data):
        seq_id = data.draw(st.sampled_from(list(self.models)))
        self.cache.finish_sequence(seq_id)
        model = self.models.pop(seq_id)
        assert model.path is None or not model.path.exists()
        with pytest.raises(ValueError, match="is finished"):
            self.cache.fork(seq_id)

    @precondition(lambda self: self.ids())
    @rule(data=st.data(), new=st.lists(FEW_TOKENS, min_size=2, max_size=3))
    def sample(self, data, new):
        """Continue one sequence in several ways at once."""
        parent = self.some(data)
        ids = [parent]
        for _ in new[1:]:
            done, seq_id = self.attempt(lambda: self.cache.fork(parent), 0)
            if done:
                self.models[self.known(seq_id)] = self.models[parent].copy()
                ids.append(seq_id)
        self.run(ids, new[: len(ids)], tell=True)

    @precondition(lambda self: self.ids())
    @rule(data=st.data(), draft=FEW_TOKENS, accepted=st.integers(0, 4), new=FEW_TOKENS, tell=MOSTLY)
    def speculate(self, data, draft, accepted, new, tell):
        """Write a draft, take some of it back, and write something else in its place."""
        seq_id = self.some(data)
        before = len(self.models[seq_id].tokens)
        self.run([seq_id], [draft], tell)
        if len(self.models[seq_id].tokens) > before:
            self.cut(seq_id, before + min(accepted, len(draft)))
            self.run([seq_id], [new], tell)

    # Tokens

    @precondition(lambda self: self.ids())
    @rule(data=st.data(), tell=MOSTLY, end=st.sampled_from(["complete"] * 4 + ["dropped", "half"]))
    def step(self, data, tell, end):
        ids = data.draw(st.lists(st.sampled_from(self.ids()), min_size=1, unique=True))
        self.run(ids, [self.draw_new(data, i) for i in ids], tell, end)

    @precondition(lambda self: self.ids())
    @rule(data=st.data(), tell=MOSTLY)
    def update(self, data, tell):
        seq_id = self.some(data)
        new = self.draw_new(data, seq_id)
        model = self.models[seq_id]
        rows = model.rows_of(new)

        def call():
            for layer in range(LAYERS):
                k, v = (rows[:, n, layer].swapaxes(0, 1) for n in range(2))
                told = {"token_ids": new} if tell and layer == 0 else {}
                self.cache.update(seq_id, k, v, layer=layer, **told)

        done, error = self.attempt(call, self.bound([seq_id], [new]))
        if done:
            self.book_floats([seq_id], [new])
            self.advance([seq_id], [new])
        else:
            if str(error) in ("write", *FLOAT_CALLS) and new:
                model.kept_from = len(model.tokens)  # it had its blocks: what fell out of the window is gone
            self.cache.truncate(seq_id, len(model.tokens))  # a pass that has come to its second layer shows

    def draw_new(self, data, seq_id):
        wanted = self.models[seq_id].wanted
        return data.draw(st.sampled_from([wanted, wanted[:1], wanted[:3], b""]) if wanted else FEW_TOKENS)

    def bound(self, ids, new):
        """Blocks that a step needs at the most: for each sequence those to come and a copy."""
        held = {i: len(self.cache.block_table(i)) for i in ids}
        return sum(
            max(-(-(len(self.models[i].tokens) + len(n)) // self.block_size) - held[i], 0) + (len(n) > 0)
            for i, n in zip(ids, new, strict=True)
        )

    def run(self, ids, new, tell, end="complete"):
        """A forward pass, up to its end, its middle or its beginning."""
        self.passes += 1
        rows = [self.models[i].rows_of(n) for i, n in zip(ids, new, strict=True)]
        packed = np.concatenate([np.empty((0, 2, LAYERS, H, D), np.float32), *rows])
        told = {"token_ids": new} if tell else {}
        done, step = self.attempt(
            lambda: self.cache.step(ids, [len(n) for n in new], **told), self.bound(ids, new)
        )
        if not done and str(step) not in FLOAT_CALLS:
            return
        for i, n in zip(ids, new, strict=True):
            if n:
                self.models[i].kept_from = len(self.models[i].tokens)
        if not done:
            return
        stand = [
            self.models[i].next_position + n
            for i, more in zip(ids, new, strict=True)
            for n in range(len(more))
        ]
        assert step.positions.tolist() == stand
        begins = self.book_floats(ids, new)
        for layer in range({"complete": LAYERS, "half": 1, "dropped": 0}[end]):
            k, v = packed[:, 0, layer], packed[:, 1, layer]
            if not self.attempt(functools.partial(step.write, k, v, layer=layer), 0)[0]:
                return
        if end == "complete":
            sinks = [self.models[i].num_sinks for i in ids]
            self.advance(ids, new)
            self.attended(step, ids, new, begins, sinks)

    def book_floats(self, ids, new):
        """From where on each sequence's new tokens attend in float; new tokens overwrite the oldest of a ring."""
        begins = []
        for i, n in zip(ids, new, strict=True):
            model, first = self.models[i], len(self.models[i].tokens)
            if 0 < len(n) <= SHORT:
                model.float_from = max(model.float_from, self.oldest(first + len(n)))
            begins.append(max(model.float_from, first + 1 - self.recent))
        return begins

    def oldest(self, length):
        """The oldest of so many tokens for which the ring has room."""
        ring = -(-(self.recent + SHORT + FLOAT_BLOCK - 2) // FLOAT_BLOCK)
        return ((length - 1) // FLOAT_BLOCK + 1 - ring) * FLOAT_BLOCK

    def advance(self, ids, new):
        for i, n in zip(ids, new, strict=True):
            model = self.models[i]
            first = len(model.tokens)
            if n:
                model.kept_from = first
            model.append(n)
            if len(n) > SHORT:
                begin = max(model.float_from, first + 1 - self.recent)
                model.float_from = max(begin, self.oldest(first + len(n)))
            if model.num_sinks == min(first, self.sinks):
                model.num_sinks = min(len(model.tokens), self.sinks)
            model.wanted = model.wanted[len(n) :] if model.wanted.startswith(n) else b""

    def attended(self, step, ids, new, begins, sinks):
        """The last layer's attention of a complete step is that of its sequences as they are stored."""
        windows = [self.models[i].window_left for i in ids]
        window = min((w for w in windows if w >= 0), default=-1)
        q = np.sin(np.arange(step.num_tokens * 2 * H * D, dtype=np.float32)).reshape(-1, 2 * H, D)
        out, lse = step.attend(q, layer=LAYERS - 1, window_left=window, return_lse=True)
        begin = 0
        for i, n, float_from, num_sinks in zip(ids, new, begins, sinks, strict=True):
            if n:
                part = slice(begin, begin + len(n))
                found, present = self.in_place(i, self.stored(i, LAYERS - 1, float_from, num_sinks))
                rounded = oracle.rounding_of(self.cache)
                oracle.assert_as_exact(
                    (out[part], lse[part]),
                    q[part],
                    *found,
                    present=present,
                    window_left=window,
                    rounded=rounded,
                )
                begin += len(n)

    def in_place(self, seq_id, found):
        """Keys and values where they stand, from the first that is held on, and which of them there are."""
        model = self.models[seq_id]
        held = np.array(model.positions[len(model.positions) - found[0].shape[1] :])
        places = held - held[0]
        present = np.isin(np.arange(model.next_position - held[0]), places)
        stand = [np.full((H, len(present), D), np.nan, np.float32) for _ in found]
        for rows, x in zip(stand, found, strict=True):
            rows[:, places] = x
        return stand, present

    # To other places and back

    @precondition(lambda self: self.ids())
    @rule(data=st.data(), in_file=st.booleans())
    def swap_out(self, data, in_file):
        seq_id = self.some(data)
        self.files += 1
        path = Path(self.folder.name, f"swap{self.files}") if in_file else None
        if self.attempt(lambda: self.cache.swap_out(seq_id, path), 0)[0]:
            self.models[seq_id].swapped, self.models[seq_id].path = True, path
            with pytest.raises(ValueError, match="is swapped out"):
                self.cache.step([seq_id], [1])
        elif path is not None:
            assert not path.exists()

    @precondition(lambda self: self.ids(swapped=True))
    @rule(data=st.data())
    def swap_in(self, data):
        seq_id = self.some(data, swapped=True)
        model = self.models[seq_id]
        needed = -(-len(model.tokens) // self.block_size)
        if self.attempt(lambda: self.cache.swap_in(seq_id), needed)[0]:
            assert model.path is None or not model.path.exists()
            model.swapped, model.path = False, None

    @precondition(lambda self: self.passes >= 5)
    @rule(num_blocks=NUM_BLOCKS)
    def restart(self, num_blocks):
        """Save, and go on with another cache that loads the file."""
        path = Path(self.folder.name, "saved")
        self.passes = 0
        if any(model.swapped for model in self.models.values()):
            with pytest.raises(ValueError, match="is swapped out"):
                self.cache.save(path)
            return
        if self.attempt(lambda: self.cache.save(path, fingerprint="test"), 0)[0]:
            other = self.new_cache(num_blocks)
            try:
                ids = other.load(path, fingerprint="test")
            except kvnumba.CacheFull:
                stats = self.cache.stats()
                assert stats.used_blocks + stats.cached_blocks > num_blocks
                assert other.num_free_blocks == num_blocks
                other.check_integrity()
            except BackendError:
                assert other.num_free_blocks == num_blocks
                other.check_integrity()
            else:
                assert sorted(ids) == sorted(self.models)
                self.cache = other
                self.models = {ids[i]: model for i, model in self.models.items()}
                for model in self.models.values():
                    model.float_from, model.num_sinks = len(model.tokens), 0
                self.ever = set(self.models)

    # What is always true

    def stored(self, seq_id, layer, float_from, num_sinks):
        """Keys and values as they are in the blocks, and what is seen in float as the model has it."""
        cache, model = self.cache, self.models[seq_id]
        first = cache._pool.first_position(seq_id)
        table = cache.block_table(seq_id)[None, first // self.block_size :]
        count = len(model.tokens) - first
        found = [x[0] for x in passes.read(cache._backend, cache._buffers, layer, table, count)]
        if self.recent:
            for n, rows in enumerate(found):
                exact = model.rows[first:, n, layer].swapaxes(0, 1).astype(np.float16)
                rows[:, max(float_from - first, 0) :] = exact[:, max(float_from - first, 0) :]
                rows[:, : max(num_sinks - first, 0)] = exact[:, : max(num_sinks - first, 0)]
        return found

    def kept(self, seq_id, layer=0):
        return self.cache.get_kv(seq_id, layer=layer)[0]

    @invariant()
    def as_the_model_says(self):
        if not hasattr(self, "models"):
            return
        self.cache.check_integrity()
        assert self.cache.seq_lens == {i: len(model.tokens) for i, model in sorted(self.models.items())}
        for i, model in self.models.items():
            assert self.cache.next_position(i) == model.next_position
            if model.swapped:
                continue
            held = model.positions[len(model.positions) - len(self.cache.positions(i)) :]
            assert self.cache.positions(i).tolist() == list(held)
            for layer in range(LAYERS):
                kept = self.cache.get_kv(i, layer=layer)
                count = kept[0].shape[1]
                length = len(model.tokens)
                assert count >= model.least()
                begin = max(model.float_from, length - self.recent)
                seen = self.stored(i, layer, begin, min(model.num_sinks, begin))
                blocks = self.stored(i, layer, length, 0)
                for n, name in enumerate(("key_format", "value_format")):
                    want = model.rows[len(model.tokens) - count :, n, layer].swapaxes(0, 1)
                    oracle.assert_stored(blocks[n], want, self.formats[name])
                    np.testing.assert_array_equal(kept[n], seen[n])
        stats = self.cache.stats()
        assert stats.free_blocks + stats.used_blocks == stats.num_blocks
        assert stats.free_blocks == self.cache.num_free_blocks >= stats.cached_blocks
        assert stats.num_tokens == sum(len(model.tokens) for model in self.models.values())


@pytest.mark.parametrize(
    "formats",
    [
        ("float32", "float32"),
        ("int8", "int4"),
        ("bfloat16", "int8"),
        ("fp8_e4m3", "float16"),
        ("int4", "int4", 4),
        ("int8", "int4", 1, 3),
    ],
    ids=lambda formats: "-".join(map(str, formats)),
)
def test_random_use(backend, formats, monkeypatch):
    for module in (storage, recent):  # small rings, which are written round
        monkeypatch.setattr(module, "RECENT_BLOCK", FLOAT_BLOCK)
        monkeypatch.setattr(module, "RECENT_SHORT", SHORT)

    def machine():
        return CacheMachine(backend, *formats)

    slow = backend == "cuda" or ON_WORKERS  # a simulated GPU, messages
    examples = 2 if slow else settings.default.max_examples // 2
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=50, deadline=None)
    )
