"""Kernels become code for GPUs that need not be there: numba-cuda and NVVM are enough."""

from types import SimpleNamespace

import pytest
from conftest import SIMULATED

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
if SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from numba import cuda
from numba.cuda import dispatcher

from kvnumba.backends.cuda import attend, copy, decode, prefill, read, write

CAPABILITIES = [(8, 0), (9, 0)]


@pytest.fixture(params=CAPABILITIES, ids=["sm_80", "sm_90"])
def compile_kernel(request, monkeypatch):
    """A kernel's PTX for a compute capability."""
    device = SimpleNamespace(compute_capability=request.param)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    for factory in (
        attend.attend_kernel,
        decode.decode_kernel,
        prefill.prefill_kernel,
        write.write_kernel,
        read.read_kernel,
        copy.copy_kernel,
    ):
        factory.cache_clear()

    def compile_ptx(kernel):
        try:
            return cuda.compile_ptx(kernel.function, kernel.kinds, cc=request.param, **kernel.options)[0]
        except RuntimeError as error:
            if "libnvvm" in str(error).lower():
                pytest.skip(f"NVVM is not installed: {error}")
            raise

    return compile_ptx


@pytest.mark.parametrize("make", [decode.decode_kernel, prefill.prefill_kernel])
@pytest.mark.parametrize(
    ("kind", "fmt"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "int8"), ("bfloat16", "int4")],
)
def test_matrix_kernels_stay_in_registers_and_out_of_float64(compile_kernel, make, kind, fmt):
    ptx = compile_kernel(make(kind, fmt, fmt, 128, True))
    assert "mma.sync" in ptx
    assert "ld.global.nc" in ptx
    assert ".f64" not in ptx
    assert ".local" not in ptx


@pytest.mark.parametrize(
    ("kind", "fmt", "width"), [("float32", "float32", 4), ("float16", "int8", 2), ("bfloat16", "int4", 4)]
)
def test_the_other_kernels_too(compile_kernel, kind, fmt, width):
    for kernel in (
        attend.attend_kernel(4, width, kind, fmt, fmt),
        write.write_kernel(kind, kind, fmt, fmt, width),
        read.read_kernel(fmt, width),
        copy.copy_kernel(),
    ):
        ptx = compile_kernel(kernel)
        assert ".f64" not in ptx
        assert ".local" not in ptx
