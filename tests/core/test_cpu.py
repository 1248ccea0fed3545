"""The level of a CPU: how it is detected, and that the libraries' own switches lower it and its kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import cpus
from kinetoscope.core import cpu
from kinetoscope.core.cpu import LIBRARY_SWITCHES, CpuLevel, cpu_level, detect_cpu_level, override_cpu_level

SLICE = ("attention/test_attention.py", "models/test_nn.py", "models/test_wan.py")
"""Tests that `make test` runs at a lower level, too; `make test-cpus` runs nearly all."""
DETECT = "from kinetoscope.core.cpu import cpu_level; print(cpu_level().name)"


@pytest.mark.parametrize("level", CpuLevel)
def test_override_changes_the_level_for_its_block(level: CpuLevel) -> None:
    before = cpu_level()
    with pytest.raises(KeyError), override_cpu_level(level):
        assert cpu_level() is level
        raise KeyError
    assert cpu_level() is before


@pytest.mark.parametrize(
    ("capability", "bf16", "amx", "limit", "expected"),
    [
        ("DEFAULT", False, False, "", CpuLevel.BASE),
        ("AVX2", False, False, "", CpuLevel.AVX2),
        ("AVX512", False, False, "", CpuLevel.AVX512),
        ("AVX512", True, False, "", CpuLevel.AVX512_BF16),
        ("AVX512", True, True, "", CpuLevel.AMX),
        ("AVX512", True, True, "ALL", CpuLevel.AMX),
        ("AVX512", True, True, "AVX512_CORE_AMX", CpuLevel.AMX),
        ("AVX512", True, True, "AVX512_CORE_BF16", CpuLevel.AVX512_BF16),
        ("AVX512", True, True, "AVX512_CORE", CpuLevel.AVX512),
        ("AVX2", True, True, "", CpuLevel.AVX2),
    ],
)
def test_level_is_the_lowest_that_processor_and_switches_allow(
    monkeypatch: pytest.MonkeyPatch, capability: str, bf16: bool, amx: bool, limit: str, expected: CpuLevel
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(cpu, "ONEDNN_BFLOAT16", capability.startswith("AVX512"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert detect_cpu_level() is expected
    if capability == "AVX512":
        monkeypatch.setattr(cpu, "ONEDNN_BFLOAT16", False)
        assert detect_cpu_level() is CpuLevel.AVX2, "oneDNN is held below"


@pytest.mark.parametrize("level", [level for level in CpuLevel if level <= cpu_level()])
def test_library_switches_lower_a_process_to_the_level(level: CpuLevel) -> None:
    environment = {**os.environ, **LIBRARY_SWITCHES[level]}  # noqa: TID251 - of the process that is started
    command = [sys.executable, "-c", DETECT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [level.name], done.stderr


@pytest.mark.parametrize("level", [CpuLevel.AVX2, CpuLevel.AMX])
def test_kernels_agree_at_another_level(level: CpuLevel) -> None:
    """A slice of `make test-cpus`: the kernels of a CPU below, and the choices of one above."""
    if level == cpu_level():
        pytest.skip("this CPU is of that level")
    tests = [str(cpus.ROOT / "tests" / path) for path in SLICE]
    command, environment, _ = cpus.command_of(level, ["-m", "not slow and not gpu", *tests])
    done = subprocess.run(
        command, env=environment, cwd=cpus.ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout
