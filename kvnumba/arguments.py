"""Checks and conversions at the public edge. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np

from kvnumba.arrays import DeviceView, device_view
from kvnumba.formats import Format, bfloat16_to_float, float_to_bfloat16
from kvnumba.storage import Layout, Scoring

if TYPE_CHECKING:
    from typing_extensions import Unpack  # noqa: F401 (for the annotations of those who take AttentionOptions)

    from kvnumba.backends.protocol import Backend

DEVICE_DTYPES = ("float32", "float16", "bfloat16")

# Half of float32's range: the difference of two such values is finite, so a scale always is.
QUANTIZABLE_LIMIT = np.float32(np.finfo(np.float32).max / 2)


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of every ``attend``, in the words of FlashInfer and vLLM.

    Attributes
    ----------
    sm_scale : float
        Factor of ``q . k``. Default: 1 / sqrt(D).
    window_left : int
        A query at position i sees keys j with ``i - window_left <= j <= i``; -1, the default, sees all.
    logits_soft_cap : float
        cap: scores become ``cap * tanh(score / cap)`` before they are masked; 0, the default, is off.
    sinks : (Hq,) float32
        One more logit a query head, in the denominator (and in lse) only.
    alibi_slopes : (Hq,) float32
        ``slope * (j - i)`` is added to the score of key j.
    arithmetic : str
        "float32", or "bfloat16", in which a backend may multiply the queries, keys, weights and values of
        several new tokens, where the processor does that faster; sums are float32 in either. Default: that of
        the queries' dtype.
    return_lse : bool
        Return ``(out, lse)``: the natural logarithm of the sum of exponentials of the scores.
    """

    sm_scale: float | None
    window_left: int
    logits_soft_cap: float
    sinks: Any
    alibi_slopes: Any
    arithmetic: str | None
    return_lse: bool


ARITHMETICS = ("float32", "bfloat16")


def scoring(options: AttentionOptions, num_qo_heads: int, head_dim: int, q: Any = None) -> Scoring:
    """Check the options of an ``attend`` of queries `q`, fill in the defaults, and leave out `return_lse`."""
    bfloat16 = _is_bfloat16(getattr(q, "dtype", np.dtype(np.float32)))
    arithmetic = "bfloat16" if bfloat16 else "float32"
    if not options:
        return _default_scoring(head_dim, arithmetic)
    unknown = set(options) - set(AttentionOptions.__annotations__)
    if unknown:
        expected = ", ".join(AttentionOptions.__annotations__)
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; expected some of {expected}")
    sm_scale = options.get("sm_scale")
    sm_scale = head_dim**-0.5 if sm_scale is None else _real("sm_scale", sm_scale)
    window_left = integer("window_left", options.get("window_left", -1), minimum=-1)
    soft_cap = float(np.float32(_real("logits_soft_cap", options.get("logits_soft_cap", 0.0))))
    if soft_cap < 0:
        raise ValueError(f"logits_soft_cap: expected 0 (off) or more; got {soft_cap}")
    per_head = {
        name: None if options.get(name) is None else _per_head(name, options.get(name), num_qo_heads)
        for name in ("sinks", "alibi_slopes")
    }
    asked = arithmetic_name(options.get("arithmetic"))
    return Scoring(sm_scale, window_left, soft_cap, **per_head, arithmetic=asked or arithmetic)


def arithmetic_name(value: Any) -> str | None:
    """`value` as one of ARITHMETICS, or None for that of the queries."""
    if value not in (None, *ARITHMETICS):
        raise ValueError(f"arithmetic: expected one of {', '.join(ARITHMETICS)}; got {value!r}")
    return value


@functools.lru_cache(64)
def _default_scoring(head_dim: int, arithmetic: str) -> Scoring:
    return Scoring(head_dim**-0.5, -1, 0.0, None, None, arithmetic)


