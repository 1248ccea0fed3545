"""What a layout of devices does to a pipeline, and which layouts a model can have: checked before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kinetoscope.attention import approximates, named_backends
from kinetoscope.attention.dispatch import MIXING
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.engine.hooks import Hook
from kinetoscope.engine.hooks.cfg_parallel import CFGParallel
from kinetoscope.engine.hooks.sequence import SequenceParallel
from kinetoscope.loading import ModelDir
from kinetoscope.loading.components import shard_plan
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.sequence import SequenceShard
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import pipeline_class

HEADS = ("num_attention_heads", "num_heads")
"""What configurations of transformers call the number of heads."""
MOST_BRANCHES = 3
"""Branches that guidance evaluates at most."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A kind of parallelism and an option of the generator that are refused together.

    Attributes:
        degree: field of `ParallelConfig`.
        option: "NAME", or "NAME=VALUE|VALUE" where only some values conflict.
        why: they do.
    """

    degree: str
    option: str
    why: str


CONFLICTS: tuple[Conflict, ...] = (
    Conflict("cfg", "cfg=sequential|batched", "the branches are shared among devices"),
    Conflict("tp", "offload", "the shares of the weights are made as they load, and stay"),
    Conflict("fsdp", "offload", "the shares of the weights are made as they load, and stay"),
    Conflict("tp", "quantize", "a device's part of a layer would be rounded by scales of its own"),
    Conflict("fsdp", "quantize", "weights in 8 bits cannot be cut and gathered by rows"),
    Conflict("fsdp", "compile=reduce-overhead|max-autotune", "CUDA graphs replay addresses of weights, which move"),
)

MODEL_CONFLICTS: tuple[tuple[str, str, str], ...] = (
    ("parallel cfg", "models without an unconditional row (distilled), and more than three devices",
     "there are no more branches to share"),
    ("parallel ring", "causal Wan and sessions of Matrix-Game", "their K/V caches are of whole frames; use ulysses"),
    ("parallel ring", "a kind of attention that approximates, for a role that mixes tokens",
     "keys are in one place part after part; use ulysses"),
    ("parallel tp", "a transformer whose heads it does not divide", "a head is on one device; use ulysses"),
    ("parallel cfg with fsdp", "step caches", "branches leave out blocks of their own, and all must gather the same"),
    ("parallel vae", "other VAEs than those of Wan, HunyuanVideo (1.5), LTX and Cosmos, and LTX's that draws noise",
     "their layers are not known, or would differ by device"),
    ("parallel vae", "a VAE given by modules=", "other pipelines would share it out too"),
)  # fmt: skip
"""(degree, what it meets, why it is refused): where model and options are known; the message names both."""


def parallel_hooks(groups: Groups, kind: type[ComposedPipeline]) -> list[Hook]:
    """The hooks that share out the forwards of a layout.

    Args:
        groups: this process's place in it.
        kind: of the pipeline.

    Raises:
        CompositionError: a degree that the family has no scheme for.
    """
    hooks: list[Hook] = []
    if groups.cfg.size > 1:
        hooks.append(CFGParallel(groups.cfg, lockstep=groups.config.fsdp))
    if groups.sequence.size > 1:
        hooks.append(SequenceParallel(SequenceShard.of(groups)))
    return hooks


def check_layout(config: ParallelConfig, model: ModelDir, options: Mapping[str, Any]) -> None:
    """Refuse a layout that cannot work, before anything loads.

    Args:
        config: the layout.
        model: its directory.
        options: of `VideoGenerator.from_pretrained`, those that are set.

    Raises:
        ConfigError: heads that do not divide, or degrees beyond what there is to share.
        CompositionError: an option that a degree does not go together with; the message names both.
    """
    if config.cfg > MOST_BRANCHES:
        raise ConfigError(f"parallel: cfg={config.cfg}, but guidance has at most {MOST_BRANCHES} branches to share out")
    kind = pipeline_class(model)
    if config.cfg > 1 and not kind.guided:
        raise CompositionError(
            f"parallel cfg={config.cfg} and {model.name} cannot be used together: it is distilled and has one branch"
        )
    if config.ring > 1 and kind.streams:
        raise CompositionError(
            f"parallel ring={config.ring} and {model.name} cannot be used together: its K/V cache is of whole frames; "
            "use ulysses"
        )
    if config.cfg > 1 and config.fsdp and options.get("cache"):
        raise CompositionError(
            f"parallel cfg={config.cfg},fsdp=true and cache={options['cache']!r} cannot be used together: each branch "
            "decides for itself which blocks to leave out, and FSDP needs all devices to run the same ones"
        )
    for name in ("transformer", "transformer_2"):
        kind_of = str(model.components().get(name))
        if name in model.components() and (config.tp > 1 or config.fsdp) and shard_plan(kind_of) is None:
            degree = f"tp={config.tp}" if config.tp > 1 else "fsdp=true"
            raise CompositionError(
                f"parallel {degree} and {kind_of} cannot be used together: its family does not say how devices share "
                "its weights (register_transformer(..., plan=ShardPlan(...)))"
            )
        if name not in model.components() or config.tp == 1:
            continue
        values = model.config(name)
        heads = next((values[n] for n in HEADS if n in values), None)
        if isinstance(heads, int) and heads % config.tp:
            raise ConfigError(
                f"parallel: tp={config.tp} does not divide the {heads} attention heads of {model.name}'s {name}; "
                f"use {_nearest_divisor(heads, config.tp)}, or ulysses, which takes any number"
            )
    if config.ring > 1:
        _check_ring(config, options.get("attention") or "auto")
    for conflict in CONFLICTS:
        degree = config.as_dict().get(conflict.degree)
        name, _, wanted = conflict.option.partition("=")
        value = options.get(name)
        if degree is None or value is None or value is False or (wanted and value not in wanted.split("|")):
            continue
        raise CompositionError(
            f"parallel {conflict.degree}={str(degree).lower()} and {name}={value!r} cannot be used together: "
            f"{conflict.why}"
        )


def _check_ring(config: ParallelConfig, attention: str | Mapping[str, str]) -> None:
    """Ring computes softmax attention part by part: it has no place for what looks at all tokens, or approximates."""
    for role, backend in named_backends(attention, MIXING).items():
        if role in MIXING and approximates(backend):
            raise CompositionError(
                f"parallel ring={config.ring} and attention={backend!r} cannot be used together: keys are in one place "
                "part after part, and the parts are merged exactly; use ulysses"
            )


def check_devices(config: ParallelConfig, device: torch.device) -> None:
    """Refuse a layout of more GPUs than this machine has; the CPU carries any number of processes.

    Raises:
        ConfigError: says how many there are.
    """
    if device.type == "cuda" and config.world > torch.cuda.device_count():
        raise ConfigError(
            f"parallel {config} is a layout of {config.world} devices, and this machine has "
            f"{torch.cuda.device_count()}; several machines are for executor='ray' or 'torchrun'"
        )


def _nearest_divisor(heads: int, degree: int) -> str:
    """ "tp=4", or "tp=2 or 4": the divisors of `heads` around `degree`."""
    divisors = [d for d in range(1, heads + 1) if heads % d == 0]
    below = max(d for d in divisors if d < degree)
    above = [d for d in divisors if d > degree][:1]
    return "tp=" + " or ".join(str(d) for d in (below, *above))
