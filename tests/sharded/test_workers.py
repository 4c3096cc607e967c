"""A cache on workers that die, hang and fail: every error names them, every answer that is given is right."""

import contextlib
import os
import signal
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba import CacheFull, WorkerLost
from kvnumba.formats import REGISTERED

ray = pytest.importorskip("ray", reason="the ray extra is not installed")

from workers import kill, killing, workers  # noqa: E402

from kvnumba.integrations.ray import ShardedKVCache  # noqa: E402

H, D, LAYERS, SIZE, NUM_BLOCKS = 2, 4, 2, 2, 40


@pytest.fixture
def group():
    """Workers that are shared by tests, so many as asked for, those that earlier tests have lost started again."""

    def group(count):
        found = workers(count, "numpy")
        found.replace()
        return found

    return group


@dataclass
class Model:
    """What a sequence holds: tokens, and rows (n, 2, LAYERS, H, D)."""

    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 2, LAYERS, H, D), np.float32))


class World:
    """A cache with sequences on the first worker, on the second, on all, on none and elsewhere; and what they are."""

    def __init__(self, group, folder, **options):
        self.group, self.folder = group, folder
        self.cache = ShardedKVCache(NUM_BLOCKS, SIZE, H, D, 14, num_layers=LAYERS, workers=group, **options)
        self.rng = np.random.default_rng(0)
        self.models = {}
        self.here, self.there, self.everywhere, self.swapped, self.empty = (
            self.add(count) for count in (2, 1, 7, 5, 0)
        )
        self.twin = self.cache.fork(self.here)
        self.models[self.twin] = replace(self.models[self.here])
        self.saved = {i: replace(model) for i, model in self.models.items()}
        self.cache.save(folder / "saved")
        self.later = self.add(5)
        self.cache.swap_out(self.swapped)
        self.away = {self.swapped}

    def rows(self, count):
        return self.rng.standard_normal((count, 2, LAYERS, H, D), dtype=np.float32)

    def append(self, seq_id, rows):
        self.models[seq_id].rows = np.concatenate([self.models[seq_id].rows, rows])

    def add(self, count):
        seq_id = self.cache.add_sequence()
        self.models[seq_id] = Model()
        if count:
            self.update(seq_id, count)
        return seq_id

    def update(self, seq_id, count=1):
        rows = self.rows(count)
        tokens = [seq_id * 100 + n for n in range(count)]
        for layer in range(LAYERS):
            told = {"token_ids": tokens} if layer == 0 else {}
            self.cache.update(
                seq_id, *(rows[:, n, layer].swapaxes(0, 1) for n in range(2)), layer=layer, **told
            )
        self.append(seq_id, rows)

    def step(self, seq_ids, counts):
        """A pass, and its attention in each layer."""
        rows = [self.rows(count) for count in counts]
        packed = np.concatenate(rows)
        step = self.cache.step(seq_ids, counts)
        for layer in range(LAYERS):
            step.write(packed[:, 0, layer], packed[:, 1, layer], layer=layer)
            if layer == LAYERS - 1:
                for seq_id, new in zip(seq_ids, rows, strict=True):
                    self.append(seq_id, new)
            q = self.rng.standard_normal((len(packed), 2 * H, D), dtype=np.float32)
            out, lse = step.attend(q, layer=layer, return_lse=True)
            begin = 0
            for seq_id, new in zip(seq_ids, rows, strict=True):
                k, v = self.models[seq_id].rows[:, :, layer].transpose(1, 2, 0, 3)
                if layer < LAYERS - 1:
                    k, v = np.concatenate([self.models[seq_id].rows, new])[:, :, layer].transpose(1, 2, 0, 3)
                part = slice(begin, begin + len(new))
                oracle.assert_as_exact((out[part], lse[part]), q[part], k, v)
                begin += len(new)

    def attend(self, seq_id):
        count = min(2, len(self.models[seq_id].rows))
        q = self.rng.standard_normal((2 * H, count, D), dtype=np.float32)
        for layer in range(LAYERS):
            out, lse = self.cache.attend(seq_id, q, layer=layer, return_lse=True)
            k, v = self.models[seq_id].rows[:, :, layer].transpose(1, 2, 0, 3)
            oracle.assert_as_exact((out.swapaxes(0, 1), lse.T), q.swapaxes(0, 1), k, v)

    def check(self, seq_id):
        """A sequence holds what it should."""
        for layer in range(LAYERS):
            found = self.cache.get_kv(seq_id, layer=layer)
            want = self.models[seq_id].rows[:, :, layer].transpose(1, 2, 0, 3)
            np.testing.assert_array_equal(found, want)

    def lost(self):
        """The sequences that have tokens on workers that are lost, and no replica of them."""
        pool, lost = self.cache._pool, self.group.lost
        replicas = self.cache._sharded.replicas
        found = set()
        for seq_id, model in self.models.items():
            row = seq_id % pool.max_num_seqs
            filled = pool.table[row, : -(-len(model.rows) // SIZE)] % len(self.group)
            holders = (filled[:, None] + np.arange(replicas)) % len(self.group)
            if seq_id not in self.away and np.isin(holders, lost).all(axis=1).any():
                found.add(seq_id)
        return found

    def refused(self, seq_id, worker):
        """Every call that needs a lost sequence names it, and its worker."""
        k = np.zeros((H, 1, D), np.float32)
        other = self.cache.add_sequence()
        calls = [
            lambda: self.cache.update(seq_id, k, k),
            lambda: self.cache.step([other, seq_id], [1, 1]),
            lambda: self.cache.step([seq_id], [1]),
            lambda: self.cache.attend(seq_id, k),
            lambda: self.cache.get_kv(seq_id),
            lambda: self.cache.fork(seq_id),
            lambda: self.cache.reorder([other], [seq_id]),
            lambda: self.cache.reorder([seq_id], [other]),
            lambda: self.cache.truncate(seq_id, 0),
            lambda: self.cache.block_table(seq_id),
            lambda: self.cache.swap_out(seq_id),
            lambda: self.cache.swap_in(seq_id),
        ]
        for call in calls:
            with pytest.raises(WorkerLost, match=rf"sequence {seq_id} is lost: worker {worker} \(") as caught:
                call()
            assert caught.value.workers == (worker,)
            assert caught.value.seq_ids == (seq_id,)
        self.cache.finish_sequence(other)


# Of each what is done, in a world; the models change with what is done.


def add(world):
    before = [*range(world.everywhere * 100, world.everywhere * 100 + 7), 5]
    seq_id = world.cache.add_sequence(before)
    found = world.cache.seq_len(seq_id)
    assert found == 6  # also where a worker is dead, which nobody knows yet
    world.models[seq_id] = Model(world.models[world.everywhere].rows[:found])


def fork_then_write(world):
    world.models[twin := world.cache.fork(world.there)] = replace(world.models[world.there])
    world.update(twin, 1)


def reorder(world):
    world.cache.reorder([world.empty, world.here], [world.everywhere, world.there])
    world.models[world.empty] = replace(world.models[world.everywhere])
    world.models[world.here] = replace(world.models[world.there])


def truncate(world):
    world.cache.truncate(world.everywhere, 3)
    world.models[world.everywhere].rows = world.models[world.everywhere].rows[:3]


def finish(world):
    world.cache.finish_sequence(world.everywhere)
    del world.models[world.everywhere]


def swap_out(world):
    world.cache.swap_out(world.everywhere, world.folder / "swap")
    world.away.add(world.everywhere)
    world.cache.swap_in(world.everywhere)
    world.away.remove(world.everywhere)


def swap_in(world):
    world.cache.swap_in(world.swapped)
    world.away.clear()


def load(world):
    ids = world.cache.load(world.folder / "saved")
    world.models.update((ids[i], replace(model)) for i, model in world.saved.items())


def save(world):
    world.cache.swap_in(world.swapped)
    world.away.clear()
    try:
        world.cache.save(world.folder / "again")
    except WorkerLost:
        assert not (world.folder / "again").exists()
        raise


ALONE = {"add": add, "reorder": reorder, "truncate": truncate, "finish": finish}
"""What no worker is asked about."""

ASKING = {
    "step": lambda world: world.step([world.everywhere, world.here, world.empty], [3, 1, 1]),
    "update": lambda world: (world.update(world.everywhere, 3), world.attend(world.everywhere)),
    "attend": lambda world: world.attend(world.everywhere),
    "get_kv": lambda world: world.check(world.everywhere),
    "fork, then write": fork_then_write,
    "swap out, and in": swap_out,
    "swap in": swap_in,
    "save": save,
    "load": load,
    "check_integrity": lambda world: world.cache.check_integrity(),
}


@pytest.mark.parametrize(
    ("name", "after"), [*((name, 0) for name in ALONE), *((name, n) for name in ASKING for n in (0, 1))]
)
def test_a_worker_killed_at_every_kind_of_call(name, after, group, tmp_path):
    """Before the call, or once so many messages are on their way, of which it may have done its own or not."""
    killed_at(name, after, group, tmp_path)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("name", ["step", "get_kv", "save"])
def test_a_worker_killed_behind_channels(name, after, group, tmp_path, monkeypatch):
    monkeypatch.setattr(kvnumba.integrations.ray.workers, "CALLS_BEFORE_CHANNELS", 2)
    killed_at(name, after, group, tmp_path)


def killed_at(name, after, group, tmp_path):
    world = World(group(2), tmp_path)
    cache, victim = world.cache, 1
    process = world.group.identity(victim).process
    error = None
    with killing(world.group, victim, after):
        try:
            (ALONE | ASKING)[name](world)
        except WorkerLost as caught:
            error = caught
    if error is None:  # it was not noticed, but the next one that asks does
        with pytest.raises(WorkerLost) as caught:
            cache.check_integrity()
        error = caught.value
    lost = world.lost()
    assert error.workers == (victim,)
    assert set(error.seq_ids) == lost & set(world.models)
    assert f"worker 1 ({world.group.identity(victim).host}, process {process}) died" in str(error)
    assert all(str(seq_id) in str(error).rpartition("sequences")[2] for seq_id in lost)
    if name in ("attend", "get_kv", "check_integrity"):
        assert lost == {world.there, world.everywhere, world.later}
    cache.check_integrity()
    for seq_id in lost:
        world.refused(seq_id, victim)
    for seq_id in list(world.away):
        cache.swap_in(seq_id)
        world.away.remove(seq_id)
    with pytest.raises(ValueError, match="is lost; restore it or finish it before you save"):
        cache.save(tmp_path / "not")
    living = [seq_id for seq_id in world.models if seq_id not in lost]
    for seq_id in living:
        world.check(seq_id)
    world.step(living, [3] * len(living))
    assert len({int(b) % 2 for seq_id in living for b in cache.block_table(seq_id)}) == 1

    back = cache.restore(tmp_path / "saved")
    assert sorted(back) == sorted(lost & world.saved.keys())
    for seq_id in back:
        world.models[seq_id] = world.saved[seq_id]
    for seq_id in lost - set(back):
        world.refused(seq_id, victim)
        cache.finish_sequence(seq_id)
        del world.models[seq_id]
    for seq_id in world.models:
        world.check(seq_id)
    world.step(list(world.models), [2] * len(world.models))
    assert world.group.lost == ()
    cache.check_integrity()
    for seq_id in world.models:
        cache.finish_sequence(seq_id)
    cache.check_integrity()
    assert cache.num_free_blocks == NUM_BLOCKS
    assert [each.used_blocks for each in cache.worker_stats()] == [0, 0]


def test_with_replicas_any_one_may_be_killed_at_any_call(group, tmp_path):
    three = group(3)
    for n, (name, action) in enumerate(ASKING.items()):
        (tmp_path / str(n)).mkdir()
        world = World(three, tmp_path / str(n), replicas=2)
        for victim, after in ((n % 3, n % 4), ((n + 1) % 3, 0)):  # another one, once the first is there again
            with killing(three, victim, after):
                if after:
                    action(world)
            world.cache.check_integrity()
            assert three.lost == (victim,), name
            for seq_id in world.models:
                if seq_id not in world.away:
                    world.check(seq_id)
            if victim == n % 3:
                world.step([world.here, world.empty], [2, 3])
                assert world.cache.restore() == []
        assert world.lost() == set()
        three.replace()


class TestGivenUp:
    def test_one_that_hangs(self, group, tmp_path, monkeypatch):
        world = World(group(2), tmp_path)
        monkeypatch.setattr(world.group, "timeout", 1)
        process = world.group.identity(0).process
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(
            WorkerLost, match=rf"worker 0 \(.*{process}\) did not answer within 1 s; it held"
        ) as caught:
            world.attend(world.everywhere)
        assert caught.value.workers == (0,)
        assert set(caught.value.seq_ids) == world.lost() >= {world.here, world.twin, world.everywhere}
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
        world.refused(world.everywhere, 0)
        world.check(world.there)
        monkeypatch.setattr(world.group, "timeout", 60)
        assert world.here in world.cache.restore(tmp_path / "saved")
        assert world.group.identity(0).process != process
        world.check(world.here)

    def test_one_in_which_something_fails(self, group, tmp_path):
        world = World(group(2), tmp_path)
        actor = world.group._actors[1]
        world.group.send(1, "know")
        with pytest.raises(
            WorkerLost, match=r"worker 1 \(.*\) failed: TypeError: .*know\(\) missing"
        ) as caught:
            world.check(world.everywhere)
        assert set(caught.value.seq_ids) == world.lost()
        assert "failed: TypeError" in world.cache.worker_stats()[1].state
        world.check(world.here)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.run.remote(99, b""), timeout=10)

    def test_one_that_dies_while_it_is_filled(self, group, tmp_path):
        """What others had is not read there: it is lost still."""
        world = World(group(3), tmp_path, replicas=2)
        kill(world.group, 0)
        world.cache.check_integrity()
        real = world.cache._sharded._copy_shard

        def copy(buffers, shard, worker, region):
            kill(world.group, 0)
            real(buffers, shard, worker, region)

        with (
            mock.patch.object(world.cache._sharded, "_copy_shard", copy),
            pytest.raises(WorkerLost, match="worker 0 .* died"),
        ):
            world.cache.restore()
        assert world.group.lost == (0,)
        world.check(world.everywhere)
        world.cache.restore()
        kill(world.group, 1)
        world.check(world.everywhere)

    def test_a_source_that_dies_while_another_one_is_filled(self, group, tmp_path):
        world = World(group(3), tmp_path, replicas=2)
        kill(world.group, 0)
        world.cache.check_integrity()
        real = world.cache._sharded._copy_shard

        def copy(buffers, shard, worker, region):
            if 1 not in world.group.lost:
                kill(world.group, 1)
            real(buffers, shard, worker, region)

        with (
            mock.patch.object(world.cache._sharded, "_copy_shard", copy),
            pytest.raises(WorkerLost, match="worker 1 .* died") as caught,
        ):
            world.cache.restore()
        assert world.group.lost == (0, 1)
        assert set(caught.value.seq_ids) == world.lost() >= {world.everywhere}
        for seq_id in world.models.keys() - world.lost() - world.away:
            world.check(seq_id)
        back = world.cache.restore(tmp_path / "saved")
        for seq_id in back:
            world.models[seq_id] = world.saved[seq_id]
            world.check(seq_id)

    def test_those_that_were_stopped(self, tmp_path):
        with ShardedKVCache(4, SIZE, H, D, 2, workers=2, replicas=2, backend="numpy") as cache:
            seq_id = cache.add_sequence()
            k = np.zeros((H, 3, D), np.float32)
            cache.update(seq_id, k, k)
        with pytest.raises(WorkerLost, match=r"worker 0 \(.*\) was stopped; worker 1 \(.*\) was stopped"):
            cache.attend(seq_id, k)
        with pytest.raises(RuntimeError, match="workers: they were stopped"):
            cache.restore()

    def test_a_pass_during_which_another_one_notices(self, group, tmp_path):
        """Blocks that were booked are gone: the pass is not counted, and its sequence is not lost."""
        world = World(group(2), tmp_path)
        cache = world.cache
        rows = world.rows(2)
        step = cache.step([world.here], [2])
        step.write(rows[:, 0, 0], rows[:, 1, 0], layer=0)
        real = cache._sharded.write

        def write(*args):
            real(*args)
            kill(world.group, 1)
            with pytest.raises(WorkerLost):
                cache.check_integrity()

        with (
            mock.patch.object(cache._sharded, "write", write),
            pytest.raises(ValueError, match="its sequences have moved on"),
        ):
            step.write(rows[:, 0, 1], rows[:, 1, 1], layer=1)
        cache.check_integrity()
        world.check(world.here)
        world.step([world.here], [2])

    def test_what_was_kept_in_float_is_not_looked_for(self, group, rng):
        """A sequence whose blocks are all there lives, though its newest tokens in float are gone."""
        cache = ShardedKVCache(64, 4, H, D, 2, "int8", workers=group(2), recent_tokens=24)
        k = rng.standard_normal((2, H, 4, D), dtype=np.float32)
        q = rng.standard_normal((H, 1, D), dtype=np.float32)
        ids = [cache.add_sequence() for _ in range(2)]
        for seq_id in ids:
            cache.update(seq_id, k[0], k[1])
            cache.attend(seq_id, q)
        assert [cache.block_table(i).tolist()[0] % 2 for i in ids] == [0, 1]
        assert sum(cache.layout.recent_blocks) % 2 == 0  # so all begin on the first worker
        kill(cache.workers, 0)
        with pytest.raises(WorkerLost, match=f"sequences {ids[0]}$"):
            cache.check_integrity()
        for _ in range(2):
            out, lse = cache.attend(ids[1], q, return_lse=True)
            found = cache.get_kv(ids[1])
            oracle.assert_stored(found[0], k[0], "int8")
            oracle.assert_as_exact((out.swapaxes(0, 1), lse.T), q.swapaxes(0, 1), *found)
            assert cache.restore() == []  # and again, with floats for what comes


def test_written_arrays_may_be_used_again_at_once(group, normal):
    """Writes wait for the next answer; what they write is what was given."""
    cache = ShardedKVCache(8, 4, H, D, 1, num_layers=LAYERS, workers=group(2), placement="sequence")
    seq_id = cache.add_sequence()
    step = cache.step([seq_id], [3])
    k, want = np.empty((3, H, D), np.float32), normal(LAYERS, 3, H, D)
    for layer in range(LAYERS):
        k[...] = want[layer]
        step.write(k, k, layer=layer)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(cache.get_kv(seq_id, layer=layer)[0].swapaxes(0, 1), want[layer])


class TestPlacement:
    def shards(self, cache, seq_id):
        return (cache.block_table(seq_id) % len(cache.workers)).tolist()

    def fill(self, cache, num_blocks):
        seq_id = cache.add_sequence()
        cache.step([seq_id], [num_blocks * SIZE])
        return seq_id

    def test_in_turn(self, group):
        cache = ShardedKVCache(30, SIZE, H, D, 6, workers=group(3))
        first, second, third = (self.fill(cache, n) for n in (4, 2, 5))
        assert self.shards(cache, first) == [0, 1, 2, 0]
        assert self.shards(cache, second) == [1, 2]  # where the most is free, the first of them
        assert self.shards(cache, third) == [0, 1, 2, 0, 1]
        cache.step([second], [5 * SIZE])
        assert self.shards(cache, second) == [1, 2, 0, 1, 2]

    def test_growth_is_even(self, group, rng):
        cache = ShardedKVCache(90, SIZE, H, D, 6, workers=group(3))
        ids = [cache.add_sequence() for _ in range(6)]
        for _ in range(40):
            cache.step([ids[rng.integers(6)]], [int(rng.integers(8)) * SIZE])
            used = [each.used_blocks for each in cache.worker_stats()]
            assert max(used) - min(used) <= len(ids)
        assert sum(used) > 30

    def test_by_sequence(self, group):
        cache = ShardedKVCache(30, SIZE, H, D, 6, workers=group(3), placement="sequence")
        first, second, third = (self.fill(cache, n) for n in (4, 2, 3))
        assert [self.shards(cache, n) for n in (first, second, third)] == [[0] * 4, [1] * 2, [2] * 3]
        fourth = self.fill(cache, 8)
        assert self.shards(cache, fourth) == [1] * 8
        cache.step([second], [4 * SIZE])  # its worker is full: each to where the most is free
        assert self.shards(cache, second) == [1, 1, 2, 0]

    def test_full(self, group):
        """What does not fit is booked nowhere."""
        cache = ShardedKVCache(7, SIZE, H, D, 6, workers=group(3))
        assert [each.num_blocks for each in cache.worker_stats()] == [3, 2, 2]
        first = self.fill(cache, 5)
        second = cache.add_sequence()
        for ids, counts in (([second], [3 * SIZE]), ([first, second], [6 * SIZE, 2 * SIZE])):
            with pytest.raises(CacheFull, match="3 more blocks of 2 tokens are needed, 2 of 7 are free"):
                cache.step(ids, counts)
            assert cache.num_free_blocks == 2
            assert cache.block_table(second).tolist() == []
            assert len(cache.block_table(first)) == 5
        cache.step([first, second], [0, 2 * SIZE])
        assert sorted([*cache.block_table(first), *cache.block_table(second)]) == list(range(7))
        assert cache.num_free_blocks == 0
        cache.check_integrity()


class TestFolders:
    def contents(self, cache, seq_id):
        return np.stack([cache.get_kv(seq_id, layer=layer) for layer in range(LAYERS)])

    @pytest.mark.parametrize("count", [1, 3])
    def test_onto_another_number_of_workers(self, count, group, tmp_path):
        world = World(group(2), tmp_path)
        assert len(list((tmp_path / "saved").iterdir())) == 3
        other = ShardedKVCache(
            40, SIZE, H, D, 6, num_layers=LAYERS, workers=group(count), placement="sequence"
        )
        world.cache, models = other, world.models
        ids = other.load(tmp_path / "saved")
        world.models = {ids[i]: world.saved[i] for i in ids}
        assert set(ids) == set(world.saved) < set(models)
        for seq_id in world.models:
            world.check(seq_id)
        world.step(list(world.models), [1] * len(ids))
        kill(other.workers, 0)
        with pytest.raises(WorkerLost):
            other.check_integrity()
        with pytest.raises(ValueError, match="another cache was saved there"):
            other.restore(tmp_path / "saved")

    def test_what_is_damaged_changes_nothing(self, group, tmp_path):
        world = World(group(2), tmp_path)
        folder = tmp_path / "saved"
        files = sorted(folder.iterdir())
        assert [path.name.partition("-")[0] for path in files] == ["manifest", "worker", "worker"]
        other = ShardedKVCache(40, SIZE, H, D, 14, num_layers=LAYERS, workers=world.group)

        def refused(error, match, **options):
            with pytest.raises(error, match=match):
                other.load(folder, **options)
            assert (dict(other.seq_lens), other.num_free_blocks) == ({}, 40)
            other.check_integrity()

        refused(ValueError, "fingerprint: expected 'other'; the file has ''", fingerprint="other")
        for path in files:
            good = path.read_bytes()
            for size in (0, 10, len(good) // 2, len(good) - 1):
                path.write_bytes(good[:size])
                refused(
                    ValueError, f"{path.name}: (not a file|its header is cut|expected .* bytes of blocks)"
                )
            for place in (0, 30, len(good) - 10):
                path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
                refused(
                    ValueError, f"{path.name}: (not a file|its header is cut|its blocks are damaged|expected)"
                )
            path.unlink()
            if path.name == "manifest":
                refused(ValueError, "no manifest: not a folder that a cache was saved to")
            else:
                refused(FileNotFoundError, rf"worker \d \(.*\): .*{path.name}")
            path.write_bytes(good)
        single = kvnumba.PagedKVCache(4, SIZE, H, D, 14, num_layers=LAYERS, backend="numpy")
        single.save(tmp_path / "single")
        folder = tmp_path / "single"
        refused(ValueError, "no manifest")
        folder = tmp_path / "nothing"
        refused(FileNotFoundError, "nothing")
        folder = tmp_path / "saved"
        small = ShardedKVCache(3, SIZE, H, D, 14, num_layers=LAYERS, workers=world.group)
        with pytest.raises(CacheFull, match="more blocks of 2 tokens are needed, 3 of 3 are free"):
            small.load(folder)
        assert len(other.load(folder)) == len(world.saved)

    def test_over_an_older_one(self, group, tmp_path):
        """It takes the other's place as a whole; where that fails, nothing has changed."""
        world = World(group(2), tmp_path)
        before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        world.cache.finish_sequence(world.swapped)
        del world.models[world.swapped]
        manifest = tmp_path / "saved" / "manifest"

        def full(path, header, chunks):
            raise OSError(28, "No space left on device")

        with (
            mock.patch.object(kvnumba.caches.snapshot, "write_file", full),
            pytest.raises(OSError, match="No space left"),
        ):
            world.cache.save(tmp_path / "saved")
        assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
        kept = manifest.read_bytes()
        world.cache.save(tmp_path / "saved")
        assert manifest.read_bytes() != kept
        assert len(list((tmp_path / "saved").iterdir())) == 3  # the files of the older one are gone
        other = ShardedKVCache(40, SIZE, H, D, 14, num_layers=LAYERS, workers=world.group)
        assert set(other.load(tmp_path / "saved")) == set(world.models)

    def test_where_a_file_cannot_be_written(self, group, tmp_path):
        world = World(group(2), tmp_path)
        world.cache.finish_sequence(world.swapped)
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(FileExistsError):
            world.cache.save(tmp_path / "taken")
        assert (tmp_path / "taken").read_text() == "mine"
        world.check(world.everywhere)


class TestStart:
    @pytest.mark.parametrize(
        ("error", "match", "options"),
        [
            (ValueError, "placement: expected one of turn, sequence; got 'even'", {"placement": "even"}),
            (ValueError, "replicas: expected .*1.*; got 0", {"replicas": 0}),
            (ValueError, "replicas: expected at most the 2 workers; got 3", {"replicas": 3}),
            (ValueError, "timeout: expected a number of seconds greater than 0, or None; got 0", {"timeout": 0}),
            (TypeError, "timeout: expected", {"timeout": "soon"}),
            (ValueError, "workers: expected .*1.*; got 0", {"workers": 0}),
            (ValueError, "workers: expected at least one; got none", {"workers": []}),
            (TypeError, "workers: expected a number, or the resources of each as a dict; got '2'", {"workers": "2"}),
            (TypeError, "workers: expected a number, or the resources of each as a dict; got 1", {"workers": [1]}),
            (ValueError, "backend: expected one of .*; got 'tpu'", {"backend": "tpu"}),
        ],
    )  # fmt: skip
    def test_arguments(self, error, match, options, group):
        group(2)
        with pytest.raises(error, match=match):
            ShardedKVCache(4, SIZE, H, D, 2, **{"backend": "numpy", **options})

    def test_options_of_workers_that_are_there(self, group):
        for options in ({"backend": "numpy"}, {"timeout": 3}):
            (name,) = options
            with pytest.raises(TypeError, match=f"{name}: expected none with workers that are there"):
                ShardedKVCache(4, SIZE, H, D, 2, workers=group(2), **options)

    def test_another_version(self, group, monkeypatch):
        group(2)
        module = kvnumba.integrations.ray.workers
        mine = module.Identity.of_this_process()
        for name, value in (("version", "0.0"), ("byteorder", "big")):
            other = replace(mine, **{name: value})
            with monkeypatch.context() as patched:
                patched.setattr(module.Identity, "of_this_process", lambda other=other: other)
                with pytest.raises(
                    RuntimeError, match=rf"worker 0 \(.*\): {name}: expected {value}, as here; it has "
                ):
                    kvnumba.integrations.ray.Workers(1, backend="numpy")

    def test_more_than_there_is_room_for(self, group, monkeypatch):
        group(2)
        monkeypatch.setattr(kvnumba.integrations.ray.workers, "START_SECONDS", 1.0)
        with pytest.raises(
            RuntimeError, match="workers: 1 of 1 did not start within 1 s; Ray has .* are free"
        ):
            kvnumba.integrations.ray.Workers([{"num_cpus": 1000}], backend="numpy")

    def test_lost_before(self, group):
        """A cache on workers of which one is lost takes the others."""
        two = group(2)
        kill(two, 0)
        with pytest.raises(WorkerLost):
            ShardedKVCache(8, SIZE, H, D, 2, workers=two)
        cache = ShardedKVCache(8, SIZE, H, D, 2, workers=two)
        assert cache.num_free_blocks == 4
        seq_id = cache.add_sequence()
        k = np.ones((H, 5, D), np.float32)
        cache.update(seq_id, k, k)
        assert set(cache.block_table(seq_id) % 2) == {1}
        with pytest.raises(CacheFull, match="2 more blocks of 2 tokens are needed, 1 of 8 are free"):
            cache.step([seq_id], [5])
        assert cache.restore() == []
        assert cache.num_free_blocks == 5
        np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k)


def test_formats_of_ones_own_are_refused(group):
    def encode(x, codes):
        codes[:] = 0

    def decode(codes, x):
        x[:] = 0

    kvnumba.register_format("zeros", bits=1, encode=encode, decode=decode)
    with pytest.raises(
        ValueError, match="key_format: zeros is a format of your own, which workers do not know"
    ):
        ShardedKVCache(4, SIZE, H, 8, 2, "zeros", workers=group(2))
    del REGISTERED["zeros"]


def test_masses_are_refused(group):
    cache = ShardedKVCache(8, SIZE, H, D, 2, workers=group(2))
    seq_id = cache.add_sequence()
    q = np.zeros((H, 1, D), np.float32)
    cache.update(seq_id, q, q)
    with pytest.raises(ValueError, match="return_mass: expected a cache of the backend .*; got one of ray"):
        cache.attend(seq_id, q, return_mass=True)
