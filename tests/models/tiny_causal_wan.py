"""A tiny random causal Wan, and slow ways to compute what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kinetoscope.models.wan.causal import CausalWanConfig, CausalWanTransformer3DModel
from tiny import perturb

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
TEXT = 8  # text tokens


def tiny_causal(seed: int = 0, **config: Any) -> CausalWanTransformer3DModel:
    """Every parameter random."""
    model = CausalWanTransformer3DModel(CausalWanConfig.from_dict({**TINY, **config}))
    model.init_weights(torch.Generator().manual_seed(seed))
    perturb(model, seed + 1, scale=0.15)
    return model.eval().requires_grad_(False)


def frame_mask(blocks: list[int], window: int = -1, sink: int = 0) -> Tensor:
    """[T, T] which frame (row) sees which, from the definition: of all frames up to the end of its block the sink and
    the newest that fill the window."""
    total = sum(blocks)
    ends = [sum(blocks[: i + 1]) for i, n in enumerate(blocks) for _ in range(n)]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        seen = list(range(ends[query]))
        if window != -1 and len(seen) > window:
            seen = seen[:sink] + seen[len(seen) - (window - sink) :]
        mask[query, seen] = True
    return mask


def masked_forward(
    model: Any, mask: Tensor, latents: Tensor, timestep: Tensor, text: Tensor, constant: int = 0
) -> Tensor:
    """A forward whose self-attention is softmax over all tokens with an explicit mask of frames, nothing cached; keys
    and values of the first `constant` frames have no gradient."""
    frame_tokens = latents.shape[-1] * latents.shape[-2] // 4
    allowed = mask.repeat_interleave(frame_tokens, 0).repeat_interleave(frame_tokens, 1)
    modules = [block.attn1 for block in model.blocks]

    def forward(self: Any, x: Tensor, rope: Any, grid: Any = None, gate: Any = None) -> Tensor:
        q, k, v = self.project(x, rope.table)
        old = constant * frame_tokens
        k, v = (torch.cat([t[:, :old].detach(), t[:, old:]], 1) for t in (k, v))
        logits = torch.einsum("rnhd,rmhd->rhnm", q, k) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        return self.to_out(torch.einsum("rhnm,rmhd->rnhd", weights, v).reshape(x.shape))

    try:
        for module in modules:
            module.forward = forward.__get__(module)
        return model(latents, timestep, text)
    finally:
        for module in modules:
            del module.forward


# -- recorded runs of the published code (tests/fixtures/causal_wan/make.py) -------------------------------------------

FIXTURES = Path(__file__).parents[1] / "fixtures" / "causal_wan"
SIZE = (4, 4, 6)  # channels, height, width of the latents
SEEDS = [7, 8]
SHIFT, STEPS = 5.0, [1000, 750, 500, 250]
EXPERTS = ("high", "low")


@dataclass(frozen=True)
class Run:
    """A rollout, recorded by the published code.

    Attributes:
        frames: latent frames asked for, the given one included.
        config: of the transformer, beyond TINY.
        extra: of the request.
        shift: of the schedule.
        given: whether the first frame is given.
    """

    frames: int
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    shift: float = SHIFT
    given: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Names as in requests."""
        return {"dmd_denoising_steps": STEPS, "warp_denoising_step": True, "context_noise": 0, **self.extra}


TWO = {"dmd_denoising_steps": [1000, 850, 700, 550, 350, 275, 200, 125]}
BOUNDARY = 875.0  # timestep between the experts
SELF_FORCING = {
    "t2v": Run(9),
    "plain_steps": Run(6, {"num_frames_per_block": 2}, {"warp_denoising_step": False}),
    "context_noise": Run(6, {}, {"context_noise": 60}),
    "window": Run(15, {"local_attn_size": 5}),
    "sink": Run(12, {"local_attn_size": 6, "sink_size": 2, "num_frames_per_block": 2}),
    "first_frame": Run(7, {"independent_first_frame": True}),
    "i2v": Run(7, {"independent_first_frame": True}, given=True),
}
TWO_EXPERTS = {"two_experts": Run(9, {}, TWO, 12.0), "two_experts_i2v": Run(9, {}, TWO, 12.0, given=True)}
FAST = Run(3, {}, {"dmd_denoising_steps": [1000, 757, 522], "warp_denoising_step": False}, 8.0)


def prompt_embeds() -> Tensor:
    """[B, L, D]"""
    return torch.randn(len(SEEDS), TEXT, TINY["text_dim"], generator=torch.Generator().manual_seed(50))


def first_frame() -> Tensor:
    """[B, C, 1, H, W] the given frame."""
    return torch.randn(len(SEEDS), SIZE[0], 1, *SIZE[1:], generator=torch.Generator().manual_seed(51))


def fixture_model(expert: str = "high", **config: Any) -> CausalWanTransformer3DModel:
    """A model of the recorded runs."""
    model = CausalWanTransformer3DModel(CausalWanConfig.from_dict({**TINY, **config}))
    weights = load_file(FIXTURES / f"{expert}.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval().requires_grad_(False)
