"""What a cache is made of: a layout (numbers only), buffers that a backend allocates for it, and batches of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from kvnumba import arguments
from kvnumba.calibration import Calibration
from kvnumba.formats import FORMATS, Format, resolve_format
from kvnumba.transforms import RowTransform, rotation_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

RECENT_BLOCK = 16
"""Tokens of a block of those that hold recent tokens in float."""
RECENT_SHORT = 16
"""New tokens of a sequence that a pass writes into such blocks; one with more has memory of its own."""

SCALE_DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class RowLayout:
    """How one row lies in memory: the elements of one token and head, of the keys or of the values.

    Attributes
    ----------
    fmt : Format
    head_dim : int
        Elements of the row.
    group_size : int
        Elements that share a scale; divides `head_dim`. Ignored if the format has no scale.
    scale_dtype : dtype
        Of scales and zeros, float32 or float16.
    """

    fmt: Format
    head_dim: int
    group_size: int
    scale_dtype: np.dtype[Any]

    @classmethod
    def of(
        cls, argument: str, fmt: Format, head_dim: int, group_size: int | None, scale_dtype: Any
    ) -> RowLayout:
        """Check the arguments and make a row layout; errors call the width `argument`. Default group: the whole row."""
        if head_dim % fmt.multiple:
            raise ValueError(f"{argument}: expected {_packed(fmt)}; got {head_dim}")
        size = head_dim
        if group_size is not None and fmt.has_scale:
            size = arguments.integer("group_size", group_size, minimum=1)
            if head_dim % size:
                raise ValueError(f"group_size: expected a divisor of {argument} {head_dim}; got {size}")
            if size % fmt.multiple:
                raise ValueError(f"group_size: expected {_packed(fmt)}; got {size}")
        try:
            dtype = np.dtype(scale_dtype)
        except TypeError:
            dtype = np.dtype(object)
        if dtype.name not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype: expected one of {', '.join(SCALE_DTYPES)}; got {scale_dtype!r}")
        if fmt.codec is not None:
            fmt.codec.try_at(size)
        return cls(fmt, head_dim, size, dtype)

    @property
    def row_length(self) -> int:
        """Elements of the format's `code_dtype` that hold a row."""
        return self.fmt.row_length(self.head_dim)

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return self.head_dim // self.group_size if self.fmt.has_scale else 0

    @property
    def num_zeros(self) -> int:
        """Zero points of a row."""
        return self.num_groups if self.fmt.has_zero else 0

    @property
    def element_bytes(self) -> int:
        """Bytes of a row's elements."""
        return self.row_length * self.fmt.code_dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales and zeros."""
        return (self.num_groups + self.num_zeros) * self.scale_dtype.itemsize

    def empty(self, *shape: int) -> Encoded:
        """Room on the host for rows (*shape, ...), to be written."""
        return self.parts(shape, np.empty)

    def parts(self, shape: tuple[int, ...], make: Callable[[tuple[int, ...], np.dtype[Any]], Any]) -> Encoded:
        """What holds rows (*shape, ...): codes, scales and zeros, each made by ``make(shape, dtype)``."""
        return Encoded(
            make((*shape, self.row_length), self.fmt.code_dtype),
            make((*shape, self.num_groups), self.scale_dtype),
            make((*shape, self.num_zeros), self.scale_dtype),
        )


def _packed(fmt: Format) -> str:
    """What a format wants numbers of elements to be."""
    if fmt.multiple == 2:
        return f"an even number, {fmt.name} packs pairs"
    return f"a multiple of {fmt.multiple}, {fmt.name} packs {fmt.multiple} elements of {fmt.bits} bits"


class LayoutOptions(TypedDict, total=False):
    """How a cache stores its rows: keyword arguments of every cache. None is the default of each.

    Attributes
    ----------
    key_format, value_format : str
        Format of one of them, where it differs from `dtype`.
    value_head_dim : int
        Elements of a value (Dv), where they are not as many as those of a key.
    group_size : int
        Elements of a row that share a scale, where formats have one. It divides the widths of keys and values that have
        scales. Default: all.
    scale_dtype : {"float32", "float16"}
        Of scales and zeros. float32, the default, keeps rows of one repeated value exact; float16 takes half as much:
        4 of 72 bytes less a row in int4 at D = 128.
    num_layers : int
        Layers that move together: a sequence's length is one number, which moves with the last. Default: 1.
    rotation : bool
        Keep keys and values multiplied by a Hadamard matrix, which spreads outliers over a row, so that few bits cost
        less. Attention and `get_kv` are those of what was written.
    calibration : Calibration
        Keep each key channel shifted and scaled as was measured for the model, which takes away what channels that are
        larger than others cost. See `kvnumba.calibrate`.
    recent_tokens : int
        So many of a sequence's newest tokens, and all that come with them in one pass, are attended to in float16. That
        is kept besides, for there few bits cost most: a ring of tokens for each sequence, and of a pass of many tokens
        all, until the next pass. Default: 0.
    sink_tokens : int
        So are so many of its first tokens. Default: 0.
    """

    key_format: Any
    value_format: Any
    value_head_dim: int | None
    group_size: int | None
    scale_dtype: Any
    num_layers: int | None
    rotation: bool | None
    calibration: Calibration | None
    recent_tokens: int | None
    sink_tokens: int | None


class MemoryUse(NamedTuple):
    """Bytes of a cache.

    Attributes
    ----------
    elements : int
        Of keys and values in their formats.
    scales : int
        Of the scales and zeros of int8 and int4.
    floats : int
        Of the tokens that are kept in float besides.
    """

    elements: int
    scales: int
    floats: int


@dataclass(frozen=True)
class Layout:
    """The shape of a cache's storage: blocks of `block_size` tokens, the same for every layer.

    `Layout.of` makes one from what a user gives, and tells how much memory a cache would take before there is one:
    ``Layout.of(1000, 16, 8, 128, "int8", num_layers=32).memory_bytes()``.

    Attributes
    ----------
    num_layers, num_blocks, block_size, num_kv_heads : int
    keys, values : RowLayout
        How a row of keys, and of values, is stored.
    transform : RowTransform, optional
        What is done to rows before they are stored. None: nothing.
    recent_tokens, sink_tokens : int
        The newest and the first tokens of a sequence that are kept in float16 besides.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    keys: RowLayout
    values: RowLayout
    transform: RowTransform | None = None
    recent_tokens: int = 0
    sink_tokens: int = 0

    @classmethod
    def of(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = "float32",
        **options: Unpack[LayoutOptions],
    ) -> Layout:
        """Check the numbers of a layout and fill in the defaults.

        Parameters
        ----------
        num_blocks, block_size : int
            Of a contiguous cache the batch elements, and the most tokens of one.
        num_kv_heads, head_dim : int
            H and D.
        dtype : str or dtype
            Format of keys and values: "float32", "float16", "bfloat16", "fp8_e4m3", "int8", "int4", or one that was
            registered with `kvnumba.register_format`.
        **options
            See `LayoutOptions`.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it.
        """
        arguments.known_options(options, LayoutOptions)
        given = {name: value for name, value in options.items() if value is not None}
        key, value = (
            resolve_format(name, given[name]) if name in given else resolve_format("dtype", dtype)
            for name in ("key_format", "value_format")
        )
        group_size = options.get("group_size")
        if group_size is not None and not (key.has_scale or value.has_scale):
            raise ValueError("group_size: expected None, the formats have no scales")
        scale_dtype = given.get("scale_dtype", "float32")
        head_dim = arguments.integer("head_dim", head_dim, minimum=1)
        width = "value_head_dim" if "value_head_dim" in given else "head_dim"
        value_head_dim = arguments.integer(width, given.get("value_head_dim", head_dim), minimum=1)
        num_layers = arguments.integer("num_layers", given.get("num_layers", 1), minimum=1)
        num_kv_heads = arguments.integer("num_kv_heads", num_kv_heads, minimum=1)
        recent_tokens = arguments.integer("recent_tokens", given.get("recent_tokens", 0), minimum=0)
        sink_tokens = arguments.integer("sink_tokens", given.get("sink_tokens", 0), minimum=0)
        if recent_tokens and min(key.bits, value.bits) >= 16:
            raise ValueError(f"recent_tokens: expected 0, {key.name} is float already; got {recent_tokens}")
        if sink_tokens and not recent_tokens:
            raise ValueError(f"sink_tokens: expected 0 without recent_tokens; got {sink_tokens}")
        return cls(
            num_layers=num_layers,
            num_blocks=arguments.integer("num_blocks", num_blocks, minimum=1),
            block_size=arguments.integer("block_size", block_size, minimum=1),
            num_kv_heads=num_kv_heads,
            keys=RowLayout.of("head_dim", key, head_dim, group_size, scale_dtype),
            values=RowLayout.of(width, value, value_head_dim, group_size, scale_dtype),
            transform=_transform(
                options.get("rotation"),
                options.get("calibration"),
                num_layers,
                num_kv_heads,
                head_dim,
                value_head_dim,
            ),
            recent_tokens=recent_tokens,
            sink_tokens=sink_tokens,
        )

    @property
    def head_dim(self) -> int:
        """Elements of a key, and of a query (D)."""
        return self.keys.head_dim

    @property
    def value_head_dim(self) -> int:
        """Elements of a value, and of an output (Dv)."""
        return self.values.head_dim

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """``(num_layers, num_blocks, H, block_size)``, before the elements of a row: a head's tokens lie in one run."""
        return (self.num_layers, self.num_blocks, self.num_kv_heads, self.block_size)

    def bytes_per_token(self) -> int:
        """Bytes that a token takes: keys, values, scales and zeros over all layers and heads."""
        return sum(self.memory(tokens=1))

    def memory_bytes(self, num_sequences: int = 0) -> int:
        """Bytes of the whole storage, and of the tokens that so many sequences keep in float."""
        return sum(self.memory(num_sequences))

    def memory(self, num_sequences: int = 0, *, tokens: int | None = None) -> MemoryUse:
        """`memory_bytes` by what they are used for; of so many tokens, instead of all for which there is room."""
        num_sequences = arguments.integer("num_sequences", num_sequences, minimum=0)
        count = self.num_blocks * self.block_size if tokens is None else tokens
        rows = count * self.num_layers * self.num_kv_heads
        floats = 0
        if num_sequences and self.recent_tokens:
            floats = sum(self.of_recent(num_sequences * sum(self.recent_blocks)).memory())
        return MemoryUse(
            rows * (self.keys.element_bytes + self.values.element_bytes),
            rows * (self.keys.scale_bytes + self.values.scale_bytes),
            floats,
        )

    @property
    def recent_blocks(self) -> tuple[int, int]:
        """Float blocks of each sequence: those of its first tokens, and the ring of its newest."""
        if not self.recent_tokens:
            return 0, 0
        ring = self.recent_tokens - 1 + RECENT_SHORT + RECENT_BLOCK - 1  # they begin anywhere in a block
        return -(-self.sink_tokens // RECENT_BLOCK), -(-ring // RECENT_BLOCK)

    def of_recent(self, num_blocks: int) -> Layout:
        """The layout of float blocks, in float16 or a format that is no less exact already."""
        keys, values = (
            replace(
                rows, fmt=rows.fmt if rows.fmt.bits >= 16 else FORMATS["float16"], group_size=rows.head_dim
            )
            for rows in (self.keys, self.values)
        )
        return Layout(
            self.num_layers, num_blocks, RECENT_BLOCK, self.num_kv_heads, keys, values, self.transform
        )

    def watch(self) -> None:
        """Raise unless the functions of registered formats are as they were."""
        for rows in (self.keys, self.values):
            if rows.fmt.codec is not None:
                rows.fmt.codec.watch()

    def describe_formats(self) -> str:
        """``int8``, or ``keys int8, values int4``."""
        if self.keys.fmt == self.values.fmt:
            return self.keys.fmt.name
        return f"keys {self.keys.fmt.name}, values {self.values.fmt.name}"


def _transform(
    rotation: bool | None,
    calibration: Calibration | None,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
) -> RowTransform | None:
    """The transform that a user asked for, after checks."""
    if not isinstance(rotation, (bool, np.bool_, type(None))):
        raise TypeError(f"rotation: expected True or False; got {rotation!r}")
    if rotation:
        for name, width in (("head_dim", head_dim), ("value_head_dim", value_head_dim)):
            if rotation_size(width) == 1:
                raise ValueError(
                    f"rotation: expected an even {name}, pairs are the least to rotate; got {width}"
                )
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            raise TypeError(f"calibration: expected a Calibration; got a {type(calibration).__name__}")
        shapes = [array.shape for array in calibration.shifts]
        if shapes != [(num_kv_heads, head_dim)] * num_layers:
            raise ValueError(
                f"calibration: expected one of {num_layers} layers of shape (H, D) = ({num_kv_heads}, {head_dim}), as "
                f"the cache's; got {calibration!r}"
            )
    return RowTransform(bool(rotation), calibration) if rotation or calibration is not None else None


class Encoded(NamedTuple):
    """Rows as a format stores them; `scale` and `zero` have no groups where the format has none.

    Unpacks as ``codes, scale, zero``.
    """

    codes: Any
    scale: Any
    zero: Any


@dataclass(frozen=True)
class Buffers:
    """The arrays of one cache, shaped as its layout says, on the backend's own device."""

    layout: Layout
    keys: Encoded
    values: Encoded


def allocate_on_host(
    layout: Layout, zeros: Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray] = np.zeros
) -> Buffers:
    """Zeroed NumPy buffers, made by ``zeros(shape, dtype)``; pages that are never written take no memory."""
    shape = layout.blocks_shape
    return Buffers(layout, layout.keys.parts(shape, zeros), layout.values.parts(shape, zeros))


