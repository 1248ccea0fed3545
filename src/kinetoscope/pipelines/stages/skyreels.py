"""Stages of SkyReels-V2 diffusion forcing: the plan of windows, their first noise, the given images."""

from __future__ import annotations

from typing import Any

import torch

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.models.skyreels.forcing import plan_forcing
from kinetoscope.models.skyreels.strategy import ForcingInputs
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.images import encode_video
from kinetoscope.pipelines.stages.validation import InputValidationStage, VideoGeometry


class ForcingValidationStage(InputValidationStage):
    """Checks the whole request and fills `family` with the plan of its windows.

    Args:
        geometry: of the model.
        block: causal block size of the model's configuration.
    """

    optional = False  # it makes the plan that later stages follow

    def __init__(self, geometry: VideoGeometry, block: int) -> None:
        super().__init__(geometry, keeps_image=True)
        self.block = block

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch with `family`.

        Raises:
            InputError: as of all requests, or its parameters do not fit (see `plan_forcing`), or a last image comes
                without a first.
        """
        batch = super().forward(batch, args)
        assert batch.params.num_frames is not None
        if batch.last_image is not None and batch.image is None:
            raise InputError("last_image needs an image too: it says where the video ends, image where it starts")
        if batch.video is not None and batch.image is not None:
            raise InputError("image and video are both where the result starts; give one of them")
        plan = plan_forcing(
            batch.params.extra,
            batch.params.num_frames,
            temporal=self.geometry.temporal,
            default_block=self.block,
            ends=0 if batch.last_image is None else 1,
            continues=batch.video is not None,
        )
        if batch.video is not None and batch.video.shape[2] < plan.history:
            raise InputError(f"the video has {batch.video.shape[2]} frames, fewer than overlap_history={plan.history}")
        batch.family = ForcingInputs(plan)
        return batch


class ForcingLatentStage(Stage):
    """Fills `latents` with the noise of the first window, and what is given: `condition`, and `family.end`.

    Args:
        geometry: pixels to latents.
        channels: latent channels C.
        vae: encodes images and videos, or lazy.
    """

    def __init__(self, geometry: VideoGeometry, channels: int, vae: Any | Lazy[Any]) -> None:
        self.geometry = geometry
        self.channels = channels
        self._vae = vae

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `latents` [B, C, T, H, W] float32 on the CPU, T the frames of the first window.

        Raises:
            InputError: given latents have another shape or hold values that are not finite.
        """
        params, inputs = batch.params, batch.family
        assert isinstance(inputs, ForcingInputs) and params.num_frames and params.height and params.width
        _, height, width = self.geometry.latent_size(params.num_frames, params.height, params.width)
        shape = (self.channels, inputs.plan.windows[0], height, width)
        batch.noise = NoiseSource(batch.seeds)
        if batch.latents is None:
            batch.latents = batch.noise.draw(shape)
        if tuple(batch.latents.shape) != (batch.size, *shape) or not torch.isfinite(batch.latents).all():
            raise InputError(
                f"latents have shape {tuple(batch.latents.shape)}; the first window of this request needs finite "
                f"values of shape {(batch.size, *shape)}"
            )
        if batch.image is not None:
            batch.condition = encode_video(resolve(self._vae), batch.image.unsqueeze(2).to(args.device))
        if batch.video is not None:
            plan = inputs.plan
            given = encode_video(resolve(self._vae), batch.video[:, :, -plan.history :].to(args.device))
            batch.condition = given[:, :, : plan.overlap - plan.overlap % plan.block]
        if batch.last_image is not None:
            end = encode_video(resolve(self._vae), batch.last_image.unsqueeze(2).to(args.device))
            batch.family = ForcingInputs(inputs.plan, end)
        return batch
