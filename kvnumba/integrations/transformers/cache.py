"""A `transformers.Cache` of kvnumba's paged storage."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from kvnumba.backends.protocol import Backend
from kvnumba.backends.registry import chosen_name, get_backend
from kvnumba.caches.per_head import check_options
from kvnumba.calibration import Calibration
from kvnumba.integrations.transformers import foreign, saving
from kvnumba.integrations.transformers.layers import HybridLayer, IndexedLayer, KVNumbaLayer
from kvnumba.integrations.transformers.passes import PassCache
from kvnumba.integrations.transformers.settings import Settings
from kvnumba.integrations.transformers.storage import LayerGroup
from kvnumba.options import arithmetic_name
from kvnumba.recipes import with_recipe
from kvnumba.storage import Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Of layers whose keys and values are kept here. All others are kept by transformers' own layers."""
HYBRID_KINDS = ("hybrid", "hybrid_sliding")
"""Of layers that have keys and values, which are kept here, and states, which are kept by transformers."""
INDEXED_KINDS = ("indexed_attention",)
"""The same with keys of an indexer, which chooses what sparse attention sees."""


@dataclass(frozen=True)
class Checkpoint:
    """What `crop` needs to return to a length, where cutting is not enough.

    Attributes
    ----------
    layers : dict
        Copies of layers that transformers keeps, by their place among these.
    groups : dict
        Forks of groups with a sliding window, which gives back what falls out of it.
    """

    layers: dict[int, Any]
    groups: dict[tuple[Any, ...], LayerGroup]

    def fork(self) -> Checkpoint:
        """A checkpoint that changes independently."""
        return Checkpoint(
            {n: foreign.shared(layer) for n, layer in self.layers.items()},
            {key: group.fork() for key, group in self.groups.items()},
        )


