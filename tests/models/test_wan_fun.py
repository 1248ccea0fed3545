"""Wan2.1-Fun's transformers against recorded outputs of the published implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.wan import original
from kinetoscope.models.wan.causal import CausalWanConfig
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from models.family_contract import TransformerContract
from models.tiny_wan_fun import FIXTURES, KINDS, SHAPE, authors_name, forward_inputs, random, tiny_fun

RECORDED = load_file(FIXTURES / "fixtures.safetensors")
ORIGINAL: dict[str, Any] = {  # config.json of the published 1.3B models, without their channels
    "model_type": "i2v", "patch_size": [1, 2, 2], "text_len": 512, "dim": 1536, "ffn_dim": 8960, "freq_dim": 256,
    "text_dim": 4096, "out_dim": 16, "num_heads": 12, "num_layers": 30, "window_size": [-1, -1], "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "_class_name": "WanTransformer3DModel",
}  # fmt: skip
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
CHANNELS: dict[str, dict[str, Any]] = {
    "Fun-Control": {"in_dim": 48},
    "Fun-V1.1-Control": {"in_dim": 48, "add_ref_conv": True},
    "Fun-V1.1-Control-Camera": {"in_dim": 32, "add_control_adapter": True, "in_dim_control_adapter": 24},
}


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind: str) -> None:
    model, inputs = tiny_fun(kind), forward_inputs(kind)
    with torch.no_grad():
        out = model(**inputs)
    expected = RECORDED[f"forward.{kind}"]
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_forward_without_a_camera() -> None:
    model, inputs = tiny_fun("camera"), forward_inputs("camera")
    del inputs["camera"]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), RECORDED["forward.camera.off"], rtol=0, atol=1e-5)


class TestControl(TransformerContract):
    """A video to follow on channels, and image features."""

    KIND = "control"
    SHAPES = (SHAPE,)
    ROLES = ("self", "cross", "cross") * 2

    def make_model(self) -> nn.Module:
        return tiny_fun(self.KIND)

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        """Of as many rows as `shape` has: its channels are those of the sample alone."""
        drawn = {
            name: torch.randn(shape[0], *value.shape[1:], generator=generator)
            for name, value in forward_inputs(self.KIND).items()
        }
        return drawn | {"timestep": torch.tensor([713.0, 120.0, 6.5])[: shape[0]]}


class TestReference(TestControl):
    """A picture read as a frame before the first."""

    KIND = "reference"


class TestCamera(TestControl):
    """Rays added to the tokens."""

    KIND = "camera"


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("size", [{}, LARGE], ids=["1.3B", "14B"])
def test_published_sizes(name: str, size: dict[str, Any]) -> None:
    """Names and shapes of diffusers' class for what is Wan's; those of the published state dicts for what is added."""
    from diffusers import WanTransformer3DModel as Oracle

    config = original.read_config({**ORIGINAL, **size, **CHANNELS[name]})
    dim = config.dim
    with torch.device("meta"):
        ours = {n: tuple(p.shape) for n, p in WanTransformer3DModel(config).named_parameters()}
        oracle = Oracle(
            num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels, ffn_dim=config.ffn_dim, num_layers=config.num_layers, image_dim=1280,
            added_kv_proj_dim=dim,
        )  # fmt: skip
    expected = {n: tuple(p.shape) for n, p in oracle.named_parameters()}
    if config.add_ref_conv:
        expected |= {"ref_conv.weight": (dim, 16, 2, 2), "ref_conv.bias": (dim,)}
    if config.add_control_adapter:
        expected |= {"control_adapter.conv.weight": (dim, 1536, 2, 2), "control_adapter.conv.bias": (dim,)}
        for part in ("conv1", "conv2"):
            block = f"control_adapter.residual_blocks.0.{part}"
            expected |= {f"{block}.weight": (dim, dim, 3, 3), f"{block}.bias": (dim,)}
    assert ours == expected


def test_names_of_both_kinds() -> None:
    """The authors' names become ours (`make.py` fills the published module by them); diffusers' stay as they are."""
    for kind in KINDS:
        for name in tiny_fun(kind).state_dict():
            assert original.rename(authors_name(name)) == original.rename(name) == name
    assert authors_name("blocks.3.attn2.norm_added_k.weight") == "blocks.3.cross_attn.norm_k_img.weight"


def test_configurations_of_both_kinds() -> None:
    published = {"num_attention_heads": 12, "in_channels": 48, "image_dim": 1280, "added_kv_proj_dim": 1536}
    assert original.read_config(published) == WanConfig.from_dict(published)
    text = original.read_config({**ORIGINAL, "model_type": "t2v"})
    assert (text.image_dim, text.in_channels, text.num_attention_heads, text.attention_head_dim) == (None, 16, 12, 128)


@pytest.mark.parametrize("change", [{"num_heads": 7}, {"window_size": [8, 8]}, {"qk_norm": False}, {"unheard_of": 1}])
def test_configurations_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        original.read_config({**ORIGINAL, **change})


def test_causal_models_take_no_controls() -> None:
    with pytest.raises(ConfigError, match="add_ref_conv"):
        CausalWanConfig.from_dict({"add_ref_conv": True})


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("control", {"reference": random((2, 16, 4, 6), 1)}, "takes no reference"),
        ("control", {"camera": random((2, 24, 3, 32, 48), 1)}, "takes no camera"),
        ("reference", {"reference": None}, "needs reference"),
        ("camera", {"camera": random((2, 24, 2, 32, 48), 1)}, "give every frame its rays"),
    ],
)
def test_inputs_refused(kind: str, change: dict[str, Tensor | None], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny_fun(kind)(**{**forward_inputs(kind), **change})
