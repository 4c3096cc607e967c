"""Kernels become code for GPUs that need not be there: numba-cuda and NVVM are enough."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SIMULATED

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
if SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from numba import cuda
from numba.cuda import dispatcher

from kvnumba.backends.cuda import attend, copy, decode, mass, merge, mods, prefill, read, registered, write
from kvnumba.backends.cuda.codecs import Codec
from kvnumba.backends.cuda.transforms import NONE, Transform
from kvnumba.codecs import register_format
from kvnumba.formats import FORMATS, REGISTERED
from kvnumba.options import Scoring

CAPABILITIES = [(8, 0), (9, 0)]


@pytest.fixture(params=CAPABILITIES, ids=["sm_80", "sm_90"])
def compile_kernel(request, monkeypatch):
    """A kernel's PTX for a compute capability."""
    device = SimpleNamespace(compute_capability=request.param)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    for factory in (
        attend.attend_kernel,
        mass.mass_kernel,
        decode.decode_kernel,
        prefill.prefill_kernel,
        write.write_kernel,
        read.read_kernel,
        copy.copy_kernel,
        merge.merge_kernel,
    ):
        factory.cache_clear()

    def compile_ptx(kernel):
        try:
            return cuda.compile_ptx(kernel.function, kernel.signature, cc=request.param, **kernel.options)[0]
        except RuntimeError as error:
            if "libnvvm" in str(error).lower():
                pytest.skip(f"NVVM is not installed: {error}")
            raise

    return compile_ptx


def decode_of_one(kind, keys, values, *others):
    return decode.decode_kernel(kind, ((keys, values),), *others)


def check_matrix_kernel(ptx):
    assert "mma.sync" in ptx
    assert "ld.global.nc" in ptx
    assert ".f64" not in ptx
    assert ".local" not in ptx


TRANSFORMS = [NONE, Transform(128, 128, calibrated=True)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "transformed"])
@pytest.mark.parametrize("make", [decode_of_one, prefill.prefill_kernel], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("kind", "fmt", "scale"),
    [
        ("float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float16", "int8", "float32"),
        ("bfloat16", "int4", "float16"),
        ("float16", "fp8_e4m3", "float32"),
    ],
)
def test_matrix_kernels_stay_in_registers_and_out_of_float64(
    request, compile_kernel, make, kind, fmt, scale, transform
):
    codec = Codec(FORMATS[fmt], scale)
    if "sm_80" in request.node.name and codec.matrix.capability > (8, 0):
        pytest.skip(f"devices of this capability do not multiply {fmt}")
    check_matrix_kernel(compile_kernel(make(kind, codec, codec, 128, 128, True, transform)))


def test_two_parts_in_one_kernel(compile_kernel):
    codecs = tuple((Codec(FORMATS[fmt], "float16"),) * 2 for fmt in ("int4", "float16"))
    check_matrix_kernel(
        compile_kernel(decode.decode_kernel("float16", codecs, 128, 128, False, TRANSFORMS[1]))
    )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "transformed"])
@pytest.mark.parametrize(
    ("kind", "fmt", "scale", "width"),
    [
        ("float32", "float32", "float32", 4),
        ("float16", "int8", "float16", 2),
        ("bfloat16", "int4", "float32", 4),
        ("float32", "fp8_e4m3", "float32", 4),
    ],
)
def test_the_other_kernels_too(compile_kernel, kind, fmt, scale, width, transform):
    codec = Codec(FORMATS[fmt], scale)
    for kernel in (
        attend.attend_kernel(4, kind, width, codec, width, codec, width, transform, None),
        mass.mass_kernel(4, kind, width, codec, width, transform, None),
        write.write_kernel(kind, kind, codec, codec, width, transform),
        read.read_kernel(codec, width),
        copy.copy_kernel(),
        merge.merge_kernel(kind, width),
    ):
        ptx = compile_kernel(kernel)
        assert ".f64" not in ptx
        assert ".local" not in ptx


def alibi(score, q_head, q_pos, kv_pos, slopes, rate):
    return rate * score - slopes[q_head] * np.float32(q_pos - kv_pos)


def document(q_head, q_pos, kv_pos, documents, rate):
    return documents[q_pos] == documents[kv_pos]


def soft_cap(score, q_head, q_pos, kv_pos):
    return 20.0 * math.tanh(score / 20.0)


def halved(score):
    return score * 0.5


def much_of_numpy(score, q_head, q_pos, kv_pos):
    down = np.floor(score) + np.ceil(score) + np.trunc(score) + np.rint(score)
    power = np.exp(score) + np.exp2(score) + np.expm1(score) + np.power(np.abs(score), 0.5)
    return halved(down + power + np.sqrt(np.fabs(score)) + np.log1p(np.absolute(score)))


