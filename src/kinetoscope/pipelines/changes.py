"""What a program changed on a pipeline after it was opened.

Other processes open the model by themselves and have none of it, and a replay record cannot hold it; so both say what
it is instead of leaving it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.pipelines.composed import ComposedPipeline

SAMPLED = 4096
"""Elements of a parameter that its fingerprint reads, at even distances."""


class PipelineSnapshot:
    """The stages, strategies, hooks and modules of a pipeline as they are now; `changes` compares them with later.

    Args:
        pipeline: opened, with everything that its own settings add.
        weights: remember the weights of modules that are loaded now or later, so that changes in place are seen.
    """

    def __init__(self, pipeline: ComposedPipeline, *, weights: bool = False) -> None:
        self._pipeline = pipeline
        self._stages = {name: (stage, dict(vars(stage))) for name, stage in pipeline.stages.items()}
        self._own = {k: v for k, v in vars(pipeline).items() if k not in _KEPT_APART}
        self._hooks = pipeline.hooks
        self._loaded: dict[str, dict[str, Tensor]] = {}
        if weights:
            self._loaded = {name: _fingerprint(module) for name, module in pipeline.loaded_modules().items()}
            pipeline.load_listeners.append(self._take)
        self._listeners = tuple(pipeline.load_listeners)

    def changes(self, *, weights: bool = False) -> list[str]:
        """Return what differs by now, one phrase each, such as "stage 'latents' (replaced)".

        Args:
            weights: compare the weights of loaded modules too, which reads some elements of each parameter.
        """
        pipeline = self._pipeline
        found = self._stage_changes()
        now = {k: v for k, v in vars(pipeline).items() if k not in _KEPT_APART}
        found += [f"pipeline.{name}" for name in _differing(self._own, now)]
        if pipeline.hooks != self._hooks:
            names = ", ".join(h.name for h in pipeline.hooks if h not in self._hooks)
            found.append(f"pipeline.hooks ({names or 'removed'})")
        if tuple(pipeline.load_listeners) != self._listeners:
            found.append("pipeline.load_listeners")
        if weights:
            for name, module in pipeline.loaded_modules().items():
                if name in self._loaded and not _same(self._loaded[name], _fingerprint(module)):
                    found.append(f"weights of {name!r}")
        return found

    def _stage_changes(self) -> list[str]:
        stages = self._pipeline.stages
        found = [f"stage {name!r} (removed)" for name in self._stages if name not in stages]
        for name, stage in stages.items():
            if name not in self._stages:
                found.append(f"stage {name!r} (added)")
                continue
            then, attributes = self._stages[name]
            if stage is not then:
                found.append(f"stage {name!r} (replaced)")
                continue
            found += [f"{a.lstrip('_')} of stage {name!r}" for a in _differing(attributes, vars(stage)) if a != "hooks"]
        if not found and list(stages) != list(self._stages):
            found.append("the order of the stages")
        return found

    def _take(self, name: str, module: Any) -> None:
        self._loaded[name] = _fingerprint(module)


_KEPT_APART = ("_stages", "_hooks", "_modules", "load_listeners", "snapshot")


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names whose values are other objects, and not equal numbers or texts."""
    missing = object()

    def same(a: Any, b: Any) -> bool:
        return a is b or (isinstance(a, (str, int, float)) and type(a) is type(b) and a == b)

    return [name for name in [*then, *(now.keys() - then.keys())] if not same(then.get(name), now.get(name, missing))]


def _fingerprint(module: Any) -> dict[str, Tensor]:
    """Return parameter or buffer -> elements of it on the CPU; nothing for what is no network."""
    if not isinstance(module, nn.Module):
        return {}
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: _sampled(value.detach()) for name, value in named if value.numel() and not value.is_meta}


def _sampled(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].to("cpu", copy=True)


def _same(then: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    return then.keys() == now.keys() and all(torch.equal(then[k], now[k]) for k in then)
