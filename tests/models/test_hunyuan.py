"""The HunyuanVideo transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.hunyuan.config import HunyuanVideoConfig
from kinetoscope.models.hunyuan.transformer import HunyuanVideoTransformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
PUBLISHED = {  # transformer/config.json of the published models where they differ from the class's defaults
    "hunyuanvideo-community/HunyuanVideo": {},
    "hunyuanvideo-community/HunyuanVideo-I2V": {"image_condition_type": "token_replace"},
    "hunyuanvideo-community/HunyuanVideo-I2V-33ch": {
        "in_channels": 33,
        "guidance_embeds": False,
        "image_condition_type": "latent_concat",
    },
}


class TestHunyuan(FamilyContract):
    MODEL, CONFIG, ORACLE, PUBLISHED = HunyuanVideoTransformer3DModel, HunyuanVideoConfig, Oracle, PUBLISHED
    TINY: ClassVar[dict[str, Any]] = TINY
    SHAPES = ((2, 4, 2, 8, 8), (1, 4, 1, 4, 6), (3, 4, 5, 2, 4))
    ROLES = ("refiner",) * 2 + ("joint",) * 4

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows = shape[0]
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": 1000 * torch.rand(rows, generator=generator),
            "encoder_hidden_states": torch.randn(rows, 12, 24, generator=generator),
            "text_lengths": torch.tensor([7, 3, 12][:rows]),
            "pooled_projections": torch.randn(rows, 20, generator=generator),
            "guidance": 1000 * torch.tensor([6.0, 1.0, 3.5])[:rows],
        }

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        lengths = inputs.pop("text_lengths")
        dtype = next(oracle.parameters()).dtype
        inputs["pooled_projections"] = inputs["pooled_projections"].to(dtype)
        mask = (torch.arange(12) < lengths.unsqueeze(1)).to(dtype)
        latents = inputs.pop("latents")
        return oracle(hidden_states=latents, encoder_attention_mask=mask, **inputs, return_dict=False)[0]


class TestHunyuanTokenReplace(TestHunyuan):
    """Image-to-video: the first frame is modulated as clean."""

    COMPILED = True

    TINY: ClassVar[dict[str, Any]] = {**TINY, "image_condition_type": "token_replace"}


class TestHunyuanConcat(TestHunyuan):
    """Image-to-video: image latents and mask on channels, no embedded guidance."""

    TINY: ClassVar[dict[str, Any]] = {
        **TINY,
        "in_channels": 9,
        "guidance_embeds": False,
        "image_condition_type": "latent_concat",
    }
    SHAPES = ((2, 9, 2, 8, 8), (1, 9, 1, 4, 6))

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        given = super().inputs(shape, generator)
        del given["guidance"]
        return given


@pytest.fixture(scope="module", params=[TestHunyuan, TestHunyuanTokenReplace])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param().make_model()


def test_what_is_beyond_the_true_length_changes_nothing(model: HunyuanVideoTransformer3DModel) -> None:
    inputs = TestHunyuan().inputs((2, 4, 2, 4, 4), torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(**inputs)
        inputs["encoder_hidden_states"][0, 7:] = 100.0
        inputs["encoder_hidden_states"][1, 3:] = -100.0
        torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"num_layers": "2"}, "num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"rope_axes_dim": [4, 6, 8]}, "rope_axes_dim"),
        ({"rope_axes_dim": [5, 5, 6]}, "rope_axes_dim"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"image_condition_type": "paint"}, "image_condition_type"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HunyuanVideoConfig.from_dict({**TINY, **change})


@pytest.mark.parametrize("lengths", [[0, 2], [13, 2]])
def test_bad_text_lengths(model: HunyuanVideoTransformer3DModel, lengths: list[int]) -> None:
    inputs = TestHunyuan().inputs((2, 4, 2, 4, 4), torch.Generator().manual_seed(2))
    with pytest.raises(InputError, match="text_lengths"):
        model(**inputs | {"text_lengths": torch.tensor(lengths)})


def test_missing_inputs(model: HunyuanVideoTransformer3DModel) -> None:
    inputs = TestHunyuan().inputs((2, 4, 2, 4, 4), torch.Generator().manual_seed(2))
    with pytest.raises(InputError, match="guidance"):
        model(**inputs | {"guidance": None})
    with pytest.raises(InputError, match="text"):
        model(inputs["latents"], inputs["timestep"])
    with pytest.raises(InputError, match="patch size"):
        model.prepare_shared((1, 4, 2, 5, 4))
