"""`make test-cpus`: the tests of everything that computes, as every kind of CPU runs them.

A level below this CPU's is a process whose libraries are held to it (`LIBRARY_SWITCHES`): its kernels are run. A level
above is chosen in a process (`--cpu-level`): the kernels are those of this CPU, as far as it has them. This CPU's own
level is what `make test` runs, and BASE chooses as AVX2 does; they are run when they are named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kinetoscope.core.cpu import LIBRARY_SWITCHES, CpuLevel, cpu_level

ROOT = Path(__file__).parent.parent
FOLDERS = ("attention", "core", "diffusion", "distributed", "engine", "evaluation", "loading", "models", "pipelines",
           "reference", "runtime", "train")  # fmt: skip
"""Folders of tests; what the others test does not depend on kernels."""
QUICK = ("-m", "not slow and not gpu and not distributed")


def command_of(level: CpuLevel, arguments: Sequence[str]) -> tuple[list[str], dict[str, str], str]:
    """Return the command and the environment that run pytest at a level, and how far they do."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ}  # noqa: TID251 - of the process that is started
    if level <= cpu_level():
        return command, {**environment, **LIBRARY_SWITCHES[level]}, "its kernels, by the libraries' switches"
    return [*command, "--cpu-level", level.name], environment, f"its choices, with kernels of {cpu_level().name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("levels", nargs="*", type=CpuLevel.__getitem__, help=", ".join(CpuLevel.__members__))
    asked: list[CpuLevel] = parser.parse_args().levels
    told: list[str] = [f"{cpu_level().name}: make test"]
    failed = False
    for level in asked or [level for level in CpuLevel if level not in (CpuLevel.BASE, cpu_level())]:
        tests = [str(ROOT / "tests" / folder) for folder in FOLDERS]
        command, environment, how = command_of(level, ["-n", "logical", *QUICK, *tests])
        print(f"-- {level.name}: {how}", flush=True)  # noqa: T201
        status = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
        failed = failed or status != 0
        told.append(f"{level.name}: {how}: {'failed' if status else 'passed'}")
    print("\n".join(told))  # noqa: T201
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
