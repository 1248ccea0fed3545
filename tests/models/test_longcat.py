"""The LongCat-Video transformer against recorded forwards of the published code (fixtures/longcat/make.py)."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kinetoscope.attention.backends import sdpa_attention
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.longcat import spec
from kinetoscope.models.longcat.transformer import LongCatVideoTransformer3DModel, TextContext
from models.family_contract import FORWARD_TOLERANCE, TransformerContract
from models.tiny_longcat import DIT, FIXTURES, MODEL


def build(**changes: Any) -> LongCatVideoTransformer3DModel:
    """The tiny published model with its stored weights."""
    config = json.loads((MODEL / "dit" / "config.json").read_text())
    model = LongCatVideoTransformer3DModel(spec.LongCatConfig.from_dict({**config, **changes}))
    weights = load_file(MODEL / "dit" / "diffusion_pytorch_model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LongCatVideoTransformer3DModel:
    return build()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURES / "forward.safetensors")


def text(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": recorded["text"], "text_lengths": recorded["lengths"]}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=FORWARD_TOLERANCE)


class TestLongCat(TransformerContract):
    SHAPES = ((2, 4, 5, 4, 6),)
    ROLES = ("self", "cross") * DIT["depth"]
    KEPT = ("num_cond_latents",)
    MORE: ClassVar[dict[str, Any]] = {}

    def make_model(self) -> nn.Module:
        return build()

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return (
            self.MORE
            | {
                "latents": torch.randn(shape, generator=generator),
                "timestep": torch.tensor([320.0, 900.0, 61.0])[: shape[0]],  # whole in bfloat16
                "encoder_hidden_states": torch.randn(shape[0], 40, 32, generator=generator),
                "text_lengths": torch.tensor([6, 24, 1])[: shape[0]],
            }
        )


class TestLongCatContinuation(TestLongCat):
    """The first two latent frames are given, at timestep 0."""

    COMPILED = True
    ROLES = ("self", "self", "cross") * DIT["depth"]
    MORE: ClassVar[dict[str, Any]] = {"num_cond_latents": 2}

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        timestep = torch.randint(1, 200, (shape[0], shape[2]), generator=generator).float()
        timestep[:, :2] = 0
        return super().inputs(shape, generator) | {"timestep": timestep}


@torch.no_grad()
def test_forward(model: LongCatVideoTransformer3DModel, recorded: dict[str, Tensor]) -> None:
    assert recorded["plain"].std() > 1
    close(model(recorded["latents"], recorded["per_row"], **text(recorded)), recorded["plain"])


@torch.no_grad()
def test_masked_text(recorded: dict[str, Tensor]) -> None:
    masked = build(text_tokens_zero_pad=False)
    close(masked(recorded["latents"], recorded["per_row"], **text(recorded)), recorded["plain_masked"])
    assert (recorded["plain_masked"] - recorded["plain"]).abs().max() > 1e-2, (
        "the two ways must differ to be told apart"
    )


@torch.no_grad()
def test_condition_frames(model: LongCatVideoTransformer3DModel, recorded: dict[str, Tensor]) -> None:
    got = model(recorded["latents"], recorded["per_frame"], **text(recorded), num_cond_latents=2)
    close(got, recorded["conditioned"])


@torch.no_grad()
def test_cache(model: LongCatVideoTransformer3DModel, recorded: dict[str, Tensor]) -> None:
    """Keys are stored before rotation, in our layout [B, N, H, D]; one sample's cache serves both rows."""
    cache = model.cache_condition(recorded["latents"][:1, :, :2])
    for i, (keys, values) in enumerate(cache):
        close(keys.transpose(1, 2), recorded[f"keys.{i}"])
        close(values.transpose(1, 2), recorded[f"values.{i}"])
    latents, timestep = recorded["latents"][:, :, 2:], recorded["per_frame"][:, 2:]
    close(model(latents, timestep, **text(recorded), num_cond_latents=2, kv_cache=cache), recorded["cached"])


@torch.no_grad()
def test_cached_is_the_rest_of_uncached(model: LongCatVideoTransformer3DModel, recorded: dict[str, Tensor]) -> None:
    cache = model.cache_condition(recorded["latents"][:, :, :2])
    whole = model(recorded["latents"], recorded["per_frame"], **text(recorded), num_cond_latents=2)
    rest = model(
        recorded["latents"][:, :, 2:],
        recorded["per_frame"][:, 2:],
        **text(recorded),
        num_cond_latents=2,
        kv_cache=cache,
    )
    close(rest, whole[:, :, 2:])


@torch.no_grad()
def test_condition_frames_ignore_text_and_noise(
    model: LongCatVideoTransformer3DModel, recorded: dict[str, Tensor]
) -> None:
    other = {"encoder_hidden_states": -recorded["text"], "text_lengths": recorded["lengths"]}
    noisier = recorded["latents"].clone()
    noisier[:, :, 2:] += 1
    one = model(recorded["latents"], recorded["per_frame"], **text(recorded), num_cond_latents=2)
    two = model(noisier, recorded["per_frame"], **other, num_cond_latents=2)
    assert torch.equal(one[:, :, :2], two[:, :, :2])
    assert (one[:, :, 2:] - two[:, :, 2:]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1, 31], [32, 7], [500, 3], [512, 512]])
