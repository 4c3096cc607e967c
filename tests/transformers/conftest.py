"""Pools that leave room for the other processes on a GPU, torch on one thread, and the device of small models."""

import pytest
from conftest import ON_GPU
from small_models import DEVICE


@pytest.fixture(autouse=True)
def a_small_share_of_the_gpu(monkeypatch):
    """On a GPU, let a test reserve a 50th of the free memory, not half: many may run on it at the same time."""
    if ON_GPU:
        pytest.importorskip("torch", reason="the transformers extra is not installed")
        pytest.importorskip("transformers", reason="the transformers extra is not installed")
        monkeypatch.setattr("kvnumba.integrations.transformers.settings.SHARE_OF_GPU", 0.02)


@pytest.fixture(autouse=True, scope="session")
def one_thread_of_torch():
    """Small models are fastest so, and many times as fast where other processes use the machine."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    torch.set_num_threads(1)


@pytest.fixture
def models_and_tensors_are_on_the_device():
    """What torch makes in a test is on the device that is tested."""
    import torch

    with torch.device(DEVICE):
        yield
