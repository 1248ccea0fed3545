"""Stages of Cosmos Predict: T5 text as it is, Qwen text of all layers, given frames, a VAE with statistics a frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import device_constant
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.strategies.cosmos import CosmosInputs
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage, to_frames
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.prompt_cache import PromptCache
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.pipelines.stages.validation import VideoGeometry

STATES_CACHE = 4
"""Prompts whose Qwen features are kept; one of the published model takes 200 MB in float32."""


class PlainTextEncodingStage(TextEncodingStage):
    """T5 text, zero beyond its true length, of the prompt as it is written."""

    def encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_length, D] and true lengths [B] (int64, CPU).

        Raises:
            InputError: a prompt is longer than `max_length` tokens.
        """
        encoded = [self._encode_one(p, device) for p in prompts]
        padded = [torch.nn.functional.pad(e, (0, 0, 0, self.max_length - len(e))) for e in encoded]
        return torch.stack(padded), torch.tensor([len(e) for e in encoded])


class AllLayersTextStage(Stage):
    """Text as the normalised states of all layers of a chat model, side by side, padding tokens included (Predict 2.5).

    Args:
        tokenizer: of `transformers`, with a chat template, or lazy.
        text_encoder: a Qwen2.5-VL model, or lazy; its layers are read, its output head is not run.
        max_length: tokens the transformer was trained with; also the longest prompt, template included.
        system: what the chat's system message says.
    """

    def __init__(self, tokenizer: Any | Lazy[Any], text_encoder: Any | Lazy[Any], max_length: int, system: str) -> None:
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self.max_length = max_length
        self.system = system
        self._cache = PromptCache[Tensor](STATES_CACHE)

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """Fills the embeddings; there are no lengths, since the padding is read like any token."""
        batch.prompt_embeds = self.encode(batch.prompts, args.device)
        if batch.params.guidance_scale != 1.0:
            batch.negative_embeds = self.encode(batch.negative_prompts, args.device)
        return batch

    def encode(self, prompts: list[str], device: torch.device) -> Tensor:
        """Features [B, max_length, layers x D].

        Raises:
            InputError: a prompt with the chat template is longer than `max_length` tokens.
        """
        return torch.stack([self._cache.get(p, lambda p=p: self._encode_one(p, device)) for p in prompts])

    @torch.no_grad()
    def _encode_one(self, prompt: str, device: torch.device) -> Tensor:
        length = len(self._ids(prompt))
        if length > self.max_length:
            raise InputError(
                f"the prompt has {length} tokens with its template and the model reads at most {self.max_length}; "
                "shorten it"
            )
        ids = torch.tensor([self._ids(prompt, padding="max_length", max_length=self.max_length)], device=device)
        states = resolve(self._text_encoder).model(ids, output_hidden_states=True).hidden_states[1:]
        normed = [(s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1e-8) for s in states]
        return torch.cat(normed, dim=-1)[0]  # [max_length, layers D]

    def _ids(self, prompt: str, **padding: Any) -> list[int]:
        chat = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("system", self.system), ("user", prompt))
        ]
        ids = resolve(self._tokenizer).apply_chat_template(
            chat, tokenize=True, add_generation_prompt=False, add_vision_id=False, **padding
        )
        return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)


