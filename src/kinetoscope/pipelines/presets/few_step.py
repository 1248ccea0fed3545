"""Few-step students of families whose own pipelines take many steps: HunyuanVideo, HunyuanVideo 1.5, LongCat-Video and
Cosmos Predict 2.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.engine.strategies.cosmos import CosmosStrategy
from kinetoscope.engine.strategies.dmd import STEPS, WARP, FewSteps
from kinetoscope.engine.strategies.longcat import LongCatStrategy
from kinetoscope.models.hunyuan import spec as hunyuan
from kinetoscope.models.hunyuan.strategy import HunyuanStrategy, true_cfg_scale
from kinetoscope.models.hunyuan15 import spec as hunyuan15
from kinetoscope.models.hunyuan15.strategy import Hunyuan15Strategy
from kinetoscope.models.longcat import spec as longcat
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets.cosmos import Cosmos25Predict
from kinetoscope.pipelines.presets.hunyuan import HunyuanVideo
from kinetoscope.pipelines.presets.hunyuan15 import HunyuanVideo15
from kinetoscope.pipelines.presets.longcat import LongCatVideo
from kinetoscope.pipelines.stages import DenoisingStage
from kinetoscope.pipelines.stages.few_step import FewStepTimestepStage
from kinetoscope.pipelines.unread import Unread

DEFAULTS: dict[str, Any] = {STEPS: [1000, 750, 500, 250], WARP: False}


class HunyuanFewSteps(FewSteps, HunyuanStrategy):
    """Few steps of a network that is told the guidance scale it was distilled at."""

    def check_guidance(self, batch: ForwardBatch) -> None:
        """Refuse unconditional rows.

        Raises:
            InputError: `true_cfg_scale` asks for them.
        """
        if (scale := true_cfg_scale(batch)) != 1.0:
            raise InputError(f"true_cfg_scale={scale}: guidance is distilled into few-step models; use 1")


class CosmosFewSteps(FewSteps, CosmosStrategy):
    """Few steps of a flow."""


class Hunyuan15FewSteps(FewSteps, Hunyuan15Strategy):
    """Few steps of a network that reads two texts."""


class LongCatFewSteps(FewSteps, LongCatStrategy):
    """Few steps of a network that predicts the negative velocity."""


class FewStepHunyuanVideo(HunyuanVideo):
    """Prompt -> video in the steps a HunyuanVideo student was distilled for (`dmd_denoising_steps=`)."""

    guided: ClassVar[bool] = False
    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(("true_cfg_scale",), "guidance is distilled into few-step models; use 1", lambda run: True),
        *HunyuanVideo.unread,
    )
    extra_defaults: ClassVar[Mapping[str, Any]] = {**HunyuanVideo.extra_defaults, **DEFAULTS}

    def create_stages(self) -> None:
        """HunyuanVideo's, with the student's timesteps."""
        super().create_stages()
        take_few_steps(self, HunyuanFewSteps)

    def defaults(self) -> SamplingParams:
        """HunyuanVideo's, with as many steps as the list has, and its published shift unless the directory says one."""
        return few_step_defaults(super().defaults(), self.model.defaults, hunyuan.CONVENTION.default_shift)


class FewStepCosmos25(Cosmos25Predict):
    """Prompt, and perhaps an image or a video -> video in the steps a Predict 2.5 student was distilled for."""

    guided: ClassVar[bool] = False
    extra_defaults: ClassVar[Mapping[str, Any]] = {**Cosmos25Predict.extra_defaults, **DEFAULTS}

    def create_stages(self) -> None:
        """Predict 2.5's, with the student's timesteps."""
        super().create_stages()
        take_few_steps(self, partial(CosmosFewSteps, convention=self.convention))

    def defaults(self) -> SamplingParams:
        """Predict 2.5's without guidance, with as many steps as the list has."""
        return unguided_defaults(super().defaults(), self.model.defaults, self.convention.default_shift)


class FewStepHunyuanVideo15(HunyuanVideo15):
    """Prompt -> video in the steps a HunyuanVideo 1.5 student was distilled for."""

    guided: ClassVar[bool] = False
    extra_defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    def create_stages(self) -> None:
        """HunyuanVideo 1.5's, with the student's timesteps."""
        super().create_stages()
        take_few_steps(self, Hunyuan15FewSteps)

    def defaults(self) -> SamplingParams:
        """HunyuanVideo 1.5's without guidance, with as many steps as the list has."""
        params = super().defaults().over(SamplingParams(extra=dict(self.extra_defaults)))
        return unguided_defaults(params, self.model.defaults, hunyuan15.CONVENTION.default_shift)


class FewStepLongCat(LongCatVideo):
    """Prompt -> video in the steps a LongCat-Video student was distilled for. Nothing is continued or refined: those
    have noise levels of their own."""

    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    guided: ClassVar[bool] = False
    unread: ClassVar[tuple[Unread, ...]] = ComposedPipeline.unread
    extra_defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    @property
    def inputs(self) -> Mapping[str, bool]:
        """None."""
        return {}

    def create_stages(self) -> None:
        """LongCat-Video's, with the student's timesteps."""
        super().create_stages()
        take_few_steps(self, LongCatFewSteps)

    def defaults(self) -> SamplingParams:
        """LongCat-Video's without guidance, with as many steps as the list has."""
        return unguided_defaults(super().defaults(), self.model.defaults, longcat.CONVENTION.default_shift)


def take_few_steps(pipeline: ComposedPipeline, strategy: Any) -> None:
    """Replace the timesteps of a pipeline by the list of its defaults, and what makes its steps by `strategy`."""
    steps = (pipeline.defaults().extra or {})[STEPS]
    pipeline.add_stage("timesteps", FewStepTimestepStage(steps))
    stage = pipeline.stages["denoising"]
    assert isinstance(stage, DenoisingStage)
    stage.strategy_cls = strategy


def unguided_defaults(params: SamplingParams, own: Mapping[str, Any], shift: float) -> SamplingParams:
    """`few_step_defaults` of families that are guided by a second row; students are not."""
    plain = {"guidance_scale": 1.0, **own}
    return few_step_defaults(replace(params, guidance_scale=plain["guidance_scale"]), plain, shift)


def few_step_defaults(params: SamplingParams, own: Mapping[str, Any], shift: float) -> SamplingParams:
    """Those of a family's pipeline for its students; `own` are the directory's, which come first."""
    count = len((params.extra or {})[STEPS])
    return replace(
        params,
        num_inference_steps=own.get("num_inference_steps", count),
        flow_shift=own.get("flow_shift", shift),
        scheduler=None,
    )
