"""The LTX-Video transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.ltx import spec
from kinetoscope.models.ltx.transformer import LTXVideoTransformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract

TINY = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,  # width 32: 32 % 6 = 2, as in the published model
    "cross_attention_dim": 32,
    "num_layers": 3,
    "caption_channels": 24,
}
SCALE = (8 / 25, 32, 32)
TEXT = 40


class TestLTX(FamilyContract):
    MODEL, CONFIG, ORACLE, TINY = LTXVideoTransformer3DModel, spec.LTXConfig, Oracle, TINY
    PUBLISHED = spec.PUBLISHED
    SHAPES = ((2, 8, 3, 4, 6), (1, 8, 1, 2, 2), (1, 8, 5, 3, 4))
    ROLES = ("self", "cross") * TINY["num_layers"]
    SHARED = ("rope_interpolation_scale",)

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows = shape[0]
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": 1000 * torch.rand(rows, generator=generator),
            "encoder_hidden_states": torch.randn(rows, TEXT, 24, generator=generator),
            "text_lengths": torch.tensor([7, 33, 40][:rows]),
            "rope_interpolation_scale": SCALE,
        }

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        latents = inputs["latents"]
        frames, height, width = latents.shape[2:]
        timestep = inputs["timestep"]
        if timestep.ndim == 2:
            timestep = timestep.repeat_interleave(height * width, dim=1)
        out = oracle(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep=timestep,
            encoder_attention_mask=(torch.arange(TEXT) < inputs["text_lengths"].unsqueeze(1)).long(),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=inputs["rope_interpolation_scale"],
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (frames, height, width))


class TestLTXTimestepPerFrame(TestLTX):
    """The first frame clean and the others not, as in image-to-video; the oracle takes a timestep a token."""

    COMPILED = True

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        timestep = 1000 * torch.rand(shape[0], shape[2], generator=generator)
        timestep[:, 0] = 0
        return super().inputs(shape, generator) | {"timestep": timestep}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TestLTX().make_model()


def test_text_beyond_its_length_is_not_read(model: nn.Module) -> None:
    inputs = TestLTX().inputs((1, 8, 2, 2, 2), torch.Generator().manual_seed(3))
    changed = inputs["encoder_hidden_states"].clone()
    changed[:, 7:] = 100
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**inputs | {"encoder_hidden_states": changed}))
        cut = inputs | {"encoder_hidden_states": changed[:, :7], "text_lengths": None}
        torch.testing.assert_close(model(**cut), model(**inputs), rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"num_layers": "12"}, "num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"patch_size": 2}, "patch_size"),
        ({"attention_head_dim": 7, "cross_attention_dim": 28}, "attention_head_dim"),
        ({"cross_attention_dim": 64}, "cross_attention_dim"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"attention_bias": 1}, "attention_bias"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec.LTXConfig.from_dict({**TINY, **change})


@pytest.mark.parametrize("lengths", [[0], [41]])
def test_bad_text_lengths(model: nn.Module, lengths: list[int]) -> None:
    with pytest.raises(InputError, match="text_lengths"):
        model.prepare_conditioning(encoder_hidden_states=torch.zeros(1, 40, 24), text_lengths=torch.tensor(lengths))


def test_text_is_needed(model: nn.Module) -> None:
    with pytest.raises(InputError, match="encoder_hidden_states"):
        model(torch.zeros(1, 8, 1, 4, 4), torch.zeros(1))
