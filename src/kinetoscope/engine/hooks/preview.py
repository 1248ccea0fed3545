"""Small pictures of a run while it is running, from latents by a linear map: no decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ForwardBatch
from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.protocols import Step, StrategyState


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """The colour of a latent position, as an affine function of its channels; fitted for one VAE.

    Attributes:
        weight: [3, C] float32.
        bias: [3] float32; `weight @ latent + bias` is a colour in [-1, 1].
    """

    weight: Tensor
    bias: Tensor

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.weight.shape[1]

    def colours(self, latents: Tensor) -> Tensor:
        """Colours [B, 3, t, h, w] float32 of normalised latents [B, C, t, h, w]; about [-1, 1], not clipped."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        return torch.einsum("dc,bcthw->bdthw", weight, latents.float()) + bias.view(1, 3, 1, 1, 1)

    def frames(self, latents: Tensor) -> Any:
        """uint8 array [B, t, h, w, 3]: a pixel a latent position, a frame a latent frame."""
        pixels = self.colours(latents).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """What a step looks like.

    Attributes:
        step, count: index of the step in its run or block, and how many there are.
        block: index of the block, or None.
        frames: uint8 [B, t, h, w, 3].
        clean: whether it shows where the run is heading, or (where that is not known) the noisy sample itself.
    """

    step: int
    count: int
    block: int | None
    frames: Any
    clean: bool


class PreviewHook(Hook):
    """Calls back after each step with small frames of the clean sample that the step predicts.

    Runs without a scheduler of their own (frames at different noise levels) are shown as they are, noise and all.

    Args:
        preview_map: of the model's VAE.
        on_preview: called after a step with the preview and the request it is of.
        every: of so many steps one; the last of a run or block is always shown.

    Raises:
        ConfigError: `every` is not a positive number.
    """

    name: ClassVar[str] = "preview"
    order: ClassVar[int] = 30

    def __init__(
        self, preview_map: PreviewMap, on_preview: Callable[[Preview, ForwardBatch], None], every: int = 1
    ) -> None:
        if every < 1:
            raise ConfigError(f"a preview every {every} steps is not possible; use 1 or more")
        self.preview_map = preview_map
        self.on_preview = on_preview
        self.every = every

    def on_run_start(self, state: StrategyState) -> None:
        channels = state.latents.shape[1]
        if channels != self.preview_map.channels:
            raise ConfigError(
                f"the preview map is for {self.preview_map.channels} latent channels, this model has {channels}; "
                "fit one for its VAE with `kinetoscope fit-preview`"
            )

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        state.scratch[self] = state.latents.clone()  # some strategies move parts of a sample in place

    def on_step_end(self, state: StrategyState, step: Step) -> None:
        if step.index + 1 < step.count and (step.index % self.every or not _begins(state, step)):
            return
        found = clean_estimate(state, step, state.scratch[self])
        shown = state.latents if found is None else found
        frames = self.preview_map.frames(shown)
        self.on_preview(Preview(step.index, step.count, step.block, frames, clean=found is not None), state.batch)


def _begins(state: StrategyState, step: Step) -> bool:
    """Return whether an evaluation is the first of the solver's step: later ones may leave the sample as it is."""
    return state.scheduler is None or step.index in state.scheduler.starts


def clean_estimate(state: StrategyState, step: Step, before: Tensor) -> Tensor | None:
    """The clean sample [B, C, t, h, w] float32 that a finished step predicted at the sample `before`.

    What the step left as it was (given frames) is kept. None where the run has no schedule to tell the noise level, or
    the prediction is not of the sample's shape.
    """
    run, prediction = state.scheduler, step.guided
    if run is None or prediction is None or prediction.shape != before.shape or state.latents.shape != before.shape:
        return None
    clean = run.clean(prediction, step.index, before)
    return torch.where(state.latents == before, before, clean)
