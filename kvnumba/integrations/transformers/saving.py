"""A `KVNumbaCache` in a folder, and back.

The file ``cache.json`` names the others and is replaced last, so a folder is as it was, or has all that is new. There
is a file for the pool of each group of layers, as `PagedKVCache.save` writes it, and one for what transformers' own
layers hold: in its header the layers' attributes, and after it the bytes of their tensors.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvnumba.backends.registry import get_backend
from kvnumba.caches.snapshot import check_payload, clear_unfinished, read_header, replacing, write_file
from kvnumba.integrations.transformers import foreign
from kvnumba.integrations.transformers.storage import LayerGroup

MANIFEST = "cache.json"
VERSION = 1
FILE = r"(?:\d+|states)\.[0-9a-f]{32}\.kv"


def save(
    folder: Path, groups: Mapping[Any, LayerGroup], layers: Sequence[Any], model: str, fingerprint: str
) -> None:
    """Write groups, and layers of transformers, to a folder, which is made where it does not exist.

    Parameters
    ----------
    folder : path
    groups : mapping
    layers : sequence
    model : str
        What a config calls models of this kind.
    fingerprint : str
        Says what computed the contents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    manifest: dict[str, Any] = {"version": VERSION, "groups": []}
    for n, group in enumerate(groups.values()):
        entry: dict[str, Any] = {"ids": group.ids, "length": group.complete_length}
        if group.started:
            entry.update(
                file=f"{n}.{token}.kv",
                num_kv_heads=group.pool.num_kv_heads,
                head_dim=group.pool.head_dim,
                value_head_dim=group.pool.value_head_dim,
                dtypes=[group.pool.key_format, group.pool.value_format],
                padding=[0] * len(group.ids) if group.padding is None else group.padding.tolist(),
                on_host=group.pool.device is None,
            )
            group.pool.save(folder / entry["file"], fingerprint=fingerprint)
        manifest["groups"].append(entry)
    if layers:
        manifest["states"] = f"states.{token}.kv"
        _save_layers(folder / manifest["states"], layers, _identity(layers, model, fingerprint))
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest).encode())
    named = {manifest.get("states"), *(entry.get("file") for entry in manifest["groups"])}
    for old in folder.iterdir():
        if re.fullmatch(FILE, old.name) and old.name not in named:
            old.unlink()
    clear_unfinished(folder, FILE)


def load(
    folder: Path, groups: Mapping[Any, LayerGroup], layers: Sequence[Any], model: str, fingerprint: str
) -> tuple[list[LayerGroup], list[Any]]:
    """New groups and layers like these, with the contents that a folder has of them."""
    path = folder / MANIFEST
    damaged = f"{path}: damaged, or not written by KVNumbaCache.save"
    try:
        manifest = json.loads(path.read_bytes())
        version, entries, states = manifest["version"], manifest["groups"], manifest.get("states")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(damaged) from error
    if version != VERSION:
        raise ValueError(f"{path}: version: expected {VERSION}; the file has {version!r}")
    if len(entries) != len(groups):
        raise ValueError(f"{folder}: expected {len(groups)} kinds of layers; it has {len(entries)}")
    if bool(states) != bool(layers):
        raise ValueError(
            f"{folder}: expected {'states' if layers else 'no states'} of layers that transformers keeps; "
            f"it has {'some' if states else 'none'}"
        )
    loaded = _load_layers(folder / states, layers, _identity(layers, model, fingerprint)) if states else []
    try:
        return [
            _load_group(folder, entry, group, fingerprint)
            for entry, group in zip(entries, groups.values(), strict=True)
        ], loaded
    except KeyError as error:
        raise ValueError(damaged) from error


def _load_group(folder: Path, entry: dict[str, Any], group: LayerGroup, fingerprint: str) -> LayerGroup:
    """A group like this one, with the contents that a folder has of it."""
    new = LayerGroup(group.settings, group.layers, group.share, group.sliding_window)
    if "file" not in entry:
        return new
    head_dims = (entry["head_dim"], entry.get("value_head_dim", entry["head_dim"]))  # once there was only one
    backend = get_backend(group.settings.backend, on_host=entry.get("on_host", True))
    new.adopt(new.allocate(entry["num_kv_heads"], head_dims, tuple(entry["dtypes"]), backend))
    ids = new.pool.load(folder / entry["file"], fingerprint=fingerprint)
    own = [ids.pop(seq_id) for seq_id in entry["ids"]]
    for seq_id in ids.values():  # of copies of the cache
        new.pool.finish_sequence(seq_id)
    padding = np.array(entry["padding"], np.int64)
    new.restore(own, entry["length"], padding if padding.any() else None)
    return new


def _identity(layers: Iterable[Any], model: str, fingerprint: str) -> dict[str, Any]:
    """Header fields that must equal those of the cache that loads the file."""
    return {
        "version": VERSION,
        "byteorder": sys.byteorder,
        "model": model,
        "layers": [type(layer).__name__ for layer in layers],
        "fingerprint": fingerprint,
    }


def _save_layers(path: Path, layers: Sequence[Any], identity: dict[str, Any]) -> None:
    tensors: list[torch.Tensor] = []
    states = [
        {
            name: _encode(value, tensors, f"{type(layer).__name__}.{name}")
            for name, value in vars(layer).items()
        }
        for layer in layers
    ]
    header = {
        **identity,
        "states": states,
        "tensors": [[_name(x.dtype), list(x.shape), str(x.device)] for x in tensors],
    }
    write_file(path, header, (_bytes(x.detach().cpu().contiguous()).tobytes() for x in tensors))


def _load_layers(path: Path, layers: Sequence[Any], identity: dict[str, Any]) -> list[Any]:
    """Layers like these, with the contents that a file has of them."""
    with path.open("rb") as file:
        header = read_header(file, path, identity)
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            for dtype, shape, _ in header["tensors"]
        ]
        begin = file.tell()
        check_payload(file, path, sum(x.nbytes for x in tensors))
        file.seek(begin)
        for x in tensors:
            _bytes(x)[:] = np.frombuffer(file.read(x.nbytes), np.uint8)
    there = [x.to(_device(device)) for x, (_, _, device) in zip(tensors, header["tensors"], strict=True)]
    loaded = []
    for layer, state in zip(layers, header["states"], strict=True):
        loaded.append(foreign.copied(layer))
        vars(loaded[-1]).update({name: _decode(value, there) for name, value in state.items()})
    return loaded


def _encode(value: Any, tensors: list[torch.Tensor], what: str) -> Any:
    """What JSON knows, for an attribute of a layer; its tensors are added to the list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) is dict:
        return {"dict": [[key, _encode(item, tensors, what)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors, what) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"save: {what} is a {type(value).__name__}, which cannot be written to a file")


def _decode(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The inverse of `_encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return _device(content)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _device(name: str) -> torch.device:
    """The device of this name; if it is not there another one of its type, or the CPU."""
    for candidate in (name, torch.device(name).type):
        try:
            return torch.empty(0, device=candidate).device
        except (RuntimeError, AssertionError):  # the latter where torch was built without it
            pass
    return torch.device("cpu")
