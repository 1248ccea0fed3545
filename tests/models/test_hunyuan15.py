"""The HunyuanVideo 1.5 transformer against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel as Oracle
from torch import Tensor, nn

from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.hunyuan15.config import HunyuanVideo15Config
from kinetoscope.models.hunyuan15.transformer import HunyuanVideo15Transformer3DModel
from models.family_contract import FORWARD_TOLERANCE, FamilyContract
from tiny import perturb

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

    SHAPES = ((2, 9, 2, 4, 4), (1, 9, 1, 3, 5), (3, 9, 4, 2, 3))
    CONFIG: ClassVar[dict[str, Any]] = TINY

    def make_oracle(self) -> nn.Module:
        return Oracle(**self.CONFIG)

    def make_ours(self, oracle: Any) -> nn.Module:
        return HunyuanVideo15Transformer3DModel(HunyuanVideo15Config.from_dict(oracle.config))

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

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        image = torch.randn(shape[0], IMAGE, 12, generator=generator)
        return super().inputs(shape, generator) | {"image_embeds": image}

    def unused(self, name: str) -> bool:
        return super().unused(name) and not name.startswith("image_embedder")


class TestHunyuan15MeanFlow(TestHunyuan15Image):
    """The timestep to step to is embedded too."""

    CONFIG: ClassVar[dict[str, Any]] = {**TINY, "use_meanflow": True}

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        given = super().inputs(shape, generator)
        return given | {"timestep_r": given["timestep"] * 0.8}

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        dtype = next(oracle.parameters()).dtype
        return super().call_oracle(oracle, inputs | {"timestep_r": inputs["timestep_r"].to(dtype)})


@pytest.fixture(scope="module", params=[False, True])
def model(request: pytest.FixtureRequest) -> HunyuanVideo15Transformer3DModel:
    oracle = Oracle(**TINY, use_meanflow=request.param)
    perturb(oracle, seed=1, scale=0.1)
    made = HunyuanVideo15Transformer3DModel(HunyuanVideo15Config.from_dict(oracle.config))
    made.load_state_dict(oracle.state_dict())
    return made


def test_prepared_parts_change_nothing(model: HunyuanVideo15Transformer3DModel) -> None:
    inputs = TestHunyuan15Image().inputs((1, 9, 2, 4, 4), torch.Generator().manual_seed(1))
    latents, timesteps = inputs.pop("latents"), torch.tensor([999.0, 700.5, 12.0])
    del inputs["timestep"]
    with torch.no_grad():
        run = model.prepare_conditioning(**inputs) | model.prepare_shared(latents.shape)
        times = model.prepare_timesteps(timesteps)["time"]
        for index, timestep in enumerate(timesteps):
            step = type(times)(*(table[index : index + 1] for table in times))
            following = torch.tensor([700.5, 12.0, 0.0])[index].view(1)
            prepared = model(latents, timestep.view(1), **run, time=step)
            assert torch.equal(prepared, model(latents, timestep.view(1), timestep_r=following, **inputs))


def test_no_quoted_text_at_all(model: HunyuanVideo15Transformer3DModel) -> None:
    inputs = TestHunyuan15().inputs((2, 9, 2, 4, 4), torch.Generator().manual_seed(2))
    without = {k: v for k, v in inputs.items() if not k.endswith("_2")}
    with torch.no_grad():
        expected = model(**without)
        got = model(**inputs | {"text_lengths_2": torch.tensor([0, 0])})
    torch.testing.assert_close(got, expected, rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = HunyuanVideo15Transformer3DModel(HunyuanVideo15Config.from_dict(PUBLISHED[name]))
        oracle = Oracle(**PUBLISHED[name])
    expected = {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == expected
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert not list(ours.buffers())


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


def test_layers_ask_for_their_role(model: HunyuanVideo15Transformer3DModel) -> None:
    asked: list[str] = []

    def backend(role: str) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
            asked.append(role)
            return torch.zeros_like(q)

        return call

    inputs = TestHunyuan15Image().inputs((2, 9, 2, 4, 4), torch.Generator().manual_seed(3))
    roles = {role: backend(role) for role in ("joint", "refiner")}
    with torch.no_grad(), forward_context(ForwardContext(roles)):
        model(**inputs)
    assert asked == ["refiner"] + ["joint"] * 2


def test_blocks_compile_without_a_break(model: HunyuanVideo15Transformer3DModel) -> None:
    """One graph a block, with attention read from the context; compiled inference equals eager inference."""
    inputs = TestHunyuan15Image().inputs((2, 9, 2, 4, 4), torch.Generator().manual_seed(4))
    compiled = HunyuanVideo15Transformer3DModel(model.config)
    compiled.load_state_dict(model.state_dict())
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    table = resolve_attention("auto", capabilities("cpu", torch.float32), ("joint", "refiner"))
    with torch.no_grad(), forward_context(ForwardContext(table)):
        torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=0, atol=FORWARD_TOLERANCE)
