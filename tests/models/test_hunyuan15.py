"""The HunyuanVideo 1.5 transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.hunyuan15.config import HunyuanVideo15Config
from kinetoscope.models.hunyuan15.transformer import HunyuanVideo15Transformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract

TINY: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "text_embed_2_dim": 20,
    "image_embed_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}
PUBLISHED = {  # transformer/config.json of the published models where they differ from the class's defaults
    "480p_t2v": {"task_type": "t2v"},
    "720p_i2v": {"target_size": 960},
    "480p_i2v_step_distilled": {"use_meanflow": True},
}
WORDS, GLYPHS, IMAGE = 12, 6, 5


class TestHunyuan15(FamilyContract):
    """Text-to-video: no image, and a row without quoted text."""

    MODEL, CONFIG, ORACLE, PUBLISHED = HunyuanVideo15Transformer3DModel, HunyuanVideo15Config, Oracle, PUBLISHED
    TINY: ClassVar[dict[str, Any]] = TINY
    SHAPES = ((2, 9, 2, 4, 4), (1, 9, 1, 3, 5), (3, 9, 4, 2, 3))
    ROLES = ("refiner",) + ("joint",) * 2

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows = shape[0]
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": 1000 * torch.rand(rows, generator=generator),
            "encoder_hidden_states": torch.randn(rows, WORDS, 24, generator=generator),
            "text_lengths": torch.tensor([7, 3, 12][:rows]),
            "encoder_hidden_states_2": torch.randn(rows, GLYPHS, 20, generator=generator),
            "text_lengths_2": torch.tensor([4, 0, 6][:rows]),
        }

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        latents = inputs.pop("latents")
        dtype = next(oracle.parameters()).dtype
        inputs["timestep"] = inputs["timestep"].to(dtype)
        for suffix, total in (("", WORDS), ("_2", GLYPHS)):
            lengths = inputs.pop(f"text_lengths{suffix}")
            inputs[f"encoder_attention_mask{suffix}"] = (torch.arange(total) < lengths.unsqueeze(1)).to(dtype)
        if "image_embeds" not in inputs:
            inputs["image_embeds"] = torch.zeros(len(latents), IMAGE, 12, dtype=dtype)
        return oracle(hidden_states=latents, **inputs, return_dict=False)[0]

    def unused(self, name: str) -> bool:
        last = f"transformer_blocks.{TINY['num_layers'] - 1}."
        return name.startswith(("image_embedder", last + "ff_context", last + "attn.to_add_out"))


class TestHunyuan15Image(TestHunyuan15):
    """Image-to-video: tokens of an image encoder."""

    COMPILED = True

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        image = torch.randn(shape[0], IMAGE, 12, generator=generator)
        return super().inputs(shape, generator) | {"image_embeds": image}

    def unused(self, name: str) -> bool:
        return super().unused(name) and not name.startswith("image_embedder")


class TestHunyuan15MeanFlow(TestHunyuan15Image):
    """The timestep to step to is embedded too; in a run it is that of the following step."""

    COMPILED = True
    KEPT = ("timestep_r",)

    TINY: ClassVar[dict[str, Any]] = {**TINY, "use_meanflow": True}

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        given = super().inputs(shape, generator)
        return given | {"timestep_r": given["timestep"] * 0.8}

    def at_step(self, inputs: dict[str, Any], timesteps: Tensor, index: int) -> dict[str, Any]:
        following = torch.cat([timesteps, torch.zeros(1)])[index + 1 : index + 2]
        return super().at_step(inputs, timesteps, index) | {"timestep_r": following}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        dtype = next(oracle.parameters()).dtype
        return super().call_oracle(oracle, inputs | {"timestep_r": inputs["timestep_r"].to(dtype)})


@pytest.fixture(scope="module", params=[TestHunyuan15, TestHunyuan15MeanFlow])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param().make_model()


def test_no_quoted_text_at_all(model: HunyuanVideo15Transformer3DModel) -> None:
    inputs = TestHunyuan15().inputs((2, 9, 2, 4, 4), torch.Generator().manual_seed(2))
    without = {k: v for k, v in inputs.items() if not k.endswith("_2")}
    with torch.no_grad():
        expected = model(**without)
        got = model(**inputs | {"text_lengths_2": torch.tensor([0, 0])})
    torch.testing.assert_close(got, expected, rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"num_layers": 0}, "num_layers"),
        ({"use_meanflow": 1}, "use_meanflow"),
        ({"rope_axes_dim": [4, 6, 8]}, "rope_axes_dim"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HunyuanVideo15Config.from_dict({**TINY, **change})


@pytest.mark.parametrize("change", [{"text_lengths": [0, 2]}, {"text_lengths_2": [-1, 2]}, {"text_lengths_2": [7, 2]}])
def test_bad_text_lengths(model: HunyuanVideo15Transformer3DModel, change: dict[str, list[int]]) -> None:
    inputs = TestHunyuan15().inputs((2, 9, 2, 4, 4), torch.Generator().manual_seed(2))
    with pytest.raises(InputError, match="text_lengths"):
        model(**inputs | {k: torch.tensor(v) for k, v in change.items()})


def test_missing_inputs(model: HunyuanVideo15Transformer3DModel) -> None:
    with pytest.raises(InputError, match="encoder_hidden_states"):
        model(torch.zeros(1, 9, 1, 2, 2), torch.zeros(1))
    with pytest.raises(InputError, match="patch size"):
        model.prepare_shared((1, 9, 0, 5, 4))
