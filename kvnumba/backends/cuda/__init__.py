"""NVIDIA GPUs through numba-CUDA: the room is booked, its kernels are not written yet."""

from kvnumba.errors import BackendUnavailable


class CudaBackend:
    """Says why it cannot run."""

    def __init__(self) -> None:
        raise BackendUnavailable("this version of kvnumba has no CUDA kernels yet")
