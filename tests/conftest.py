"""Settings of every test.

They are one thread (parity is exact only at a fixed thread count), one seed, a limit of time (`limits`), forks that do
not wait for threads of their parent (`forks`), and the level of the CPU by which kernels are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import forks
from kinetoscope.core.cpu import CpuLevel, cpu_level, override_cpu_level

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
    chosen = config.getoption("--cpu-level")
    return f"CPU level: {cpu_level().name}" + (f", kernels chosen as for {chosen}" if chosen else "")


@pytest.fixture(scope="session", autouse=True)
def chosen_cpu_level(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = request.config.getoption("--cpu-level")
    with override_cpu_level(cpu_level() if chosen is None else CpuLevel[chosen]):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Put back, before any fixture, the thread count and the generator that modules are initialised from."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # noqa: TID251 - what torch's own initialisation draws from
