"""The errors that are the library's own. Bad arguments raise ``ValueError`` or ``TypeError``."""


class CacheFull(RuntimeError):
    """A cache has no room for what was asked; it is as it was before the call."""


class WorkerLost(RuntimeError):
    """Workers that hold parts of a cache died, did not answer or failed, and sequences had blocks there.

    Attributes
    ----------
    workers : tuple of int
    seq_ids : tuple of int
        Sequences that can only be finished, or brought back from a file.
    """

    def __init__(self, message: str, workers: tuple[int, ...] = (), seq_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.workers = workers
        self.seq_ids = seq_ids


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