def test_folding_of_the_padding(model: LongCatVideoTransformer3DModel, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2, 4, 4, generator=generator)
    words = torch.randn(2, 512, 32, generator=generator)
    timestep, counts = torch.tensor([10.0, 990.0]), torch.tensor(lengths)
    folded = model(latents, timestep, words, text_lengths=counts)
    embedded = model.y_embedder(words).masked_fill((torch.arange(512) >= counts[:, None])[..., None], 0.0)
    pairs = [block.cross_attn.project(embedded) for block in model.blocks]  # pyright: ignore
    plain = TextContext([k for k, _ in pairs], [v for _, v in pairs], None)
    close(folded, model(latents, timestep, text=plain))


@torch.no_grad()
def test_bfloat16_with_a_cache(model: LongCatVideoTransformer3DModel, recorded: dict[str, Tensor]) -> None:
    """Timesteps are read in the compute dtype, as published; modulation and the last layer stay float32."""
    low = build()
    for name, parameter in low.named_parameters():
        if not set(name.split(".")) & set(low.keep_in_float32):
            parameter.data = parameter.data.bfloat16()
    latents, words = recorded["latents"], {**text(recorded), "encoder_hidden_states": recorded["text"].bfloat16()}
    rounded = recorded["per_frame"].bfloat16().float()
    exact = model(latents, rounded, **text(recorded), num_cond_latents=2)
    whole = low(latents.bfloat16(), recorded["per_frame"], **words, num_cond_latents=2)
    cache = low.cache_condition(latents[:, :, :2].bfloat16())
    rest = low(latents[:, :, 2:].bfloat16(), rounded[:, 2:], **words, num_cond_latents=2, kv_cache=cache)
    assert whole.dtype == torch.float32 and cache[0].keys.dtype == torch.bfloat16
    for got, expected in ((whole, exact), (rest, exact[:, :, 2:])):
        assert (got - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_blocks_with_a_cache_are_one_graph(recorded: dict[str, Tensor]) -> None:
    compiled = build()
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True)
    latents, timestep = recorded["latents"][:, :, 2:], recorded["per_frame"][:, 2:]
    with forward_context(ForwardContext({"self": sdpa_attention, "cross": sdpa_attention})):
        cache = compiled.cache_condition(recorded["latents"][:1, :, :2])
        close(compiled(latents, timestep, **text(recorded), num_cond_latents=2, kv_cache=cache), recorded["cached"])


def test_published_names_and_shapes() -> None:
    published = json.loads((FIXTURES / "published.json").read_text())
    expected = {
        name.replace("blocks.N.", f"blocks.{i}."): tuple(shape) for name, shape in published.items() for i in range(48)
    }
    with torch.device("meta"):
        full = LongCatVideoTransformer3DModel(spec.LongCatConfig())
    assert {name: tuple(value.shape) for name, value in full.state_dict().items()} == expected
    assert sum(value.numel() for value in full.parameters()) == 13_581_071_424
    assert not list(full.buffers())


def test_forward_flops() -> None:
    """2 x parameters that a token meets, and attention over all tokens, of the full model at 480p x 93 frames."""
    tokens = 24 * 30 * 52
    per_token = 48 * (6 * 4096**2 + 3 * 4096 * 11008)
    expected = 2 * (tokens * per_token + 48 * (512 * 2 * 4096**2 + 2 * tokens * 4096 * (tokens + 512)))
    assert spec.forward_flops(spec.LongCatConfig(), tokens) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "unknown fields"),
        ({"depth": "12"}, "depth"),
        ({"depth": 0}, "depth"),
        ({"text_tokens_zero_pad": 1}, "text_tokens_zero_pad"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"num_heads": 3}, "hidden_size"),
        ({"hidden_size": 24}, "hidden_size"),
        ({"frequency_embedding_size": 31}, "frequency_embedding_size"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec.LongCatConfig.from_dict({**DIT, **change})


@pytest.mark.parametrize("shape", [(1, 4, 1, 5, 4), (1, 4, 1, 4, 0)])
def test_bad_latent_size(model: LongCatVideoTransformer3DModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiple of the patch"):
        model(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 8, 32))


def test_text_is_needed(model: LongCatVideoTransformer3DModel) -> None:
    with pytest.raises(InputError, match="encoder_hidden_states"):
        model(torch.zeros(1, 4, 1, 4, 4), torch.zeros(1))
    with pytest.raises(InputError, match="text_lengths"):
        model(torch.zeros(1, 4, 1, 4, 4), torch.zeros(1), torch.zeros(1, 8, 32), text_lengths=torch.tensor([9]))
