"""The recorded tiny Matrix-Game models (tests/fixtures/matrix_game/make.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kinetoscope.models.matrix_game import spec
from kinetoscope.models.matrix_game.config import MatrixGameConfig
from kinetoscope.models.matrix_game.transformer import MatrixGameTransformer3DModel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "matrix_game"
VARIANTS = ("base", "gta", "templerun")
IMAGE_DIM = 20


def published_config(variant: str) -> dict[str, Any]:
    """The original repository's words; the width of the image features is a literal there."""
    return json.loads((FIXTURES / f"{variant}.json").read_text()) | {"image_dim": IMAGE_DIM}


def tiny_weights(variant: str) -> dict[str, Tensor]:
    """The recorded weights under our names."""
    stored = load_file(FIXTURES / f"{variant}.weights.safetensors")
    return {spec.rename(name): value.float() for name, value in stored.items()}


def tiny_model(variant: str) -> MatrixGameTransformer3DModel:
    model = MatrixGameTransformer3DModel(MatrixGameConfig.from_dict(published_config(variant)))
    model.load_state_dict(tiny_weights(variant))
    return model.eval().requires_grad_(False)


def recorded(name: str) -> dict[str, Tensor]:
    """Inputs and outputs of a recording, float32."""
    return {k: v.float() for k, v in load_file(FIXTURES / f"{name}.safetensors").items()}


def windows(frames: Tensor, start: int, count: int) -> Tensor:
    """Windows of latent frames [start, start + count) of per-frame actions [R, N, C], written out: the slow oracle."""
    picked = [[max(0, n) for n in range(4 * i - 12, 4 * i)] for i in range(start, start + count)]
    return torch.stack([frames[:, rows] for rows in picked], dim=1)
