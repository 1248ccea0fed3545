"""What Wan's control models are shown: a video to follow, a camera, a first frame, a picture to be like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.media.camera import MOVES, load_camera, pluecker_rays
from kinetoscope.media.pictures import fit_picture, load_picture
from kinetoscope.models.wan.strategy import WanControls
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.images import ImageFeatureStage, encode_video

REFERENCE = "ref_image"
CAMERA = "camera"


def controls_of(batch: ForwardBatch) -> WanControls:
    """The family part of a batch, made where there is none."""
    if batch.family is None:
        batch.family = WanControls()
    assert isinstance(batch.family, WanControls)
    return batch.family


class ReferenceStage(Stage):
    """Reads the picture that the video should be like (`ref_image=`).

    Args:
        readable: whether the model has a layer for it.
    """

    def __init__(self, *, readable: bool) -> None:
        self.readable = readable

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `family.picture` [B, 3, H, W] in [-1, 1]; nothing changes without a picture.

        Raises:
            InputError: the model reads none, or the picture cannot be read.
        """
        controls = controls_of(batch)
        source: Any = (batch.params.extra or {}).get(REFERENCE)
        if source is None:
            return batch
        if not self.readable:
            raise InputError(f"this model reads no {REFERENCE} (add_ref_conv is off); image= sets the first frame")
        if not isinstance(source, str):
            raise InputError(f"{REFERENCE}={source!r} should be a path or an http(s) address")
        assert batch.params.height and batch.params.width
        pixels = torch.from_numpy(fit_picture(load_picture(source), batch.params.height, batch.params.width).copy())
        controls.picture = (pixels.permute(2, 0, 1).float() / 127.5 - 1).expand(batch.size, -1, -1, -1)
        return batch


class ControlFeatureStage(ImageFeatureStage):
    """Fills `image_embeds` with features of the picture to be like, else of the first frame, else with zeros.

    Args:
        processor, encoder: see `ImageFeatureStage`.
        shape: (N, D) of the features of a picture.
    """

    def __init__(self, processor: Any | Lazy[Any], encoder: Any | Lazy[Any], shape: tuple[int, int]) -> None:
        super().__init__(processor, encoder)
        self.shape = shape

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `image_embeds` [B, N, D]."""
        picture = controls_of(batch).picture
        picture = batch.image if picture is None else picture
        zeros = torch.zeros(batch.size, *self.shape)
        batch.image_embeds = zeros if picture is None else self.encode(picture, args)
        return batch


class ControlConditionStage(Stage):
    """Fills `condition` with the latents of the video to follow and, on further channels, of the first frame.

    Published pipelines differ in what they do with an image of a model without a layer for references: this follows
    aigc-apps/VideoX-Fun, where the models were trained (it is the first frame); FastVideo leaves the channels zero.

    Args:
        vae: a diffusers video VAE, or lazy.
        follows: whether the model is shown a video.
        reference: whether it reads a picture to be like; zeros stand for none.
    """

    def __init__(self, vae: Any | Lazy[Any], *, follows: bool, reference: bool) -> None:
        self._vae = vae
        self.follows = follows
        self.reference = reference

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `condition` [B, C', t, h, w] and `family.reference` [B, C, h, w].

        Raises:
            InputError: the video is shorter than what is to be made.
        """
        assert batch.latents is not None
        controls, frames = controls_of(batch), batch.params.num_frames
        first = torch.zeros_like(batch.latents, device=args.device, dtype=torch.float32)
        if batch.image is not None and first.shape[2] > 1:
            first[:, :, :1] = self._encode(batch.image.unsqueeze(2), args)
        batch.condition = first
        if self.follows:
            assert batch.video is not None and frames
            if batch.video.shape[2] < frames:
                raise InputError(
                    f"the video to follow has {batch.video.shape[2]} frames and num_frames={frames} are asked for"
                )
            batch.condition = torch.cat([self._encode(batch.video[:, :, :frames], args), first], 1)
        if self.reference:
            given = controls.picture
            like = torch.zeros_like(first[:, :, :1]) if given is None else self._encode(given.unsqueeze(2), args)
            controls.reference = like[:, :, 0]
        return batch

    def _encode(self, video: Tensor, args: ExecutionArgs) -> Tensor:
        return encode_video(resolve(self._vae), video.to(args.device))


class CameraStage(Stage):
    """Reads where the camera is (`camera=`, see `media.camera`), the same in all videos of a batch.

    Args:
        temporal: frames of a latent frame; the first one's rays stand for all of the first latent frame.
    """

    def __init__(self, temporal: int) -> None:
        self.temporal = temporal

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `family.camera` [B, 6 temporal, t, H, W]; what a file said is kept in the parameters.

        Raises:
            InputError: there is no camera, or see `media.camera.load_camera`.
        """
        params = batch.params
        extra = dict(params.extra or {})
        source: Any = extra.get(CAMERA)
        if source is None:
            raise InputError(f"this model needs {CAMERA}=: a move ({', '.join(MOVES)}), poses, or a file of them")
        assert params.num_frames and params.height and params.width
        path = load_camera(source, params.num_frames)
        if not (source in list(MOVES) or (isinstance(source, Mapping) and "poses" not in source)):
            batch.params = replace(params, extra={**extra, CAMERA: path.to_json()})
        rays = torch.from_numpy(pluecker_rays(path, params.height, params.width))  # [T, 6, H, W]
        camera = pack_frames(rays, self.temporal).unsqueeze(0)
        controls_of(batch).camera = camera.expand(batch.size, -1, -1, -1, -1)
        return batch


def pack_frames(x: Tensor, step: int) -> Tensor:
    """[1 + (t - 1) step, C, H, W] -> [C step, t, H, W]: channel c step + k is c of a latent frame's frame k."""
    groups = torch.cat([x[:1].expand(step - 1, -1, -1, -1), x]).unflatten(0, (-1, step))  # [t, step, C, H, W]
    return groups.permute(2, 1, 0, 3, 4).flatten(0, 1)
