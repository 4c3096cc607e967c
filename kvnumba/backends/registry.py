"""Backends by name: ``argument > use_backend() > KVNUMBA_BACKEND > auto``, loaded when first asked for."""

from __future__ import annotations

import functools
import importlib
import os
from contextvars import ContextVar
from types import TracebackType

from kvnumba.backends.protocol import Backend
from kvnumba.errors import BackendUnavailable

ENVIRONMENT_VARIABLE = "KVNUMBA_BACKEND"

BACKENDS: dict[str, str] = {
    "cuda":  "kvnumba.backends.cuda:CudaBackend",
    "cpu":   "kvnumba.backends.cpu:CpuBackend",
    "numpy": "kvnumba.backends.numpy:NumpyBackend",
}  # fmt: skip
"""Name -> "module:class", in the order in which ``auto`` tries them."""

_chosen: ContextVar[str | None] = ContextVar("kvnumba_backend", default=None)


def _check_name(source: str, name: object) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, auto; got {name!r}")
    return str(name)


class use_backend:  # noqa: N801 (read as a verb: ``with use_backend("cpu"):``)
    """Choose the backend of the caches made from here on.

    Takes effect at once, in the current thread (context). As a context manager it holds until the block ends, when what
    was chosen before the block is chosen again; one object may serve several blocks.

    Parameters
    ----------
    name : {"numpy", "cpu", "cuda", "auto"}

    Raises
    ------
    ValueError
        The name is not known.
    BackendUnavailable
        The backend cannot run here.
    """

    def __init__(self, name: str) -> None:
        self._name = _check_name("use_backend", name)
        if name != "auto":
            _load(name)
        self._before: list[str | None] = [_chosen.get()]  # of each block that is to come or has begun
        self._entered = False
        _chosen.set(name)

    def __enter__(self) -> None:
        if self._entered:  # the first block began when the object was made
            self._before.append(_chosen.get())
            _chosen.set(self._name)
        self._entered = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.set(self._before.pop())


def get_backend(name: str | Backend | None = None, *, on_host: bool = False) -> Backend:
    """The backend called `name`, or the one that is chosen where None is given; a backend is that itself.

    With `on_host`, ``auto`` passes over those that keep their storage on a device.

    Raises
    ------
    ValueError
        The name, or the one in ``KVNUMBA_BACKEND``, is not known.
    BackendUnavailable
        It was named and cannot run here. ``auto`` goes on to the next one instead.
    """
    if not (name is None or isinstance(name, str)):
        return name
    name = chosen_name(name)
    if name == "auto":
        suited = (each for each in available_backends() if not on_host or _load(each).device is None)
        name = next(suited)
    return _load(name)


def chosen_name(name: str | None = None) -> str:
    """`name`, or where None is given that of `use_backend` or ``KVNUMBA_BACKEND``; "auto" stays what it is.

    Raises
    ------
    ValueError
        The name is not known.
    """
    if name is not None:
        return _check_name("backend", name)
    return _chosen.get() or _check_name(ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "auto")


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run here, the one that ``auto`` takes first; no simulated one."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None and not _load(name).simulated)


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run here; None if it can."""
    try:
        _load(name)
    except BackendUnavailable as error:
        return str(error)
    return None


def _load(name: str) -> Backend:
    found = _attempt(name)
    if isinstance(found, BackendUnavailable):
        raise BackendUnavailable(str(found))
    return found


@functools.cache
def _attempt(name: str) -> Backend | BackendUnavailable:
    """The backend, or why there is none; looked for once, since ``auto`` asks for every new cache."""
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except BackendUnavailable as error:
        return error
    except ImportError as error:
        return BackendUnavailable(f"the {name} backend cannot be imported: {error}")
