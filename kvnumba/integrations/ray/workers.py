"""The processes that hold shards of caches, as the driver sees them: started, asked, given up and started again."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray

from kvnumba import arguments
from kvnumba.backends.registry import chosen_name
from kvnumba.errors import WorkerLost
from kvnumba.integrations.ray.channels import Channels, ChannelsError, Message
from kvnumba.integrations.ray.worker import Identity, Worker

LARGE = 1 << 16  # bytes of an array that travels beside a message, through shared memory on one machine
FLUSH = 1 << 20  # bytes of commands that wait for no answer, from which on they are sent at once
TIMEOUT = 300.0  # seconds for an answer, the first of which may wait for a minute of compilation
CALLS_BEFORE_CHANNELS = 100  # to make channels takes a second
START_SECONDS = 120.0  # for processes to start and load what they need

logger = logging.getLogger("kvnumba")

_open_groups = 0  # of a Ray that was started here
_started_here = False
_starting = threading.Lock()


class Holder(Protocol):
    """What hears of workers that are lost, and brings back what those need that take their places."""

    def lose(self, reasons: Mapping[int, str]) -> None: ...

    def refill(self, empty: Sequence[int]) -> None: ...

    def reread(self) -> None: ...


class Workers:
    """Processes that hold the blocks of caches, on this machine or on those of a Ray cluster.

    Several caches may use the same ones. As a context manager it stops them at the end.

    Parameters
    ----------
    workers : int or sequence of mapping
        How many, or the resources of each, in Ray's words: ``[{"num_cpus": 8}, {"num_gpus": 1}]``. A worker stays on so
        many processors as its ``num_cpus`` says, without that on an equal share of its machine's; each has a thread.
    backend : {"numpy", "cpu", "cuda", "auto"}, optional
        Of the workers. Default: `kvnumba.use_backend`, then ``KVNUMBA_BACKEND``, then "auto".
    timeout : float, optional
        Seconds after which a worker that does not answer is given up. Kernels compile when they are first used, which
        counts. None: it is waited for.

    Raises
    ------
    RuntimeError
        The workers do not start, or one of them has another version of kvnumba.

    Notes
    -----
    Where `ray.init` has not been called, and ``RAY_ADDRESS`` does not name a cluster, Ray is started on this machine,
    and stopped with the last workers.
    """

    def __init__(
        self,
        workers: int | Sequence[Mapping[str, float]] = 2,
        *,
        backend: str | None = None,
        timeout: float | None = TIMEOUT,
    ) -> None:
        if isinstance(workers, Sequence):
            unfit = [each for each in workers if not isinstance(each, Mapping)]
            if unfit:
                raise TypeError(
                    f"workers: expected a number, or the resources of each as a dict; got {unfit[0]!r}"
                )
            resources = [dict(each) for each in workers]
        else:
            resources = [{} for _ in range(arguments.integer("workers", workers, minimum=1))]
        if not resources:
            raise ValueError("workers: expected at least one; got none")
        timeout = None if timeout is None else arguments.real("timeout", timeout)
        if timeout is not None and timeout <= 0:
            raise ValueError(
                f"timeout: expected a number of seconds greater than 0, or None; got {timeout:g}"
            )
        self.timeout = timeout
        self._resources = resources
        self._backend_name = chosen_name(backend)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        count = len(resources)
        self._actors: list[Any] = [None] * count
        self._identities: list[Identity | None] = [None] * count
        self._incarnations = [0] * count
        self._cpus_of_node: dict[str, tuple[int, ...]] = {}
        self._reasons: dict[int, str] = {}  # why a worker is lost
        # of these, those in whose places others are, which lack their blocks still
        self._filling: set[int] = set()
        self._waiting: list[list[tuple[Any, ...]]] = [[] for _ in range(count)]
        self._waiting_bytes = [0] * count
        self._garbage: list[deque[int]] = [deque() for _ in range(count)]
        self._sent = [0] * count  # messages so far
        self._calls = 0
        self._channels: Channels | None = None
        self._in_turn = threading.RLock()  # of those who use channels
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        _connect()
        self._stop = weakref.finalize(self, _stop, self._actors)
        try:
            self._begin(range(count))
        except BaseException:
            self._stop()
            raise

    def __len__(self) -> int:
        return len(self._actors)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; caches on them cannot be used any more."""
        with self._lock:
            for number in range(len(self)):
                self._reasons.setdefault(number, "was stopped")
        self._drop_channels()
        self._stop()

    @property
    def lost(self) -> tuple[int, ...]:
        """The numbers of workers that died, did not answer or failed."""
        return tuple(sorted(self._reasons))

    def state(self, number: int) -> str:
        """ "alive", or what became of a worker."""
        return self._reasons.get(number, "alive")

    def identity(self, number: int) -> Identity:
        """Where a worker runs, or ran."""
        identity = self._identities[number]
        assert identity is not None
        return identity

    def incarnation(self, number: int) -> int:
        """How often another process has taken a worker's place: what was sent to it before is gone."""
        return self._incarnations[number]

    def describe(self, number: int) -> str:
        """``worker 1 (host, process 4711)``."""
        identity = self._identities[number]
        return f"worker {number}" + (f" ({identity.host}, process {identity.process})" if identity else "")

    def watch(self, holder: Holder) -> None:
        """Let something hear of workers that are lost, as long as it lives."""
        self._holders.add(holder)

    def new_number(self) -> int:
        """A name for something that workers are to know."""
        return next(self._numbers)

    # Messages

    def send(self, number: int, *command: Any) -> None:
        """Let a worker do something, not before the next message to it; its error comes with the next answer."""
        with self._lock:
            if number in self._reasons:
                return
            self._waiting[number].append(command)
            self._waiting_bytes[number] += sum(x.nbytes for x in command if isinstance(x, np.ndarray))
            if self._waiting_bytes[number] >= FLUSH:
                self._post(number, *self._message(number, [], {}))

    def forget(self, number: int, thing: int) -> None:
        """Let a worker forget something, some time; also from where no lock may be taken."""
        self._garbage[number].append(thing)

    def call(
        self, commands: Mapping[int, Sequence[tuple[Any, ...]]], *, patient: bool = False
    ) -> dict[int, Any]:
        """Let workers do some commands each, all at the same time; returns what the last one of each returned.

        Who is patient waits for an answer as long as the worker lives: a disk may be slow.

        Raises
        ------
        WorkerLost
            A worker is lost, or is from now on. The other ones have done their commands.
        """
        timeout = None if patient else self.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._in_turn if self._may_use_channels() else contextlib.nullcontext():
            channels = self._channels
            with self._lock:
                self.require(commands)
                arrays: dict[tuple[int, int], Any] = {}
                messages = {
                    number: self._message(number, those, arrays) for number, those in commands.items()
                }
                sent = None
                if channels is not None and not any(beside for _, beside in messages.values()):
                    with contextlib.suppress(ChannelsError):
                        sent = channels.send({number: message for number, (message, _) in messages.items()})
                if sent is None:
                    references = {
                        number: self._post(number, *message) for number, message in messages.items()
                    }
            if sent is None or channels is None:
                return self._wait(references, deadline)
            try:
                return self._checked(channels.receive(sent, timeout))
            except ChannelsError:
                # who has done the message says so again, who is lost says nothing
                references = {number: self._post(number, *message) for number, message in messages.items()}
                try:
                    return self._wait(references, deadline)
                finally:
                    self._drop_channels()

    def _message(
        self, number: int, commands: Sequence[tuple[Any, ...]], arrays: dict[tuple[int, int], Any]
    ) -> tuple[Message, list[Any]]:
        """What waits and some more commands, and large arrays beside; `arrays` are those of others in the same call."""
        garbage = self._garbage[number]
        message = list(self._waiting[number])  # these may need what is garbage by now
        message += [("forget", garbage.popleft()) for _ in range(len(garbage))]
        message += commands
        beside: list[Any] = []

        def inside(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < LARGE:
                return True
            array = np.frombuffer(raw, np.uint8)
            key = (array.ctypes.data, array.nbytes)
            if key not in arrays:
                arrays[key] = ray.put(array)
            beside.append(arrays[key])
            return False

        data = pickle.dumps(message, protocol=5, buffer_callback=inside)
        self._waiting[number], self._waiting_bytes[number] = [], 0
        self._sent[number] += 1
        return (self._sent[number], data), beside

    def _post(self, number: int, message: Message, beside: Sequence[Any]) -> Any:
        return self._actors[number].run.remote(*message, *beside)

    def _wait(self, references: Mapping[int, Any], deadline: float | None) -> dict[int, Any]:
        """The answers to calls of actors."""

        def left() -> float | None:
            # a moment in any case: to hear from those that have done their part
            return None if deadline is None else max(deadline - time.monotonic(), 1.0)

        try:
            return dict(zip(references, ray.get(list(references.values()), timeout=left()), strict=True))
        except ray.exceptions.RayError:
            ray.wait(list(references.values()), num_returns=len(references), timeout=left())
        answers: dict[int, Any] = {}
        for number, reference in references.items():
            try:
                answers[number] = ray.get(reference, timeout=0)
            except ray.exceptions.RayError as error:
                answers[number] = error
        return self._checked(answers)

    def _checked(self, answers: dict[int, Any]) -> dict[int, Any]:
        """The answers, if all workers have given one."""
        failed = {
            number: answer
            for number, answer in answers.items()
            if isinstance(answer, ray.exceptions.RayError)
        }
        if failed:
            self.give_up({number: self._why(error) for number, error in failed.items()})
            self.require(answers)
        return answers

    def _why(self, error: Exception) -> str:
        if isinstance(error, ray.exceptions.GetTimeoutError):
            return f"did not answer within {self.timeout:g} s"
        if isinstance(error, ray.exceptions.RayTaskError):
            return f"failed: {type(error.cause).__name__}: {error.cause}"
        return "died"

    def _may_use_channels(self) -> bool:
        """Whether there are channels; they are made after some calls in which no worker was lost or replaced."""
        with self._lock:
            self._calls += 1
            due = self._calls == CALLS_BEFORE_CHANNELS
        if due:
            alive = {
                n: actor
                for n, actor in enumerate(self._actors)
                if n not in self._reasons or n in self._filling
            }
            # between nodes they take down Ray's daemon with a worker that dies (ray 2.60)
            if {self.identity(n).node for n in alive} != {ray.get_runtime_context().get_node_id()}:
                return False
            with self._in_turn:
                try:
                    self._channels = Channels(alive)
                except Exception as error:  # they are experimental, and calls do as well
                    logger.warning("no channels to the workers, which makes each call slower: %s", error)
        return self._channels is not None

    def _drop_channels(self) -> None:
        channels, self._channels, self._calls = self._channels, None, 0
        if channels is not None:
            channels.close()

    def require(self, numbers: Iterable[int]) -> None:
        """Raise WorkerLost if one of these workers is lost."""
        lost = tuple(n for n in numbers if n in self._reasons and n not in self._filling)
        if lost:
            raise WorkerLost(
                "; ".join(f"{self.describe(number)} {self._reasons[number]}" for number in lost), lost
            )

    # Loss and replacement

    def give_up(self, reasons: Mapping[int, str]) -> None:
        """Count workers as lost, stop what is left of them, and tell all that had something there."""
        with self._lock:
            new = {number: why for number, why in reasons.items() if number not in self._reasons}
            again = {number: why for number, why in reasons.items() if number in self._filling}
            self._filling -= again.keys()
            self._reasons.update(new | again)
            for number in new | again:
                self._waiting[number], self._waiting_bytes[number] = [], 0
                self._garbage[number].clear()
                with contextlib.suppress(Exception):  # it may be gone, with its machine
                    ray.kill(self._actors[number], no_restart=True)
        if new or again:
            self._drop_channels()  # after that: a worker that hangs would be waited for
            for holder in list(self._holders):
                holder.lose(new)

    def replace(self) -> None:
        """Start a process in the place of each lost worker, and give them what others still have of their blocks."""
        lost = self.lost
        if not lost:
            return
        if not self._stop.alive:
            raise RuntimeError("workers: they were stopped")
        self._begin(lost)
        self._drop_channels()
        with self._lock:
            for number in lost:
                self._sent[number] = 0
                self._incarnations[number] += 1
            self._filling.update(lost)
        try:
            for holder in list(self._holders):
                holder.refill(lost)
        except BaseException as error:
            self.give_up(dict.fromkeys(lost, f"was not filled again: {type(error).__name__}"))
            raise
        with self._lock:
            self._filling.clear()
            for number in lost:
                del self._reasons[number]
        for holder in list(self._holders):
            holder.reread()

    def _begin(self, numbers: Sequence[int]) -> None:
        """Start processes, on processors of their own, and check that they mean the same by all that is sent."""
        for number in numbers:
            resources = {"num_cpus": 0, **self._resources[number]}
            known = {
                name: resources.pop(name) for name in ("num_cpus", "num_gpus", "memory") if name in resources
            }
            actor = ray.remote(Worker).options(scheduling_strategy="SPREAD", resources=resources, **known)
            self._actors[number] = actor.remote()
        found = self._answers(numbers, [self._actors[number].hello.remote() for number in numbers])
        mine = Identity.of_this_process()
        for number, identity in zip(numbers, found, strict=True):
            self._identities[number] = identity
            self._cpus_of_node[identity.node] = identity.cpus
            for name in ("version", "byteorder"):
                want, have = getattr(mine, name), getattr(identity, name)
                if want != have:
                    raise RuntimeError(
                        f"{self.describe(number)}: {name}: expected {want}, as here; it has {have}"
                    )
        cpus = {number: self._cpus(number) for number in numbers}
        self._answers(
            numbers,
            [self._actors[number].begin.remote(cpus[number], self._backend_name) for number in numbers],
        )
        for number, identity in zip(numbers, found, strict=True):
            self._identities[number] = replace(identity, cpus=cpus[number])

    def _answers(self, numbers: Sequence[int], references: list[Any]) -> list[Any]:
        _, late = ray.wait(references, num_returns=len(references), timeout=START_SECONDS)
        if late:
            raise RuntimeError(
                f"workers: {len(late)} of {len(references)} did not start within {START_SECONDS:g} s; Ray has "
                f"{ray.cluster_resources()}, of which {ray.available_resources()} are free"
            )
        try:
            return list(ray.get(references))
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"workers: one does not start: {error.cause}") from error.cause
        except ray.exceptions.RayError as error:  # kvnumba cannot be imported there, say
            reason = str(error).strip().rpartition("\n")[2]
            raise RuntimeError(f"workers: one does not start: {reason}") from error

    def _cpus(self, number: int) -> tuple[int, ...]:
        """The processors of a worker: so many as it was given, or an equal share of what its machine has."""
        identity = self.identity(number)
        cpus = self._cpus_of_node[identity.node]
        beside = [n for n, other in enumerate(self._identities) if other and other.node == identity.node]
        sizes = [
            int(self._resources[n].get("num_cpus", 0)) or max(1, len(cpus) // len(beside)) for n in beside
        ]
        first = sum(sizes[: beside.index(number)])
        mine = sizes[beside.index(number)]
        if first + mine <= len(cpus):
            return cpus[first : first + mine]
        return tuple(cpus[(first + n) % len(cpus)] for n in range(min(mine, len(cpus)))) if cpus else ()


def _connect() -> None:
    """See to it that there is a Ray."""
    global _open_groups, _started_here
    with _starting:
        if not ray.is_initialized():
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False, logging_level="ERROR")
            else:
                ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            _started_here = True
        _open_groups += _started_here


def _stop(actors: list[Any]) -> None:
    global _open_groups, _started_here
    with _starting:
        for actor in actors:
            if actor is not None and ray.is_initialized():
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)
        _open_groups -= _started_here
        if _started_here and not _open_groups:
            _started_here = False
            ray.shutdown()
