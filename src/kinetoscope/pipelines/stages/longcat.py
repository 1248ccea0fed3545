"""Stages of LongCat-Video: what a request asks for, its noise levels, condition latents, and videos to refine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.strategies.longcat import LongCatInputs, inputs_of, start_schedule
from kinetoscope.media import read_video
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.pipelines.stages.images import normalize
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.validation import VideoGeometry

EXTRA_DEFAULTS: Mapping[str, Any] = {
    "num_cond_frames": None,  # frames to keep of a given video (13, or what it has), or of one refined beside it
    "use_kv_cache": None,  # None: only to continue a video
    "offload_kv_cache": False,
    "enhance_hf": None,  # None: only to continue a video, unless distilled
    "use_distill": False,
    "stage1_video": None,  # a video to refine: a file or uint8 [T, H, W, 3], or a list of one a prompt
    "t_thresh": 0.5,  # of refinement
    "spatial_refine_only": False,
    "scale_over_noise_frames": False,
}
"""Published parameters of `generate_t2v`, `generate_i2v`, `generate_vc` and `generate_refine`, and one of ours."""

COND_FRAMES = 13  # frames of a video that are continued
REFINE_PIXELS = 64  # sizes of a refined video are multiples of this
REFINE_FRAMES = 4  # and its condition and noise latents multiples of this


class LongCatRequestStage(Stage):
    """Fills `family` with what the request asks for, by what it brings.

    `stage1_video` is refined; else `video` is continued; else `image` is the first frame; else the text is all.
    """

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with its `LongCatInputs`; refinement is without guidance.

        Raises:
            InputError: parameters that contradict each other, or of the wrong kind.
        """
        extra = extra_of(batch)
        for name in ("use_kv_cache", "offload_kv_cache", "enhance_hf", "use_distill", "spatial_refine_only",
                     "scale_over_noise_frames"):  # fmt: skip
            if extra[name] is not None and type(extra[name]) is not bool:
                raise InputError(f"{name}={extra[name]!r} is neither true nor false")
        if batch.image is not None and batch.video is not None:
            raise InputError("an image and a video were given; LongCat-Video continues one or the other")
        refine = extra["stage1_video"] is not None
        videos = load_videos(extra["stage1_video"], batch.size) if refine else ()
        continues = batch.video is not None and not refine
        distill = bool(extra["use_distill"])
        enhance = (continues and not distill) if extra["enhance_hf"] is None else extra["enhance_hf"]
        if distill and enhance:
            raise InputError("use_distill and enhance_hf are different schedules; choose one")
        threshold = extra["t_thresh"]
        if not isinstance(threshold, float) or not 0 < threshold < 1:
            raise InputError(f"t_thresh={threshold!r} is not a number between 0 and 1")
        if extra["num_cond_frames"] is not None and not refine and batch.video is None:
            raise InputError(
                f"num_cond_frames={extra['num_cond_frames']!r} says how many frames of a video are kept, and none is "
                "given; give video=, or stage1_video= to refine one"
            )
        if extra["use_kv_cache"] and batch.image is None and batch.video is None:
            raise InputError("use_kv_cache keeps what given frames were computed to, and none are given; give video=")
        if refine:
            for name, size in (("height", batch.params.height), ("width", batch.params.width)):
                if size is None or size % REFINE_PIXELS:
                    raise InputError(f"{name}={size} of a refined video is not a multiple of {REFINE_PIXELS}")
            if batch.latents is not None:
                raise InputError("latents were given beside a video to refine, which the run would start from")
            names = [f"sha256:{hashlib.sha256(v.tobytes()).hexdigest()}" for v in videos]  # a record cannot hold frames
            named = {**extra, "stage1_video": names[0] if len(set(names)) == 1 else names}
            batch.params = replace(batch.params, guidance_scale=1.0, guidance_scale_2=None, extra=named)
        batch.family = LongCatInputs(
            use_kv_cache=continues if extra["use_kv_cache"] is None else extra["use_kv_cache"],
            offload_kv_cache=bool(extra["offload_kv_cache"]),
            enhance_hf=bool(enhance),
            use_distill=distill,
            t_thresh=threshold if refine else None,
            stage1_video=videos,
            scale_over_noise_frames=bool(extra["scale_over_noise_frames"]),
        )
        return batch


