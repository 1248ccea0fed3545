"""The SkyReels-V2 transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel as Oracle
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.skyreels import spec
from kinetoscope.models.skyreels.transformer import SkyReelsV2Transformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
LENGTHS = [7, 3, 40]


class TestTextToVideo(FamilyContract):
    MODEL, CONFIG, ORACLE = SkyReelsV2Transformer3DModel, spec.SkyReelsConfig, Oracle
    TINY: ClassVar[dict[str, Any]] = TINY
    PUBLISHED = spec.PUBLISHED
    SHAPES = ((2, 16, 2, 8, 8), (1, 16, 1, 4, 6), (1, 16, 5, 6, 4))
    ROLES = ("self", "cross") * TINY["num_layers"]
    SHARED = ("frames_per_block",)
    TIMED = ("fps",)

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows = shape[0]
        text = torch.randn(rows, 512, 32, generator=generator)
        for row in range(rows):
            text[row, LENGTHS[row] :] = 0
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": torch.randint(1, 1000, (rows,), generator=generator),
            "encoder_hidden_states": text,
            "text_lengths": torch.tensor(LENGTHS[:rows]),
        }

    def call_oracle(self, oracle: Any, inputs: dict[str, Any]) -> Tensor:
        given = {
            k: v for k, v in inputs.items() if k not in ("text_lengths", "image_embeds", "frames_per_block", "fps")
        }
        return oracle(
            hidden_states=given.pop("latents"),
            encoder_hidden_states_image=inputs.get("image_embeds"),
            **given,
            return_dict=False,
        )[0]


class TestImageToVideo(TestTextToVideo):
    SHAPES = ((2, 20, 2, 8, 8), (1, 20, 3, 4, 6))
    TINY: ClassVar[dict[str, Any]] = TINY | {"in_channels": 20, "image_dim": 12, "added_kv_proj_dim": 32}
    ROLES = ("self", "cross", "cross") * TINY["num_layers"]

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"image_embeds": torch.randn(shape[0], 5, 12, generator=generator)}


class TestFirstAndLastFrame(TestImageToVideo):
    """Positions for the features of two images."""

    TINY: ClassVar[dict[str, Any]] = TestImageToVideo.TINY | {"pos_embed_seq_len": 10}

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"image_embeds": torch.randn(shape[0], 10, 12, generator=generator)}

    def call_oracle(self, oracle: Any, inputs: dict[str, Any]) -> Tensor:
        """The oracle takes the two images as two rows."""
        return super().call_oracle(oracle, inputs | {"image_embeds": inputs["image_embeds"].reshape(-1, 5, 12)})


class TestForcing(TestTextToVideo):
    """One timestep a latent frame and a frame rate; the oracle can take one row at a time only."""

    TINY: ClassVar[dict[str, Any]] = TINY | {"inject_sample_info": True}
    FPS = 24

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        timestep = torch.randint(0, 1000, (shape[0], shape[2]), generator=generator)
        timestep[:, 0] = 0
        return super().inputs(shape, generator) | {"timestep": timestep, "fps": self.FPS}

    def call_oracle(self, oracle: Any, inputs: dict[str, Any]) -> Tensor:
        block = inputs.get("frames_per_block", 1)
        if oracle.config.num_frame_per_block != block:
            oracle._set_ar_attention(block)
        rows = [
            oracle(
                hidden_states=inputs["latents"][i : i + 1],
                timestep=inputs["timestep"][i : i + 1],
                encoder_hidden_states=inputs["encoder_hidden_states"][i : i + 1],
                enable_diffusion_forcing=True,
                fps=[int(inputs["fps"] != 16)],
                return_dict=False,
            )[0]
            for i in range(len(inputs["latents"]))
        ]
        return torch.cat(rows)


class TestForcingInCausalBlocks(TestForcing):
    COMPILED = True
    SHAPES = ((2, 16, 4, 4, 4), (1, 16, 2, 4, 6), (1, 16, 6, 4, 4))
    ROLES = ("self", "self", "cross") * TINY["num_layers"]
    FPS = 16

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"frames_per_block": 2}


@pytest.fixture(scope="module")
def model() -> SkyReelsV2Transformer3DModel:
    made = TestForcing().make_model()
    assert isinstance(made, SkyReelsV2Transformer3DModel)
    return made


def test_a_causal_block_does_not_see_later_ones(model: SkyReelsV2Transformer3DModel) -> None:
    inputs = TestForcingInCausalBlocks().inputs((1, 16, 4, 4, 4), torch.Generator().manual_seed(3))
    changed = inputs["latents"].clone()
    changed[:, :, 2:] += 1
    with torch.no_grad():
        before, after = model(**inputs), model(**inputs | {"latents": changed})
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2], rtol=0, atol=FORWARD_TOLERANCE)
    assert (after[:, :, 2:] - before[:, :, 2:]).abs().max() > 0.1


def test_the_frame_rate_matters(model: SkyReelsV2Transformer3DModel) -> None:
    inputs = TestForcing().inputs((1, 16, 2, 4, 4), torch.Generator().manual_seed(4))
    with torch.no_grad():
        at = {fps: model(**inputs | {"fps": fps}) for fps in (16.0, 24.0, 30.0)}
    assert torch.equal(at[24.0], at[30.0]) and (at[16.0] - at[24.0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"num_layers": "12"}, "num_layers"),
        ({"num_frame_per_block": 0}, "num_frame_per_block"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [1, 2, 0]}, "patch_size"),
        ({"attention_head_dim": 15}, "attention_head_dim"),
        ({"freq_dim": 31}, "freq_dim"),
        ({"qk_norm": None}, "qk_norm"),
        ({"added_kv_proj_dim": 32}, "image_dim=None"),
        ({"image_dim": 1280, "added_kv_proj_dim": 8}, "added_kv_proj_dim"),
        ({"inject_sample_info": 1}, "inject_sample_info"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec.SkyReelsConfig.from_dict({**TINY, **change})


@pytest.mark.parametrize("shape", [(1, 16, 1, 5, 4), (1, 16, 1, 4, 130), (1, 16, 65, 4, 4), (1, 16, 1, 0, 4)])
def test_bad_latent_size(model: SkyReelsV2Transformer3DModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="patch size"):
        model.prepare_shared(shape)


def test_bad_inputs(model: SkyReelsV2Transformer3DModel) -> None:
    text = torch.zeros(1, 512, 32)
    with pytest.raises(InputError, match="causal blocks"):
        model.prepare_shared((1, 16, 3, 4, 4), frames_per_block=2)
    with pytest.raises(InputError, match="takes no image features"):
        model.prepare_conditioning(encoder_hidden_states=text, image_embeds=torch.zeros(1, 5, 12))
    with pytest.raises(InputError, match="text_lengths"):
        model.prepare_conditioning(encoder_hidden_states=text, text_lengths=torch.tensor([513]))
    with pytest.raises(InputError, match="encoder_hidden_states"):
        model(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1))
