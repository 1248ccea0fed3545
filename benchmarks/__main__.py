"""The benchmarks of one processor, results in benchmarks/results: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import RESULTS

SCRIPTS = (
    "attention",
    "engine_overhead",
    "launches",
    "executors",
    "vs_diffusers",
    "memory",
    "parallel_memory",
    "caches",
    "settings",
    "few_step",
    "play",
    "training",
)  # each in its own process, so that none warms up another


def main() -> int:
    """Run the scripts that are named, or all; the exit status is the first that is not zero."""
    if unknown := [name for name in sys.argv[1:] if name not in SCRIPTS]:
        sys.stderr.write(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(SCRIPTS)}\n")
        return 2
    for script in sys.argv[1:] or SCRIPTS:
        command = [sys.executable, "-m", f"benchmarks.{script}", "--json-out", str(RESULTS)]
        if status := subprocess.run(command, check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