class LongCatTimestepStage(Stage):
    """Fills `timesteps` with the schedule of the request.

    Args:
        scheduler: the prototype, or lazy.
    """

    def __init__(self, scheduler: SchedulerAdapter | Lazy[SchedulerAdapter]) -> None:
        self._scheduler = scheduler

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `timesteps` [S] on the CPU."""
        batch.timesteps = start_schedule(resolve(self._scheduler), batch.params, inputs_of(batch)).timesteps
        return batch


class LongCatLatentStage(LatentPreparationStage):
    """Noise, or a noised video to refine; and the latents of condition frames.

    Random numbers are drawn in the published order: noise, then the VAE's posterior of the condition; in refinement the
    posterior of the video, its noise, then the posterior of the condition.

    Args:
        geometry: pixels to latents.
        channels: latent channels C.
        vae: encodes pictures, or lazy.
    """

    def __init__(self, geometry: VideoGeometry, channels: int, vae: Any | Lazy[Any]) -> None:
        super().__init__(geometry, channels)
        self._vae = vae

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `latents` [B, C, T, H, W] and, given pictures, `condition` [B, C, T_cond, H, W].

        Raises:
            InputError: a video of fewer frames than are to be kept, or one that leaves nothing to make.
        """
        extra = extra_of(batch)
        if inputs_of(batch).stage1_video:
            return self._refine(batch, extra)
        batch = super().forward(batch, args)
        assert batch.noise is not None and batch.params.num_frames is not None
        if batch.image is not None:
            batch.condition = self.encode(batch.image.unsqueeze(2), batch.noise)
        if batch.video is not None:
            count = extra["num_cond_frames"]
            if count is None:  # of a shorter video what it has
                count = min(COND_FRAMES, self.geometry.longest(batch.video.shape[2]))
            frames = last_frames(batch.video, count)
            if (count - 1) % self.geometry.temporal or count >= batch.params.num_frames:
                raise InputError(
                    f"num_cond_frames={count} is not 1 + a multiple of {self.geometry.temporal} "
                    f"below num_frames={batch.params.num_frames}"
                )
            batch.condition = self.encode(frames, batch.noise)
        return batch

    def encode(self, video: Tensor, noise: Noise) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, t, h, w] on the CPU, a draw of the posterior."""
        vae = resolve(self._vae)
        weight = next(vae.parameters())
        posteriors = [vae.encode(v.unsqueeze(0).to(weight)).latent_dist for v in video]
        mean, std = (torch.cat([getattr(p, n) for p in posteriors]).float().cpu() for n in ("mean", "std"))
        z = mean + std * noise.draw(mean.shape[1:])  # [B, C, t, h, w]
        return normalize(z, vae.config)

    def _refine(self, batch: ForwardBatch, extra: Mapping[str, Any]) -> ForwardBatch:
        """The upsampled video, noised, padded in time to whole blocks; condition frames padded in front."""
        params, inputs, step = batch.params, inputs_of(batch), self.geometry.temporal
        assert params.height and params.width and inputs.t_thresh
        given = None if batch.image is None else batch.image.unsqueeze(2)
        count = extra["num_cond_frames"] or (0 if given is None else 1)
        given = batch.video if given is None else given
        if type(count) is not int:
            raise InputError(f"num_cond_frames={count!r} is not a whole number")
        if count and given is None:
            raise InputError(f"num_cond_frames={count} needs an image or a video to take them from")
        if given is not None and not count:
            raise InputError("a refined video with a condition video needs num_cond_frames")
        size = (params.height, params.width)
        low = torch.stack([upsample(v, size, double=not extra["spatial_refine_only"]) for v in inputs.stage1_video])
        total = low.shape[2]
        if count >= total:
            raise InputError(f"num_cond_frames={count} leaves nothing to refine of {total} frames")
        front = 0
        if count:
            latents = _whole_blocks(1 + math.ceil((count - 1) / step))
            front = 1 + (latents - 1) * step - count
        back = _whole_blocks(math.ceil((total - count) / step)) * step - (total - count)
        batch.noise = NoiseSource(batch.seeds)
        z = self.encode(pad_time(low, front, back), batch.noise)
        noise = batch.noise.draw(z.shape[1:])
        batch.latents = (1 - inputs.t_thresh) * z + inputs.t_thresh * noise
        if given is not None:
            batch.condition = self.encode(pad_time(last_frames(given, count), front, 0), batch.noise)
        batch.params = replace(params, num_frames=total)
        batch.family = replace(inputs, stage1_video=(), keep_frames=(front, front + total))
        return batch


class LongCatDecodingStage(DecodingStage):
    """Latents to frames, without the padding of refinement."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with one uint8 [T, H, W, 3] array a sample."""
        batch = super().forward(batch, args)
        if keep := inputs_of(batch).keep_frames:
            batch.frames = [frames[slice(*keep)] for frames in batch.frames]
        return batch


