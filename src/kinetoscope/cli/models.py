"""`kinetoscope models`: what can be run."""

from __future__ import annotations

import argparse

NAME = "models"
HELP = "list embedded models and supported published ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """A table of models with task, default video and where they come from."""
    from rich.console import Console
    from rich.table import Table

    from kinetoscope.pipelines.presets import known_models

    table = Table(box=None, pad_edge=False)
    for column in ("model", "task", "video", "steps", "guidance", "where"):
        table.add_column(column, no_wrap=column == "model")
    for model in known_models():
        p = model.defaults
        video = f"{p.width}x{p.height}, {p.num_frames} frames"
        table.add_row(
            model.name, ", ".join(model.tasks), video, str(p.num_inference_steps), f"{p.guidance_scale:g}", model.where
        )
    Console().print(table)
    return 0
