"""Which backend a cache gets."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import kvnumba
from kvnumba.backends import registry


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("KVNUMBA_BACKEND", raising=False)


def made(**options):
    return kvnumba.KVCache(1, 4, 1, 8, **options).backend


def test_argument_before_context_before_variable_before_auto(monkeypatch):
    assert made() == kvnumba.available_backends()[0]
    monkeypatch.setenv("KVNUMBA_BACKEND", "numpy")
    assert made() == "numpy"
    with kvnumba.use_backend("cpu"):
        assert made() == "cpu"
        assert made(backend="numpy") == "numpy"
        with kvnumba.use_backend("numpy"):
            assert made() == "numpy"
        assert made() == "cpu"
        with kvnumba.use_backend("auto"):
            assert made() == kvnumba.available_backends()[0]
    assert made() == "numpy"
    assert made(backend="auto") == kvnumba.available_backends()[0]


def test_the_variable_is_read_when_a_cache_is_made(monkeypatch):
    for name in ("numpy", "cpu", "numpy"):
        monkeypatch.setenv("KVNUMBA_BACKEND", name)
        assert made() == name
    monkeypatch.setenv("KVNUMBA_BACKEND", "")
    assert made() == kvnumba.available_backends()[0]


def test_unknown_names(monkeypatch):
    valid = "expected one of cuda, cpu, numpy, auto"
    with pytest.raises(ValueError, match=f"backend: {valid}; got 'tpu'"):
        made(backend="tpu")
    with pytest.raises(ValueError, match=f"use_backend: {valid}; got 'CPU'"):
        kvnumba.use_backend("CPU")
    monkeypatch.setenv("KVNUMBA_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"KVNUMBA_BACKEND: {valid}; got 'gpu'"):
        made()


@pytest.mark.skipif("cuda" in kvnumba.available_backends(), reason="there is a GPU")
def test_what_was_asked_for_and_cannot_run(monkeypatch):
    reason = "numba-cuda is not installed|no CUDA device answers"
    with pytest.raises(kvnumba.BackendUnavailable, match=reason):
        made(backend="cuda")
    with pytest.raises(kvnumba.BackendUnavailable, match=reason):
        kvnumba.use_backend("cuda")
    monkeypatch.setenv("KVNUMBA_BACKEND", "cuda")
    with pytest.raises(kvnumba.BackendUnavailable, match=reason):
        made()
    assert "cuda" not in kvnumba.available_backends()


def test_auto_passes_the_simulator_over():
    script = (
        "import kvnumba; assert kvnumba.KVCache(1, 4, 1, 8, backend='cuda').backend == 'cuda';"
        "print(kvnumba.KVCache(1, 4, 1, 8).backend, 'cuda' in kvnumba.available_backends())"
    )
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    environment.pop("KVNUMBA_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["cpu", "False"]


def test_a_backend_whose_import_fails(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "cpu", "kvnumba.backends.no_such_module:Backend")
    registry._attempt.cache_clear()
    try:
        with pytest.raises(
            kvnumba.BackendUnavailable, match="the cpu backend cannot be imported: No module named"
        ):
            made(backend="cpu")
        assert kvnumba.available_backends() == ("numpy",)
        assert made() == "numpy"
    finally:
        registry._attempt.cache_clear()


def test_a_new_backend_is_a_row(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "mine", "kvnumba.backends.numpy:NumpyBackend")
    assert made(backend="mine") == "numpy"
    assert "mine" in kvnumba.available_backends()


def test_importing_the_package_loads_numpy_only():
    script = (
        "import sys, kvnumba; kvnumba.KVCache(1, 4, 1, 8, backend='numpy');"
        "print([m for m in ('numba', 'llvmlite', 'torch', 'tqdm', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_on_the_host(monkeypatch):
    """A GPU that answers is not for whoever keeps arrays in host memory."""
    backends = {
        name: SimpleNamespace(name=name, device=device) for name, device in (("cuda", 0), ("cpu", None))
    }
    monkeypatch.setattr(registry, "available_backends", lambda: tuple(backends))
    monkeypatch.setattr(registry, "_load", backends.__getitem__)
    assert registry.get_backend("auto").name == "cuda"
    assert registry.get_backend("auto", on_host=True).name == "cpu"
    assert registry.get_backend("cuda", on_host=True).name == "cuda"


def test_one_object_serves_several_blocks():
    choice = kvnumba.use_backend("numpy")
    with choice:
        assert made() == "numpy"
    with kvnumba.use_backend("auto"):
        for _ in range(2):
            with choice:
                assert registry.chosen_name() == "numpy"
                with choice:
                    assert registry.chosen_name() == "numpy"
                assert registry.chosen_name() == "numpy"
            assert registry.chosen_name() == "auto"
