"""Reads Hugging Face checkpoint folders: config.json and safetensors files, one or sharded with an index."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvnumba.formats import bfloat16_to_float

BUNDLED_MODEL = Path(__file__).parent / "data"
"""The folder of the small byte-level model that comes with the package."""

CALIBRATION = "calibration.npz"
"""The file of a checkpoint folder that holds a calibration of its model, where there is one."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F64":  np.dtype("<f8"),
    "F32":  np.dtype("<f4"),
    "F16":  np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a checkpoint folder with a config.json")
    with path.open(encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object; got a {type(config).__name__}")
    return config


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint folder by name, float32, each read from its file when it is asked for.

    Parameters
    ----------
    folder : Path
        Holds model.safetensors, or shards and model.safetensors.index.json.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                paths = [folder / name for name in sorted(set(weight_map.values()))]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: expected a JSON object with a weight_map") from error
        else:
            paths = [folder / "model.safetensors"]
        self._where: dict[str, tuple[mmap.mmap, int, dict[str, Any], Path]] = {}
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{folder}: expected {path.name} in it")
            data, start, header = _open(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    self._where[name] = (data, start, entry, path)

    def __getitem__(self, name: str) -> np.ndarray:
        data, start, entry, path = self._where[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or start + end > len(data):
            raise ValueError(f"{path}: {name} is cut short or its header is wrong")
        array = np.frombuffer(data, dtype, count=math.prod(shape), offset=start + begin).reshape(shape)
        if entry["dtype"] == "BF16":
            return bfloat16_to_float(array)
        return array.astype(np.float32)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _open(path: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """The file's memory, where its tensors begin, and its header.

    The layout (huggingface/safetensors, "Format"): a little-endian uint64 n, n bytes of JSON, the tensors.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
    return data, 8 + length, header