class GivenFramesStage(LatentPreparationStage):
    """Noise, and where the request gives an image or a video its first latent frames (`condition`, `family`).

    The published pipelines fill up the video that the VAE reads, with grey, black or its last frame, and use the
    latents of the given frames alone. These VAEs are causal: the latents are the same without anything filled up.

    Args:
        geometry: pixels to latents.
        channels: latent channels C.
        vae: a diffusers video VAE, or lazy.
        sigma_data: standard deviation of the latents that the transformer knows.
        extra_defaults: the family's own parameters, where a request leaves them out.
    """

    required = True
    """Whether a request must give frames."""
    sampled = False
    """Whether the latents are a draw of the VAE's posterior (before the noise), not its mode."""

    def __init__(
        self,
        geometry: VideoGeometry,
        channels: int,
        vae: Any | Lazy[Any],
        sigma_data: float,
        extra_defaults: Mapping[str, Any],
    ) -> None:
        super().__init__(geometry, channels)
        self._vae = vae
        self.sigma_data = sigma_data
        self.extra_defaults = dict(extra_defaults)

    def given(self, batch: ForwardBatch, extra: Mapping[str, Any]) -> Tensor:
        """The frames that are given, [B, 3, n, H, W]; of more than the request has, the last count."""
        return _frames(batch)

    def inputs(self, batch: ForwardBatch, frames: int, extra: Mapping[str, Any]) -> CosmosInputs:
        """What the strategy is told, for so many given latent frames."""
        raise TypeError(f"{type(self).__name__} does not override inputs")

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `latents`, `noise` and `family`; given frames also `condition` [B, C, n, h, w].

        Raises:
            InputError: nothing is given where something must be, an image and a video are, or their shape is not the
                request's; and as `LatentPreparationStage`.
        """
        params = batch.params
        extra = {**self.extra_defaults, **(params.extra or {})}
        assert params.num_frames and params.height and params.width
        shape = (self.channels, *self.geometry.latent_size(params.num_frames, params.height, params.width))
        source = NoiseSource(batch.seeds)
        frames = 0
        if self._has_frames(batch):
            video = self.given(batch, extra)[:, :, -params.num_frames :]
            frames = (video.shape[2] - 1) // self.geometry.temporal + 1
            video = video[:, :, : 1 + (frames - 1) * self.geometry.temporal]  # an unfinished latent frame is not given
            batch.condition = self.encode(video, source, shape)
        batch.family = self.inputs(batch, frames, extra)
        if batch.latents is None:
            batch.latents = source.draw(shape)
        batch = super().forward(batch, args)  # checks the latents
        batch.noise = source
        return batch

    def encode(self, video: Tensor, source: NoiseSource, shape: tuple[int, ...]) -> Tensor:
        """[B, 3, n, H, W] in [-1, 1] -> latents [B, C, t, h, w] float32 on the CPU, at a deviation of `sigma_data`.

        A posterior is drawn with the first frames of noise of `shape`, that of the request's latents.
        """
        vae = resolve(self._vae)
        if not self.sampled:
            return encode_frames(vae, video, self.sigma_data).cpu()
        weight = next(vae.parameters())
        posteriors = [vae.encode(v.unsqueeze(0).to(weight)).latent_dist for v in video]
        z = torch.cat([p.mean for p in posteriors]).float().cpu()
        z = z + torch.cat([p.std for p in posteriors]).float().cpu() * source.draw(shape)[:, :, : z.shape[2]]
        return _normalized(z, vae, self.sigma_data)

    def _has_frames(self, batch: ForwardBatch) -> bool:
        params, found = batch.params, [(n, v) for n in ("image", "video") if (v := getattr(batch, n)) is not None]
        if len(found) > 1:
            raise InputError("an image and a video were given; this model continues one or the other")
        if not found and self.required:
            raise InputError("this model continues an image or a video; give one")
        for name, value in found:
            if value.shape[0] != batch.size or tuple(value.shape[-2:]) != (params.height, params.width):
                raise InputError(
                    f"{name} has shape {tuple(value.shape)}; this request needs {batch.size} of "
                    f"{params.height} x {params.width} pixels"
                )
        return bool(found)


def _frames(batch: ForwardBatch) -> Tensor:
    """The image or video of a batch that has one, [B, 3, n, H, W]."""
    if batch.video is not None:
        return batch.video
    assert batch.image is not None
    return batch.image.unsqueeze(2)


class Predict1FramesStage(GivenFramesStage):
    """Predict 1 video-to-world: noise of `augment_sigma` on given frames at every step."""

    def inputs(self, batch: ForwardBatch, frames: int, extra: Mapping[str, Any]) -> CosmosInputs:
        """`augment_sigma`, and `input_frames_guidance`: the unconditional row does not know of given frames."""
        return CosmosInputs(
            fps=batch.params.fps,
            mask=True,
            frames=frames,
            augment_sigma=_number("augment_sigma", extra),
            guide_frames=_switch("input_frames_guidance", extra),
        )


class Predict2FramesStage(GivenFramesStage):
    """Predict 2 video-to-world: given frames are clean, at a noise level near zero."""

    sampled = True

    def inputs(self, batch: ForwardBatch, frames: int, extra: Mapping[str, Any]) -> CosmosInputs:
        """`sigma_conditioning`: the noise level the network is told for given frames."""
        return CosmosInputs(fps=batch.params.fps, mask=True, frames=frames, level=_number("sigma_conditioning", extra))


class Predict25FramesStage(GivenFramesStage):
    """Predict 2.5: nothing is given, an image, or the end of a video."""

    required = False

    def given(self, batch: ForwardBatch, extra: Mapping[str, Any]) -> Tensor:
        """An image, or the last frames of a video: those of `num_latent_conditional_frames` latent frames.

        Raises:
            InputError: that count is neither 1 nor 2, or the video or the request is shorter.
        """
        frames = _frames(batch)
        if batch.video is None:
            return frames
        count = _count(extra)
        needed = self.geometry.temporal * (count - 1) + 1
        for what, length in (("the video has", frames.shape[2]), ("num_frames is", batch.params.num_frames or 0)):
            if length < needed:
                raise InputError(f"{what} {length}; {needed} frames are given to the model, so it must be that or more")
        return frames[:, :, -needed:]

    def inputs(self, batch: ForwardBatch, frames: int, extra: Mapping[str, Any]) -> CosmosInputs:
        """`conditional_frame_timestep`: what the network is told for given frames; below 0: the step's own."""
        _count(extra)  # also where no video is given, so that it is never silently nothing
        level = _number("conditional_frame_timestep", extra, lowest=-1.0)
        return CosmosInputs(mask=True, frames=frames, level=level if level >= 0 else None)


