"""The parts of a world that is played as they are before post-training, drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from kinetoscope.models.matrix_game.config import MatrixGameConfig
from kinetoscope.models.matrix_game.transformer import MatrixGameTransformer3DModel
from kinetoscope.nn.action import ActionModule
from kinetoscope.train.loop import step_generator

MOUSE = 0.1
"""Mouse of a usual turn. Weights that read it are larger by as much as it is smaller than a pressed key."""


def draw_transformer(config: Mapping[str, Any], seed: int) -> MatrixGameTransformer3DModel:
    """A Matrix-Game transformer of a published `config.json`, drawn as Wan's: linear layers Xavier uniform with zero
    bias, time embedding normal 0.02, modulation tables normal d^-1/2, output projection zero.

    Raises ConfigError where the configuration describes no such model.
    """
    module = MatrixGameTransformer3DModel(MatrixGameConfig.from_dict(config))
    generator = step_generator(seed, 0)
    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv3d):
                if "time_embedder" in name:
                    nn.init.normal_(part.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(part.weight.flatten(1), generator=generator)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for part in module.modules():
            if isinstance(part, ActionModule) and part.enable_mouse:
                weight = part.mouse_mlp.get_parameter("0.weight")
                weight[:, module.config.dim :] /= MOUSE
        for name, parameter in module.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=module.config.dim**-0.5, generator=generator)
        nn.init.zeros_(module.proj_out.weight)
    return module


def draw_image_encoder(config: Mapping[str, Any], seed: int) -> CLIPVisionModel:
    """A vision model that nothing has trained and that is blind: the same features for every image.

    What a world looks like at its start comes by the condition latents. Features of an image that was seen five hundred
    frames ago would say nothing true, and a model trained on short clips would believe them.
    """
    module = CLIPVisionModel(CLIPVisionConfig(**config))
    generator = step_generator(seed, 1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 or name.endswith("class_embedding"):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if "patch_embedding" in name:
                nn.init.zeros_(parameter)
    return module