class KVNumbaCache(PassCache):
    """The cache of a Hugging Face model, in kvnumba's formats and on its backends.

    With ``model.set_attn_implementation("kvnumba")`` attention is computed straight out of the storage. With any
    other implementation the cache works too, and gives back dense keys and values at each step. ``copy.deepcopy``
    shares all blocks with the copy until one of the two writes to them.

    Layers without keys and values of their own for each token, those of recurrences, convolutions and sparse attention,
    are kept by transformers' own classes, beside those that are kept here.

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
    backend : {"numpy", "cpu", "cuda", "auto"} or Backend, optional
        Default: `kvnumba.use_backend`, then ``KVNUMBA_BACKEND``, then "auto": "cuda" for tensors on a GPU, else "cpu".
        A `kvnumba.integrations.ray.ShardedBackend` keeps the cache on several machines.
    per_head : bool
        Keep each KV head of each layer in blocks of its own, so that it may drop other tokens than the others: see
        `kvnumba.integrations.kvpress`. For models on a CPU, all of whose layers are of full attention and attend out
        of the storage; nothing is kept in float besides.
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
        backend: str | Backend | None = None,
        per_head: bool = False,
        **options: Unpack[LayoutOptions],
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: expected model.config; got a {type(config).__name__}")
        options = _checked(options, per_head)
        arithmetic = arithmetic_name(arithmetic)
        get_backend(backend, on_host=True)  # raises where there is none
        if backend is None or isinstance(backend, str):
            backend = chosen_name(backend)
        self._settings = Settings(options, arithmetic, backend, per_head)
        self._config = config
        kinds = _kinds(config, per_head)
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
        self._checkpoints: dict[int, Checkpoint] = {}  # by the tokens there were
        self._set_layers()
        self._empty = [foreign.copied(layer) for layer in self._foreign]

    def _set_layers(self) -> None:
        layers = _make_layers(self._config, _kinds(self._config, self.per_head), self._groups)
        self._foreign = [
            getattr(layer, "states", layer)
            for layer in layers
            if isinstance(layer, (HybridLayer, IndexedLayer))
            or not isinstance(layer, (KVNumbaLayer, foreign.DummyLayer))
        ]
        super().__init__(layers, watched=bool(self._foreign))

    def _complete_length(self) -> int:
        """Tokens of every sequence that all layers have, padding included."""
        lengths = [group.complete_length for group in self._groups.values()]
        return min(lengths if self._pass_is_complete() else [*lengths, self._length_before])

    def _require_states(self, call: str) -> None:
        """Raise unless the cache has all that the model remembers of its tokens, and of no token more."""
        lengths = {
            group.length(index) for group in self._groups.values() for index in (0, group.num_layers - 1)
        }
        if len(lengths) > 1 or not self._pass_is_complete():
            raise ValueError(f"{call}: a forward pass did not reach the last layer; crop(0) forgets it")
        if self.get_seq_length() and foreign.are_untouched(self._foreign):
            raise ValueError(f"{call}: the model keeps the states of its layers in itself, not in its cache")

    def checkpoint(self) -> None:
        """Remember what `crop` cannot cut, so that it can return to the present length.

        That is the states of recurrent layers, which are copied, and what is going to fall out of sliding windows,
        whose blocks are kept. Other layers need no checkpoint. One is forgotten when the cache is cropped to fewer
        tokens, reset or loaded; it is not saved.

        Raises
        ------
        ValueError
            A forward pass did not reach the last layer, or the model keeps states elsewhere than in the cache.
        """
        self._require_states("checkpoint")
        self._checkpoints[self.get_seq_length()] = Checkpoint(
            {
                n: foreign.copied(layer)
                for n, layer in enumerate(self._foreign)
                if not foreign.crops_itself(layer)
            },
            {
                key: group.fork()
                for key, group in self._groups.items()
                if group.sliding_window is not None and not group.record_past
            },
        )

    @property
    def per_head(self) -> bool:
        """Whether each KV head may drop other tokens than the others."""
        return self._settings.per_head

    @property
    def groups(self) -> list[LayerGroup]:
        """The layers of each kind."""
        return list(self._groups.values())

    @property
    def all_ours(self) -> bool:
        """Whether no layer keeps anything elsewhere."""
        return not self._foreign

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have states and no keys."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, KVNumbaLayer)
            for layer in self.layers
        ]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, given as a number of 0 or less.

        The tokens of the latest forward pass can always be cropped from layers that attend. More than these, from
        layers with a sliding window, can be cropped only to a `checkpoint`, or if `activate_past_recording` was called
        before the first token: otherwise tokens that the window would reach again are gone. States of recurrent layers
        can only return to a `checkpoint`, or to nothing. A pass that did not reach the last layer is forgotten first.

        Raises
        ------
        ValueError
            The argument is not as above, or a layer cannot return to that length. The cache is as it was.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or less; got {tokens_to_remove}")
        before, complete = self._complete_length(), self._pass_is_complete()
        length = max(before + tokens_to_remove, 0)
        there = self._checkpoints.get(length, Checkpoint({}, {}))
        remembered = there.layers if length else dict(enumerate(self._empty))
        layers = foreign.cropped(self._foreign, remembered, length, before - length, complete)
        returning = {key: group.fork() for key, group in there.groups.items()} if tokens_to_remove else {}
        # those with a window first: only they can fail
        for key, group in sorted(self._groups.items(), key=lambda item: item[1].sliding_window is None):
            if key in returning:
                group.take(returning[key])
            else:
                group.crop(group.complete_length - length)
        for layer, result in zip(self._foreign, layers, strict=True):
            foreign.become(layer, result)
        self._checkpoints = {at: one for at, one in self._checkpoints.items() if at <= length}
        self._forget_pass()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the whole cache back, once past recording is active."""
        return all(foreign.is_croppable(layer) for layer in self._foreign)

    def activate_past_recording(self) -> None:
        """Before the first token: keep what falls out of a sliding window, so that `crop` can return to it."""
        for group in self._groups.values():
            group.record_past = True
        for layer in (*self._foreign, *self._empty):
            foreign.activate_past_recording(layer)

    def reset(self) -> None:
        """Empty the cache and give its memory back."""
        for group in self._groups.values():
            group.clear()
        for layer, empty in zip(self._foreign, self._empty, strict=True):
            foreign.become(layer, foreign.copied(empty))
        self._checkpoints.clear()
        self._forget_pass()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each sequence b by sequence ``beam_idx[b]``; blocks are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences, in this order; a sequence that is named several times is continued each time."""
        rows = self._rows()[indices.cpu()]
        for group in self._all_groups():
            group.select(rows)
        for layer in self._all_foreign():
            layer.reorder_cache(rows)  # the only method that all classes have; it takes any rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue each sequence `repeats` times."""
        self.batch_select_indices(self._rows().repeat_interleave(repeats))

    def _rows(self) -> torch.Tensor:
        """The places of the sequences in the batch."""
        return torch.arange(max(len(group.ids) for group in self._groups.values()), device="cpu")

    def _all_groups(self) -> Iterator[LayerGroup]:
        yield from self._groups.values()
        for checkpoint in self._checkpoints.values():
            yield from checkpoint.groups.values()

    def _all_foreign(self) -> Iterator[Any]:
        yield from self._foreign
        for checkpoint in self._checkpoints.values():
            yield from checkpoint.layers.values()

    def used_bytes(self) -> int:
        """Bytes of the blocks that hold tokens, of the tokens that are kept in float besides, and of states."""
        states = sum(tensor.nbytes for layer in self._all_foreign() for tensor in foreign.tensors_of(layer))
        return states + sum(group.used_bytes() for group in self._groups.values())

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

        Raises
        ------
        ValueError
            A forward pass did not reach the last layer, or the model keeps states elsewhere than in the cache.
        """
        self._require_states("save")
        saving.save(Path(folder), self._groups, self._foreign, self._config.model_type, fingerprint)

    def load(self, folder: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Replace the cache's contents by what `save` wrote. If that fails, the cache is as it was.

        Keys and values are on a GPU if they were and there is one, unless `backend` says where. States are on the
        device where they were; if it is not there, on another one of its type, or on the CPU. There are no checkpoints
        afterwards.

        Raises
        ------
        ValueError
            The folder is not one of `save`, a file is damaged, or it was made with another model, model shape, format
            or fingerprint.
        OSError
            A file cannot be read.
        """
        groups, layers = saving.load(
            Path(folder), self._groups, self._empty, self._config.model_type, fingerprint
        )
        self.reset()
        for group, new in zip(self._groups.values(), groups, strict=True):
            group.take(new)
        for layer, loaded in zip(self._foreign, layers, strict=True):
            foreign.become(layer, loaded)
        if any(layer.record_past for layer in self.layers if hasattr(layer, "record_past")):
            self.activate_past_recording()  # all that was loaded, and what was there, go on alike

    def __deepcopy__(self, memo: dict[int, Any]) -> KVNumbaCache:
        self._require_states("copy.deepcopy")
        twin = KVNumbaCache.__new__(KVNumbaCache)
        twin._settings, twin._config = self._settings, self._config
        twin._groups = {key: group.fork() for key, group in self._groups.items()}
        twin._set_layers()
        twin._empty = [foreign.copied(layer) for layer in self._empty]
        for layer, own in zip(twin._foreign, self._foreign, strict=True):
            foreign.become(layer, foreign.copied(own))
        twin._checkpoints = {length: one.fork() for length, one in self._checkpoints.items()}
        return twin

    def __repr__(self) -> str:
        settings = self._settings
        ours = sum(isinstance(layer, KVNumbaLayer) for layer in self.layers)
        whose = f" ({ours} kvnumba, {len(self._foreign)} transformers)" if self._foreign else ""
        used = [group.pool.backend for group in self._groups.values() if group.started]
        backend = settings.backend if isinstance(settings.backend, str) else settings.backend.name
        formats = ("key_format", "value_format")
        kept = {name: value for name, value in settings.options.items() if name not in formats}
        return (
            f"KVNumbaCache(layers={len(self)}{whose}, tokens={self.get_seq_length()}, "
            f"keys {settings.options.get('key_format') or 'as given'}, "
            f"values {settings.options.get('value_format') or 'as given'}, "
            f"{''.join(f'{name}={value!r}, ' for name, value in kept.items())}"
            f"{'of one head each, ' if self.per_head else ''}"
            f"{(used or [backend])[0]}, {self.used_bytes() / 1e6:.1f} MB)"
        )