class RateStage(Stage):
    """Tells the strategy the frame rate (Predict 1 text-to-world)."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `family`."""
        batch.family = CosmosInputs(fps=batch.params.fps)
        return batch


class CosmosDecodingStage(DecodingStage):
    """Latents to frames by a VAE whose statistics may differ from frame to frame, or be missing.

    Args:
        vae: a diffusers video VAE, or lazy.
        sigma_data: standard deviation of the latents that the transformer knows.
    """

    def __init__(self, vae: Any | Lazy[Any], sigma_data: float) -> None:
        super().__init__(vae)
        self.sigma_data = sigma_data

    def decode(self, latents: Tensor) -> Any:
        """uint8 array [T, H, W, 3] from latents [C, t, h, w]."""
        vae = resolve(self._vae)
        mean, std = latent_statistics(vae.config, latents.unsqueeze(0))
        z = latents.unsqueeze(0) * std / self.sigma_data + mean
        video = vae.decode(z.to(next(vae.parameters()).dtype), return_dict=False)[0][0]  # [3, T, H, W] in [-1, 1]
        return to_frames(video)


@torch.no_grad()
def encode_frames(vae: Any, video: Tensor, sigma_data: float) -> Tensor:
    """Latents [B, C, t, h, w] float32 of videos [B, 3, T, H, W] in [-1, 1], at a deviation of `sigma_data`: the
    posterior's mode."""
    weight = next(vae.parameters())
    modes = [vae.encode(v.unsqueeze(0).to(weight)).latent_dist.mode() for v in video]
    return _normalized(torch.cat(modes).float(), vae, sigma_data)


def _normalized(z: Tensor, vae: Any, sigma_data: float) -> Tensor:
    mean, std = latent_statistics(vae.config, z)
    return (z - mean) * sigma_data / std


def latent_statistics(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a VAE's latents [B, C, T, h, w], to broadcast against them: one a channel, or one a channel
    and frame; 0 and 1 where the VAE has none."""
    if config.latents_mean is None:
        return latents.new_zeros(1), latents.new_ones(1)
    shape = (1, latents.shape[1], -1, 1, 1)
    values = (
        device_constant(np.ravel(v).tolist(), latents.device, latents.dtype)
        for v in (config.latents_mean, config.latents_std)
    )
    mean, std = (v.view(shape)[:, :, : latents.shape[2]] for v in values)
    return mean, std


def _count(extra: Mapping[str, Any]) -> int:
    """Latent frames of a video that are given (Predict 2.5)."""
    count = extra["num_latent_conditional_frames"]
    if type(count) is not int or count not in (1, 2):
        raise InputError(f"num_latent_conditional_frames={count!r} should be 1 or 2")
    return count


def _switch(name: str, extra: Mapping[str, Any]) -> bool:
    if type(extra[name]) is not bool:
        raise InputError(f"{name}={extra[name]!r} is neither true nor false")
    return extra[name]


def _number(name: str, extra: Mapping[str, Any], lowest: float = 0.0) -> float:
    value = extra[name]
    if type(value) not in (int, float) or not lowest <= value < float("inf"):
        raise InputError(f"{name}={value!r} should be a number of at least {lowest:g}")
    return float(value)
