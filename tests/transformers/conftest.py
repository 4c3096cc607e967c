"""Pools that leave room for the other processes on a GPU."""

import pytest
from conftest import ON_GPU


@pytest.fixture(autouse=True)
def a_small_share_of_the_gpu(monkeypatch):
    """On a GPU, let a test reserve a 50th of the free memory, not half: many may run on it at the same time."""
    if ON_GPU:
        pytest.importorskip("torch", reason="the transformers extra is not installed")
        pytest.importorskip("transformers", reason="the transformers extra is not installed")
        monkeypatch.setattr("kvnumba.integrations.transformers.settings.SHARE_OF_GPU", 0.02)
