"""The only place that imports `numba.cuda`: how kernels are compiled and launched, each option said once."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

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

_KINDS = {"q": numba.int64, "i": numba.int32, "f": numba.float32}
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
def num_multiprocessors() -> int:
    """Of the device; the simulator has a few, so that work is split."""
    return 2 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


class Kernel:
    """A function that runs on the device, of numbers only: addresses ``q``, integers ``i`` and floats ``f``.

    Launched through the driver with one packed buffer of arguments: Numba's own launch looks at every argument's
    type in every call and takes ten times as long.

    Parameters
    ----------
    function : callable
    kinds : str
        A letter for each parameter, as in `struct`, the widest first.
    threads : int
        Of a block.
    blocks_per_sm : int
        Blocks that a multiprocessor is to have room for: bounds the registers of a thread.
    """

    def __init__(
        self, function: Callable[..., Any], kinds: str, threads: int = THREADS, blocks_per_sm: int = 1
    ) -> None:
        self.function = function
        self.kinds = tuple(_KINDS[letter] for letter in kinds)
        self.threads = threads
        self.blocks_per_sm = blocks_per_sm
        self._format = "=" + kinds
        self._size = ctypes.c_size_t(struct.calcsize(self._format))
        self._handle: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is compiled with."""
        return {"launch_bounds": (self.threads, self.blocks_per_sm)}

    def launch(self, grid: tuple[int, int], shared_bytes: int, stream: int, *arguments: Any) -> None:
        """Run blocks; returns before they have run, except in the simulator."""
        if SIMULATED:
            _simulate(self.function, grid, shared_bytes, arguments)
            return
        self.compile()
        packed = struct.pack(self._format, *arguments)
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END
        extra = (ctypes.c_void_p * 5)(
            1, ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p), 2, ctypes.addressof(self._size), 0
        )
        driver_call(
            "cuLaunchKernel",
            self._handle,
            *grid,
            1,
            self.threads,
            1,
            1,
            shared_bytes,
            stream,
            0,
            ctypes.addressof(extra),
        )

    def compile(self) -> None:
        """Compile and load, unless that is done."""
        if self._handle is not None or SIMULATED:
            return
        with _COMPILING:
            dispatcher = cuda.jit(numba.void(*self.kinds), **self.options)(self.function)
            self._compiled = next(iter(dispatcher.overloads.values()))  # it owns the module
            self._handle = int(self._compiled._codelibrary.get_cufunc().handle)


def _simulate(
    function: Callable[..., Any], grid: tuple[int, int], shared_bytes: int, arguments: tuple[Any, ...]
) -> None:
    """The simulator waits for its threads in a busy loop: let them interrupt it often."""
    with _ONE_AT_A_TIME:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            cuda.jit(_Quiet(function))[grid, THREADS, 0, shared_bytes](
                *(np.float32(x) if isinstance(x, float) else x for x in arguments)
            )
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
        error = ERRORS.get(code.name.removeprefix("CUDA_ERROR_"), RuntimeError)
        raise error(f"{name}: {code.name}")
    return values[0] if values else None


ERRORS: dict[str, type[Exception]] = {
    "OUT_OF_MEMORY":       MemoryError,
    "NO_DEVICE":           BackendUnavailable,
    "DEVICE_UNAVAILABLE":  BackendUnavailable,
    "ECC_UNCORRECTABLE":   BackendUnavailable,
    "DEINITIALIZED":       BackendUnavailable,
}  # fmt: skip
