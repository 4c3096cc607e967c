"""Calibration: shifts and scales of a model's key channels, measured on a text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kvnumba import arguments

MAGIC = b"PK\x03\x04"
"""Of a zip file, which is what an npz is."""
VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Shift m and scale s of every key channel of a model's layers: keys are stored as ``(k - m) / s``.

    `kvnumba.calibrate` makes one from keys and queries, a model's own `calibrate` from a text.

    Attributes
    ----------
    shifts, scales : tuple of (H, D) float32
        Of each layer; layers may differ in H and D. Scales are positive.
    num_tokens : int
        Tokens from which they were measured.
    source : str
        What these tokens were; may be empty.

    Raises
    ------
    ValueError, TypeError
        It is made by hand of something else; the message names it.
    """

    shifts: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]
    num_tokens: int
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("shifts", "scales"):
            with np.errstate(over="ignore"):  # beyond float32's range is infinity, which is refused
                layers = [np.array(array, np.float32, order="C") for array in getattr(self, name)]
            for i, array in enumerate(layers):
                arguments.check_shape(f"{name}[{i}]", array, (None, None), "H D")
                if not np.isfinite(array).all():
                    raise ValueError(f"{name}[{i}]: expected finite numbers in float32")
                if name == "scales" and not (array > 0).all():
                    raise ValueError(f"scales[{i}]: expected numbers above 0; got {array.min()}")
                array.flags.writeable = False  # a cache that was made with it relies on it
            object.__setattr__(self, name, tuple(layers))
        shapes = [array.shape for array in self.shifts]
        if not shapes:
            raise ValueError("shifts: expected at least one layer; got none")
        if [array.shape for array in self.scales] != shapes:
            raise ValueError(
                f"scales: expected the shapes of the shifts, {shapes}; got {[array.shape for array in self.scales]}"
            )
        object.__setattr__(self, "num_tokens", arguments.integer("num_tokens", self.num_tokens, minimum=1))
        if not isinstance(self.source, str):
            raise TypeError(f"source: expected a str; got a {type(self.source).__name__}")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file is damaged, of another version, or something else.
        OSError
            It cannot be read.
        """
        path = Path(path)
        data = path.read_bytes()
        if not data.startswith(MAGIC):
            raise ValueError(f"{path}: not a file that a calibration was saved to")
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception as error:  # a damaged archive raises whatever it leads zipfile to
            raise ValueError(f"{path}: damaged: {error}") from error
        if "version" not in arrays:
            raise ValueError(f"{path}: not a file that a calibration was saved to")
        if arrays["version"].shape or arrays["version"] != VERSION:
            raise ValueError(f"{path}: version: expected {VERSION}; the file has {arrays['version']}")
        try:
            layers = range(int(arrays["num_layers"]))
            return cls(
                tuple(arrays[f"shifts.{i}"] for i in layers),
                tuple(arrays[f"scales.{i}"] for i in layers),
                int(arrays["num_tokens"]),
                str(arrays["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it to a file, an npz without pickles."""
        layers = {f"shifts.{i}": array for i, array in enumerate(self.shifts)}
        layers.update((f"scales.{i}", array) for i, array in enumerate(self.scales))
        data = io.BytesIO()
        np.savez(
            data,
            allow_pickle=False,
            version=VERSION,
            num_layers=len(self.shifts),
            num_tokens=self.num_tokens,
            source=self.source,
            **layers,
        )
        Path(path).write_bytes(data.getvalue())

    def select(self, layers: Iterable[int]) -> Calibration:
        """The calibration of some of the layers, in this order."""
        indices = [arguments.layer_index(layer, len(self.shifts)) for layer in layers]
        return Calibration(
            tuple(self.shifts[i] for i in indices),
            tuple(self.scales[i] for i in indices),
            self.num_tokens,
            self.source,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that tell calibrations apart."""
        digest = hashlib.sha256()
        for array in (*self.shifts, *self.scales):
            digest.update(array.tobytes())
        return digest.hexdigest()[:8]

    def __repr__(self) -> str:
        shapes = sorted({array.shape for array in self.shifts})
        source = f" of {self.source}" if self.source else ""
        return (
            f"Calibration({self.fingerprint}: {len(self.shifts)} layers of (H, D) = "
            f"{', '.join(map(str, shapes))}, {self.num_tokens:,} tokens{source})"
        )
