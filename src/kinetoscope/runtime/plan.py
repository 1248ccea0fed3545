"""What a model directory holds, and what a run of it will cost, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.scheduler import count_evaluations
from kinetoscope.engine.rows import BATCH_POSITIONS
from kinetoscope.loading.weights import read_headers, weight_files
from kinetoscope.runtime.footprint import MemoryPlan, plan_memory
from kinetoscope.runtime.generator import VideoGenerator


@dataclass(frozen=True, slots=True)
class ComponentSummary:
    """One component of a directory.

    Attributes:
        parameters: numbers stored, 0 for components without weights.
        file_bytes: bytes of the weights on disk.
        dtypes: how they are stored.
    """

    name: str
    class_name: str
    parameters: int
    file_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What one video costs.

    Attributes:
        params: the request, resolved.
        latent_shape: [C, T, H, W].
        tokens: of one row.
        forwards: rows evaluated in the whole run: steps times branches.
        pflop: of all forwards, 1e15 operations.
        memory: what is where, with the options of the generator.
    """

    params: SamplingParams
    latent_shape: tuple[int, int, int, int]
    tokens: int
    forwards: int
    pflop: float
    memory: MemoryPlan

    @property
    def weight_bytes(self) -> int:
        """Of all components in the dtypes they are computed in."""
        return sum(self.memory.weights.values())

    @property
    def activation_bytes(self) -> int:
        """Estimate of the transformer's working memory in one forward."""
        return self.memory.activations


def summarize(generator: VideoGenerator) -> list[ComponentSummary]:
    """The components of a generator's directory, read from the headers of their files.

    Raises:
        ModelLoadError: see `weight_files` and `read_headers`.
    """
    model = generator.pipeline.model
    found: list[ComponentSummary] = []
    for name, class_name in model.components().items():
        folder = model.folder(name)
        files = weight_files(folder) if any(folder.glob("*.safetensors*")) else []  # a directory may hold none
        headers = read_headers(files).values()
        size, dtypes = sum(file.stat().st_size for file in files), {header.dtype for header in headers}
        parameters = sum(math.prod(header.shape) for header in headers)
        found.append(ComponentSummary(name, class_name, parameters, size, tuple(sorted(dtypes))))
    return found


def plan_run(generator: VideoGenerator, request: SamplingParams) -> RunPlan:
    """The cost of one video with `request` over the generator's defaults.

    Raises:
        InputError: the request is not one the model can serve.
    """
    from kinetoscope.pipelines.stages.validation import check_params

    pipeline = generator.pipeline
    params = request.over(generator.defaults())
    check_params(params, pipeline.geometry)
    assert params.num_frames and params.height and params.width and params.num_inference_steps
    tokens = pipeline.geometry.tokens(params.num_frames, params.height, params.width)
    branches = pipeline.rows(params)
    vae: dict[str, Any] = pipeline.model.config("vae")
    size = pipeline.geometry.latent_size(params.num_frames, params.height, params.width)
    evaluations = count_evaluations(
        params.scheduler, pipeline.model.components().get("scheduler"), params.num_inference_steps
    )
    plan = pipeline.args.cfg
    together = plan == "batched" or (plan == "auto" and branches * math.prod(size) <= BATCH_POSITIONS)
    parameters = {c.name: c.parameters for c in summarize(generator)}
    return RunPlan(
        params=params,
        latent_shape=(vae["z_dim"] if "z_dim" in vae else vae["latent_channels"], *size),
        tokens=tokens,
        forwards=evaluations * branches,
        pflop=pipeline.forward_flops(tokens) * evaluations * branches / 1e15,
        memory=plan_memory(
            pipeline, generator.options, parameters, tokens * (branches if together else 1), size, params.num_frames
        ),
    )
