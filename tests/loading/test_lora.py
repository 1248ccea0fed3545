"""LoRA files of every key style change the forward as diffusers, PEFT or a merge by hand; bad ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading import ModelDir, load_component
from kinetoscope.loading.components import lora_target
from kinetoscope.loading.lora import LoraFile, Target, read_lora
from kinetoscope.nn.lora import carrier_of
from kinetoscope.pipelines import presets  # noqa: F401 - registers the families
from lora_files import DIM, deltas, factors, tensors, write
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


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # it takes a bias for a shard
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
    from kinetoscope.loading.components import _NAMES  # pyright: ignore[reportPrivateUsage]

    for name in ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "CausalWanTransformer3DModel"):
        assert _NAMES[name][1]("blocks.3.cross_attn.o.weight") == "blocks.3.attn2.to_out.0.weight"


@pytest.mark.parametrize("style", ["kohya", "comfyui", "peft"])
def test_hunyuan_keeps_queries_keys_and_values_in_one_layer(tmp_path: Path, style: str) -> None:
    """Their shares of the outputs go to our layers, as diffusers' own conversion says; by hand what it cannot convert:
    the refiner, and single blocks of another width than the published one."""
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers as convert

    from kinetoscope.models.hunyuan.original import lora_names
    from models.tiny_hunyuan import TRANSFORMER

    module = HunyuanVideoTransformer3DModel(**TRANSFORMER)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    dim, draw = 32, torch.Generator().manual_seed(0)
    sizes = {"img_attn_proj": 32, "txt_attn_proj": 32, "img_attn_qkv": 96, "txt_attn_qkv": 96, "img_mlp.fc1": 128,
             "txt_mlp.fc1": 128, "img_mod.linear": 192, "txt_mod.linear": 192}  # fmt: skip
    layers = {f"double_blocks.1.{name}": out for name, out in sizes.items()}
    layers |= {"txt_in.individual_token_refiner.blocks.0.self_attn_qkv": 96, "single_blocks.0.linear1": 224}
    if style == "comfyui":  # its own names of the same layers
        changed = {"_attn_": "_attn.", "mlp.fc1": "mlp.0", "mod.linear": "mod.lin", "self_attn_qkv": "self_attn.qkv"}
        for old, new in changed.items():
            layers = {name.replace(old, new): out for name, out in layers.items()}
    pairs = {
        name: (torch.randn(4, dim, generator=draw), torch.randn(out, 4, generator=draw)) for name, out in layers.items()
    }
    stem = {"kohya": lambda n: f"lora_unet_{n.replace('.', '_')}", "comfyui": lambda n: f"diffusion_model.{n}",
            "peft": lambda n: f"transformer.{n}"}[style]  # fmt: skip
    content = {
        f"{stem(n)}.{side}.weight": t
        for n, p in pairs.items()
        for side, t in zip(("lora_down", "lora_up"), p, strict=True)
    }
    file = read_lora(write(tmp_path / "a.safetensors", content), {"transformer": Target(shapes, lora_names)})
    assert file.unmatched == ()
    got = {name: one.delta(shapes[name], CPU) for name, (one,) in file.changes["transformer"].items()}
    single, refiner = (pairs.pop(next(n for n in pairs if n.startswith(start))) for start in ("single", "txt_in"))
    qkv = ("attn.to_q", "attn.to_k", "attn.to_v")
    for stem_, parts, (down, up) in (
        ("single_transformer_blocks.0", (*qkv, "proj_mlp"), single),
        ("context_embedder.token_refiner.refiner_blocks.0", qkv, refiner),
    ):
        rows = up.split([dim] * 3 + [128] * (len(parts) - 3))
        for part, row in zip(parts, rows, strict=True):
            torch.testing.assert_close(got.pop(f"{stem_}.{part}.weight"), row @ down)
    theirs = {n.replace("_attn.", "_attn_").replace("mlp.0", "mlp.fc1").replace("mod.lin", "mod.linear")
              .replace("mod.linearear", "mod.linear"): p for n, p in pairs.items()}  # fmt: skip
    converted = convert(
        {f"{n}.{side}.weight": t for n, p in theirs.items() for side, t in zip(("lora_A", "lora_B"), p, strict=True)}
    )
    expected = {
        name.removeprefix("transformer.").replace("lora_A.", ""): converted[name.replace("lora_A", "lora_B")] @ down
        for name, down in converted.items() if "lora_A" in name
    }  # fmt: skip
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name])


def test_longcat_has_a_factor_for_each_share_of_the_outputs(tmp_path: Path) -> None:
    """github meituan-longcat/LongCat-Video, longcat_video/modules/lora_utils.py: chunks of lora_down(x), each through a
    factor of its own; scaled by a stored alpha_scale."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.attn.qkv.weight": (36, 12), "blocks.0.attn.proj.weight": (12, 12)}
    stem = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___"
    down, proj = torch.randn(6, 12, generator=draw), torch.randn(2, 12, generator=draw)
    ups = [torch.randn(12, 2, generator=draw) for _ in range(3)]
    content = {f"{stem}qkv.lora_down.weight": down, f"{stem}qkv.alpha_scale": torch.tensor(0.5)}
    content |= {f"{stem}qkv.lora_up.blocks.{i}.weight": up for i, up in enumerate(ups)}
    content |= {f"{stem}proj.lora_down.weight": proj, f"{stem}proj.lora_up.weight": ups[0].clone()}
    file = read_lora(write(tmp_path / "a.safetensors", content), {"transformer": Target(shapes, str)})
    assert file.unmatched == () and file.styles == ("longcat",)
    x = torch.randn(5, 12, generator=draw)
    chunks = nn.functional.linear(x, down).chunk(3, -1)
    expected = 0.5 * torch.cat([nn.functional.linear(c, up) for c, up in zip(chunks, ups, strict=True)], -1)
    found = {name: one.delta(shapes[name], CPU) for name, (one,) in file.changes["transformer"].items()}
    torch.testing.assert_close(x @ found["blocks.0.attn.qkv.weight"].T, expected)
    torch.testing.assert_close(found["blocks.0.attn.proj.weight"], ups[0] @ proj)
    del content[f"{stem}qkv.lora_down.weight"]
    with pytest.raises(ModelLoadError, match="counterpart"):
        read_lora(write(tmp_path / "b.safetensors", content), {"transformer": Target(shapes, str)})
