"""What a playable world asks of a request, and how its frames come out block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import HostRead, device_constant
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.engine.strategies.matrix_game import Actions
from kinetoscope.media.actions import ActionScript, load_actions, still
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.images import ImageConditionStage, normalize, split_patches
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
        if size[0] % self.block and not batch.streaming:
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


@dataclass(slots=True, eq=False)
class PlayedStream:
    """What a stream keeps beside the engine's own state (`ForwardBatch.family`): its script, if it has one, and what
    makes its condition longer.
    """

    script: ActionScript | None = None
    image: ImageThenNothing | None = None

    def reach(self, batch: ForwardBatch, frames: int) -> None:
        """Make the condition of the batch `frames` latent frames long, unless nothing new would come."""
        assert batch.condition is not None and self.image is not None
        missing = frames - batch.condition.shape[2]
        if missing > 0 and not self.image.settled:
            batch.condition = torch.cat([batch.condition, self.image.more(missing)], 2)


class ActionStage(Stage):
    """Reads the action script of the request into `Actions`, the same for all samples; without one nothing is done.

    The parameters keep the script itself in place of its path, so that a record of the request is complete.

    Args:
        layout: name of the model's action layout (`media.actions.LAYOUTS`).
    """

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with its actions in `family`, unless a program put them there; of a stream, with a `PlayedStream`.

        Raises:
            InputError: see `media.actions.load_actions`; or the script is shorter than the video.
        """
        params = batch.params
        assert params.num_frames
        if isinstance(batch.family, Actions):
            return batch
        extra = dict(params.extra or {})
        source = extra.get(ACTIONS)
        if batch.streaming:
            script = None if source is None else load_actions(source, self.layout)
            if script is not None:
                batch.params = replace(params, extra={**extra, ACTIONS: script.to_json()})
            batch.family = PlayedStream(script)
            return batch
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
        mean, std = (device_constant(v, pixels.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        pixels = (pixels * 0.5 + 0.5 - mean) / std
        batch.image_embeds = encoder(pixels.to(parameter), output_hidden_states=True).hidden_states[-2]
        return batch


class PlayConditionStage(ImageConditionStage):
    """As `ImageConditionStage`; of a stream, the condition of its first block.

    Args:
        vae: a diffusers video VAE, or lazy.
        geometry: pixels to latents.
        block: latent frames made together.
    """

    def __init__(self, vae: Any | Lazy[Any], geometry: VideoGeometry, block: int) -> None:
        super().__init__(vae, geometry)
        self.block = block

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `condition`."""
        if not isinstance(batch.family, PlayedStream):
            return super().forward(batch, args)
        assert batch.image is not None
        batch.family.image = ImageThenNothing(resolve(self._vae), batch.image.to(args.device), self.geometry.temporal)
        batch.condition = batch.family.image.more(max(self.block, 2))
        return batch


class ImageThenNothing:
    """Condition of a first frame and of nothing after it, a few latent frames at a time: that of the whole video.

    Wan's encoder is causal in time, and what its convolutions need of earlier frames is kept here. It also forgets:
    some frames into the nothing it gives the same latents again and keeps the same features. The condition is `settled`
    then, its last frame is that of all later ones, and memory does not grow any more.

    Args:
        vae: diffusers' `AutoencoderKLWan`.
        image: [1, 3, H, W] in [-1, 1].
        step: frames of a latent frame, also the mask's channels.
    """

    def __init__(self, vae: Any, image: Tensor, step: int) -> None:
        self.vae, self.step = vae, step
        self._unchanged: HostRead | None = None
        self._image: Tensor | None = image
        self._blank = image.new_zeros(1, 3, step, *image.shape[-2:])
        self._past: list[Any] = [None] * vae._cached_conv_counts["encoder"]
        self._last: Tensor | None = None

    @property
    def settled(self) -> bool:
        """Whether the host knows that the last latent frame is that of all later ones; it never waits to know."""
        return self._unchanged is not None and self._unchanged.ready and bool(self._unchanged.value)

    @torch.no_grad()
    def more(self, frames: int) -> Tensor:
        """The next latent frames [1, step + C, n, h, w], n = `frames` or fewer where the condition settles."""
        parts: list[Tensor] = []
        while len(parts) < frames and not self.settled:
            parts.append(self._next())
        return torch.cat(parts, 2)

    def _next(self) -> Tensor:
        vae, image = self.vae, self._image
        video = self._blank if image is None else image.unsqueeze(2)
        mask = video.new_full((1, self.step, 1, 1, 1), float(image is not None))
        self._image, before = None, list(self._past)
        patched = split_patches(video.to(next(vae.parameters()).dtype), vae.config.patch_size or 1)
        mode = vae.quant_conv(vae.encoder(patched, feat_cache=self._past, feat_idx=[0])).chunk(2, 1)[0].float()
        z = normalize(mode, vae.config)
        self._unchanged = HostRead(_same([*before, self._last], [*self._past, z]))
        self._last = z
        return torch.cat([mask.expand(-1, -1, -1, *z.shape[-2:]).to(z), z], 1)


def _same(before: Sequence[Any], after: Sequence[Any]) -> Tensor:
    """Return whether all tensors and other values are equal, as a bool tensor [] on the device of the tensors."""
    flags: list[Tensor] = []
    equal = True
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
            flags.append((a == b).all())
        else:
            equal &= type(a) is type(b) and not isinstance(a, Tensor) and a == b
    return torch.stack(flags).all() if equal and flags else torch.tensor(equal and not flags)
