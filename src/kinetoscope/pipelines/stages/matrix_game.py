"""What a playable world asks of a request, and how its frames come out block by block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.engine.strategies.matrix_game import Actions
from kinetoscope.media.actions import ActionScript, load_actions, still
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import denormalize
from kinetoscope.pipelines.stages.validation import VideoGeometry, check_params

ACTIONS = "actions"
"""Name under which a request brings its action script (`SamplingParams.extra`): a path, or parsed JSON."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PlayValidationStage(Stage):
    """Checks the whole request; prompts are not read.

    Args:
        geometry: of the model.
        channels: of the latents.
        block: latent frames made together.
    """

    def __init__(self, geometry: VideoGeometry, channels: int, block: int) -> None:
        self.geometry = geometry
        self.channels = channels
        self.block = block

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch.

        Raises:
            InputError: a field out of range, frames that are no whole number of blocks, no image, or starting noise of
                another shape.
        """
        params = batch.params
        check_params(params, self.geometry)
        assert params.num_frames and params.height and params.width
        size = self.geometry.latent_size(params.num_frames, params.height, params.width)
        if size[0] % self.block:
            step = self.geometry.temporal * self.block
            low = params.num_frames - (params.num_frames + self.geometry.temporal - 1) % step
            near = " or ".join(str(n) for n in (low, low + step) if n > 0)
            raise InputError(
                f"num_frames={params.num_frames} is no whole number of blocks of {self.block} latent frames; "
                f"nearest: {near}"
            )
        if batch.size != len(batch.seeds):
            raise InputError(
                f"{batch.size} prompts and {len(batch.seeds)} seeds; there must be one of each for a video"
            )
        if batch.image is None:
            raise InputError("this model needs image=, the first frame of the world")
        if batch.latents is not None and tuple(batch.latents.shape) != (batch.size, self.channels, *size):
            expected = (batch.size, self.channels, *size)
            raise InputError(f"latents have shape {tuple(batch.latents.shape)}; this request needs {expected}")
        return batch


class ActionStage(Stage):
    """Reads the action script of the request into `Actions`, the same for all samples; without one nothing is done.

    The parameters keep the script itself in place of its path, so that a record of the request is complete.

    Args:
        layout: name of the model's action layout (`media.actions.LAYOUTS`).
    """

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with its actions in `family`, unless a program put them there.

        Raises:
            InputError: see `media.actions.load_actions`; or the script is shorter than the video.
        """
        params = batch.params
        assert params.num_frames
        if isinstance(batch.family, Actions):
            return batch
        extra = dict(params.extra or {})
        source = extra.get(ACTIONS)
        if source is None:
            script = still(self.layout, params.num_frames)
        else:
            script = load_actions(source, self.layout).first(params.num_frames)
            batch.params = replace(params, extra={**extra, ACTIONS: script.to_json()})
        batch.family = as_actions(script, batch.size)
        return batch


def as_actions(script: ActionScript, rows: int = 1) -> Actions:
    """The script for each of `rows` samples."""
    keyboard = torch.from_numpy(script.keyboard).expand(rows, -1, -1)
    mouse = None if script.mouse is None else torch.from_numpy(script.mouse).expand(rows, -1, -1)
    return Actions(keyboard, mouse)


class SquareImageFeatureStage(Stage):
    """Fills `image_embeds` with CLIP features of the image, squeezed to a square (bicubic, no smoothing), as published.

    Args:
        encoder: a CLIP vision model of transformers, or lazy; its second last hidden state is used.
    """

    def __init__(self, encoder: Any | Lazy[Any]) -> None:
        self._encoder = encoder

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `image_embeds` [B, N, D]."""
        assert batch.image is not None
        encoder = resolve(self._encoder)
        parameter, size = next(encoder.parameters()), encoder.config.image_size
        pixels = F.interpolate(batch.image.float(), (size, size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        pixels = (pixels.cpu() * 0.5 + 0.5 - mean) / std
        batch.image_embeds = encoder(pixels.to(parameter), output_hidden_states=True).hidden_states[-2]
        return batch


class FrameDecoder:
    """Latents to frames a few at a time: the same frames as decoding them all at once, for one stream.

    Wan's VAE is causal in time; what its convolutions need of earlier frames is kept here, one decoder a stream.

    Args:
        vae: diffusers' `AutoencoderKLWan`.

    Raises:
        InputError: a VAE that decodes patches, as Wan 2.2's; its parts are not put together here.
    """

    def __init__(self, vae: Any) -> None:
        if vae.config.patch_size is not None:
            raise InputError(f"streams need a VAE without patches; this one has patch_size={vae.config.patch_size}")
        self.vae = vae
        self._past: list[Any] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """One uint8 array [T, H, W, 3] a sample from the next normalised latents [B, C, t, h, w]; T = 1 + 4 (t - 1) the
        first time, 4 t later."""
        vae = self.vae
        z = denormalize(latents.to(next(vae.parameters())), vae.config)
        z = vae.post_quant_conv(z)
        parts: list[Tensor] = []
        for frame in range(z.shape[2]):
            first = {"first_chunk": True} if self._past is None else {}
            if self._past is None:
                vae.clear_cache()  # counts the convolutions
                self._past = [None] * vae._conv_num
            parts.append(vae.decoder(z[:, :, frame : frame + 1], feat_cache=self._past, feat_idx=[0], **first))
        video = torch.cat(parts, dim=2)
        video = video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return [v.permute(1, 2, 3, 0).contiguous().cpu().numpy() for v in video]
