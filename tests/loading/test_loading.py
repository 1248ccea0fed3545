"""Directories and weights: the good are loaded as diffusers loads them, the bad are explained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinetoscope.core.errors import KinetoscopeError, ModelLoadError
from kinetoscope.loading import ModelDir, directory, load_component, resolve_model
from kinetoscope.loading.weights import load_weights
from kinetoscope.pipelines.presets import pipeline_class
from tiny import make_tiny_wan

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(path: Path, name: str = "transformer", dtype: torch.dtype = torch.float32) -> Any:
    model = resolve_model(path)
    pipeline_class(model)  # registers the family's transformer
    return load_component(model, name, dtype=dtype, device=CPU)


def test_components_compute_what_the_libraries_loading_computes(original: Path) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    z = torch.empty(1, 16, 2, 4, 4).normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[4, 5, 6, 1]])
    with torch.no_grad():
        ours, theirs = load(original, "vae"), AutoencoderKLWan.from_pretrained(original / "vae")
        assert (ours.decode(z).sample - theirs.decode(z).sample).abs().max() <= 1e-5
        ours, theirs = load(original, "text_encoder"), UMT5EncoderModel.from_pretrained(original / "text_encoder")
        assert (ours(ids).last_hidden_state - theirs(ids).last_hidden_state).abs().max() <= 1e-5


def test_weights_are_aligned_frozen_and_in_evaluation_mode(original: Path) -> None:
    for name in ("transformer", "vae", "text_encoder"):
        module = load(original, name)
        assert not module.training
        for parameter in module.parameters():
            assert parameter.data_ptr() % 64 == 0 and not parameter.requires_grad and not parameter.is_meta


def test_shards_equal_one_file(original: Path, tmp_path: Path) -> None:
    sharded = make_tiny_wan(tmp_path, shard_size="40KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    whole, parts = load(original).state_dict(), load(sharded).state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_dtype_policy_keeps_sensitive_parts_in_float32(original: Path) -> None:
    transformer = load(original, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in transformer.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.scale_shift_table"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert next(load(original, "vae", torch.bfloat16).parameters()).dtype == torch.float32
    assert next(load(original, "text_encoder", torch.bfloat16).parameters()).dtype == torch.bfloat16


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("proj_out.bias"), r"missing: proj_out\.bias"),
        (put("extra.weight", torch.zeros(2)), r"unexpected: extra\.weight"),
        (put("proj_out.bias", torch.zeros(3)), r"proj_out\.bias .* is \(3,\), needs \(64,\)"),
        (put("proj_out.bias", torch.full((64,), float("nan"))), r"not finite: proj_out\.bias"),
        (lambda t: t.clear(), r"missing: .* and \d+ more"),
    ],
)
def test_weights_that_do_not_fit(copy: Path, change: Any, says: str) -> None:
    rewrite(copy, change)
    with pytest.raises(ModelLoadError, match=says):
        load(copy)


@pytest.mark.parametrize("keep", [0, 5, 200, 30_000])
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_truncated_files(copy: Path, name: str, keep: int) -> None:
    file = next((copy / name).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"safetensors.*download it again"):
        load(copy, name)


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(ModelLoadError, match=r"no \.safetensors weights"):
        load(copy)
    sharded = make_tiny_wan(tmp_path / "sharded", shard_size="40KB")
    next((sharded / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ModelLoadError, match=r"shards .* are missing"):
        load(sharded)
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    edit(index, weight_map={"proj_out.bias": "../vae/diffusion_pytorch_model.safetensors"})
    with pytest.raises(ModelLoadError, match="outside its folder"):
        load(sharded)
    index.unlink()
    with pytest.raises(ModelLoadError, match=r"no index\.json"):
        load(sharded)
    shutil.rmtree(copy / "vae")
    with pytest.raises(ModelLoadError, match="vae"):
        load(copy, "vae")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "name", "says"),
    [
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKLMagic"]}, "vae", r"AutoencoderKLMagic.*supported"),
        ("model_index.json", {"vae": ["diffusers"]}, "vae", "vae should be"),
        ("model_index.json", {"vae": ["diffusers", "WanTransformer3DModel"]}, "vae", "describes"),
        ("transformer/config.json", {"num_layers": "two"}, "transformer", "num_layers"),
        ("transformer/config.json", {"new_field": 1}, "transformer", "new_field"),
        ("transformer/config.json", {"num_layers": 3}, "transformer", r"missing: blocks\.2"),
        ("vae/config.json", {"z_dim": "many"}, "vae", "vae cannot be loaded as AutoencoderKLWan"),
        ("scheduler/scheduler_config.json", {"prediction_type": "magic"}, "scheduler", "magic"),
    ],
)
def test_configurations_that_do_not_fit(copy: Path, file: str, fields: Any, name: str, says: str) -> None:
    edit(copy / file, **fields)
    with pytest.raises(KinetoscopeError, match=says):
        load(copy, name)


def test_an_unknown_scheduler_is_explained(copy: Path) -> None:
    edit(copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(ModelLoadError, match=r"DDIMScheduler.*UniPCMultistepScheduler"):
        load(copy, "scheduler")


def test_an_unknown_pipeline_is_explained(copy: Path) -> None:
    edit(copy / "model_index.json", _class_name="MagicPipeline")
    with pytest.raises(ModelLoadError, match=r"MagicPipeline.*WanPipeline"):
        load(copy)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_an_index_that_is_not_json(copy: Path, text: str) -> None:
    (copy / "model_index.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"model_index\.json"):
        load(copy)


def test_names(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(copy).path == copy
    with pytest.raises(ModelLoadError, match=r"not a model in diffusers layout; did you mean .*model"):
        resolve_model(copy.parent)
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model(copy / "model_index.json")
    with pytest.raises(ModelLoadError, match="no model 'nowhere at all'"):
        resolve_model("nowhere at all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match="there is no local directory 'some/model'"):
        resolve_model("some/model")


def test_the_fingerprint_follows_the_contents(copy: Path) -> None:
    before = ModelDir(copy, "a").fingerprint()
    assert before == ModelDir(copy, "b").fingerprint()
    rewrite(copy, lambda t: t["proj_out.bias"].add_(1e-3))
    assert ModelDir(copy, "a").fingerprint() != before


def test_defaults_of_the_sidecar(copy: Path) -> None:
    (copy / "kinetoscope.json").write_text('{"defaults": {"height": 32, "num_inference_steps": 7}}')
    assert resolve_model(copy).defaults == {"height": 32, "num_inference_steps": 7}
    (copy / "kinetoscope.json").write_text('{"defaults": {"hight": 32}}')
    with pytest.raises(ModelLoadError, match=r"kinetoscope\.json.*height"):
        _ = resolve_model(copy).defaults


def test_key_map_renames_prefixes(tmp_path: Path) -> None:
    save_file({"old.weight": torch.ones(2, 2), "old.bias": torch.zeros(2)}, tmp_path / "a.safetensors")
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    load_weights(module, tmp_path, dtype=lambda _: torch.float32, device=CPU, key_map={"old.": "0."})
    assert torch.equal(module[0].weight, torch.ones(2, 2))


def test_components_of_an_embedded_model(original: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that takes its VAE from an embedded model is that directory with its own, and copied it is whole."""
    whole = ModelDir(original, "whole").fingerprint()
    monkeypatch.setattr(directory, "embedded_models", lambda: {"base": original})
    shutil.rmtree(copy / "vae")
    with pytest.raises(ModelLoadError, match="folder of component 'vae' is missing"):
        resolve_model(copy).folder("vae")
    sidecar = {"defaults": {"height": 32}, "shared": {"vae": "base"}}
    (copy / "kinetoscope.json").write_text(json.dumps(sidecar))
    model = resolve_model(copy)
    assert model.folder("vae") == original / "vae" and model.fingerprint() == whole
    assert torch.equal(load(copy, "vae").post_quant_conv.weight, load(original, "vae").post_quant_conv.weight)
    again = model.copy(copy.parent / "again", [copy / "scheduler"])
    assert (again.path / "vae" / "config.json").exists() and not (again.path / "scheduler").exists()
    assert again.sidecar == {"defaults": {"height": 32}}
    sidecar["shared"]["vae"] = "bare"
    (copy / "kinetoscope.json").write_text(json.dumps(sidecar))
    with pytest.raises(ModelLoadError, match=r"vae is shared with 'bare', which is no embedded model \(base\)"):
        resolve_model(copy).folder("vae")
    (copy / "kinetoscope.json").write_text('{"shared": ["vae"]}')
    with pytest.raises(ModelLoadError, match="shared should be an object"):
        resolve_model(copy).folder("vae")
