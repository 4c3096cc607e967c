"""A paged cache over several processes or machines, on Ray.

    from kvnumba.integrations.ray import ShardedKVCache

    cache = ShardedKVCache(1024, 16, 8, 128, 4, "int4", workers=2)

It needs the extra ``kvnumba[ray]``.
"""

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError("kvnumba.integrations.ray needs the extra: pip install 'kvnumba[ray]'") from error

from kvnumba.errors import WorkerLost
from kvnumba.integrations.ray.backend import ShardedBackend
from kvnumba.integrations.ray.cache import ShardedKVCache, WorkerStats
from kvnumba.integrations.ray.workers import Workers

__all__ = ["ShardedBackend", "ShardedKVCache", "WorkerLost", "WorkerStats", "Workers"]
