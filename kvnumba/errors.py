"""The errors that are the library's own. Bad arguments raise ``ValueError`` or ``TypeError``."""


class CacheFull(RuntimeError):
    """A cache has no room for what was asked; it is as it was before the call."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