def integer(argument: str, value: Any, *, minimum: int) -> int:
    """`value` as an int that is at least `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer; got {type(value).__name__} {value!r}") from None
    if not minimum <= number < 2**63:
        expected = f"at least {minimum}" if number < minimum else "less than 2**63"
        raise ValueError(f"{argument}: expected {expected}; got {number}")
    return number


def integers(argument: str, values: Any, length: int | None = None) -> np.ndarray:
    """`values` as a vector of int64, of a length where one is given."""
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (length is not None and len(array) != length):
        wanted = "a list of" if length is None else f"a list of {length}"
        raise ValueError(
            f"{argument}: expected {wanted} integers; got {array.dtype} of shape {array.shape}"
            if array.dtype != object
            else f"{argument}: expected {wanted} integers; got {values!r}"
        )
    return array.astype(np.int64, copy=False)


def tokens(argument: str, values: Any, length: int | None = None) -> np.ndarray:
    """Token ids as a vector of int64, of a length where one is given; bytes are those of a byte-level model."""
    if isinstance(values, (bytes, bytearray)):
        values = np.frombuffer(values, np.uint8)
    return integers(argument, values, length)


def layer_index(layer: Any, num_layers: int) -> int:
    """`layer` as an int that names one of the layers."""
    layer = integer("layer", layer, minimum=0)
    if layer >= num_layers:
        raise ValueError(f"layer: expected 0 to {num_layers - 1}; got {layer}")
    return layer


def group_size(value: int | None, head_dim: int, formats: Sequence[Format]) -> int:
    """The group size along head_dim: `head_dim` by default, checked against it and the formats."""
    four_bit = any(fmt.bits == 4 for fmt in formats)
    if four_bit and head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, int4 packs pairs; got {head_dim}")
    if value is None:
        return head_dim
    size = integer("group_size", value, minimum=1)
    if not any(fmt.quantized for fmt in formats):
        raise ValueError("group_size: expected None, the formats have no scales")
    if head_dim % size:
        raise ValueError(f"group_size: expected a divisor of head_dim {head_dim}; got {size}")
    if four_bit and size % 2:
        raise ValueError(f"group_size: expected an even number, int4 packs pairs; got {size}")
    return size


def float_array(argument: str, x: Any) -> np.ndarray:
    """`x` as float32: from float32 itself, float16, float64, or bfloat16 (its own dtype or uint16 bits)."""
    x = np.asarray(x)
    if x.dtype == np.float32:
        return x
    if _is_bfloat16(x.dtype):
        return bfloat16_to_float(x.view(np.uint16))
    if x.dtype in (np.float16, np.float64):
        with np.errstate(over="ignore"):
            return x.astype(np.float32)
    raise TypeError(
        f"{argument}: expected float32, float16, float64 or bfloat16 (its bits as uint16); got {x.dtype}"
    )


def results(query: Any, options: AttentionOptions) -> tuple[Any, Any]:
    """Room for the attention of checked queries (..., D) and for its lse (...), float32; on the queries' device.

    On a device an lse that nobody asked for has no memory, and the address 0.
    """
    if isinstance(query, DeviceView):
        out = query.empty(query.shape, query.dtype)
        shape = query.shape[:-1]
        wanted = options.get("return_lse")
        return out, query.empty(shape, "float32") if wanted else query.nowhere(shape, "float32")
    return np.empty(query.shape, np.float32), np.empty(query.shape[:-1], np.float32)


def returned(q: Any, out: Any, lse: Any, options: AttentionOptions) -> Any:
    """What an ``attend`` of the user's queries `q` returns, of what `results` made."""
    if isinstance(out, DeviceView):
        out, lse = out.owner, lse.owner
    else:
        out = _like(q, out)
    return (out, lse) if options.get("return_lse") else out


def _like(x: Any, out: np.ndarray) -> np.ndarray:
    """`out`, which is float32, in the precision of the query `x`; float64 stays float32."""
    dtype = getattr(x, "dtype", np.dtype(np.float32))
    if dtype == np.float16:
        with np.errstate(over="ignore"):  # beyond float16's range is infinity, as everywhere in NumPy
            return out.astype(np.float16)
    if _is_bfloat16(dtype):
        return float_to_bfloat16(out).view(dtype)
    return out


def new_tokens(
    names: tuple[str, str],
    k: Any,
    v: Any,
    shape: tuple[int | None, ...],
    axes: str,
    layout: Layout,
    backend: Backend,
) -> tuple[Any, Any]:
    """New keys and values, of one shape in which None is any length, fit for the layout's formats.

    float32, or views of what lies on the backend's device: these are taken as they are, and nobody looks whether
    they are finite.
    """
    views = [_on_device(name, x, backend) for name, x in zip(names, (k, v), strict=True)]
    if (views[0] is None) != (views[1] is None):
        raise TypeError(
            f"{names[1]}: expected an array on the same device as {names[0]}; got a {type(v).__name__} "
            f"beside a {type(k).__name__}"
        )
    found: list[Any] = []
    for name, x, view, fmt in zip(
        names, (k, v), views, (layout.key_format, layout.value_format), strict=True
    ):
        array = float_array(name, x) if view is None else view
        check_shape(name, array, found[0].shape if found else shape, axes)
        if isinstance(array, np.ndarray):
            check_finite(name, array, fmt)
        found.append(array)
    return found[0], found[1]


