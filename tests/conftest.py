"""What every test shares: no network, and one thread, because tests run beside each other."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Also after a test that asked for more (`--cpu_threads`)."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
