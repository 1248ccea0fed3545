"""Settings of every test: one thread (parity is exact only at a fixed thread count) and no hub."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Put the thread count back, whatever an earlier test did."""
    torch.set_num_threads(1)
