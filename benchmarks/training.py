"""What an update of a training costs, and what a setting of its recipe changes: `python -m benchmarks.training RECIPE`.

Two trainings of the recipe take turns in one process, the second one with other settings (`--with`), an update each.
Their products are counted once, in the first, and stand beside the peak of matrix products on this machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import environment, gemm_peak, pairs, report, seconds
from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.trainer import Trainer

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny_world_long.yaml"
START = ("models.student.init_from=tiny-world", "models.student.compile=false", "data.clips=256")
"""Over the recipe above: what is embedded, as it is, and few clips, whose latents are soon made."""
COMPARED = ("models.student.compile=true",)
WARM = 3  # updates of each that are not counted; the first of them compile


def opened(recipe: Path, overrides: Sequence[str], folder: Path) -> Trainer:
    """A training before its first update."""
    cache = () if any(o.startswith("data.cache=") for o in overrides) else (f"data.cache={folder}",)
    trainer = Trainer(load_post_recipe(recipe, [*overrides, *cache]), folder)
    trainer.prepare()
    return trainer


def measure(recipe: Path, given: Sequence[str], other: Sequence[str], threads: int, amount: int) -> dict[str, Any]:
    """Updates of the recipe with `given` and of the same with `other` besides."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (opened(recipe, o, Path(folder)) for o in (given, [*given, *other]))
        with FlopCounterMode(display=False) as counter:
            first.step(0)
        numbers = {id(first): count(1), id(second): count(0)}

        def update(trainer: Trainer) -> float:
            return seconds(lambda: trainer.step(next(numbers[id(trainer)])))

        for _ in range(WARM):
            update(first)
            update(second)
        taken = pairs(lambda: update(first), lambda: update(second), amount)
        low = first.recipe.loop.precision == "bfloat16"
        peak, flops = gemm_peak(torch.bfloat16 if low else torch.float32), counter.get_total_flops()
        return {
            "threads": threads,
            "precision": first.recipe.loop.precision,
            "gflop_an_update": flops / 1e9,
            "gemm_peak_gflops": peak / 1e9,
            "share_of_peak": {name: flops / taken[f"{name}_s"] / peak for name in ("first", "second")},
            "update": taken,
        }


def main() -> None:
    """One comparison for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE, help=f"default: {RECIPE.name}, made small")
    parser.add_argument("--set", action="append", dest="given", metavar="KEY=VALUE", help="settings of both")
    parser.add_argument("--with", action="append", dest="other", metavar="KEY=VALUE",
                        help=f"settings of the second (default: {' '.join(COMPARED)})")  # fmt: skip
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json-out", type=Path, help="file, or folder for training.json")
    options = parser.parse_args()
    given = [*(START if options.recipe == RECIPE else ()), *(options.given or ())]
    other = options.other or list(COMPARED)
    runs = [measure(options.recipe, given, other, threads, options.pairs) for threads in options.threads]
    facts = {"recipe": options.recipe.name, "settings": given, "second_with": other}
    report({"benchmark": "training", **environment(), **facts, "runs": runs}, "training", options.json_out)


if __name__ == "__main__":
    main()
