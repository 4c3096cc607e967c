"""The only place that imports `numba.cuda`: how kernels are compiled and launched, each option said once."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import struct
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import numba
import numpy as np
from numba import cuda as cuda  # for the other files of this folder

from kvnumba.errors import BackendUnavailable

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""Whether numba's simulator takes the place of a device; decided by NUMBA_ENABLE_CUDASIM before Numba's import."""

if not SIMULATED and importlib.util.find_spec("numba_cuda") is None:  # Numba alone has the simulator only
    raise BackendUnavailable(
        "numba-cuda is not installed: pip install 'kvnumba[cuda13]' or 'kvnumba[cuda12]'"
    )

WARP = 1 if SIMULATED else 32
"""Threads that exchange values without shared memory; the simulator has no such exchange."""

THREADS = 4 if SIMULATED else 128
"""Threads of a block. Each is a thread of the operating system in the simulator."""

Long = Annotated[int, 64]
"""Of a kernel's parameter: an integer of 64 bits, such as an address; plain ``int`` has 32, ``float`` too."""

_KINDS = {Long: (numba.int64, "q"), int: (numba.int32, "i"), float: (numba.float32, "f")}
int32, int64 = (int, int) if SIMULATED else (numba.int32, numba.int64)
"""Conversions in kernels; the simulator computes with Python's integers."""

_COMPILING = threading.RLock()
_ONE_AT_A_TIME = threading.Lock()  # kernels in the simulator, which knows no other way


