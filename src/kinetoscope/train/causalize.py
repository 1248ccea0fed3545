"""A directory of a causal model that begins with the weights of one that sees whole videos.

Parameters have the same names and shapes, so only the words around them change: the classes, the sizes of blocks, and
the few steps that it will be sampled with. What it makes before it is trained is not worth watching.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.files import replacing_folder, write_json
from kinetoscope.engine.strategies.causal import CONTEXT_NOISE
from kinetoscope.engine.strategies.dmd import STEPS, WARP
from kinetoscope.loading import ModelDir
from kinetoscope.models.wan.causal import CausalWanConfig
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.train.recipe import Positive, Section

FROM, TO = "WanTransformer3DModel", "CausalWanTransformer3DModel"
PIPELINE = "WanCausalDMDPipeline"
LEFT_OUT = ("README.md", "loss.png", "step_caches.json")
"""Files that tell of what the transformer was."""


class CausalSection(Section):
    """How a model becomes causal.

    Attributes:
        num_frames_per_block: latent frames made together.
        local_attn_size: latent frames that a block sees, its own included; -1: all. With a window a stream has no end.
        sink_size: first latent frames that every block sees.
        steps, warp, shift: the few steps it is sampled with (`FewStepSchedule.make`).
        context_noise: timestep at which finished blocks are remembered.
    """

    num_frames_per_block: Positive = 3
    local_attn_size: int = -1
    sink_size: int = Field(default=0, ge=0)
    steps: tuple[Positive, ...] = (1000, 750, 500, 250)
    warp: bool = True
    shift: float = Field(default=5.0, gt=0)
    context_noise: int = Field(default=0, ge=0)

    def defaults(self) -> dict[str, Any]:
        """Sampling defaults."""
        extra = {STEPS: list(self.steps), WARP: self.warp, CONTEXT_NOISE: self.context_noise}
        few = {"num_inference_steps": len(self.steps), "guidance_scale": 1.0, "flow_shift": self.shift}
        return {**few, "extra": extra}


def make_causal(name: str, section: CausalSection, folder: Path) -> Path:
    """Copy a Wan text-to-video directory to `folder` as a causal one; what is there already is kept.

    Args:
        name: an embedded name, a directory or a hub id.

    Returns:
        `folder`.

    Raises:
        ModelLoadError: there is no such model.
        ConfigError: it is of another family, has two experts, or the blocks do not fit a window.
        OutputError: the directory cannot be written.
    """
    model = find_model(name)
    components = model.components()
    if components.get("transformer") != FROM or "transformer_2" in components:
        raise ConfigError(f"{name} cannot be made causal: only a Wan model with one {FROM} can")
    sizes = section.model_dump(include={"num_frames_per_block", "local_attn_size", "sink_size"})
    CausalWanConfig.from_dict({**model.config("transformer"), **sizes}).check()
    if folder.exists():
        return folder
    with replacing_folder(folder) as temporary:
        copied = model.copy(temporary, [model.path / name for name in LEFT_OUT])
        _rewrite(copied, section.defaults(), sizes)
    return folder


def _rewrite(model: ModelDir, defaults: dict[str, Any], sizes: dict[str, Any]) -> None:
    library, config = model.model_index["transformer"][0], model.config("transformer")
    index = {**model.model_index, "_class_name": PIPELINE, "transformer": [library, TO]}
    write_json(model.path / "model_index.json", index)
    old = {k: v for k, v in model.sidecar.get("defaults", {}).items() if k not in ("guidance", "scheduler")}
    write_json(model.path / "kinetoscope.json", {**model.sidecar, "defaults": {**old, **defaults}})
    write_json(model.config_file("transformer"), {**config, "_class_name": TO, **sizes})
