"""A generator as one process of a layout, without an executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinetoscope import VideoGenerator
from kinetoscope.parallel import Groups
from kinetoscope.runtime.opening import open_pipeline

OPTIONS: dict[str, Any] = {
    "attention": "auto", "cfg": "auto", "text_mode": None, "cache": None, "compile": False, "quantize": None,
    "offload": None, "vae": "whole", "autocast": False, "hooks": (), "perf_logging": None, "threads": None,
    "modules": None,
}  # fmt: skip


def open_among(groups: Groups | None, path: Path, **options: Any) -> VideoGenerator:
    """A generator in float32 on the CPU, in a layout or (None) alone."""
    pipeline, settings = open_pipeline(path, "cpu", "float32", groups=groups, **OPTIONS | options)
    return VideoGenerator(pipeline, {"scheduler": None, **settings})
