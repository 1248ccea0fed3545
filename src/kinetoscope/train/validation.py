"""Videos of the student in training, for a contact sheet and, where a world says what they should show, for a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.context import AttentionFn
from kinetoscope.core.errors import ConfigError, InputError, KinetoscopeError
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.engine.strategies.matrix_game import Actions
from kinetoscope.evaluation import Report, heldout_specs, prompt_following
from kinetoscope.evaluation.playing import Walk, action_following
from kinetoscope.media import Array, fit_picture, load_picture
from kinetoscope.pipelines.preflight import check_settings
from kinetoscope.train.plugins import Opened
from kinetoscope.train.post import ValidationSection
from kinetoscope.worlds import get_world

VIDEOS_AT_ONCE = 4
PLACE = "callbacks.validation"

Judge = Callable[[Sequence[Array]], Report]
"""Videos uint8 [T, H, W, 3] in the order of the shots -> scores."""


@dataclass(frozen=True, eq=False)
class Shot:
    """What one video is made from.

    Attributes:
        label: on the contact sheet.
        prompt: empty for models that read none.
        image: first frame uint8 [H, W, 3], of the size of the video.
        actions: keyboard [T, K] and mouse [T, 2] of each frame; None: those of the parameters, or nothing is done.
    """

    label: str
    prompt: str = ""
    image: Array | None = None
    actions: tuple[Array, Array] | None = None


class ValidationVideos:
    """The videos of `callbacks.validation`: the same shots and seeds in every validation.

    Of the recipe's `prompts` there is one video each. Without, they are of the world that the model's directory names:
    captions never trained on, or, if it is played, games from places never trained on, with what was done in them.
    A model that begins with an image and is of no played world needs `images`.

    Args:
        opened: the student's directory, sampled as the exported model will be.
        section: of the recipe.

    Raises:
        ConfigError: there is nothing to make videos of, or a setting is not one that the model can have; the message
            says how to set it.
    """

    def __init__(self, opened: Opened, section: ValidationSection) -> None:
        self._opened, self._section = opened, section
        self.params = SamplingParams(**section.params).over(opened.pipeline.defaults())
        extra = opened.pipeline.extra_defaults
        if unknown := [name for name in section.params.get("extra") or {} if name not in extra]:
            raise ConfigError(
                f"{PLACE}.params.extra.{unknown[0]}: this model has no such parameter; its own are: "
                f"{', '.join(extra) or 'none'}"
            )
        try:
            self.shots, self._judge = self._choose()
            self._check()
        except InputError as error:
            raise ConfigError(f"{PLACE}: {error}") from error

    def make(self, attention: Mapping[str, AttentionFn]) -> list[Array]:
        """Return the videos, uint8 [T, H, W, 3] each, with the weights as they are now.

        Args:
            attention: in place of the pipeline's own, by role: a student may be trained with sparse attention.
        """
        frames: list[Array] = []
        for start in range(0, len(self.shots), VIDEOS_AT_ONCE):
            batch = self._batch(range(start, min(start + VIDEOS_AT_ONCE, len(self.shots))))
            made = self._opened.run(batch, attention).frames
            assert made is not None
            frames += made
        return frames

    def scores(self, frames: Sequence[Array]) -> dict[str, float]:
        """Return what the judge of the world reads in videos of `make`: attribute -> share that is right; empty where
        there is no judge."""
        return {} if self._judge is None else {k: score.value for k, score in self._judge(frames).items()}

    # -- what is made -------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[list[Shot], Judge | None]:
        section, pipeline, model = self._section, self._opened.pipeline, self._opened.model
        needs_image, reads_text = pipeline.inputs.get("image") is True, "text_encoding" in pipeline.stages
        if section.prompts and not reads_text:
            raise ConfigError(f"{PLACE}.prompts: {model.name} reads no prompts; leave them out, and set images")
        if section.images and "image" not in pipeline.inputs:
            raise ConfigError(f"{PLACE}.images: {model.name} takes no image; leave them out")
        if section.images and reads_text and not section.prompts:
            raise ConfigError(f"{PLACE}.images: set prompts as well, one for each image or for one image of all")
        if section.prompts or section.images:
            if needs_image and not section.images:
                raise ConfigError(
                    f"{PLACE}.images: {model.name} begins with an image; give one, or one for each prompt"
                )
            return self._given(), None
        name = model.sidecar.get("world")
        if name is None:
            what = "prompts: [...]" if reads_text else "images: [...]"
            raise ConfigError(
                f"{model.name} names no world, so there is nothing to make videos of; set {PLACE}.{what}, or "
                f"{PLACE}.every=0"
            )
        world: Any = get_world(name)
        if hasattr(world, "player") != bool(needs_image):
            raise ConfigError(f"{PLACE}: the world {name!r} is not one of such a model; set prompts or images")
        return self._played(world) if needs_image else self._described(world)

    def _given(self) -> list[Shot]:
        """Return the shots of the recipe's own prompts and images."""
        prompts, files = list(self._section.prompts) or [""] * len(self._section.images), list(self._section.images)
        if len(files) not in (0, 1, len(prompts)):
            raise ConfigError(f"{PLACE}: {len(prompts)} prompts and {len(files)} images; give one for all or one each")
        assert self.params.height and self.params.width
        pictures = [fit_picture(load_picture(f), self.params.height, self.params.width) for f in files]
        images = pictures * len(prompts) if len(pictures) == 1 else pictures or [None] * len(prompts)
        labels = list(self._section.prompts) or [Path(f).name for f in files]
        return [Shot(label, p, image) for label, p, image in zip(labels, prompts, images, strict=True)]

    def _described(self, world: Any) -> tuple[list[Shot], Judge]:
        specs = heldout_specs(world, self._section.videos)
        shots = [Shot(caption, caption) for caption in (spec.caption() for spec in specs)]
        return shots, lambda frames: prompt_following(world, zip(specs, frames, strict=True))

    def _played(self, world: Any) -> tuple[list[Shot], Judge]:
        params, shots, told = self.params, list[Shot](), list[Array]()
        truth: list[Array] = []
        for seed in range(self._section.videos):
            clip = world.sample(seed, "heldout", height=params.height, width=params.width, num_frames=params.num_frames)
            done = clip.actions.keyboard, clip.actions.mouse
            shots.append(Shot(f"game {seed}", image=clip.frames[0], actions=done))
            told.append(world.told_motions(*done))
            truth.append(clip.frames)

        def judge(frames: Sequence[Array]) -> Report:
            walks = [Walk(f, t, world.read_motions(f), [len(f)]) for f, t in zip(frames, told, strict=True)]
            return action_following(world, walks)

        judge(truth)  # refuses videos that are too short to be judged
        return shots, judge

    # -- batches ------------------------------------------------------------------------------------------------------

    def _batch(self, numbers: Sequence[int]) -> ForwardBatch:
        shots = [self.shots[number] for number in numbers]
        prompts, given = [shot.prompt for shot in shots], dict[str, Any]()
        if shots[0].image is not None:
            given["image"] = _pictures([shot.image for shot in shots if shot.image is not None])
        if shots[0].actions is not None:
            done = [shot.actions for shot in shots if shot.actions is not None]
            keyboard, mouse = (torch.from_numpy(np.stack(part)) for part in zip(*done, strict=True))
            given["family"] = Actions(keyboard, mouse)
        negative = [self.params.negative_prompt or ""] * len(shots)
        return ForwardBatch(self.params, prompts, negative, list(numbers), **given)

    def _check(self) -> None:
        """Refuse, before the first step, what a validation would refuse."""
        pipeline = self._opened.pipeline
        asked = self._section.params
        inputs = ["image"] if self.shots[0].image is not None else []
        check_settings(pipeline, self.params, pipeline.defaults(), {**asked, **(asked.get("extra") or {})}, inputs)
        if (stage := pipeline.stages.get("validation")) is not None:
            stage.forward(self._batch(range(min(VIDEOS_AT_ONCE, len(self.shots)))), pipeline.args)
        try:
            self._opened.encoder()([shot.prompt for shot in self.shots])
        except KinetoscopeError as error:
            raise ConfigError(f"{PLACE}.prompts: {error}") from error


def _pictures(images: Sequence[Array]) -> Tensor:
    """Return uint8 arrays [H, W, 3] as one float32 tensor [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
