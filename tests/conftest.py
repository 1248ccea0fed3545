"""Settings of every test: one thread (parity is exact only at a fixed thread count), one seed, and no hub."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Put back, before any fixture, the thread count and the generator that modules are initialised from."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # noqa: TID251 - what torch's own initialisation draws from