@pytest.mark.parametrize(
    "options",
    [
        {"score_mod": alibi, "aux": (np.ones(4), 0.5)},
        {"mask_mod": document, "aux": (np.zeros(100, np.int32), 0.5)},
        {"score_mod": soft_cap},
        {"score_mod": much_of_numpy},
        {"mask_mod": lambda *where: where[1] > 3},
    ],
    ids=["ALiBi", "document", "soft cap", "functions of NumPy, and one's own", "any number of arguments"],
)
def test_users_functions(compile_kernel, options):
    """They are computed in float32, and what they are given besides is read where it lies."""
    codec = Codec(FORMATS["int8"], "float32")
    scoring = Scoring.of(4, 128, **options)
    change = mods.change_of(scoring, True)
    for kernel in (
        attend.attend_kernel(4, "float32", 4, codec, 4, codec, 4, NONE, change),
        mass.mass_kernel(4, "float32", 4, codec, 4, NONE, change),
    ):
        ptx = compile_kernel(kernel)
        assert ".f64" not in ptx
        assert ".local" not in ptx


def test_users_functions_that_do_not_compile(compile_kernel):
    def textual(score, q_head, q_pos, kv_pos):
        return score + float(f"{kv_pos}")

    with pytest.raises(
        ValueError, match=r"score_mod: textual \(test_compile.py, line \d+\) cannot be compiled.*: "
    ):
        mods.change_of(Scoring.of(4, 128, score_mod=textual), True)


LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def largest(x):
    size = abs(x[0])
    for value in x:
        size = max(size, abs(value))
    return size / 6.0


def nearest(value, scale):
    code = 0
    for n in range(1, 8):
        if abs(value) > scale * (LEVELS[n - 1] + LEVELS[n]) * 0.5:
            code = n
    return code | 8 if value < 0 else code


def fp4_encode(x, codes, scale):
    for n in range(len(codes)):
        codes[n] = nearest(x[2 * n], scale) << 4 | nearest(x[2 * n + 1], scale)


def fp4_decode(codes, x, scale):
    for i in range(len(x)):
        code = codes[i // 2] >> (4 if i % 2 == 0 else 0)
        x[i] = LEVELS[code & 7] * (-scale if code & 8 else scale)


def smallest(x):
    found = x[0]
    for value in x:
        found = min(found, value)
    return found


def rounded(x, codes, scale, zero):
    for i in range(len(x)):
        codes[i] = int(np.rint((x[i] - zero) / scale)) if scale > 0 else 0


def as_numbers(codes, x, scale, zero):
    for i in range(len(x)):
        x[i] = codes[i] * scale + zero


def all_zeros(x, codes):
    for i in range(len(codes)):
        codes[i] = 0


def zeros_again(codes, x):
    for i in range(len(x)):
        x[i] = codes[0]


@pytest.fixture
def format_of():
    """A format of some functions."""

    def register(bits, **functions):
        register_format("test_compiled", bits=bits, **functions)
        return REGISTERED.pop("test_compiled")

    return register


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        ("float16", {"bits": 4, "scale": largest, "encode": fp4_encode, "decode": fp4_decode}),
        ("float32", {"bits": 8, "scale": largest, "zero": smallest, "encode": rounded, "decode": as_numbers}),
        ("float32", {"bits": 1, "encode": all_zeros, "decode": zeros_again}),
    ],
    ids=["fp4", "scale and zero", "alone"],
)
def test_formats_of_users(compile_kernel, format_of, scale, options):
    """They are computed in float32 too."""
    codec = Codec(format_of(**options), scale)
    for kernel in (
        attend.attend_kernel(4, "float32", 4, codec, 32, codec, 4, NONE, None),
        mass.mass_kernel(4, "float16", 4, codec, 32, NONE, None),
        write.write_kernel("float32", "float32", codec, codec, 4, NONE),
        read.read_kernel(codec, 32),
    ):
        assert ".f64" not in compile_kernel(kernel)


def over_arrays(x, codes):
    codes[:] = np.minimum(np.maximum(np.rint(x * 16), 0), 255).astype(np.uint8)


def over_arrays_again(codes, x):
    x[:] = codes / 16


def test_formats_that_do_not_compile(compile_kernel, format_of):
    """Arrays cannot be made on a GPU."""
    fmt = format_of(8, encode=over_arrays, decode=over_arrays_again)
    with pytest.raises(
        ValueError, match=r"encode: over_arrays \(test_compile.py, line \d+\) cannot be compiled.*: "
    ):
        registered.functions_of(fmt.codec)


def test_what_is_encoded_is_rounded_as_numpy_rounds(compile_kernel):
    """A product and a sum are two roundings, and quotients are exact."""
    codec = Codec(FORMATS["int8"], "float32")
    for kernel in (
        read.read_kernel(codec, 4),
        write.write_kernel("float32", "float32", codec, codec, 4, NONE),
    ):
        ptx = compile_kernel(kernel)
        assert "fma.rn.f32" not in ptx
        assert "div.approx" not in ptx
        assert "div.full" not in ptx