def queries(
    argument: str,
    x: Any,
    shape: tuple[int | None, ...],
    axes: str,
    head_axis: int,
    num_kv_heads: int,
    backend: Backend,
) -> Any:
    """Queries of a shape in which None is any length, their heads a multiple of `num_kv_heads`.

    float32, or a view of what lies on the backend's device.
    """
    view = _on_device(argument, x, backend)
    array = float_array(argument, x) if view is None else view
    check_shape(argument, array, shape, axes)
    num_qo_heads = array.shape[head_axis]
    if num_qo_heads == 0 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"{argument}: expected a multiple of num_kv_heads={num_kv_heads} query heads; "
            f"got {num_qo_heads} in shape {array.shape}"
        )
    return array


def _on_device(argument: str, x: Any, backend: Backend) -> DeviceView | None:
    """A view of `x` where it lies on a GPU; raises where it cannot be used there, None where it is the host's."""
    view = device_view(x)
    if view is None:
        return None
    if backend.device is None:
        raise TypeError(
            f"{argument}: expected an array in host memory for the {backend.name} backend; "
            f"got a {type(x).__name__} on a GPU"
        )
    if view.device not in (None, backend.device):
        raise ValueError(
            f"{argument}: expected an array on GPU {backend.device}, where the {backend.name} backend works; "
            f"got one on GPU {view.device}"
        )
    if view.dtype not in DEVICE_DTYPES:
        raise TypeError(f"{argument}: expected {', '.join(DEVICE_DTYPES)} on a GPU; got {view.dtype}")
    if view.size and view.strides[-1] != 1 and view.shape[-1] != 1:
        raise ValueError(
            f"{argument}: expected adjacent elements along the last axis; got strides {view.strides} elements"
        )
    return view


def check_shape(argument: str, array: Any, shape: tuple[int | None, ...], axes: str) -> None:
    """Raise unless the shape is as expected, where None is any length."""
    fits = len(shape) == array.ndim and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(
            name if want is None else f"{name}={want}" for name, want in zip(axes.split(), shape, strict=True)
        )
        raise ValueError(f"{argument}: expected shape ({expected}); got {array.shape}")


def check_finite(argument: str, array: np.ndarray, fmt: Format) -> None:
    """Raise if a quantised format cannot hold a value: NaN, infinity, or beyond half of float32's range."""
    if not fmt.quantized:
        return
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.dot(flat, flat)  # one pass that allocates nothing
    if np.isfinite(squares):
        return
    outside = ~(np.abs(array) <= QUANTIZABLE_LIMIT)
    if outside.any():
        worst = array[outside][0]
        raise ValueError(
            f"{argument}: expected finite values up to {QUANTIZABLE_LIMIT:.2g} for {fmt.name}; got {worst}"
        )


F = TypeVar("F", bound=Callable[..., Any])


def also_called(**aliases: str) -> Callable[[F], F]:
    """Let a function be called with other names of its keyword arguments too: ``also_called(old="new")``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for alias, name in aliases.items():
                if alias in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{alias} is another name of {name}: give one of them")
                    kwargs[name] = kwargs.pop(alias)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


@functools.lru_cache(64)  # NumPy takes microseconds to name a dtype
def _is_bfloat16(dtype: Any) -> bool:
    return dtype == np.uint16 or getattr(dtype, "name", "") == "bfloat16"


def _real(argument: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: expected a number; got {type(value).__name__} {value!r}") from None
    if not np.isfinite(number):
        raise ValueError(f"{argument}: expected a finite number; got {number}")
    return number


def _per_head(argument: str, value: Any, num_qo_heads: int) -> np.ndarray:
    array = float_array(argument, value)
    check_shape(argument, array, (num_qo_heads,), "Hq")
    if not np.isfinite(array).all():
        raise ValueError(f"{argument}: expected finite values; got {array[~np.isfinite(array)][0]}")
    return np.ascontiguousarray(array)
