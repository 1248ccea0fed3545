"""Which families can be trained: class of a transformer -> what stands for it in any role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.core.context import AttentionFn
from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.registry import Registry
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.loading import ModelDir
from kinetoscope.loading.lora_sampling import LoraSampling, sampled_as
from kinetoscope.loading.weights import load_weights
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.train.roles import ModelBase, Text
from kinetoscope.train.run_inputs import FileDigests, text_digest

PLUGINS = Registry(
    "a {name} cannot be trained here; the families that can: {known}",
    {
        "WanTransformer3DModel": "kinetoscope.train.plugins.wan:WanModel",
        "CausalWanTransformer3DModel": "kinetoscope.train.plugins.causal_wan:CausalWanModel",
        "CausalMatrixGame2WanModel": "kinetoscope.train.plugins.matrix_game:MatrixGameModel",
        "CausalMatrixGameWanModel": "kinetoscope.train.plugins.matrix_game:MatrixGameModel",
        "CausalWanModel": "kinetoscope.train.plugins.matrix_game:MatrixGameModel",
        "MatrixGame2WanModel": "kinetoscope.train.plugins.matrix_game:MatrixGameVideoModel",
        "MatrixGameWanModel": "kinetoscope.train.plugins.matrix_game:MatrixGameVideoModel",
        "CosmosTransformer3DModel": "kinetoscope.train.plugins.cosmos:CosmosModel",
        "HunyuanVideo15Transformer3DModel": "kinetoscope.train.plugins.hunyuan:Hunyuan15Model",
        "HunyuanVideoTransformer3DModel": "kinetoscope.train.plugins.hunyuan:HunyuanModel",
        "LongCatVideoTransformer3DModel": "kinetoscope.train.plugins.longcat:LongCatModel",
    },
)
"""By the class name of the transformer, as in model_index.json."""


def register_plugin(class_name: str, place: str) -> None:
    """Let transformers of a class be trained by `place`, "module:class" of a `ModelBase`."""
    PLUGINS[class_name] = place


def plugin_of(class_name: str) -> type[ModelBase]:
    """The plugin of a transformer's class.

    Raises:
        ConfigError: there is none.
    """
    return PLUGINS.find(class_name)


class Opened:
    """A model directory opened for training: its pipeline, with weights in float32.

    Attributes:
        pipeline: samples with the very weights that are trained.
    """

    def __init__(self, init_from: str, transformer: str | None = None, device: str = "cpu") -> None:
        """
        Args:
            init_from: an embedded name, a directory, or a hub id.
            transformer: a folder or .safetensors file whose weights are used in place of the directory's own.

        Raises:
            ModelLoadError: there is no such model, or the weights do not fit.
            ConfigError: its family cannot be trained.
        """
        self.model: ModelDir = find_model(init_from)
        args = ExecutionArgs(device=torch.device(device), dtype=torch.float32)
        self.pipeline: ComposedPipeline = build_pipeline(self.model, args)
        self.class_name = self.model.components()["transformer"]
        self.plugin = plugin_of(self.class_name)
        self.transformer: nn.Module = self.pipeline.get_module("transformer")
        self.override = None if transformer is None else Path(transformer)
        if self.override is not None:
            override_weights(self.transformer, self.override)
        for name, parameter in self.transformer.named_parameters():  # mapped files are read-only and not aligned
            owner = self.transformer.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.detach().clone()))

    def digests(self, files: FileDigests, *, whole: bool) -> dict[str, str]:
        """Return digests of what training reads of the directory: of the files of its transformer and of the sampling
        defaults that it is told, and if `whole` of the files of all other components."""
        model, found = self.model, dict[str, str]()
        for name in model.components() if whole else ("transformer",):
            found[name] = files.of_folder(model.folder(name))
        if self.override is not None:
            found["transformer"] = files.of_folder(self.override)
        defaults = self.pipeline.defaults()
        told = (defaults.negative_prompt or "", defaults.guidance_scale, defaults.flow_shift, defaults.fps)
        return {**found, "defaults": text_digest(*map(str, told))}

    def role(self, **options: Any) -> ModelBase:
        """The transformer by its family's plugin; `options` are `ModelBase`'s.

        Raises:
            ConfigError: a family, or a model of one, that cannot be trained.
        """
        return self.plugin.of(self.pipeline, **options)

    def encoder(self) -> Callable[[list[str]], Text]:
        """Prompts to text states, by the pipeline's own stage; to none where the family reads no text."""
        return partial(self.plugin.encode_text, self.pipeline)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w] float32 of videos [B, 3, T, H, W] in [-1, 1]."""
        return self.plugin.encode_video(self.pipeline, video.to(self.pipeline.args.device))

    def latent_channels(self) -> int:
        """C of the latents."""
        vae = self.model.config("vae")
        return int(vae.get("z_dim") or vae["latent_channels"])

    def sampled_as(self, sampling: LoraSampling) -> Opened:
        """The same weights, sampled as what is made of them will be."""
        other = copy(self)
        other.pipeline = build_pipeline(
            sampled_as(self.model, sampling), self.pipeline.args, modules=self.pipeline.loaded_modules()
        )
        return other

    def sample(self, prompts: list[str], seeds: list[int], **params: Any) -> ForwardBatch:
        """Videos by the engine, with the weights as they are now; `params` over the directory's sampling defaults."""
        batch = ForwardBatch(
            replace(self.pipeline.defaults(), **params), prompts, [self.negative_prompt] * len(prompts), seeds
        )
        return self.pipeline.run(batch)

    def run(self, batch: ForwardBatch, attention: Mapping[str, AttentionFn]) -> ForwardBatch:
        """Return a batch that all stages have run, with the weights as they are now.

        Args:
            attention: in place of the pipeline's own, by role.
        """
        pipeline = self.pipeline
        kept = pipeline.args
        pipeline.args = replace(kept, attention={**kept.attention, **attention})
        try:
            return pipeline.run(batch)
        finally:
            pipeline.args = kept

    @property
    def negative_prompt(self) -> str:
        """That of the directory's sampling defaults."""
        return self.pipeline.defaults().negative_prompt or ""


def override_weights(transformer: nn.Module, path: Path) -> None:
    """Weights of a folder or a .safetensors file into a loaded transformer.

    Raises:
        ModelLoadError: they are missing or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        load_weights(transformer, path, dtype=lambda _: torch.float32, device=torch.device("cpu"))
        return
    try:
        transformer.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        message = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"transformer file {path} does not fit this model: {message}") from error
