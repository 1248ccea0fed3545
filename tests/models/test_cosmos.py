"""The Cosmos transformer against diffusers' own, on random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from diffusers import CosmosTransformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.cosmos.config import CosmosConfig
from kinetoscope.models.cosmos.transformer import CosmosTransformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract
from models.tiny_cosmos import TINY, without_torchvision

CHANNELS = 16
_VIDEO = {"in_channels": 17}
_PREDICT2 = {"extra_pos_embed_type": None}
_PREDICT25 = {
    "rope_scale": (1.0, 3.0, 3.0),
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
    "encoder_hidden_states_channels": 1024,
}
_LARGE = {"num_attention_heads": 40, "num_layers": 36}
PUBLISHED = {  # transformer/config.json of the published models; what they share are the defaults
    "Cosmos-1.0-Diffusion-7B-Text2World": {},
    "Cosmos-1.0-Diffusion-7B-Video2World": _VIDEO,
    "Cosmos-1.0-Diffusion-14B-Text2World": _LARGE | {"rope_scale": (2.0, 2.0, 2.0)},
    "Cosmos-1.0-Diffusion-14B-Video2World": _LARGE | _VIDEO | {"rope_scale": (2.0, 2.0, 2.0)},
    "Cosmos-Predict2-2B-Text2Image": _PREDICT2 | {"num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0)},
    "Cosmos-Predict2-14B-Text2Image": _PREDICT2 | _LARGE | {"rope_scale": (1.0, 4.0, 4.0)},
    "Cosmos-Predict2-2B-Video2World": _PREDICT2 | _VIDEO | {"num_attention_heads": 16, "rope_scale": (1.0, 3.0, 3.0)},
    "Cosmos-Predict2-14B-Video2World": _PREDICT2 | _LARGE | _VIDEO | {"rope_scale": (20 / 24, 2.0, 2.0)},
    "Cosmos-Predict2.5-2B": _PREDICT2 | _VIDEO | _PREDICT25 | {"num_attention_heads": 16},
    "Cosmos-Predict2.5-14B": _PREDICT2 | _VIDEO | _PREDICT25 | _LARGE,
}


@pytest.fixture(scope="module", autouse=True)
def resize() -> Iterator[None]:
    """diffusers' transformer resizes its padding mask with torchvision, which is not installed."""
    with without_torchvision():
        yield


class TestCosmos(FamilyContract):
    """Predict 1 text-to-world: learned positions, rotary time by fps."""

    MODEL, CONFIG, ORACLE, PUBLISHED = CosmosTransformer3DModel, CosmosConfig, Oracle, PUBLISHED
    TINY: ClassVar[dict[str, Any]] = TINY
    SHAPES = ((2, CHANNELS, 3, 8, 8), (1, CHANNELS, 1, 4, 6), (1, CHANNELS, 5, 10, 4))
    ROLES = ("self", "cross") * TINY["num_layers"]
    SHARED = ("fps",)
    KEPT = ("condition_mask", "padding_mask")
    FPS: float | None = 30

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows = shape[0]
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": 2 * torch.rand(rows, generator=generator) - 1,
            "encoder_hidden_states": padded_text([7, 3, 40][:rows], generator),
            "fps": self.FPS,
        }

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        latents = inputs.pop("latents")
        padding = torch.zeros(1, 1, 8 * latents.shape[-2], 8 * latents.shape[-1], dtype=latents.dtype)
        return oracle(hidden_states=latents, **{"padding_mask": padding} | inputs, return_dict=False)[0]


class TestCosmosFolded(TestCosmos):
    """The same, the padding of the text folded into one token."""

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"text_lengths": torch.tensor([7, 3, 40][: shape[0]])}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return super().call_oracle(oracle, {k: v for k, v in inputs.items() if k != "text_lengths"})


class TestCosmosImage(TestCosmos):
    """Predict 2 text-to-image: rotary positions alone, stretched in space; a padding mask that is not zero."""

    TINY: ClassVar[dict[str, Any]] = TINY | {"extra_pos_embed_type": None, "rope_scale": (1.0, 4.0, 3.0)}
    FPS = None

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        mask = torch.zeros(shape[0], 1, 8 * shape[-2], 8 * shape[-1])
        mask[..., 24:] = 1
        return super().inputs(shape, generator) | {"padding_mask": mask}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return super().call_oracle(oracle, inputs | {"padding_mask": inputs["padding_mask"][:1]})  # it repeats one


