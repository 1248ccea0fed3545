"""What HunyuanVideo does differently in a run: guidance is embedded, text comes with a pooled vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.guidance import COND, Guidance
from kinetoscope.engine.protocols import StrategyState, Tree
from kinetoscope.engine.strategies.standard import StandardStrategy, stack_text


@dataclass(slots=True)
class HunyuanInputs:
    """What a HunyuanVideo run needs beyond the common fields of a batch.

    Attributes:
        pooled: [B, P] pooled CLIP text of the prompts.
        negative_pooled: the same for the negative prompts; None where no classifier-free guidance is asked for.
    """

    pooled: Tensor
    negative_pooled: Tensor | None = None


def true_cfg_scale(batch: ForwardBatch) -> float:
    """Scale of classifier-free guidance; `guidance_scale` is the embedded one."""
    return float((batch.params.extra or {}).get("true_cfg_scale", 1.0))


class HunyuanStrategy(StandardStrategy):
    """Standard steps. `guidance_scale` is an input of the network; `true_cfg_scale` above 1 adds unconditional rows."""

    def make_guidance(self, batch: ForwardBatch) -> Guidance:
        """Of `true_cfg_scale`."""
        return Guidance.make(true_cfg_scale(batch), batch.params.guidance_rescale or 0.0, batch.params.guidance)

    def prepare_conditioning(
        self, batch: ForwardBatch, args: ExecutionArgs, branches: tuple[str, ...]
    ) -> dict[str, Tree]:
        """Text with its true lengths, pooled text, embedded guidance."""
        given = batch.family
        assert isinstance(given, HunyuanInputs)
        embeds, lengths = stack_text(batch, branches)
        pooled = [given.pooled if b == COND else given.negative_pooled for b in branches]
        transformer: Any = self.parts.transformer
        guidance = None
        if transformer.config.guidance_embeds:
            scale = 1.0 if batch.params.guidance_scale is None else batch.params.guidance_scale
            guidance = torch.full((len(embeds),), 1000.0 * scale, device=args.device)
        return transformer.prepare_conditioning(
            encoder_hidden_states=embeds.to(args.device, args.dtype),
            text_lengths=lengths,
            pooled_projections=torch.cat([p for p in pooled if p is not None]).to(args.device, args.dtype),
            guidance=guidance,
        )


class HunyuanFirstFrameStrategy(HunyuanStrategy):
    """Image-to-video by "token_replace": the first latent frame is `batch.condition` [B, C, 1, h, w], never moved."""

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """The image's latents into the first frame."""
        state = super().prepare(batch, args)
        assert batch.condition is not None
        state.latents = torch.cat([batch.condition.to(state.latents), state.latents[:, :, 1:]], dim=2)
        return state

    def model_latents(self, state: StrategyState) -> Tensor:
        """The sample; the condition is in it."""
        return state.latents

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """A step of all frames but the first."""
        moved = super().scheduler_step(state, noise_pred, t)
        return torch.cat([state.latents[:, :, :1], moved[:, :, 1:]], dim=2)
