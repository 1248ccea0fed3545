"""A generator that is one process of a layout, all of which do the same: what executors open in theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kinetoscope.loading import ModelDir
from kinetoscope.parallel import Groups
from kinetoscope.runtime.executors.choose import of_one
from kinetoscope.runtime.generator import VideoGenerator
from kinetoscope.runtime.lora import lora_specs
from kinetoscope.runtime.opening import open_pipeline


def rank_generator(
    model: ModelDir, groups: Groups, dtype: str | torch.dtype = "auto", options: Mapping[str, Any] | None = None
) -> VideoGenerator:
    """Open a model as one process of a layout; its first process writes the files of requests.

    Args:
        model: the directory.
        groups: this process's place; its device is used.
        dtype, options: as in `VideoGenerator.from_pretrained`.
    """
    given: dict[str, Any] = {
        "attention": "auto", "cfg": "auto", "text_mode": None, "cache": None, "compile": False, "quantize": None,
        "offload": None, "vae": "whole", "autocast": False, "perf_logging": None, "hooks": (), "modules": None,
        "threads": None, **(options or {}),
    }  # fmt: skip
    scheduler, lora = given.pop("scheduler", None), given.pop("lora", None)
    pipeline, kept = open_pipeline(model, groups.device, dtype, **given, groups=groups)
    generator = VideoGenerator(pipeline, {"scheduler": scheduler, **kept, "parallel": of_one(groups.config)}, groups)
    generator.defaults()
    for one in lora_specs(lora):
        generator.load_lora(**one)
    return generator
