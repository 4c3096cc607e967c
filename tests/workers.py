"""Workers for tests: a cluster of several nodes on this machine, and paged caches on it instead of here."""

import contextlib
import functools
import os
import signal
import time
from unittest import mock

import pytest
import ray
from ray.cluster_utils import Cluster

import kvnumba
from kvnumba import PagedKVCache
from kvnumba.integrations.ray import ShardedKVCache, Workers
from kvnumba.integrations.ray.backend import ShardedBuffers
from kvnumba.integrations.ray.channels import Channels


@functools.cache
def cluster(num_nodes):
    """A cluster of so many nodes, which this process uses from now on."""
    nodes = Cluster()
    for _ in range(num_nodes):
        nodes.add_node(num_cpus=1, include_dashboard=False)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    return nodes


@functools.cache
def workers(count, backend):
    """Workers that are shared by tests; on one node where some are killed: Ray's channels between nodes fail then."""
    if not ray.is_initialized():
        cluster(count if ON else 1)
    return Workers(count, backend=backend)


def kill(workers, number):
    """End the process of a worker at once, as a machine ends that loses its power."""
    process = workers.identity(number).process
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(process, signal.SIGKILL)
        while True:  # until it is gone, or a zombie that its parent has not seen yet
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
            time.sleep(0.001)


@contextlib.contextmanager
def killing(workers, number, after, *, at_the_end=True):
    """Kill a worker once so many messages have been sent to any; otherwise at the end, or not at all."""
    left = after

    def then_kill(real):
        def send(*args):
            nonlocal left
            answer = real(*args)
            left -= 1
            if left == 0:
                kill(workers, number)
            return answer

        return send

    if after == 0:
        kill(workers, number)
    with (
        mock.patch.object(workers, "_post", then_kill(workers._post)),
        mock.patch.object(Channels, "send", then_kill(Channels.send)),
    ):
        try:
            yield
        finally:
            if left > 0 and at_the_end:
                kill(workers, number)


class OnWorkers(ShardedKVCache):
    """What takes the place of `PagedKVCache`: the workers have chosen a backend already."""

    def __init__(self, *args, backend=None, **options):
        super().__init__(*args, workers=workers(*ON), **options)

    __repr__ = PagedKVCache.__repr__

    @classmethod
    def from_layout(cls, layout, max_num_seqs, *, backend=None):
        return super().from_layout(layout, max_num_seqs, workers=workers(*ON))


ON = ()


def put_paged_caches_on_workers(count, backend):
    """From now on every paged cache is on so many workers."""
    global ON
    ON = (count, backend)
    for module in (kvnumba, kvnumba.models.llama):
        module.PagedKVCache = OnWorkers
    ShardedBuffers.keys = ShardedBuffers.values = property(lambda self: pytest.skip("looks into the storage"))