def device(function: Callable[..., Any]) -> Any:
    """A piece of a kernel, compiled into it."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def why_unavailable() -> str | None:
    """Why kernels cannot run here; None if they can."""
    if SIMULATED:
        return None
    try:
        cuda.current_context()
        capability = cuda.get_current_device().compute_capability
    except Exception as error:  # of many kinds, from the driver's absence to a device that is lost
        return f"no CUDA device answers: {' '.join(str(error).split())}"
    if capability < (8, 0):
        return f"a device of compute capability 8.0 or more is needed; this one has {capability}"
    return None


def device_name() -> str:
    """What to call the device that kernels run on."""
    if SIMULATED:
        return "numba's simulator"
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def device_number() -> int:
    """Of the device that kernels run on, as the driver counts them."""
    return 0 if SIMULATED else int(cuda.get_current_device().id)


@functools.cache
def capability() -> tuple[int, int]:
    """The compute capability of the device that kernels run on."""
    return (8, 0) if SIMULATED else tuple(cuda.get_current_device().compute_capability)


@functools.cache
def num_multiprocessors() -> int:
    """Of the device; the simulator has a few, so that work is split."""
    return 2 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


class Kernel:
    """A function that runs on the device, and whose arguments are named tuples of numbers.

    Parameters
    ----------
    function : callable
    parameters : tuple of classes of named tuples
        Annotated with `Long`, ``int`` or ``float``. The first half of them, with `Long` only, differ from call to call.
    threads : int
        Of a block.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: tuple[type, ...], threads: int = THREADS
    ) -> None:
        self.function = function
        self.parameters = parameters
        self.threads = threads
        self.handle: Any = None

    @property
    def signature(self) -> tuple[Any, ...]:
        """The parameters' types as Numba has them."""
        kinds = [[kind for kind, _ in _letters(each)] for each in self.parameters]
        return tuple(
            numba.types.NamedUniTuple(found[0], len(found), each)
            if len(set(found)) == 1
            else numba.types.NamedTuple(found, each)
            for found, each in zip(kinds, self.parameters, strict=True)
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is compiled with."""
        return {"launch_bounds": (self.threads, 1)}

    def compile(self) -> None:
        """Compile and load, unless that is done."""
        if self.handle is not None or SIMULATED:
            return
        with _COMPILING:
            dispatcher = cuda.jit(numba.void(*self.signature), **self.options)(self.function)
            self._compiled = next(iter(dispatcher.overloads.values()))  # it owns the module
            self.handle = int(self._compiled._codelibrary.get_cufunc().handle)


class Launch:
    """A kernel with its grid and the second half of its arguments, packed once; a call gives the first.

    Launched through the driver with one packed buffer of arguments: Numba's own launch looks at every argument's
    type in every call and takes ten times as long.

    Parameters
    ----------
    kernel : Kernel
    grid : (int, int)
        Blocks along x and y.
    shared_bytes : int
        Of a block.
    *shapes : named tuples
        The second half of the kernel's arguments.
    """

    def __init__(self, kernel: Kernel, grid: tuple[int, int], shared_bytes: int, *shapes: Any) -> None:
        self._kernel = kernel
        self._grid = grid
        self._shared_bytes = shared_bytes
        self._shapes = shapes
        letters = ["".join(letter for _, letter in _letters(each)) for each in kernel.parameters]
        first, second = ("".join(half) for half in (letters[: -len(shapes)], letters[-len(shapes) :]))
        self._first = struct.Struct(first)  # in native alignment, which is the device's too
        self._rest = struct.pack(second, *itertools.chain(*shapes))
        self._end = self._first.size + len(self._rest)

    def prepare(self) -> None:
        """Compile the kernel."""
        self._kernel.compile()

    def __call__(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Run blocks; returns before they have run, except in the simulator."""
        kernel = self._kernel
        if SIMULATED:
            given = iter(addresses)
            calls = [
                make(*itertools.islice(given, len(_letters(make))))
                for make in kernel.parameters[: -len(self._shapes)]
            ]
            _simulate(kernel.function, self._grid, self._shared_bytes, (*calls, *self._shapes))
            return
        packed = _packed
        self._first.pack_into(packed.buffer, 0, *addresses)
        packed.view[self._first.size : self._end] = self._rest
        packed.size.value = self._end
        _start(self, stream, packed.extra)

    def bind(self, addresses: tuple[int, ...]) -> BoundLaunch:
        """The same for one call's addresses, of which the first two may differ each time."""
        return BoundLaunch(self, self._first.pack(*addresses) + self._rest, addresses[2:])


class BoundLaunch:
    """A launch with all its arguments packed in memory of its own: a call changes the first two addresses only.

    Not for several threads at once.
    """

    def __init__(self, launch: Launch, packed: bytes, addresses: tuple[int, ...]) -> None:
        self._launch = launch
        self._addresses = addresses
        self._arguments = _Arguments(packed)

    def __call__(self, stream: int, first: int, second: int) -> None:
        """Run blocks; returns before they have run, except in the simulator."""
        launch = self._launch
        if SIMULATED:
            launch(stream, (first, second, *self._addresses))
            return
        _TWO.pack_into(self._arguments.buffer, 0, first, second)
        _start(launch, stream, self._arguments.extra)


def _start(launch: Launch, stream: int, extra: int) -> None:
    """Run a kernel with packed arguments."""
    (x, y), kernel = launch._grid, launch._kernel
    if kernel.handle is None:
        kernel.compile()
    (code,) = _driver().cuLaunchKernel(
        kernel.handle, x, y, 1, kernel.threads, 1, 1, launch._shared_bytes, stream, 0, extra
    )
    if code != 0:
        _raise("cuLaunchKernel", code)


_TWO = struct.Struct("qq")


class _Arguments:
    """Packed arguments of a launch, which the driver copies, and how the driver is told where they are."""

    def __init__(self, packed: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(packed, len(packed))
        self.size = ctypes.c_size_t(len(packed))
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END
        self._extra = (ctypes.c_void_p * 5)(
            1, ctypes.addressof(self.buffer), 2, ctypes.addressof(self.size), 0
        )
        self.extra = ctypes.addressof(self._extra)


class _Packed(threading.local):
    """Room for the arguments of any launch of a thread."""

    def __init__(self) -> None:
        arguments = _Arguments(bytes(512))
        self.buffer, self.size, self.extra = arguments.buffer, arguments.size, arguments.extra
        self.view = memoryview(self.buffer).cast("B")
        self._kept = arguments  # what `extra` is the address of


_packed = _Packed()


@functools.cache
def _letters(parameters: type) -> list[tuple[Any, str]]:
    """Numba's type and the letter in `struct` of each of a named tuple's members."""
    return [_KINDS[kind] for kind in get_type_hints(parameters, include_extras=True).values()]


def _simulate(
    function: Callable[..., Any], grid: tuple[int, int], shared_bytes: int, arguments: tuple[Any, ...]
) -> None:
    """The simulator waits for its threads in a busy loop: let them interrupt it often."""
    with _ONE_AT_A_TIME:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            cuda.jit(_Quiet(function))[grid, THREADS, 0, shared_bytes](*arguments)
        finally:
            sys.setswitchinterval(interval)


class _Quiet:
    """A kernel whose floating-point errors are silent in every thread, as they are on hardware."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.__globals__ = function.__globals__  # where the simulator puts itself in the place of `cuda`

    def __call__(self, *arguments: Any) -> None:
        with np.errstate(all="ignore"):
            self.__wrapped__(*arguments)  # type: ignore[attr-defined]


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver  # a dependency of numba-cuda, which the simulator does without

    return driver


def driver_call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA driver.

    Raises
    ------
    MemoryError, BackendUnavailable, RuntimeError
        The device has no memory left, is gone, or anything else, by the driver's own name of it.
    """
    code, *values = getattr(_driver(), name)(*arguments)
    if code != 0:
        _raise(name, code)
    return values[0] if values else None


def _raise(name: str, code: Any) -> None:
    error = ERRORS.get(code.name.removeprefix("CUDA_ERROR_"), RuntimeError)
    raise error(f"{name}: {code.name}")


ERRORS: dict[str, type[Exception]] = {
    "OUT_OF_MEMORY":       MemoryError,
    "NO_DEVICE":           BackendUnavailable,
    "DEVICE_UNAVAILABLE":  BackendUnavailable,
    "ECC_UNCORRECTABLE":   BackendUnavailable,
    "DEINITIALIZED":       BackendUnavailable,
}  # fmt: skip
