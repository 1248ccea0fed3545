"""The Wan transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import WanTransformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.wan import spec
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}
PUBLISHED = {  # transformer/config.json of the published text-to-video models; what they share are the defaults
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "I2V-14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "FLF2V-14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
    "2.2-I2V-A14B": {"in_channels": 36},
    "2.2-TI2V-5B": {
        "in_channels": 48,
        "out_channels": 48,
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "num_layers": 30,
    },
}


class TestWan(FamilyContract):
    MODEL, CONFIG, ORACLE, TINY, PUBLISHED = WanTransformer3DModel, spec.WanConfig, Oracle, TINY, PUBLISHED
    SHAPES = ((2, 16, 2, 8, 8), (1, 16, 1, 4, 6), (1, 16, 5, 10, 4))
    ROLES = ("self", "cross") * TINY["num_layers"]

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows = shape[0]
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": 1000 * torch.rand(rows, generator=generator),
            "encoder_hidden_states": padded_text([7, 3, 40][:rows], generator),
        }

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        return oracle(hidden_states=inputs.pop("latents"), **inputs, return_dict=False)[0]


class TestWanFolded(TestWan):
    """The same, the padding folded into one token."""

    COMPILED = True

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        lengths = torch.tensor([7, 3, 40][: shape[0]])
        return super().inputs(shape, generator) | {"text_lengths": lengths}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return super().call_oracle(oracle, {k: v for k, v in inputs.items() if k != "text_lengths"})


class TestWanTimestepPerFrame(TestWan):
    """One timestep a latent frame; the oracle takes one a token."""

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows, _, frames = shape[:3]
        return super().inputs(shape, generator) | {"timestep": 1000 * torch.rand(rows, frames, generator=generator)}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        frame_tokens = inputs["latents"][0, 0, 0].numel() // 4
        timestep = inputs["timestep"].repeat_interleave(frame_tokens, dim=1)
        return super().call_oracle(oracle, inputs | {"timestep": timestep})


class TestWanImage(TestWan):
    """Image features and condition channels of Wan 2.1 image-to-video; the oracle wants 512 text tokens."""

    SHAPES = ((2, 36, 2, 8, 8), (1, 36, 1, 4, 6))
    TINY: ClassVar[dict[str, Any]] = TINY | {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 64}
    ROLES = ("self", "cross", "cross") * TINY["num_layers"]
    FEATURES = 9

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        features = torch.randn(shape[0], self.FEATURES, 20, generator=generator)
        return super().inputs(shape, generator) | {"image_embeds": features}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        features = inputs["image_embeds"]
        inputs = {k: v for k, v in inputs.items() if k != "image_embeds"}
        return super().call_oracle(oracle, inputs | {"encoder_hidden_states_image": self.for_oracle(features)})

    def for_oracle(self, features: Tensor) -> Tensor:
        return features


class TestWanTwoImages(TestWanImage):
    """First and last frame: the features of both, with position embeddings."""

    TINY: ClassVar[dict[str, Any]] = TestWanImage.TINY | {"pos_embed_seq_len": 10}
    FEATURES = 10

    def for_oracle(self, features: Tensor) -> Tensor:
        return features.reshape(-1, 5, 20)


def padded_text(lengths: list[int], generator: torch.Generator, total: int = 512) -> Tensor:
    """[R, total, 32], zero beyond each length."""
    text = torch.randn(len(lengths), total, 32, generator=generator)
    for row, length in enumerate(lengths):
        text[row, length:] = 0
    return text


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    made = WanTransformer3DModel(spec.WanConfig.from_dict(TINY))
    generator = torch.Generator().manual_seed(0)
    made.init_weights(generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("lengths", [[0, 0], [0, 31], [479, 2], [480, 3], [511, 511], [512, 1]])
def test_folding_at_the_ends(model: WanTransformer3DModel, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 1, 4, 4, generator=generator)
    text = padded_text(lengths, generator)
    timestep = torch.tensor([10.0, 990.0])
    with torch.no_grad():
        plain = model(latents, timestep, text)
        folded = model(latents, timestep, text, text_lengths=torch.tensor(lengths))
    torch.testing.assert_close(folded, plain, rtol=0, atol=FORWARD_TOLERANCE)


def test_one_modulation_serves_all_rows(model: WanTransformer3DModel) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 2, 4, 4, generator=generator)
    text = padded_text([4, 6], generator)
    timestep = torch.tensor([321.0])
    with torch.no_grad():
        shared = model(latents, timestep, text, **model.prepare_timesteps(timestep))
        torch.testing.assert_close(shared, model(latents, timestep.expand(2), text), rtol=0, atol=FORWARD_TOLERANCE)


def test_trains_under_autocast(model: WanTransformer3DModel) -> None:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 16, 2, 4, 4, generator=generator)
    text, lengths = padded_text([4, 6], generator), torch.tensor([4, 6])
    timestep = torch.tensor([100.0, 900.0])
    model.zero_grad()
    model(latents, timestep, text, text_lengths=lengths).square().mean().backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(latents, timestep, text, text_lengths=lengths)
    assert out.dtype == torch.float32
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    theirs = torch.cat([gradient.flatten() for gradient in exact.values() if gradient is not None])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.995


def test_init_weights_is_a_function_of_the_generator() -> None:
    config = spec.WanConfig.from_dict(TINY)
    one, two = WanTransformer3DModel(config), WanTransformer3DModel(config)
    for made in (one, two):
        made.init_weights(torch.Generator().manual_seed(5))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all(), name
    assert one.proj_out.weight.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"num_layers": "12"}, "num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"eps": None}, "eps"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [1, 2, 0]}, "patch_size"),
        ({"attention_head_dim": 15}, "attention_head_dim"),
        ({"freq_dim": 31}, "freq_dim"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"added_kv_proj_dim": 1536}, "image_dim=None"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec.WanConfig.from_dict({**TINY, **change})


def test_config_skips_bookkeeping() -> None:
    config = spec.WanConfig.from_dict({**TINY, "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33"})
    assert config.dim == 64 and config.patch_size == (1, 2, 2)


@pytest.mark.parametrize("shape", [(1, 16, 1, 5, 4), (1, 16, 1, 4, 130), (1, 16, 65, 4, 4), (1, 16, 1, 0, 4)])
def test_bad_latent_size(model: WanTransformer3DModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="patch size"):
        model.prepare_shared(shape)


@pytest.mark.parametrize("lengths", [[-1, 2], [513, 2]])
def test_bad_text_lengths(model: WanTransformer3DModel, lengths: list[int]) -> None:
    with pytest.raises(InputError, match="text_lengths"):
        model.prepare_conditioning(encoder_hidden_states=torch.zeros(2, 512, 32), text_lengths=torch.tensor(lengths))


def test_text_is_needed(model: WanTransformer3DModel) -> None:
    with pytest.raises(InputError, match="encoder_hidden_states"):
        model(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1))
