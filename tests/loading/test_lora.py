"""LoRA files of every key style change the forward as diffusers, PEFT or a merge by hand; bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, ModelLoadError
from kinetoscope.core.lora import LowRank
from kinetoscope.loading import ModelDir, load_component
from kinetoscope.loading.components import lora_target
from kinetoscope.loading.lora import LoraFile, Target, lora_digest, read_lora
from kinetoscope.nn.lora import carrier_of
from kinetoscope.pipelines import presets  # noqa: F401 - registers the families
from lora_files import BLOCKS, DIM, FFN, deltas, factors, tensors, write
from tiny import make_tiny_wan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> ModelDir:
    return ModelDir(tiny, str(tiny))


@pytest.fixture(scope="module")
def targets(model: ModelDir) -> dict[str, Target]:
    return {"transformer": lora_target(model, "transformer")}


def load(model: ModelDir) -> nn.Module:
    return load_component(model, "transformer", dtype=torch.float32, device=CPU)


def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(9)
    return {
        "latents": torch.randn(2, 16, 2, 4, 4, generator=draw),
        "timestep": torch.tensor([800.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=draw),
    }


@torch.no_grad()
def forward(module: nn.Module) -> Tensor:
    return module(**inputs())


@torch.no_grad()
def oracle_forward(module: nn.Module) -> Tensor:
    given = inputs()
    return module(hidden_states=given.pop("latents"), **given, return_dict=False)[0]


def carry(module: nn.Module, file: LoraFile, weight: float = 1.0) -> nn.Module:
    wanted = {n: tuple((c, weight) for c in cs) for n, cs in file.changes["transformer"].items()}
    carrier_of(module).carry(module, wanted, torch.float32)
    return module


@torch.no_grad()
def merged(module: nn.Module, changes: dict[str, Tensor], weight: float = 1.0) -> nn.Module:
    """The oracle by hand."""
    parameters = dict(module.named_parameters())
    for name, delta in changes.items():
        parameters[name] += weight * delta.view(parameters[name].shape)
    return module


def near(got: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).abs().max() > 0.02 * base.std()  # the LoRA does something
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("style", "alpha", "named"),
    [
        ("diffusers", None, "diffusers"),
        ("comfyui", None, "comfyui"),
        ("comfyui", 2.0, "comfyui"),
        ("comfyui-down", 6.0, "comfyui"),
        ("kohya", 1.0, "kohya"),
    ],
)
def test_styles_equal_diffusers(
    model: ModelDir, targets: dict[str, Target], tmp_path: Path, style: str, alpha: float | None, named: str
) -> None:
    """`load_lora_weights` of diffusers is the oracle, and the merge by hand is its witness."""
    from diffusers import WanPipeline

    pairs = factors()
    path = write(tmp_path / "a.safetensors", tensors(style, pairs, alpha))
    pipeline = WanPipeline.from_pretrained(model.path)
    base = oracle_forward(pipeline.transformer)
    pipeline.load_lora_weights(str(path))
    file = read_lora(path, targets)
    assert file.unmatched == () and file.styles == (named,) and file.ranks == (4,)
    got = forward(carry(load(model), file))
    near(got, oracle_forward(pipeline.transformer), base)
    near(got, forward(merged(load(model), deltas(pairs, (alpha or 4) / 4))), base)


@pytest.mark.parametrize("style", ["bare", "half-kohya"])
def test_further_styles(model: ModelDir, targets: dict[str, Target], tmp_path: Path, style: str) -> None:
    pairs = factors(1)
    file = read_lora(write(tmp_path / "a.safetensors", tensors(style, pairs, 8.0)), targets)
    assert file.unmatched == ()
    near(forward(carry(load(model), file)), forward(merged(load(model), deltas(pairs, 2.0))), forward(load(model)))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 7},
        {"lora_alpha": 7, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 12}, "rank_pattern": {"attn1.to_q": 3}},
        {"lora_alpha": 3, "lora_bias": True},
    ],
)
def test_folders_of_peft(model: ModelDir, targets: dict[str, Target], tmp_path: Path, settings: dict[str, Any]) -> None:
    """What peft saves: scales are in its configuration, not in the tensors."""
    peft = pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    oracle = WanTransformer3DModel.from_pretrained(model.path / "transformer")
    base = oracle_forward(oracle)
    config = peft.LoraConfig(
        r=4,
        target_modules=["to_q", "to_k", "to_out.0", "ffn.net.0.proj", "time_proj"],
        init_lora_weights=False,
        **settings,
    )
    torch.manual_seed(3)  # noqa: TID251 - peft initialises from the global generator
    adapted = peft.get_peft_model(oracle, config)
    adapted.save_pretrained(tmp_path)
    file = read_lora(tmp_path, targets)
    assert file.unmatched == () and file.styles == ("peft",)
    near(forward(carry(load(model), file)), oracle_forward(adapted.eval()), base)


def test_what_diffusers_saves_says_its_alpha_in_the_header(
    model: ModelDir, targets: dict[str, Target], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import WanPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipeline = WanPipeline.from_pretrained(model.path)
    base = oracle_forward(pipeline.transformer)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(4)  # noqa: TID251 - peft initialises from the global generator
    pipeline.transformer.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.transformer))
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config.to_dict())
    file = read_lora(tmp_path, targets)
    assert file.path.name == "pytorch_lora_weights.safetensors" and file.unmatched == ()
    near(forward(carry(load(model), file)), oracle_forward(pipeline.transformer), base)


def test_deltas_of_weights_biases_norms_modulation_and_convolutions(
    model: ModelDir, targets: dict[str, Target], tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(5)
    make = lambda *shape: torch.randn(*shape, generator=draw) * 0.2  # noqa: E731
    down, up = make(2, 16, 1, 2, 2), make(DIM, 2, 1, 1, 1)
    content = {
        "diffusion_model.blocks.0.self_attn.q.diff": make(DIM, DIM),
        "diffusion_model.blocks.0.self_attn.q.diff_b": make(DIM),
        "diffusion_model.blocks.1.cross_attn.norm_k.diff": make(DIM),
        "diffusion_model.blocks.1.norm3.diff": make(DIM),
        "diffusion_model.blocks.1.norm3.diff_b": make(DIM),
        "blocks.0.diff_m": make(1, 6, DIM),
        "diffusion_model.blocks.1.modulation.diff": make(1, 6, DIM),
        "head.diff_m": make(1, 2, DIM),
        "diffusion_model.head.head.diff": make(64, DIM),
        "diffusion_model.text_embedding.0.diff_b": make(DIM),
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.patch_embedding.alpha": torch.tensor(4.0),
    }
    names = [
        "blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias", "blocks.1.attn2.norm_k.weight",
        "blocks.1.norm2.weight", "blocks.1.norm2.bias", "blocks.0.scale_shift_table", "blocks.1.scale_shift_table",
        "scale_shift_table", "proj_out.weight", "condition_embedder.text_embedder.linear_1.bias",
    ]  # fmt: skip
    expected = dict(zip(names, list(content.values()), strict=False))
    expected["patch_embedding.weight"] = 2.0 * torch.einsum("or,r...->o...", up.flatten(1), down)
    file = read_lora(write(tmp_path / "a.safetensors", content), targets)
    assert file.unmatched == () and file.changes["transformer"].keys() == expected.keys()
    got, base = carry(load(model), file, 0.5), load(model)
    near(forward(got), forward(merged(load(model), expected, 0.5)), forward(base))
    untouched = dict(base.named_parameters())
    for name, value in got.named_parameters():  # nothing else moved
        assert torch.equal(value, untouched[name]) == (name not in expected), name


def test_bf16_weights_are_merged_in_float32_and_come_back(
    model: ModelDir, targets: dict[str, Target], tmp_path: Path
) -> None:
    """Rounded once: computing in bf16 would lose changes that are small beside their weight."""
    pairs = {"blocks.0.self_attn.q": factors(scale=0.02)["blocks.0.self_attn.q"]}
    halves = {n: (a.bfloat16(), b.bfloat16()) for n, (a, b) in pairs.items()}
    file = read_lora(write(tmp_path / "a.safetensors", tensors("kohya", halves, 4.0)), targets)
    module = load_component(model, "transformer", dtype=torch.bfloat16, device=CPU)
    weight = module.get_parameter("blocks.0.attn1.to_q.weight")
    before = weight.clone()
    carry(module, file)
    delta = deltas({n: (a.float(), b.float()) for n, (a, b) in halves.items()})["blocks.0.attn1.to_q.weight"]
    assert torch.equal(weight, (before.float() + delta).bfloat16())
    assert not torch.equal(weight, before + delta.bfloat16())
    carrier_of(module).carry(module, {}, torch.bfloat16)
    assert torch.equal(weight, before)


def test_every_family_under_the_names_of_wan(tmp_path: Path) -> None:
    """SkyReels-V2 and causal Wan are Wan's layers: LoRAs in its authors' names fit them too."""
    from kinetoscope.loading.components import _KEY_MAPS  # pyright: ignore[reportPrivateUsage]

    for name in ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "CausalWanTransformer3DModel"):
        rename: Any = _KEY_MAPS[name]
        assert rename("blocks.3.cross_attn.o.weight") == "blocks.3.attn2.to_out.0.weight"


# -- bad files --------------------------------------------------------------------------------------------------------


def refused(path: Path, targets: dict[str, Target], *says: str, error: type[Exception] = ModelLoadError) -> None:
    with pytest.raises(error) as caught:
        read_lora(path, targets)
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(targets: dict[str, Target], tmp_path: Path) -> None:
    refused(tmp_path / "no.safetensors", targets, "no.safetensors", "there is no")
    refused(tmp_path, targets, "folder without adapter_model.safetensors")
    path = write(tmp_path / "a.safetensors", tensors("kohya", factors()))
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 5):
        path.write_bytes(whole[:size])
        refused(path, targets, "truncated or not a safetensors file")
    (tmp_path / "a.pt").write_bytes(b"x")
    refused(tmp_path / "a.pt", targets, "may run code")
    refused(write(tmp_path / "b.safetensors", {}), targets, "no tensors")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_blocks_0_self_attn_q.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_self_attn_q.lokr_w1", "LoKr"),
        ("lora_unet_blocks_0_self_attn_q.lora_mid.weight", "LoCon"),
        ("diffusion_model.blocks.0.self_attn.q.set_weight", "replaced weights"),
    ],
)
def test_other_kinds_are_refused_by_name(targets: dict[str, Target], tmp_path: Path, key: str, says: str) -> None:
    path = write(tmp_path / "a.safetensors", {**tensors("comfyui", factors()), key: torch.ones(DIM)})
    refused(path, targets, key, says, "not supported")


def test_dora_in_the_configuration_is_refused(targets: dict[str, Target], tmp_path: Path) -> None:
    write(
        tmp_path / "adapter_model.safetensors",
        {f"base_model.model.{k}": v for k, v in tensors("bare", factors()).items()},
    )
    for config, says in (
        ({"use_dora": True}, "DoRA"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"alpha_pattern": 3}, "alpha_pattern"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        refused(tmp_path, targets, says)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(targets: dict[str, Target], tmp_path: Path, value: float) -> None:
    content = tensors("kohya", factors(), 4.0)
    for key in ("lora_unet_blocks_0_ffn_2.lora_up.weight", "lora_unet_blocks_0_ffn_2.alpha"):
        bad = {k: v.clone() for k, v in content.items()}
        bad[key].view(-1)[0] = value
        refused(write(tmp_path / "a.safetensors", bad), targets, key, "NaN")


def test_shapes_that_do_not_fit_are_named(targets: dict[str, Target], tmp_path: Path) -> None:
    """As of a LoRA for Wan 14B on Wan 1.3B."""
    wide = tensors("kohya", factors(dim=32, ffn=64))
    refused(
        write(tmp_path / "a.safetensors", wide), targets, "lora_unet_blocks_0_cross_attn_k.lora_down.weight",
        "[32, 32]", "blocks.0.attn2.to_k.weight", f"[{DIM}, {DIM}]", "another size",
    )  # fmt: skip
    refused(write(tmp_path / "b.safetensors", {"blocks.0.self_attn.q.diff_b": torch.ones(FFN)}), targets,
            "blocks.0.self_attn.q.diff_b", f"[{FFN}]", f"[{DIM}]")  # fmt: skip
    name = "blocks.0.self_attn.q"
    halves = {f"{name}.lora_A.weight": torch.ones(4, DIM), f"{name}.lora_B.weight": torch.ones(DIM, 3)}
    refused(write(tmp_path / "c.safetensors", halves), targets, f"{name}.lora_A.weight", f"[4, {DIM}]", f"[{DIM}, 3]")
    refused(write(tmp_path / "d.safetensors", {f"{name}.lora_B.weight": torch.ones(DIM, 3)}), targets, "counterpart")
    alphas = tensors("bare", factors()) | {f"{name}.alpha": torch.ones(2)}
    refused(write(tmp_path / "e.safetensors", alphas), targets, f"{name}.alpha", "one number")


def test_a_lora_of_another_family_names_keys_and_styles(targets: dict[str, Target], tmp_path: Path) -> None:
    names = [
        f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{side}.weight" for i in range(3) for side in ("down", "up")
    ]
    path = write(tmp_path / "a.safetensors", {name: torch.ones(4, 4) for name in names})
    refused(
        path,
        targets,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "and 2 more",
        "kohya",
        "ComfyUI",
        "PEFT",
    )


def test_keys_that_do_nothing_are_told(targets: dict[str, Target], tmp_path: Path) -> None:
    """Image layers of a text-to-video model, blocks it does not have, text encoders, unknown suffixes."""
    content = tensors("kohya", factors(), 4.0)
    extra = [
        "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight", "lora_unet_blocks_0_cross_attn_k_img.lora_up.weight",
        f"lora_unet_blocks_{BLOCKS}_self_attn_q.alpha", "lora_te_layers_0_q_proj.lora_down.weight",
        "lora_unet_blocks_0_self_attn_q.what",
    ]  # fmt: skip
    file = read_lora(write(tmp_path / "a.safetensors", content | {k: torch.ones(4, 4) for k in extra}), targets)
    assert sorted(file.unmatched) == sorted(extra) and file.matched == len(content)


# -- two transformers -------------------------------------------------------------------------------------------------


def test_experts(targets: dict[str, Target], tmp_path: Path) -> None:
    two = targets | {"transformer_2": targets["transformer"]}
    high, low = tensors("diffusers", factors(1)), tensors("diffusers-2", factors(2))
    file = read_lora(write(tmp_path / "both.safetensors", high | low), two)
    assert file.unmatched == ()
    for name, content in (("transformer", high), ("transformer_2", low)):
        change = file.changes[name]["blocks.0.attn1.to_q.weight"][0]
        assert isinstance(change, LowRank)
        assert torch.equal(change.down, content[f"{name}.blocks.0.attn1.to_q.lora_A.weight"])
    with pytest.raises(ConfigError, match="says itself"):
        read_lora(tmp_path / "both.safetensors", two, "transformer")
    assert set(read_lora(tmp_path / "both.safetensors", targets).unmatched) == low.keys()

    path = write(tmp_path / "one.safetensors", tensors("kohya", factors(1)))
    refused(path, two, "'transformer'", "'transformer_2'", "'both'", error=ConfigError)
    for component, changed in (("transformer_2", ["transformer_2"]), ("both", ["transformer", "transformer_2"])):
        assert list(read_lora(path, two, component).changes) == changed
    with pytest.raises(ConfigError, match="no component 'transformer_2'"):
        read_lora(path, targets, "transformer_2")


def test_the_digest_sees_the_configuration(targets: dict[str, Target], tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", tensors("bare", factors()))
    plain = lora_digest(tmp_path)
    seen = {plain}
    for alpha in (1, 2):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        seen.add(read_lora(tmp_path, targets).sha256)
    assert len(seen) == 3
    assert load_file(tmp_path / "adapter_model.safetensors")  # untouched
