"""FastWan: few-step Wan, from text, from an image, or from both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.strategies.dmd import STEPS, WARP, DMDExpertStrategy, DMDStrategy
from kinetoscope.models.wan.distilled import FEW_STEP_PRESETS, FirstFrameDMDStrategy
from kinetoscope.pipelines.presets.wan import TRAIN_TIMESTEPS, WanImageToVideo, WanTextToVideo
from kinetoscope.pipelines.stages import DenoisingStage, FirstFrameStage
from kinetoscope.pipelines.stages.few_step import FewStepTimestepStage


class FastWanTextToVideo(WanTextToVideo):
    """Prompt -> video in the steps a student was distilled for (`dmd_denoising_steps=`), without guidance.

    The scheduler of the directory is the teacher's and is not used. With `expand_timesteps` a first image may be given.
    """

    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    guided: ClassVar[bool] = False
    extra_defaults: ClassVar[Mapping[str, Any]] = {STEPS: [1000, 757, 522], WARP: False}

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A first image, where the model can keep one."""
        return {"image": False} if self.frame_wise else {}

    def create_stages(self) -> None:
        """Wan's, with the student's timesteps."""
        super().create_stages()
        ratio = self.model.model_index.get("boundary_ratio")
        steps = {**self.extra_defaults, **(self.defaults().extra or {})}[STEPS]
        stage = FewStepTimestepStage(steps, None if ratio is None else ratio * TRAIN_TIMESTEPS)
        self.add_stage("timesteps", stage)

    def add_condition_stages(self) -> None:
        """The first frame."""
        if self.frame_wise:
            self.add_stage("first_frame", FirstFrameStage(self.lazy("vae")))

    def denoising_stage(self) -> DenoisingStage:
        """Wan's, with the few-step strategy of its kind."""
        stage = super().denoising_stage()
        if self.model.model_index.get("boundary_ratio") is not None:
            stage.strategy_cls = DMDExpertStrategy
        else:
            stage.strategy_cls = FirstFrameDMDStrategy if self.frame_wise else DMDStrategy
        return stage

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name, or of the model it is like."""
        like = "FastWan2.2-TI2V-5B" if self.frame_wise else "FastWan2.1-T2V-1.3B"
        preset = FEW_STEP_PRESETS.get(self.model.name) or FEW_STEP_PRESETS[f"FastVideo/{like}-Diffusers"]
        return SamplingParams(**self.model.defaults).over(preset)


class FastWanImageToVideo(FastWanTextToVideo, WanImageToVideo):
    """Image and prompt -> video in few steps."""

    tasks: ClassVar[tuple[str, ...]] = ("i2v",)

    @property
    def inputs(self) -> Mapping[str, bool]:
        """As Wan's."""
        return WanImageToVideo.inputs.__get__(self)

    def add_condition_stages(self) -> None:
        """As Wan's."""
        WanImageToVideo.add_condition_stages(self)