def host_memory_bytes() -> int:
    """The machine's memory; 16 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 34


def array_specs(layout: Layout, num_blocks: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of what `Backend.read_blocks` returns, keys before values: codes, scales, zeros."""
    shape = (layout.num_layers, num_blocks, *layout.blocks_shape[2:])

    def spec(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        return shape, dtype

    return [*layout.keys.parts(shape, spec), *layout.values.parts(shape, spec)]


def copy_blocks_on_host(buffers: Buffers, pairs: np.ndarray) -> None:
    """Copy whole blocks of NumPy buffers, as `Backend.copy_blocks`."""
    source, destination = pairs.T
    for array in (*buffers.keys, *buffers.values):
        array[:, destination] = array[:, source]


def read_blocks_on_host(buffers: Buffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
    """Copies of whole blocks of NumPy buffers, as `Backend.read_blocks`."""
    keys, values = (Encoded(*(array[:, blocks] for array in kept)) for kept in (buffers.keys, buffers.values))
    return keys, values


def write_blocks_on_host(buffers: Buffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
    """Whole blocks into NumPy buffers, as `Backend.write_blocks`."""
    for array, new in zip((*buffers.keys, *buffers.values), (*keys, *values), strict=True):
        array[:, blocks] = new


@dataclass(frozen=True, eq=False)
class Batch:
    """New tokens of some sequences, and the blocks in which the keys lie that they see: integers only.

    Token i of sequence s sees key j if ``begins[s] <= j < seq_lens[s]`` and ``j <= positions[s] + i``, and the key's
    block is there.

    Attributes
    ----------
    block_table : (B, max_blocks) int32
        Block ids of each sequence, in order; entries past its length are not read. -1 is a block that is not there:
        nothing of it is read, its keys are not seen, and new tokens that belong there are not written. The positions
        of all others stay what they are.
    seq_lens : (B,) int32
        Keys of each sequence, those of the new tokens included.
    query_start_loc : (B + 1,) int32
        Where each sequence's new tokens begin among all T of them.
    block_size : int
        Tokens of a block.
    positions : (B,) int32
        Where each sequence's first new token stands among these keys. Usually its last keys are those of the new
        tokens: ``seq_lens`` less their number. Tokens that come after all keys have positions from ``seq_lens`` on.
    begins : (B,) int32, optional
        The first key of each sequence that is seen. None: 0.
    offsets : (B,) int32, optional
        The position in its sequence of what counts as each sequence's key 0 here. None: 0.
    shifts : (B,) int32, optional
        How much earlier each sequence's new tokens stand than `positions` say, where they see later keys. None: 0.
    kept : dict
        What a backend has derived from the batch, to use it again in the next layer.
    """

    block_table: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    block_size: int
    positions: np.ndarray
    begins: np.ndarray | None = None
    offsets: np.ndarray | None = None
    shifts: np.ndarray | None = None
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, block_table: np.ndarray, seq_lens: np.ndarray, num_new_tokens: Any, block_size: int) -> Batch:
        """A batch from what each sequence adds; `seq_lens` counts these tokens already."""
        query_start_loc = np.zeros(len(seq_lens) + 1, np.int32)
        np.add.accumulate(num_new_tokens, out=query_start_loc[1:])
        positions = np.subtract(seq_lens, num_new_tokens, dtype=np.int32)
        return cls(block_table, seq_lens, query_start_loc, block_size, positions)

    @classmethod
    def of_one(cls, blocks: np.ndarray, seq_len: int, num_new_tokens: int, block_size: int) -> Batch:
        """The batch of one sequence, which holds blocks (1, max_blocks)."""
        return cls(
            blocks,
            np.array((seq_len,), np.int32),
            np.array((0, num_new_tokens), np.int32),
            block_size,
            np.array((seq_len - num_new_tokens,), np.int32),
        )

    def after_all_keys(self) -> Batch:
        """The same, where new tokens see all keys: as if they stood behind them."""
        positions = np.maximum(self.positions, self.seq_lens)
        return replace(self, positions=positions, shifts=positions - self.positions, kept={})

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together (T)."""
        return int(self.query_start_loc[-1])

    @property
    def slot_mapping(self) -> np.ndarray:
        """``block * block_size + offset`` of each new token, (T,) int64, negative for a block -1; made once."""
        found = self.kept.get("slot_mapping")  # a cached_property takes longer than making it, for one token
        if found is None:
            found = self.kept["slot_mapping"] = self._slots()
        return found

    def _slots(self) -> np.ndarray:
        block_size = self.block_size
        if self.num_tokens == len(self.seq_lens) == 1:  # the commonest batch: one token of one sequence
            position = int(self.positions[0])
            block = int(self.block_table[0, position // block_size])
            return np.array([block * block_size + position % block_size], np.int64)
        num_new_tokens = np.diff(self.query_start_loc)
        sequence = np.repeat(np.arange(len(num_new_tokens)), num_new_tokens)
        first_position = self.positions - self.query_start_loc[:-1]
        position = np.arange(len(sequence)) + first_position[sequence]
        block = self.block_table[sequence, position // block_size].astype(np.int64)
        return block * block_size + position % block_size


class Part(NamedTuple):
    """Some of the keys that new tokens attend to, and which tokens these are.

    Attention over several parts is one softmax over all their keys. Common prefixes are a part: they are read once for
    the tokens of all sequences that begin with them.

    Attributes
    ----------
    buffers : Buffers
    batch : Batch
        ``query_start_loc`` counts within `tokens`.
    tokens : (T',) int32, optional
        Which of the packed tokens the part's new tokens are. None: they are all the packed tokens, in order.
    masked : bool
        Whether `Scoring.mask_mod` is asked about the keys; otherwise it would show them all.
    """

    buffers: Buffers
    batch: Batch
    tokens: np.ndarray | None = None
    masked: bool = True
