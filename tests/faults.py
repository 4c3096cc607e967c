"""Backends that fail now and then, for caches under random use."""

from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

BACKEND_CALLS = ("write", "copy_blocks", "read_blocks", "write_blocks")


class BackendError(Exception):
    """What a backend is made to raise."""


class FaultyMachine(RuleBasedStateMachine):
    """A machine whose `cache` has a backend that fails once in a while."""

    fault = None

    def teardown(self):
        if self.fault is not None:
            self.fault.stop()

    @precondition(lambda self: self.fault is None)
    @rule(name=st.sampled_from(BACKEND_CALLS), after=st.integers(0, 2))
    def break_backend(self, name, after):
        """Let one of the next calls of a backend's method fail, half-way."""
        backend, real = self.cache._backend, getattr(self.cache._backend, name)
        calls = iter([False] * after + [True])

        def failing(*args):
            if next(calls, False):
                patch.stop()
                self.fault = None
                if name in ("write_blocks", "copy_blocks"):
                    real(*args)  # what it has done by then is of no consequence
                raise BackendError(name)
            return real(*args)

        patch = self.fault = mock.patch.object(backend, name, failing)
        patch.start()
