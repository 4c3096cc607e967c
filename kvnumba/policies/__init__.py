"""Policies of eviction: which tokens of a sequence a cache keeps, and each KV head of it.

Each is a few lines on top of `Policy`, to be used, and to be read before one writes one's own.
"""

from kvnumba.policies.base import Policy
from kvnumba.policies.h2o import H2O
from kvnumba.policies.keydiff import KeyDiff
from kvnumba.policies.knorm import KnormPress
from kvnumba.policies.masses import MassPolicy
from kvnumba.policies.snapkv import SnapKV
from kvnumba.policies.streaming import StreamingLLM
from kvnumba.policies.tova import TOVA

__all__ = ["H2O", "TOVA", "KeyDiff", "KnormPress", "MassPolicy", "Policy", "SnapKV", "StreamingLLM"]
