"""The foundation model of Matrix-Game 2: a whole video at once, by a scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.guidance import COND
from kinetoscope.engine.protocols import StrategyState, Tree
from kinetoscope.engine.strategies.matrix_game import Actions
from kinetoscope.engine.strategies.standard import StandardStrategy


class MatrixGameVideoStrategy(StandardStrategy):
    """Rows of the noisy sample, each with the image's features and condition latents and the actions of its frames."""

    def prepare_conditioning(
        self, batch: ForwardBatch, args: ExecutionArgs, branches: tuple[str, ...]
    ) -> dict[str, Tree]:
        """Keys and values of the image; condition and actions as they are.

        Raises:
            InputError: guidance is asked for; the image or the actions are missing.
        """
        if branches != (COND,):
            raise InputError("Matrix-Game has no unconditional row; use guidance_scale=1")
        if batch.image_embeds is None or batch.condition is None or not isinstance(batch.family, Actions):
            raise InputError("Matrix-Game needs image_embeds, condition and Actions in ForwardBatch.family")
        transformer: Any = self.parts.transformer
        image = transformer.prepare_conditioning(image_embeds=batch.image_embeds.to(args.device, args.dtype))
        given = {"condition": batch.condition, "keyboard": batch.family.keyboard, "mouse": batch.family.mouse}
        return image | {n: None if v is None else v.to(args.device, args.dtype) for n, v in given.items()}

    def model_latents(self, state: StrategyState) -> Tensor:
        """The sample alone; the network joins the condition itself."""
        return state.latents
