"""Block sizes and kernels as on another GPU."""

import pytest

from moda_kernels import tuning


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(tuning, "shared_memory", lambda device: 232_448)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    tuning.forward_two_kernels.cache_clear()
    yield
    tuning.forward_two_kernels.cache_clear()
