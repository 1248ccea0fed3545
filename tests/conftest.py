"""Settings of every test.

They are one thread (parity is exact only at a fixed thread count), one seed, a limit of time (`limits`), forks that do
not wait for threads of their parent (`forks`), and the level of the CPU by which kernels are chosen.
"""

from __future__ import annotations

import pytest
import torch

import forks
from kinetoscope.core.cpu import CpuLevel, cpu_level, detect_cpu_level, override_cpu_level

pytest_plugins = ["limits"]
torch.set_num_threads(1)
forks.register()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-level",
        choices=[level.name for level in CpuLevel],
        help="choose kernels as a CPU of this level does; the kernels stay those of this CPU",
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"CPU level: {cpu_level().name} chooses the kernels, those of {detect_cpu_level().name} run"


def pytest_configure(config: pytest.Config) -> None:
    """Set the level before tests are collected, since modules of tests ask for it."""
    if (chosen := config.getoption("--cpu-level")) is not None:
        override = override_cpu_level(CpuLevel[chosen])
        override.__enter__()
        config.add_cleanup(lambda: override.__exit__(None, None, None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Put back, before any fixture, the thread count and the generator that modules are initialised from."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # noqa: TID251 - what torch's own initialisation draws from
