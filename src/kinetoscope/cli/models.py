"""`kinetoscope models`: what can be run."""

from __future__ import annotations

import argparse

NAME = "models"
HELP = "list the embedded models and the published ones that run by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """A table of models with task, default video and where they come from."""
    from kinetoscope.pipelines.catalogue import known_models

    rows = [("model", "tasks", "video", "steps", "guidance", "where", "status")]
    for model in known_models():
        p = model.defaults
        video = f"{p.height}x{p.width}, {p.num_frames} frames"
        guidance = "" if p.guidance_scale is None else f"{p.guidance_scale:g}"
        tasks, steps = ",".join(model.tasks), str(p.num_inference_steps)
        rows.append((model.name, tasks, video, steps, guidance, model.where, model.status))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
