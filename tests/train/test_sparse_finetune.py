"""Fine-tuning to sparse attention: its ramp, and that each step is fine-tuning under that step's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import randn
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.train.methods.finetune import Finetune, FinetuneSettings
from kinetoscope.train.methods.sparse_finetune import SparseFinetune, SparseFinetuneSettings
from kinetoscope.train.plugins.causal_wan import CausalWanModel
from kinetoscope.train.plugins.wan import WanModel
from kinetoscope.train.roles import Text, TrainBatch
from models.tiny_causal_wan import TEXT, TINY, tiny_causal

RAMP: dict[str, Any] = {"sparsity": 0.5, "tile": (2, 2, 2), "rise": 0.2, "every": 10, "caption_dropout": 0}


def wan(attention: str = "dense") -> WanModel:
    model = WanTransformer3DModel(tiny_causal().config)
    model.load_state_dict(tiny_causal().state_dict())
    return WanModel(model, trainable=True, attention=attention)


def batch() -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    text = Text(randn((2, TEXT, TINY["text_dim"]), generator), torch.full((2,), TEXT))
    return TrainBatch(randn((2, 4, 6, 8, 8), generator), text)


def result(method: Finetune, step: int) -> tuple[Tensor, Tensor]:
    """Loss and one gradient."""
    method.student.transformer.zero_grad()
    total = method.losses("student", batch(), step, torch.Generator().manual_seed(step))["total"]
    total.backward()
    grad = dict(method.student.transformer.named_parameters())["blocks.0.attn1.to_v.weight"].grad
    assert grad is not None
    return total.detach(), grad.clone()


def test_the_share_left_out_rises_to_the_sparsity() -> None:
    method = SparseFinetune({"student": wan()}, SparseFinetuneSettings(name="sparse_finetune", **RAMP))
    shares = [method.attention(step) for step in (0, 9, 10, 19, 20, 30, 1000)]
    tile = ",tile=2,2,2"
    assert (
        shares
        == ["dense"] * 2
        + [f"vsa:sparsity=0.2{tile}"] * 2
        + [f"vsa:sparsity=0.4{tile}"]
        + [f"vsa:sparsity=0.5{tile}"] * 2
    )


def test_a_step_is_fine_tuning_under_its_attention() -> None:
    """In whatever order steps come: a resumed run starts in the middle."""
    method = SparseFinetune({"student": wan()}, SparseFinetuneSettings(name="sparse_finetune", **RAMP))
    losses: list[float] = []
    for step in (25, 0, 40):
        settings = FinetuneSettings(name="finetune", caption_dropout=0)
        plain = Finetune({"student": wan(method.attention(step))}, settings)
        for found, expected in zip(result(method, step), result(plain, step), strict=True):
            assert torch.equal(found, expected)
        dense = Finetune({"student": wan()}, settings)
        losses.append(float((result(method, step)[1] - result(dense, step)[1]).abs().max()))
    assert losses[1] == 0 and min(losses[0], losses[2]) > 1e-6, "sparse steps must differ from dense ones"


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"start=0.9 is above"):
        SparseFinetuneSettings(name="sparse_finetune", start=0.9)
    with pytest.raises(ValidationError, match="three sizes"):
        SparseFinetuneSettings(name="sparse_finetune", tile=(4, 0, 4))
    causal = CausalWanModel(tiny_causal(num_frames_per_block=2), trainable=True)
    with pytest.raises(ConfigError, match="causal one attends densely"):
        SparseFinetune({"student": causal}, SparseFinetuneSettings(name="sparse_finetune"))
