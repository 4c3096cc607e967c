"""One trip of new tokens through the layers: what every cache does to write and to attend."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvnumba.arrays import DeviceView, in_precision_of, is_bfloat16
from kvnumba.attention.cascade import split_prefixes
from kvnumba.backends.protocol import Backend
from kvnumba.options import AttentionOptions, Scoring, scoring_of
from kvnumba.storage import Batch, Buffers, Part


class Pass:
    """New tokens on their way through the layers: their batch, how to attend, and which layer is next.

    Internal: keys, values and queries come as views (B, n, heads, D), as `Backend` takes them, and are checked already.

    Parameters
    ----------
    backend : Backend
    buffers : Buffers
    batch : Batch
    widest_window : int, optional
        The widest window with which the tokens may attend, where tokens before it have been given back.
    written : bool
        Whether the batch's tokens are in all layers already: then the pass only attends.
    """

    def __init__(
        self,
        backend: Backend,
        buffers: Buffers,
        batch: Batch,
        widest_window: int | None = None,
        *,
        written: bool = False,
    ) -> None:
        self.batch = batch
        self.next_layer = buffers.layout.num_layers if written else 0
        self._backend = backend
        self._buffers = buffers
        self._widest_window = widest_window
        self._plans: dict[Any, Any] = {}

    @property
    def complete(self) -> bool:
        """Whether all layers are written."""
        return self.next_layer == self._buffers.layout.num_layers

    def covers(self, layer: int) -> bool:
        """Whether the tokens of a layer are written."""
        return layer < self.next_layer

    def require_next(self, layer: int) -> None:
        """Raise unless a layer is the next one to be written."""
        if layer != self.next_layer:
            due = "none, the pass is complete" if self.complete else f"layer {self.next_layer}"
            raise ValueError(f"layer: layers are written in order, next is {due}; got {layer}")

    def require_written(self, layer: int) -> None:
        """Raise unless the tokens of a layer are written."""
        if not self.covers(layer):
            raise ValueError(f"layer: the new tokens of layer {layer} have not been written yet")

    def write(self, layer: int, k: Any, v: Any) -> None:
        """Store the keys and values of the next layer."""
        self.require_next(layer)
        if k.size or v.size:
            self._backend.write(self._buffers, layer, k, v, self.batch)
        self.next_layer += 1

    def attend(
        self, layer: int, q: Any, out: Any, lse: Any, options: AttentionOptions, dtype: Any = None
    ) -> None:
        """Write the attention of q into views `out` (B, n, Hq, Dv) and `lse` (B, n, Hq).

        `dtype` is that of the queries as the user gave them, which decides about the arithmetic.
        """
        scoring = self._scoring(q, options, dtype)
        if not q.size:
            return
        self._backend.attend(layer, q, self._plan(q.shape[2], scoring), scoring, out, lse)

    def prepare(self, q: Any, options: AttentionOptions) -> None:
        """Do what `attend` does once for all layers, and once for all passes."""
        scoring = self._scoring(q, options, q.dtype)
        if q.size:
            self._backend.prepare(q, self._plan(q.shape[2], scoring), scoring)

    def _scoring(self, q: Any, options: AttentionOptions, dtype: Any) -> Scoring:
        scoring = scoring_of(options, q.shape[2], q.shape[3])
        widest = self._widest_window
        if widest is not None and not 0 <= scoring.window_left <= widest:
            raise ValueError(
                f"window_left: expected 0 to {widest}, earlier tokens may be given back; got {scoring.window_left}"
            )
        if self._backend.device is None:
            for name in ("sinks", "alibi_slopes"):
                if isinstance(getattr(scoring, name), DeviceView):
                    raise TypeError(
                        f"{name}: expected an array in host memory for the {self._backend.name} backend; "
                        f"got one on a GPU"
                    )
        return scoring.in_bfloat16 if dtype is not None and is_bfloat16(dtype) else scoring

    def _plan(self, num_qo_heads: int, scoring: Scoring) -> Any:
        # a shared prefix is attended without positions, so it cannot be combined with a window or ALiBi
        shared = scoring.window_left < 0 and scoring.alibi_slopes is None
        key = (num_qo_heads, scoring.window_left, shared)
        plan = self._plans.get(key)
        if plan is None:
            parts = [Part(self._buffers, self.batch)]
            limits = self._backend.cascade
            if shared and limits is not None and len(self.batch.seq_lens) > 1:
                parts = split_prefixes(self._buffers, self.batch, num_qo_heads, limits)
            plan = self._plans[key] = self._backend.plan(parts, num_qo_heads, scoring.window_left)
        return plan


def room_for_results(
    backend: Backend, query: Any, value_head_dim: int, options: AttentionOptions
) -> tuple[Any, Any]:
    """Room for the attention of checked queries (..., D) and for its lse: (..., Dv) and (...), where the queries are.

    On a GPU an lse that nobody asked for has no memory, and the address 0.
    """
    shape, rows = (*query.shape[:-1], value_head_dim), query.shape[:-1]
    if isinstance(query, DeviceView):
        out = backend.empty(query, shape, query.dtype)
        if options.get("return_lse"):
            return out, backend.empty(query, rows, "float32")
        return out, query.nowhere(rows, "float32")
    return np.empty(shape, np.float32), np.empty(rows, np.float32)


def as_returned(q: Any, out: Any, lse: Any, options: AttentionOptions) -> Any:
    """What an ``attend`` of the user's queries `q` returns, of what `room_for_results` made."""
    if isinstance(out, DeviceView):
        out, lse = out.owner, lse.owner
    else:
        out = in_precision_of(q, out)
    return (out, lse) if options.get("return_lse") else out


def read(
    backend: Backend, buffers: Buffers, layer: int, block_table: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as they were written, to the rounding of their formats; otherwise as `Backend.read`."""
    k, v = backend.read(buffers, layer, block_table, length)
    transform = buffers.layout.transform
    if transform is None:
        return k, v
    # the heads are the axis before the last where a transform sees them
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    return transform.load_keys(k, layer).swapaxes(1, 2), transform.load_values(v).swapaxes(1, 2)
