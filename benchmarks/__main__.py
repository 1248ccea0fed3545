"""All benchmarks, results in benchmarks/results: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import RESULTS

SCRIPTS = ("attention", "engine_overhead", "vs_diffusers")  # each in its own process, so that none warms up another


def main() -> int:
    """Run each script; the exit status is the first that is not zero."""
    for script in SCRIPTS:
        command = [sys.executable, "-m", f"benchmarks.{script}", "--json-out", str(RESULTS)]
        if status := subprocess.run(command, check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
