"""Values that travel from the request to the video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kinetoscope.core.context import AttentionFn
from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.core.stage_data import StageData


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample, the same for every sample of a batch. None means: the model's default.

    Attributes:
        height, width: pixels.
        num_frames: frames of the video.
        fps: frames a second of the written file.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance w in u + w (c - u); 1 switches guidance off.
        guidance_rescale: phi of arXiv 2305.08891 in [0, 1]; 0 is off.
        guidance: kind of guidance with its parameters, as `diffusion.guidance.Guidance.make` reads it.
        flow_shift: shift of the sigma schedule.
        scheduler: name of a solver: "unipc", "euler", "dpm++", "heun", or one that an extension registered.
        negative_prompt: what the unconditional row reads, unless a request says otherwise.
        guidance_scale_2: guidance of the low-noise expert, for models with two; None: as `guidance_scale`.
        strength: how much of a given video is noised, in (0, 1]; 1 keeps nothing of it.
        extra: further parameters of a family, by their published names (`ComposedPipeline.extra_defaults`).
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance: str | None = None
    flow_shift: float | None = None
    scheduler: str | None = None
    negative_prompt: str | None = None
    guidance_scale_2: float | None = None
    strength: float | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def guided(self) -> bool:
        """Whether any step needs an unconditional row."""
        return self.guidance_scale != 1.0 or self.guidance_scale_2 not in (None, 1.0)

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These values where given, else those of `defaults`; `extra` is merged name by name."""
        given = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        if self.extra is not None and defaults.extra is not None:
            given["extra"] = {**defaults.extra, **self.extra}
        return replace(defaults, **given)


class Noise(Protocol):
    """What a run asks of its source of random numbers (`diffusion.noise.NoiseSource`)."""

    def draw(self, shape: Sequence[int]) -> Tensor: ...

    def fork(self, *key: int) -> Noise: ...


@dataclass(slots=True)
class ForwardBatch:
    """One run on its way through the stages: B samples of one size and one schedule.

    Attributes:
        params: resolved sampling parameters, shared by all samples.
        prompts, negative_prompts: B strings each.
        seeds: B seeds.
        prompt_embeds: [B, L, D] encoded prompts, zero beyond the true length.
        prompt_lengths: [B] true token counts (int64, CPU).
        negative_embeds, negative_lengths: the same for the negative prompts; None when guidance is off.
        image, last_image: [B, 3, H, W] float32 in [-1, 1], first and last picture at the request's size; None where
            not given.
        video: [B, 3, T, H, W] float32 in [-1, 1], the video to start from or to continue.
        image_embeds: [B, N, D] features of an image encoder.
        condition: [B, C', t, h, w] float32 condition on the latent grid: channels to add, or clean latents to keep.
        noise: the run's random numbers; `latents` is their first draw unless the caller gave latents.
        hooks: engine hooks of this request alone.
        timesteps: [S] the schedule the run will follow (CPU).
        latents: [B, C, T, H, W] float32; noise before denoising, the result in the transformer's normalised space
            after.
        frames: B arrays uint8 [T, H, W, 3] after decoding.
        timings: stage name -> seconds.
        logging_info: what hooks report (perf logging, step trace).
        family: the typed extension of a model family that needs more, else None.
        data: objects of stages that are no part of the package, one for each type.
        streaming: blocks are made until their caller has enough; `params.num_frames` says nothing then.
        solver_chosen: the request chose another solver than the defaults; a strategy that steps without it is refused.
        videos: indices of the samples among the videos of the request; every event of the run carries them.
    """

    params: SamplingParams
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    prompt_embeds: Tensor | None = None
    prompt_lengths: Tensor | None = None
    negative_embeds: Tensor | None = None
    negative_lengths: Tensor | None = None
    image: Tensor | None = None
    last_image: Tensor | None = None
    video: Tensor | None = None
    image_embeds: Tensor | None = None
    condition: Tensor | None = None
    noise: Noise | None = None
    hooks: list[Any] = field(default_factory=list[Any])
    timesteps: Tensor | None = None
    latents: Tensor | None = None
    frames: list[Any] = field(default_factory=list[Any])
    timings: dict[str, float] = field(default_factory=dict[str, float])
    logging_info: dict[str, Any] = field(default_factory=dict[str, Any])
    family: object | None = None
    data: StageData = field(default_factory=StageData)
    streaming: bool = False
    solver_chosen: bool = False
    videos: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of samples B."""
        return len(self.prompts)

    def samples(self) -> list[ForwardBatch]:
        """One batch a sample, before any stage has run: its row of every tensor and its entry of every list."""
        rows: dict[str, list[Any]] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                rows[f.name] = [value[i : i + 1] for i in range(self.size)]
            elif f.name in ("prompts", "negative_prompts", "seeds"):
                rows[f.name] = [[entry] for entry in value]
        rows["data"] = self.data.samples(self.size)
        if self.videos:
            rows["videos"] = [(index,) for index in self.videos]
        return [
            replace(self, timings={}, logging_info={}, hooks=list(self.hooks), **{k: v[i] for k, v in rows.items()})
            for i in range(self.size)
        ]

    @classmethod
    def joined(cls, batches: Sequence[ForwardBatch]) -> ForwardBatch:
        """What finished batches have in common as one batch: prompts, seeds, results; the rest is the first's."""
        lists = {n: [entry for b in batches for entry in getattr(b, n)]
                 for n in ("prompts", "negative_prompts", "seeds", "frames")}  # fmt: skip
        latents = [b.latents for b in batches if b.latents is not None]
        data = StageData.joined([b.data for b in batches])
        videos = tuple(index for b in batches for index in b.videos)
        return replace(batches[0], latents=torch.cat(latents) if latents else None, data=data, videos=videos, **lists)


@dataclass(frozen=True, slots=True)
class ExecutionArgs:
    """How to compute, the same for every request of a generator.

    Attributes:
        device: where modules and latents live.
        dtype: what the transformer computes in.
        autocast: run the transformer under `torch.autocast(dtype)`, for weights kept in float32; off computes in the
            weights' dtype.
        cfg: "sequential" (one forward a branch), "batched" (all rows in one forward) or "auto"; "parallel" where
            devices share the branches.
        attention: role -> attention function, from `attention.resolve_attention`.
        text_mode: "padded" or "true_length" instead of what the model was trained with (`nn.text_padding`).
        ulysses: devices that share the heads of self-attention, so that a K/V cache holds a device's own.
        ranks: processes that compute a run together, all in the same order.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    cfg: str = "auto"
    attention: Mapping[str, AttentionFn] = field(default_factory=dict[str, AttentionFn])
    text_mode: str | None = None
    ulysses: int = 1
    ranks: int = 1

    @property
    def run_errors(self) -> type[Exception]:
        """Return the errors that end one run while other runs of the request go on.

        Several ranks must go on alike, so there it is only the errors that all ranks raise alike, those of this
        package; any other error ends the request.
        """
        return Exception if self.ranks == 1 else KinetoscopeError
