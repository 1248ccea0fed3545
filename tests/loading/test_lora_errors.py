"""LoRA files that are damaged, of another kind or for another model are refused in words; what fits in part says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kinetoscope.core.errors import ConfigError, ModelLoadError
from kinetoscope.core.lora import LowRank
from kinetoscope.loading import ModelDir
from kinetoscope.loading.components import lora_target
from kinetoscope.loading.lora import Target, lora_digest, read_lora
from kinetoscope.pipelines import presets  # noqa: F401 - registers the families
from lora_files import BLOCKS, DIM, FFN, factors, tensors, write
from tiny import make_tiny_wan


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    path = make_tiny_wan(tmp_path_factory.mktemp("wan"))
    return {"transformer": lora_target(ModelDir(path, str(path)), "transformer")}


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
        refused(path, targets, f"{path} is", "safetensors", "download it again")
    (tmp_path / "a.pt").write_bytes(b"x")
    refused(tmp_path / "a.pt", targets, "which can run code when they are read", "convert them: python -c")
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
