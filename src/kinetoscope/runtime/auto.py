"""`parallel="auto"`: the layout for a model, a video and the devices that are here, and why."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kinetoscope.core.config import launch
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.spec import one_of, parse_spec
from kinetoscope.core.types import ExecutionArgs, SamplingParams
from kinetoscope.loading import ModelDir
from kinetoscope.parallel import ParallelConfig
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.runtime.accelerators import ACCELERATORS, MAX_FIGURE, Accelerator
from kinetoscope.runtime.device import resolve_device, resolve_dtype
from kinetoscope.runtime.layouts import choose
from kinetoscope.runtime.parallel import check_layout
from kinetoscope.runtime.workload import workload

AUTO = "auto"
KNOWN = ("size", "frames", "devices")
LESS = ("quantize", "offload")
"""Options with which a device holds less than the cost model counts."""

logger = logging.getLogger(__name__)


def is_auto(parallel: Any) -> bool:
    """Whether a layout is to be chosen: "auto", or "auto:size=480x832,frames=81,devices=4"."""
    return isinstance(parallel, str) and parallel.partition(":")[0].strip() == AUTO


def auto_layout(
    text: str,
    model: ModelDir,
    device: str | torch.device,
    dtype: str | torch.dtype,
    options: Mapping[str, Any],
) -> ParallelConfig:
    """The fastest layout for one video that fits the devices and goes with the options; why is logged.

    Args:
        text: "auto" and, if wanted, `size` (height x width) and `frames` of the video (else the model's defaults) and
            `devices` (else those that torchrun started, or the GPUs of this machine; on the CPU one).
        model: its directory; only configurations are read.
        device: a kind of device; one with an index is alone.
        dtype: the transformer computes in.
        options: of `VideoGenerator.from_pretrained`.

    Raises:
        InputError: the text or the size is wrong.
        ConfigError: no layout fits, or the number of devices is none.
    """
    given = parse_spec(text, "parallel")[1]
    for name in given:
        one_of(name, KNOWN, "setting of parallel=auto")
    request = SamplingParams(**_size(given), num_frames=_number(given, "frames"))
    place = resolve_device(device)
    devices = _number(given, "devices") or _devices_here(place)
    started = launch()
    say: Callable[[str], None] = logger.info if started is None or started.rank == 0 else logger.debug
    if devices == 1:
        say(f"parallel auto: one {place.type.upper()} device, so nothing is shared out")
        return ParallelConfig()
    kind = resolve_dtype(dtype, place)
    args = ExecutionArgs(place, kind, cfg=str(options.get("cfg") or "auto"))
    work = workload(build_pipeline(model, args), request, vae=str(options.get("vae") or "whole"))
    here = accelerator_here(place, devices)
    if other := [name for name in LESS if options.get(name)]:
        say(f"parallel auto: {' and '.join(other)} leaves less on a device than is counted here, so all layouts fit")
        here = replace(here, memory_gb=MAX_FIGURE)
    choice = choose(devices, work, here, allowed=refuses(model, options))
    best = choice.best
    for line in choice.explain():
        say(f"parallel auto: {line}")
    return best.config


def refuses(model: ModelDir, options: Mapping[str, Any]) -> Callable[[ParallelConfig], str | None]:
    """What says why a layout does not go with a model and options; None: it does."""

    def why(config: ParallelConfig) -> str | None:
        try:
            check_layout(config, model, options)
        except (ConfigError, CompositionError) as error:
            return str(error).removeprefix("parallel: ").removeprefix("parallel ")
        return None

    return why


def accelerator_here(device: torch.device, devices: int = 1) -> Accelerator:
    """What the devices of this machine are on paper, with the memory that they have.

    Args:
        devices: on the CPU, those that share the machine's memory.
    """
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
        return replace(ACCELERATORS["cpu"], memory_gb=memory / 1e9, node=devices)
    found = torch.cuda.get_device_properties(device)
    known = next((a for n, a in ACCELERATORS.items() if n in found.name.lower()), None)
    node = max(1, torch.cuda.device_count())
    if known is None:
        unknown = f"{found.name} is not in the table: rates of an A100"
        return replace(
            ACCELERATORS["a100"], name=found.name, memory_gb=found.total_memory / 1e9, node=node, source=unknown
        )
    return replace(known, memory_gb=found.total_memory / 1e9, node=node)


def _devices_here(device: torch.device) -> int:
    if (started := launch()) is not None:
        return started.world
    return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1


def _number(given: Mapping[str, str], name: str) -> int | None:
    if name not in given:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", given[name]) or int(given[name]) < 1:
        raise ConfigError(f"parallel=auto: {name}={given[name]} is not a positive whole number")
    return int(given[name])


def _size(given: Mapping[str, str]) -> dict[str, Any]:
    if "size" not in given:
        return {}
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", given["size"])
    if found is None:
        raise ConfigError(f"parallel=auto: size={given['size']} is not HEIGHTxWIDTH")
    return {"height": int(found[1]), "width": int(found[2])}