def _checked(options: LayoutOptions, per_head: bool) -> LayoutOptions:
    """Options with what int4 stands for, after the checks that need no model; None where the default is meant."""
    for name in ("num_layers", "value_head_dim"):
        if name in options:
            raise TypeError(f"{name}: the model decides it; expected no such argument")
    given: Any = {name: value for name, value in options.items() if value is not None}
    filled: Any = with_recipe(None, given)
    if per_head and "recent_tokens" not in given:
        filled = {name: value for name, value in filled.items() if name != "recent_tokens"}
    calibration = filled.get("calibration")
    if not isinstance(calibration, (Calibration, type(None))):
        raise TypeError(f"calibration: expected a Calibration; got a {type(calibration).__name__}")
    group_size = filled.get("group_size")
    head_dim = 2 * group_size if isinstance(group_size, int) and group_size > 0 else 2
    layout = Layout.of(1, 1, 1, head_dim, **{**filled, "calibration": None})
    if per_head:
        check_options(layout.recent_tokens, calibration)
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


def _kinds(config: PreTrainedConfig, per_head: bool) -> list[LayerKind]:
    """The kind of each layer; with `per_head` each has a pool of its own, so that it can drop tokens at any time."""
    if hasattr(config, "decoder_layers") and not config.is_encoder_decoder:
        # a decoder alone, of a model that has both
        config = copy.copy(config)
        config.is_encoder_decoder = True
    decoder = config.get_text_config(decoder=True)
    if config.is_encoder_decoder and config.attribute_map.get("num_hidden_layers") == "num_layers":
        decoder.num_hidden_layers = config.num_decoder_layers  # as T5 and its kin call it, whose copy this is
    if getattr(decoder, "cross_attention_layers", None):
        raise ValueError(
            f"config: a {type(decoder).__name__} has layers that attend to pictures, which cannot be kept in a "
            f"KVNumbaCache; use transformers.DynamicCache"
        )
    kinds: list[LayerKind] = []
    # until transformers 5.23 the last layers, if they use other layers' keys, are left out
    for name, options, layer in zip(
        *get_layer_types_and_kwargs(decoder), decoder.per_layer_config, strict=False
    ):
        heads = (getattr(layer, name, None) for name in ("num_key_value_heads", "head_dim"))
        ours = name in KINDS + HYBRID_KINDS + INDEXED_KINDS
        if per_head and name != KINDS[0]:
            raise ValueError(
                f"per_head: expected a model whose layers are all of {KINDS[0]}; a {type(decoder).__name__} has one of "
                f"{name}. Use a KVNumbaCache without it"
            )
        own = (len(kinds),) if per_head else ()
        kinds.append(
            LayerKind(name, options, (options.get("sliding_window"), name, *heads, *own) if ours else None)
        )
    return kinds


def _make_layers(
    config: PreTrainedConfig, kinds: list[LayerKind], groups: dict[tuple[Any, ...], LayerGroup]
) -> list[Any]:
    """The layers of a model, empty: ours, of these groups, and those of transformers."""
    layers: list[Any] = []
    counts = dict.fromkeys(groups, 0)
    # whose attention implementation is read: of a flat config the decoder's part would be a copy
    live = config.get_text_config(decoder=True) if config.sub_configs else config
    for kind in kinds:
        if kind.group is None:
            layers.append(foreign.make_layer(kind.name, kind.options))
            continue
        place = live, groups[kind.group], counts[kind.group]
        if kind.name in HYBRID_KINDS:
            layers.append(HybridLayer(*place, LinearAttentionLayer(**kind.options)))
        elif kind.name in INDEXED_KINDS:
            layers.append(IndexedLayer(*place))
        else:
            layers.append(KVNumbaLayer(*place))
        counts[kind.group] += 1
    return layers
