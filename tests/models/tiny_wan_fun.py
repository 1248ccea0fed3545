"""Tiny Wan2.1-Fun models and the parts around them, shared by the tests and by `fixtures/wan_fun/make.py`."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "wan_fun"
TOKENS, FEATURES, CLIP = 20, 16, 257  # text tokens, width of features; the reference cuts the context after 257 tokens
SIZE = (9, 32, 48)  # frames, height, width of the recorded runs
STEPS, SHIFT, GUIDANCE = 4, 3.0, 5.0
SHAPE = (2, 16, 3, 4, 6)  # latents of the recorded forwards and runs
KINDS: dict[str, dict[str, Any]] = {
    "control": {"in_channels": 48},
    "reference": {"in_channels": 48, "add_ref_conv": True},
    "camera": {"in_channels": 32, "add_control_adapter": True},
}


def tiny_config(kind: str) -> WanConfig:
    """Of the published models, all sizes but the channels made small."""
    return WanConfig(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=2, text_dim=FEATURES, freq_dim=32,
        image_dim=FEATURES, added_kv_proj_dim=24, **KINDS[kind],
    )  # fmt: skip


AUTHORS = {  # diffusers' parts of names -> the authors', in the order in which they are replaced
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    ".attn2.norm_added_k": ".attn2.norm_k_img",
    ".attn2.add_k_proj": ".attn2.k_img",
    ".attn2.add_v_proj": ".attn2.v_img",
    ".to_out.0": ".o",
    ".attn1.to_": ".self_attn.",
    ".attn2.to_": ".cross_attn.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj": ".ffn.0",
    ".ffn.net.2": ".ffn.2",
    ".scale_shift_table": ".modulation",
    "scale_shift_table": "head.modulation",
    "proj_out.": "head.head.",
}


def authors_name(name: str) -> str:
    """The name of a parameter in the authors' checkpoints."""
    for ours, theirs in AUTHORS.items():
        name = name.replace(ours, theirs)
    return name


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers that need no recording."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value of a size that matters."""
    for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
        value = random(tuple(parameter.shape), 1000 * seed + number)
        matrix = parameter.ndim > 1 and not name.endswith("scale_shift_table")
        value = 0.7 * value / math.sqrt(math.prod(parameter.shape[1:])) if matrix else 0.3 * value
        parameter.data = value + (1 if "norm" in name and name.endswith("weight") else 0)


def tiny_fun(kind: str) -> WanTransformer3DModel:
    """Our module of a kind, filled."""
    model = WanTransformer3DModel(tiny_config(kind)).eval()
    fill(model)
    return model


def forward_inputs(kind: str) -> dict[str, Tensor]:
    """Keyword arguments of our forward; rows of two texts."""
    rows, _, frames, height, width = SHAPE
    config = tiny_config(kind)
    inputs = {
        "latents": random((rows, config.in_channels, frames, height, width), 1),
        "timestep": torch.tensor([713.0, 120.0]),
        "encoder_hidden_states": random((rows, TOKENS, FEATURES), 2),
        "image_embeds": random((rows, CLIP, FEATURES), 3),
    }
    if config.add_ref_conv:
        inputs["reference"] = random((rows, 16, height, width), 4)
    if config.add_control_adapter:
        inputs["camera"] = random((rows, 24, frames, 8 * height, 8 * width), 5)
    return inputs


def clip_pixels(frames: int, seed: int) -> Tensor:
    """A video [1, 3, T, H, W] in [0, 1], in whole 255ths."""
    return random((1, 3, frames, *SIZE[1:]), seed).sigmoid().mul(255).round().div(255)


def run_texts() -> tuple[Tensor, Tensor]:
    """Embedded prompt and negative prompt [L, F] of the recorded runs."""
    return random((7, FEATURES), 10), random((3, FEATURES), 11)


RUNS: dict[str, dict[str, Any]] = {  # kind of model, and the seeds of what it is given
    "control": {"kind": "control", "video": 20},
    "control.image": {"kind": "control", "video": 20, "image": 21},
    "reference": {"kind": "reference", "video": 20},
    "reference.picture": {"kind": "reference", "video": 20, "ref_image": 22},
    "camera": {"kind": "camera", "image": 21, "camera": True},
}
POSES = [  # w2c of the recorded camera, 3 x 4: a turn about y that moves
    [math.cos(0.05 * i), 0.0, math.sin(0.05 * i), 0.02 * i,
     0.0, 1.0, 0.0, -0.01 * i * i,
     -math.sin(0.05 * i), 0.0, math.cos(0.05 * i), -0.03 * i] for i in range(SIZE[0])
]  # fmt: skip
INTRINSICS = (0.532, 0.946, 0.5, 0.48)


def pose_lines(poses: list[list[float]]) -> list[str]:
    """A pose file: a heading, then for each frame a time, fx fy cx cy, two unread values, and w2c row by row."""
    return ["made here"] + [" ".join(map(repr, [i, *INTRINSICS, 0, 0, *pose])) for i, pose in enumerate(poses)]


class AverageVAE(nn.Module):
    """Stands in for a video VAE: a latent is a mixture of the mean colours of its pixels, so nothing is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(random((16, 3), 7))
        self.config = {
            "latents_mean": [0.1 * i - 0.5 for i in range(16)], "latents_std": [1.0 + 0.05 * i for i in range(16)]
        }  # fmt: skip

    def encode(self, video: Tensor) -> Any:
        """[B, 3, T, H, W] -> a posterior whose mode is [B, 16, t, h, w]"""
        frames = [video[:, :, max(i - 3, 0) : i + 1] for i in range(0, video.shape[2], 4)]
        means = torch.stack([nn.functional.avg_pool2d(f.mean(2), 8) for f in frames], 2)
        mode = torch.einsum("kc,bcthw->bkthw", self.mix, means)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mode))

    def normalized(self, video: Tensor) -> Tensor:
        """As the reference's own VAE class returns it."""
        mean, std = (torch.tensor(self.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        return (self.encode(video).latent_dist.mode() - mean) / std


def clip_features(pixels: Tensor) -> Tensor:
    """Stands in for an image encoder: [B, 3, H, W] in [-1, 1] -> [B, 257, F]"""
    small = nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)  # [B, 48]
    return (small @ random((48, CLIP * FEATURES), 8)).view(-1, CLIP, FEATURES)
