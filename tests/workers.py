"""Workers for tests: a cluster of several nodes on this machine, and paged caches on it instead of here."""

import functools

import pytest
import ray
from ray.cluster_utils import Cluster

import kvnumba
from kvnumba import PagedKVCache
from kvnumba.integrations.ray import ShardedKVCache, Workers
from kvnumba.integrations.ray.backend import ShardedBuffers


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
    """Workers that are shared by tests."""
    cluster(count)
    return Workers(count, backend=backend)


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
