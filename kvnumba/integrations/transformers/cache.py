"""A `transformers.Cache` of kvnumba's paged storage."""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from kvnumba.backends.registry import chosen_name, get_backend
from kvnumba.caches.snapshot import clear_unfinished, replacing
from kvnumba.calibration import Calibration
from kvnumba.integrations.transformers.deferred import Deferred
from kvnumba.integrations.transformers.foreign import become, copied, make_layer
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.storage import LayerGroup, Settings
from kvnumba.options import arithmetic_name
from kvnumba.recipes import with_recipe
from kvnumba.storage import Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

NAME = "kvnumba"
"""Of the attention implementation."""

MANIFEST = "cache.json"
VERSION = 1
GROUP_FILE = r"\d+\.[0-9a-f]{32}\.kv"
KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Of layers whose keys and values are kept here. All others are kept by transformers' own layers."""
HYBRID_KINDS = ("hybrid", "hybrid_sliding")
"""Of layers that have keys and values, which are kept here, and states, which are kept by transformers."""


class Appended:
    """What one `update` appended to a layer. The keys and values that it returns lead the attention function here.

    Parameters
    ----------
    group, index
        The layer.
    keys, values : (B, H, q, D) and (B, H, q, Dv)
        The new ones.
    """

    def __init__(self, group: LayerGroup, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._group = group
        self._index = index
        self._new = keys, values
        self._forward = group.append(index, keys, values)
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def fits(self, mask: CausalMask) -> bool:
        """Whether `attend` shows what the mask shows; raises where nothing can."""
        self._require_latest()
        return self._group.fits(self._index, mask)

    def attend(
        self,
        query: torch.Tensor,
        mask: CausalMask,
        sm_scale: float | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of queries (B, Hq, q, D), out of the storage: (B, q, Hq, Dv); 0 where the query is padding."""
        if self._index == 0 and mask.padding is not None:
            self._group.leave_out(mask.padding, *self._new)
        return self._group.attend(self._index, query, mask.window_left, sm_scale, soft_cap, sinks)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that the new tokens see, in the dtype of the new keys; 0 where padding was."""
        if self._dense is None:
            self._require_latest()
            self._dense = self._group.dense(self._index, self._new[0])
        return self._dense

    def deferred(self) -> tuple[DeferredKeys, DeferredValues]:
        """`dense`, computed only if somebody needs it."""
        keys, values = self._new
        batch, heads, _, head_dim = keys.shape
        dtype, device, visible = keys.dtype, keys.device, self._forward.visible
        return (
            DeferredKeys((batch, heads, visible, head_dim), dtype, device, self),
            DeferredValues((batch, heads, visible, values.shape[3]), dtype, device, self),
        )

    def _require_latest(self) -> None:
        if self._group.forward is not self._forward or not self._forward.step.is_latest():
            raise ValueError("key: these keys are not those of the latest update of their KVNumbaCache")


class DeferredKeys(Deferred):
    """All keys that the new tokens of a layer see, (B, H, k, D)."""

    source: Appended

    def compute(self) -> torch.Tensor:
        """The keys, read from the storage."""
        return self.source.dense()[0]


class DeferredValues(Deferred):
    """All values that the new tokens of a layer see, (B, H, k, Dv)."""

    source: Appended

    def compute(self) -> torch.Tensor:
        """The values, read from the storage."""
        return self.source.dense()[1]


class KVNumbaLayer(CacheLayerMixin):
    """The keys and values of one model layer, in a group with those of its kind.

    What concerns whole sequences (crop, reorder, reset) is done for the group, by `KVNumbaCache`.
    """

    is_croppable = True

    def __init__(self, config: PreTrainedConfig, group: LayerGroup, index: int) -> None:
        super().__init__()
        self._config = config
        self.group = group
        self.index = index
        self.sliding_window = group.sliding_window
        self.is_sliding = group.sliding_window is not None

    @property
    def is_initialized(self) -> bool:
        """Whether there is a pool."""
        return self.group.started

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:  # the base class sets it
        pass

    @property
    def record_past(self) -> bool:
        """Whether sequences that begin from here on keep what falls out of their window."""
        return self.group.record_past

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the pool, for tensors of this shape (B, H, any, D), dtype and device."""
        if not self.is_initialized:
            self.group.start(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, keys (B, H, q, D) and values (B, H, q, Dv).

        Returns
        -------
        keys, values : (B, H, k, D) and (B, H, k, Dv)
            All that the new tokens see, in the dtype of the new ones: `Deferred` with the attention
            implementation "kvnumba", dense with any other.
        """
        if self.index == 0:  # the same for all layers of a pass: a config takes its time to answer
            self.group.deferring = self._config._attn_implementation == NAME
        appended = Appended(self.group, self.index, key_states, value_states)
        return appended.deferred() if self.group.deferring else appended.dense()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an `update` of so many tokens is going to return, and the position of the first."""
        length = self.get_seq_length()
        earlier = length if self.sliding_window is None else min(length, self.sliding_window - 1)
        return earlier + query_length, length - earlier

    def get_seq_length(self) -> int:
        """Tokens of every sequence, padding included."""
        return self.group.length(self.index)

    def get_max_length(self) -> int:
        """-1: there is no maximum; of a sliding layer, its window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def _refuse(self, *args: Any) -> None:
        raise NotImplementedError("call this of the KVNumbaCache: layers of a kind share their sequences")

    crop = reset = reorder_cache = batch_select_indices = batch_repeat_interleave = offload = prefetch = (
        _refuse
    )

    def __repr__(self) -> str:
        window = "" if self.sliding_window is None else f", sliding_window={self.sliding_window}"
        return f"KVNumbaLayer(tokens={self.get_seq_length()}{window})"


@LinearAttentionCacheLayerMixin.register
class HybridLayer(KVNumbaLayer):
    """The keys and values of a layer that has states too, which are kept by a layer of transformers.

    Models find the states as attributes of this one.
    """

    def __init__(
        self, config: PreTrainedConfig, group: LayerGroup, index: int, states: LinearAttentionLayer
    ) -> None:
        super().__init__(config, group, index)
        self.states = states

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can put the states back."""
        return self.states.is_croppable

    def __getattr__(self, name: str) -> Any:
        if name == "states":  # not there yet
            raise AttributeError(name)
        return getattr(self.states, name)


class KVNumbaCache(Cache):
    """The cache of a Hugging Face model, in kvnumba's formats and on its backends.

    With ``model.set_attn_implementation("kvnumba")`` attention is computed straight out of the storage. With any
    other implementation the cache works too, and gives back dense keys and values at each step. ``copy.deepcopy``
    shares all blocks with the copy until one of the two writes to them.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config`` itself: the cache reads which attention implementation is set.
    key_format, value_format : {"float32", "float16", "bfloat16", "fp8_e4m3", "int8", "int4"}, optional
        Default: the model's dtype.
    arithmetic : {"float32", "bfloat16"}, optional
        In which queries, keys and values are multiplied, as in `kvnumba.options.ScoringOptions`: "bfloat16" makes
        prompts faster on some processors, at its precision. Default: "bfloat16" for models in bfloat16, otherwise what
        is fastest within the rounding of the storage format.
    backend : {"numpy", "cpu", "cuda", "auto"}, optional
        Default: `kvnumba.use_backend`, then ``KVNUMBA_BACKEND``, then "auto": "cuda" for tensors on a GPU, else "cpu".
    **options
        Group size and dtype of scales, rotation, calibration, tokens kept in float: see `kvnumba.LayoutOptions`. int4
        here means rotated, with float16 scales and the newest 128 tokens in float, unless options say otherwise; give
        it what `calibrate` measured for the model to have it calibrated too. Layers with a narrower sliding window
        keep that much in float.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above, or the model has layers that cannot be cached here.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        arithmetic: str | None = None,
        backend: str | None = None,
        **options: Unpack[LayoutOptions],
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: expected model.config; got a {type(config).__name__}")
        options = _checked(options)
        arithmetic = arithmetic_name(arithmetic)
        get_backend(backend, on_host=True)  # raises where there is none
        self._settings = Settings(options, arithmetic, chosen_name(backend))
        self._config = config.get_text_config(decoder=True)
        kinds = _kinds(self._config)
        stored = [kind.group for kind in kinds if kind.group is not None]
        if not stored:
            raise ValueError(
                f"config: a {type(self._config).__name__} has no layers whose keys and values could be kept in a "
                f"KVNumbaCache; use transformers.DynamicCache"
            )
        calibration = options.get("calibration")
        if calibration is not None and len(calibration.shifts) != len(stored):
            raise ValueError(f"calibration: expected one of {len(stored)} layers; got {calibration!r}")
        layers = {key: [n for n, other in enumerate(stored) if other == key] for key in stored}
        self._groups = {
            key: LayerGroup(self._settings, own, len(own) / len(stored), key[0])
            for key, own in layers.items()
        }
        super().__init__(layers=_make_layers(self._config, self._groups))
        self._foreign = _foreign(self.layers)
        self._empty = [copied(layer) for layer in self._foreign]

    @property
    def groups(self) -> list[LayerGroup]:
        """The layers of each kind."""
        return list(self._groups.values())

    @property
    def all_ours(self) -> bool:
        """Whether no layer keeps anything elsewhere."""
        return all(isinstance(layer, (KVNumbaLayer, DummyLayer)) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, given as a number of 0 or less.

        The tokens of the latest forward pass can always be cropped. More than these, from layers with a sliding window,
        can be cropped only if `activate_past_recording` was called before the first token: otherwise tokens that the
        window would reach again are gone. A pass that did not reach the last layer is forgotten first.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or less; got {tokens_to_remove}")
        for group in self._groups.values():
            group.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Before the first token: keep what falls out of a sliding window, so that `crop` can return to it."""
        for group in self._groups.values():
            group.record_past = True
        for layer in (*self._foreign, *self._empty):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Empty the cache and give its memory back."""
        for group in self._groups.values():
            group.clear()
        for layer, empty in zip(self._foreign, self._empty, strict=True):
            become(layer, empty)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each sequence b by sequence ``beam_idx[b]``; blocks are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences, in this order; a sequence that is named several times is continued each time."""
        for group in self._groups.values():
            group.select(indices)
        for layer in self._foreign:
            layer.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue each sequence `repeats` times."""
        count = max(len(group.ids) for group in self._groups.values())
        self.batch_select_indices(torch.arange(count).repeat_interleave(repeats))

    def used_bytes(self) -> int:
        """Bytes of the blocks that hold tokens, and of the tokens that are kept in float besides."""
        return sum(group.used_bytes() for group in self._groups.values())

    def save(self, folder: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Write the cache to a folder, which is made where it does not exist.

        The file ``cache.json`` names the others and is replaced last, so that a save that fails or is killed leaves the
        folder as it was; what it has written already is removed by the next save. Tokens that are kept in float besides
        are not saved: a cache that loads the folder has them in the cache's formats.

        Parameters
        ----------
        folder : path
        fingerprint : str
            Says what computed the keys and values: the model's name and revision, say. `load` compares it.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        groups = []
        for n, group in enumerate(self._groups.values()):
            if group.running:
                raise ValueError("save: a forward pass did not reach the last layer; crop(0) forgets it")
            entry: dict[str, Any] = {"ids": group.ids, "length": group.complete_length}
            if group.started:
                entry.update(
                    file=f"{n}.{token}.kv",
                    num_kv_heads=group.pool.num_kv_heads,
                    head_dim=group.pool.head_dim,
                    value_head_dim=group.pool.value_head_dim,
                    dtypes=[group.pool.key_format, group.pool.value_format],
                    padding=[0] * len(group.ids) if group.padding is None else group.padding.tolist(),
                )
                group.pool.save(path / entry["file"], fingerprint=fingerprint)
            groups.append(entry)
        with replacing(path / MANIFEST) as file:
            file.write(json.dumps({"version": VERSION, "groups": groups}).encode())
        named = {entry.get("file") for entry in groups}
        for old in path.iterdir():
            if re.fullmatch(GROUP_FILE, old.name) and old.name not in named:
                old.unlink()
        clear_unfinished(path, GROUP_FILE)

    def load(self, folder: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Replace the cache's contents by what `save` wrote. If that fails, the cache is as it was.

        Raises
        ------
        ValueError
            The folder is not one of `save`, a file is damaged, or it was made with another model shape, format or
            fingerprint.
        OSError
            A file cannot be read.
        """
        path = Path(folder)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            version, groups = manifest["version"], manifest["groups"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path / MANIFEST}: damaged, or not written by KVNumbaCache.save") from error
        if version != VERSION:
            raise ValueError(f"{path / MANIFEST}: version: expected {VERSION}; the file has {version!r}")
        if len(groups) != len(self._groups):
            raise ValueError(f"{path}: expected {len(self._groups)} kinds of layers; it has {len(groups)}")
        loaded = [
            _load_group(path, entry, group, fingerprint)
            for entry, group in zip(groups, self._groups.values(), strict=True)
        ]
        for group, new in zip(self._groups.values(), loaded, strict=True):
            group.clear()
            if new.started:
                group.adopt(new.pool)
                group.restore(new.ids, new.complete_length, new.padding)
                new.ids.clear()  # this group finishes them

    def __deepcopy__(self, memo: dict[int, Any]) -> KVNumbaCache:
        twin = KVNumbaCache.__new__(KVNumbaCache)
        twin._settings, twin._config = self._settings, self._config
        twin._groups = {kind: group.fork() for kind, group in self._groups.items()}
        Cache.__init__(twin, layers=_make_layers(self._config, twin._groups))
        twin._foreign = _foreign(twin.layers)
        twin._empty = self._empty
        for layer, own in zip(twin._foreign, self._foreign, strict=True):
            become(layer, own)
        return twin

    def __repr__(self) -> str:
        settings = self._settings
        used = [group.pool.backend for group in self._groups.values() if group.started]
        formats = ("key_format", "value_format")
        kept = {name: value for name, value in settings.options.items() if name not in formats}
        return (
            f"KVNumbaCache(layers={_whose(self.layers)}, tokens={self.get_seq_length()}, "
            f"keys {settings.options.get('key_format') or 'as given'}, "
            f"values {settings.options.get('value_format') or 'as given'}, "
            f"{''.join(f'{name}={value!r}, ' for name, value in kept.items())}"
            f"{(used or [settings.backend])[0]}, {self.used_bytes() / 1e6:.1f} MB)"
        )


def _checked(options: LayoutOptions) -> LayoutOptions:
    """Options with what int4 stands for, after the checks that need no model; None where the default is meant."""
    for name in ("num_layers", "value_head_dim"):
        if name in options:
            raise TypeError(f"{name}: the model decides it; expected no such argument")
    given: Any = {name: value for name, value in options.items() if value is not None}
    filled: Any = with_recipe(None, given)
    calibration = filled.get("calibration")
    if not isinstance(calibration, (Calibration, type(None))):
        raise TypeError(f"calibration: expected a Calibration; got a {type(calibration).__name__}")
    group_size = filled.get("group_size")
    head_dim = 2 * group_size if isinstance(group_size, int) and group_size > 0 else 2
    Layout.of(1, 1, 1, head_dim, **{**filled, "calibration": None})
    checked: LayoutOptions = filled
    return checked


@dataclass(frozen=True)
class LayerKind:
    """What a layer of a model needs.

    Attributes
    ----------
    name : str
        As transformers calls it.
    options : dict
        Arguments of transformers' layer of that kind.
    group : tuple, optional
        What layers that share a pool have in common, the window first; None: the layer has no keys, or transformers
        keeps them.
    """

    name: str
    options: dict[str, Any]
    group: tuple[Any, ...] | None


def _kinds(config: PreTrainedConfig) -> list[LayerKind]:
    """The kind of each layer."""
    kinds = []
    for name, options, layer in zip(
        *get_layer_types_and_kwargs(config), config.per_layer_config, strict=True
    ):
        heads = (getattr(layer, name, None) for name in ("num_key_value_heads", "head_dim"))
        ours = name in KINDS + HYBRID_KINDS
        kinds.append(
            LayerKind(name, options, (options.get("sliding_window"), name, *heads) if ours else None)
        )
    return kinds


def _make_layers(config: PreTrainedConfig, groups: dict[tuple[Any, ...], LayerGroup]) -> list[Any]:
    """The layers of a model, empty: ours, of these groups, and those of transformers."""
    layers: list[Any] = []
    counts = dict.fromkeys(groups, 0)
    for kind in _kinds(config):
        if kind.group is None:
            layers.append(make_layer(kind.name, kind.options))
            continue
        place = config, groups[kind.group], counts[kind.group]
        if kind.name in HYBRID_KINDS:
            layers.append(HybridLayer(*place, LinearAttentionLayer(**kind.options)))
        else:
            layers.append(KVNumbaLayer(*place))
        counts[kind.group] += 1
    return layers


def _foreign(layers: list[Any]) -> list[Any]:
    """Those of transformers, and the states of hybrid ones."""
    foreign = []
    for layer in layers:
        if isinstance(layer, HybridLayer):
            foreign.append(layer.states)
        elif not isinstance(layer, (KVNumbaLayer, DummyLayer)):
            foreign.append(layer)
    return foreign


def _whose(layers: list[Any]) -> str:
    """How many layers there are, and whose they are where not all with a cache are ours."""
    ours = sum(isinstance(layer, KVNumbaLayer) for layer in layers)
    foreign = len(_foreign(layers))
    return f"{len(layers)} ({ours} kvnumba, {foreign} transformers)" if foreign else f"{len(layers)}"


def _load_group(path: Path, entry: dict[str, Any], group: LayerGroup, fingerprint: str) -> LayerGroup:
    """A group like this one, with the contents that a folder has of it."""
    new = LayerGroup(group.settings, group.layers, group.share, group.sliding_window)
    if "file" not in entry:
        return new
    head_dims = (entry["head_dim"], entry.get("value_head_dim", entry["head_dim"]))  # once there was only one
    backend = get_backend(group.settings.backend, on_host=True)
    new.adopt(new.allocate(entry["num_kv_heads"], head_dims, tuple(entry["dtypes"]), backend))
    ids = new.pool.load(path / entry["file"], fingerprint=fingerprint)
    own = [ids.pop(seq_id) for seq_id in entry["ids"]]
    for seq_id in ids.values():  # of copies of the cache
        new.pool.finish_sequence(seq_id)
    padding = np.array(entry["padding"], np.int64)
    new.restore(own, entry["length"], padding if padding.any() else None)
    return new
