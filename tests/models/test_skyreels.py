"""The SkyReels-V2 transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.skyreels import spec
from kinetoscope.models.skyreels.transformer import SkyReelsV2Transformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract
from tiny import perturb

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
    SHAPES = ((2, 16, 2, 8, 8), (1, 16, 1, 4, 6), (1, 16, 5, 6, 4))
    CHANGES: ClassVar[dict[str, Any]] = {}

    def make_oracle(self) -> nn.Module:
        return Oracle(**{**TINY, **self.CHANGES})

    def make_ours(self, oracle: Any) -> nn.Module:
        return SkyReelsV2Transformer3DModel(spec.SkyReelsConfig.from_dict(oracle.config))

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
    CHANGES: ClassVar[dict[str, Any]] = {"in_channels": 20, "image_dim": 12, "added_kv_proj_dim": 32}

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"image_embeds": torch.randn(shape[0], 5, 12, generator=generator)}


class TestFirstAndLastFrame(TestImageToVideo):
    """Positions for the features of two images."""

    CHANGES: ClassVar[dict[str, Any]] = TestImageToVideo.CHANGES | {"pos_embed_seq_len": 10}

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"image_embeds": torch.randn(shape[0], 10, 12, generator=generator)}

    def call_oracle(self, oracle: Any, inputs: dict[str, Any]) -> Tensor:
        """The oracle takes the two images as two rows."""
        return super().call_oracle(oracle, inputs | {"image_embeds": inputs["image_embeds"].reshape(-1, 5, 12)})


class TestForcing(TestTextToVideo):
    """One timestep a latent frame and a frame rate; the oracle can take one row at a time only."""

    CHANGES: ClassVar[dict[str, Any]] = {"inject_sample_info": True}
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
    SHAPES = ((2, 16, 4, 4, 4), (1, 16, 2, 4, 6), (1, 16, 6, 4, 4))
    FPS = 16

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {"frames_per_block": 2}


@pytest.fixture(scope="module")
def model() -> SkyReelsV2Transformer3DModel:
    family = TestForcing()
    oracle = family.make_oracle()
    perturb(oracle, seed=1, scale=0.1)
    ours = family.make_ours(oracle)
    ours.load_state_dict(oracle.state_dict())
    assert isinstance(ours, SkyReelsV2Transformer3DModel)
    return ours


@pytest.mark.parametrize("steps", [[999, 700, 12], [[0, 999, 999, 700], [0, 40, 41, 900]]])
def test_prepared_is_bit_equal(model: SkyReelsV2Transformer3DModel, steps: Any) -> None:
    timesteps = torch.tensor(steps)
    inputs = TestForcingInCausalBlocks().inputs((1, 16, 4, 4, 4), torch.Generator().manual_seed(2))
    latents = inputs["latents"]
    with torch.no_grad():
        run = model.prepare_conditioning(
            encoder_hidden_states=inputs["encoder_hidden_states"], text_lengths=inputs["text_lengths"]
        )
        run |= model.prepare_shared(latents.shape, frames_per_block=2)
        prepared = model.prepare_timesteps(timesteps, fps=16)["modulation"]
        for index, timestep in enumerate(timesteps):
            step = type(prepared)(*(table[index : index + 1] for table in prepared))
            plain = model(**inputs | {"timestep": timestep.unsqueeze(0)})
            assert torch.equal(model(latents, timestep.unsqueeze(0), **run, modulation=step), plain)


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


def test_blocks_compile_without_a_break(model: SkyReelsV2Transformer3DModel) -> None:
    """One graph a block, with attention read from the context; compiled inference equals eager inference."""
    inputs = TestForcingInCausalBlocks().inputs((1, 16, 4, 4, 4), torch.Generator().manual_seed(6))
    compiled = SkyReelsV2Transformer3DModel(model.config)
    compiled.load_state_dict(model.state_dict())
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    table = resolve_attention("auto", capabilities("cpu", torch.float32), ("self", "cross"))
    with torch.no_grad(), forward_context(ForwardContext(table)):
        torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize("name", spec.PUBLISHED)
def test_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = SkyReelsV2Transformer3DModel(spec.SkyReelsConfig.from_dict(spec.PUBLISHED[name]))
        oracle = Oracle(**spec.PUBLISHED[name])
    expected = {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == expected
    assert not list(ours.buffers())


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
        ({"image_dim": 1280}, "added_kv_proj_dim"),
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