def extra_of(batch: ForwardBatch) -> dict[str, Any]:
    """The family's parameters of a request, with defaults."""
    return {**EXTRA_DEFAULTS, **(batch.params.extra or {})}


def last_frames(video: Tensor, count: Any) -> Tensor:
    """The last `count` frames of [B, 3, T, H, W].

    Raises:
        InputError: `count` is not a whole number of frames that the video has.
    """
    if type(count) is not int or not 0 < count <= video.shape[2]:
        raise InputError(f"num_cond_frames={count!r} is not a whole number from 1 to the {video.shape[2]} frames given")
    return video[:, :, -count:]


def pad_time(video: Tensor, front: int, back: int) -> Tensor:
    """[B, 3, T, H, W] with copies of the first and last frame around it."""
    first, last = video[:, :, :1], video[:, :, -1:]
    return torch.cat([first.expand(-1, -1, front, -1, -1), video, last.expand(-1, -1, back, -1, -1)], dim=2)


def load_videos(source: Any, count: int) -> tuple[np.ndarray, ...]:
    """`count` arrays uint8 [T, H, W, 3] from one video for all, or a list of one each; a video is an array or a file.

    Raises:
        InputError: another number of them, of different sizes, or something else than frames.
    """
    given: list[Any] = [*source] if isinstance(source, (list, tuple)) else [source]
    videos = tuple(read_video(v)[0] if isinstance(v, (str, Path)) else np.asarray(v) for v in given)
    for v in videos:
        if v.ndim != 4 or v.shape[-1] != 3 or v.dtype != np.uint8 or 0 in v.shape:
            raise InputError(f"stage1_video is {v.dtype} {v.shape}, not uint8 frames [T, H, W, 3]")
    if len(videos) not in (1, count) or len({v.shape for v in videos}) != 1:
        raise InputError(f"{len(videos)} videos to refine for {count} prompts; give one, or one each of the same size")
    return videos * (count // len(videos))


def upsample(frames: np.ndarray, size: tuple[int, int], *, double: bool) -> Tensor:
    """uint8 [T, h, w, 3] to [3, T or 2 T, H, W] in [-1, 1]: bilinear in space, then linear in time, ends aligned."""
    low = torch.from_numpy(np.ascontiguousarray(frames))
    high = F.interpolate(low.permute(0, 3, 1, 2).float(), size, mode="bilinear", align_corners=True)  # [T, 3, H, W]
    high = high.transpose(0, 1).unsqueeze(0) / 255.0  # [1, 3, T, H, W]
    count = len(low) * (2 if double else 1)
    return F.interpolate(high, (count, *size), mode="trilinear", align_corners=True)[0] * 2 - 1


def _whole_blocks(latents: int) -> int:
    return math.ceil(latents / REFINE_FRAMES) * REFINE_FRAMES