class TestCosmosVideoToWorld(TestCosmos):
    """Predict 2 video-to-world: a mask of given frames, and one timestep a latent frame."""

    TINY: ClassVar[dict[str, Any]] = TINY | {
        "in_channels": CHANNELS + 1,
        "extra_pos_embed_type": None,
        "rope_scale": (20 / 24, 2.0, 2.0),
    }
    FPS = 16

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows, _, frames, height, width = shape
        mask = torch.zeros(rows, 1, frames, height, width)
        mask[:, :, : (frames + 1) // 2] = 1
        timestep = torch.rand(rows, frames, generator=generator)
        return super().inputs(shape, generator) | {"timestep": timestep, "condition_mask": mask}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return super().call_oracle(oracle, inputs | {"timestep": inputs["timestep"][:, None, :, None, None]})


class TestCosmos25(TestCosmosVideoToWorld):
    """Predict 2.5: wide text features through a projection."""

    TINY: ClassVar[dict[str, Any]] = TestCosmosVideoToWorld.TINY | {
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 80,
        "encoder_hidden_states_channels": 32,
    }
    FPS = None

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        text = torch.randn(shape[0], 24, 80, generator=generator)
        return super().inputs(shape, generator) | {"encoder_hidden_states": text}


def padded_text(lengths: list[int], generator: torch.Generator, total: int = 512) -> Tensor:
    """[R, total, 32], zero beyond each length."""
    text = torch.randn(len(lengths), total, 32, generator=generator)
    for row, length in enumerate(lengths):
        text[row, length:] = 0
    return text


def random_model(**changes: Any) -> CosmosTransformer3DModel:
    made = CosmosTransformer3DModel(CosmosConfig.from_dict(TINY | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> CosmosTransformer3DModel:
    return random_model()


def test_fps_stretches_time(model: CosmosTransformer3DModel) -> None:
    """Frames at half the rate lie twice as far apart; at 24 they are positions."""
    one, slow, fast = (model.prepare_shared((1, 16, 5, 4, 4), fps=fps)["rope"] for fps in (None, 12.0, 24.0))
    assert torch.equal(one, fast)
    torch.testing.assert_close(slow[4 : 3 * 4], one.view(5, 4, -1)[[2, 4]].flatten(0, 1), rtol=0, atol=1e-6)


def test_a_frame_is_modulated_by_its_own_timestep() -> None:
    """Equal timesteps of all frames are one timestep; another one of a frame moves that frame most."""
    model = random_model(in_channels=CHANNELS + 1, extra_pos_embed_type=None)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, CHANNELS, 3, 4, 4, generator=generator)
    text, mask = padded_text([4], generator), torch.ones(1, 1, 3, 1, 1)
    one = model(latents, torch.tensor([0.3]), text, condition_mask=mask)
    equal = model(latents, torch.full((1, 3), 0.3), text, condition_mask=mask)
    torch.testing.assert_close(equal, one, rtol=0, atol=FORWARD_TOLERANCE)
    other = model(latents, torch.tensor([[0.3, 0.3, 0.9]]), text, condition_mask=mask)
    assert (other - one)[:, :, 2].abs().max() > 10 * (other - one)[:, :, 0].abs().max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"num_layers": "12"}, "num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"max_size": None}, "max_size"),
        ({"rope_scale": [1.0, 2.0]}, "rope_scale"),
        ({"rope_scale": [1.0, 2.0, 0.0]}, "rope_scale"),
        ({"attention_head_dim": 15}, "attention_head_dim"),
        ({"attention_head_dim": 10}, "attention_head_dim"),
        ({"extra_pos_embed_type": "sincos"}, "extra_pos_embed_type"),
        ({"use_crossattn_projection": True}, "encoder_hidden_states_channels"),
        ({"img_context_dim_in": 1152}, "Transfer"),
        ({"controlnet_block_every_n": 7}, "Transfer"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CosmosConfig.from_dict({**TINY, **change})


@pytest.mark.parametrize("shape", [(1, 16, 1, 5, 4), (1, 16, 1, 4, 34), (1, 16, 13, 4, 4), (1, 16, 1, 0, 4)])
def test_bad_latent_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="patch size"):
        random_model(max_size=(12, 32, 32)).prepare_shared(shape)


def test_bad_inputs(model: CosmosTransformer3DModel) -> None:
    latents, t, text = torch.zeros(1, CHANNELS, 1, 4, 4), torch.zeros(1), torch.zeros(1, 512, 32)
    with pytest.raises(InputError, match="encoder_hidden_states"):
        model(latents, t)
    with pytest.raises(InputError, match="takes no condition_mask"):
        model(latents, t, text, condition_mask=torch.zeros(1, 1, 1, 4, 4))
    with pytest.raises(InputError, match="needs a condition_mask"):
        random_model(in_channels=CHANNELS + 1)(latents, t, text)
    with pytest.raises(InputError, match="fps"):
        model(latents, t, text, fps=0)
    with pytest.raises(InputError, match="text_lengths"):
        model.prepare_conditioning(encoder_hidden_states=text, text_lengths=torch.tensor([513]))
