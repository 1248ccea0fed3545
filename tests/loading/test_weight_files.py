"""Every kind of weight file that people have is loaded, or the message says what it is and what to do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading import load_component, resolve_model
from kinetoscope.loading.lora import Target, read_lora
from kinetoscope.loading.weights import weight_files
from kinetoscope.pipelines.presets import pipeline_class
from tiny import make_tiny_wan

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model"
HEAVY = {"transformer", "vae", "text_encoder"}


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


def equal(a: Any, b: Any) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def weights(path: Path) -> Path:
    return path / "transformer" / f"{FILE}.safetensors"


def refused(path: Path, *says: str, name: str = "transformer") -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path, name)
    message = str(caught.value)
    for part in says:
        assert part in message, message
    assert "\n" not in message
    return message


# -- precisions and shards --------------------------------------------------------------------------------------------


def shards(tensors: Mapping[str, Tensor], stem: str = FILE, variant: str = "", count: int = 3) -> dict[str, Any]:
    """File name -> tensors, of a set of shards."""
    keys = list(tensors)
    return {
        f"{stem}{variant}-{i + 1:05d}-of-{count:05d}.safetensors": {k: tensors[k] for k in keys[i::count]}
        for i in range(count)
    }


def test_precision_without_a_suffix_is_taken(copy: Path, original: Path) -> None:
    for name in ("transformer", "text_encoder", "vae"):
        file = next((copy / name).glob("*.safetensors"))
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        for variant in ("bf16", "fp16"):
            save_file(half, file.with_name(f"{file.stem}.{variant}.safetensors"))
        assert equal(load(copy, name), load(original, name))


def test_precision_with_a_suffix_is_taken_when_it_is_the_only_one(copy: Path) -> None:
    weights(copy).rename(weights(copy).with_name(f"{FILE}.fp16.safetensors"))
    text = next((copy / "text_encoder").glob("*.safetensors"))
    text.rename(text.with_name("model.fp16.safetensors"))
    load(copy)
    load(copy, "text_encoder")


def test_precisions_with_suffixes_alone_are_named(copy: Path) -> None:
    for variant in ("fp16", "bf16"):
        shutil.copy(weights(copy), weights(copy).with_name(f"{FILE}.{variant}.safetensors"))
    weights(copy).unlink()
    refused(copy, f"{FILE}.bf16.safetensors, {FILE}.fp16.safetensors", "keep the one")


def test_sharded_precision_beside_a_whole_file(copy: Path, original: Path) -> None:
    tensors = load_file(weights(copy))
    half = shards({k: v.half() for k, v in tensors.items()}, variant=".fp16")
    for name, part in half.items():
        save_file(part, weights(copy).with_name(name))
    index = {"weight_map": {k: name for name, part in half.items() for k in part}}
    weights(copy).with_name(f"{FILE}.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert equal(load(copy), load(original))


def test_shards_without_an_index_are_joined_by_their_names(copy: Path, original: Path) -> None:
    parts = shards(load_file(weights(copy)))
    weights(copy).unlink()
    for name, part in parts.items():
        save_file(part, weights(copy).with_name(name))
    assert equal(load(copy), load(original))
    weights(copy).with_name(next(iter(parts))).unlink()
    refused(copy, "shards 1 of 3 are missing", "no index.json")


def test_key_in_two_shards_is_refused(copy: Path) -> None:
    parts = shards(load_file(weights(copy)))
    weights(copy).unlink()
    first, second, _ = parts
    key = next(iter(parts[second]))
    parts[first][key] = parts[second][key]
    for name, part in parts.items():
        save_file(part, weights(copy).with_name(name))
    refused(copy, f"{key} is in {first} and in {second}")


def test_shard_that_the_index_does_not_name_is_not_read(
    copy: Path, original: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = {"weight_map": dict.fromkeys(load_file(weights(copy)), "all.safetensors")}
    shutil.copy(weights(copy), weights(copy).with_name("all.safetensors"))
    weights(copy).with_name(f"{FILE}.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load(copy), load(original))
    assert f"does not name {FILE}.safetensors, which is not read" in caplog.text


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "[", ""])
def test_index_that_is_none_is_refused(copy: Path, content: str) -> None:
    weights(copy).with_name(f"{FILE}.safetensors.index.json").write_text(content)
    refused(copy, "index.json is not")


def test_tensor_under_both_of_its_names_is_refused(copy: Path) -> None:
    tensors = load_file(weights(copy))
    tensors["blocks.0.self_attn.q.weight"] = tensors["blocks.0.attn1.to_q.weight"].clone()
    save_file(tensors, weights(copy))
    refused(copy, "twice: ", "blocks.0.self_attn.q.weight")


# -- other formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (f"{FILE}.bin", "pickled weights of PyTorch"),
        ("model.pt", "pickled weights of PyTorch"),
        ("model.pth", "pickled weights of PyTorch"),
        ("model.ckpt", "pickled weights of PyTorch"),
        ("model-Q4_0.gguf", "GGUF"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
        ("model.onnx", "ONNX"),
        ("__0_0.distcp", "distributed checkpoint"),
    ],
)
def test_other_format_is_named_with_what_to_do(copy: Path, file: str, says: str) -> None:
    weights(copy).unlink()
    (copy / "transformer" / file).write_bytes(b"x")
    (copy / "transformer" / "optimizer.bin").write_bytes(b"x")
    message = refused(copy, file, says, "holds no .safetensors weights")
    assert "download the model again" not in message


def test_pickled_weights_are_converted_by_the_command_of_the_message(copy: Path, original: Path) -> None:
    for name in ("transformer", "text_encoder"):
        file = next((copy / name).glob("*.safetensors"))
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
        message = refused(copy, "convert them: ", name=name)
        command = shlex.split(message.partition("convert them: ")[2])
        subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
        assert equal(load(copy, name), load(original, name))


def header(**tensor: Any) -> bytes:
    """The beginning of a safetensors file with one tensor."""
    text = json.dumps({"a": {"dtype": "F32", **tensor}}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><body>401</body></html>", "is a web page"),
        (b'{"error": "Access to model x is restricted"}', "is text"),
        (b"PK\x03\x04" + bytes(90), "zip archive"),
        (b"\x80\x02}q\x00.", "pickled weights"),
        (b"GGUF" + bytes(90), "GGUF"),
        (struct.pack("<Q", 2**62) + b"{}", "is not a safetensors file"),
        (struct.pack("<Q", 500) + b"{}", "is truncated"),
        (struct.pack("<Q", 2) + b"[]", "is not a safetensors file"),
        (header(shape=[99999999999], data_offsets=[0, 399999999996]), "is truncated"),
        (header(shape=[9], data_offsets=[0, 4]) + bytes(4), "contradicts"),
    ],
)
@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_file_that_is_not_safetensors_is_described(copy: Path, name: str, content: bytes, says: str) -> None:
    file = next((copy / name).glob("*.safetensors"))
    file.write_bytes(content)
    refused(
        copy, f"{file} ", says, "safetensors", "download it again" if "Git" not in says else "git lfs pull", name=name
    )


def test_link_to_a_file_that_is_gone_is_described(copy: Path) -> None:
    weights(copy).unlink()
    weights(copy).symlink_to(copy / "nothing")
    refused(copy, "a link to a file that is gone")


# -- quantized and small types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_scales_is_upcast(copy: Path, original: Path, kind: torch.dtype) -> None:
    stored = {k: v.to(kind) for k, v in load_file(weights(original)).items()}
    save_file(stored, weights(copy))
    loaded = load(copy).state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in stored.items())
    assert load(copy, dtype=torch.bfloat16).blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    stored["proj_out.bias"] = torch.full((64,), float("nan")).to(kind)
    save_file(stored, weights(copy))
    refused(copy, "not finite: proj_out.bias")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("scaled_fp8", "scaled float8"),
        ("blocks.0.attn1.to_q.scale_weight", "scaled float8"),
        ("blocks.0.attn1.to_q.weight_scale", "scaled float8"),
        ("blocks.0.attn1.to_q.weight_scale_inv", "scaled float8"),
        ("blocks.0.attn1.to_q.weight.absmax", "bitsandbytes"),
        ("blocks.0.attn1.to_q.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("blocks.0.attn1.to_q.SCB", "bitsandbytes"),
        ("blocks.0.attn1.to_q._weight_qdata", "torchao"),
        ("blocks.0.attn1.to_q.weight._data", "quanto"),
        ("blocks.0.attn1.to_q.qweight", "GPTQ"),
    ],
)
def test_quantized_weights_are_refused_by_name(copy: Path, key: str, says: str) -> None:
    save_file({**load_file(weights(copy)), key: torch.ones(1)}, weights(copy))
    refused(copy, says, key, "quantize=")


def test_integers_for_numbers_are_refused(copy: Path) -> None:
    tensors = load_file(weights(copy))
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, weights(copy))
    refused(copy, "integers: proj_out.weight", "is I8")


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_configuration_of_quantized_weights_is_refused(copy: Path, method: str) -> None:
    for name in ("transformer", "text_encoder"):
        file = copy / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
        refused(copy, f"the weights of {name} are quantized by {method}", name=name)


# -- whole paths that are no models -----------------------------------------------------------------------------------


def test_keys_of_another_layout_say_which(copy: Path) -> None:
    tensors = load_file(weights(copy))
    for prefix, says in (("model.diffusion_model.", "single-file checkpoint"), ("_orig_mod.", "wrapped module")):
        save_file({prefix + k: v for k, v in tensors.items()}, weights(copy))
        refused(copy, "unexpected: ", says)
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 24)}, weights(copy))
    refused(copy, "keys of a LoRA", "lora=")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "it is empty"),
        ({"pytorch_lora_weights.safetensors": b""}, "it holds a LoRA"),
        ({"adapter_model.safetensors": b"", "adapter_config.json": b"{}"}, "it holds a LoRA"),
        ({"step-00000100.pt": b""}, "checkpoints of a training"),
        ({"optimizer.bin": b"", "random_states_0.pkl": b""}, "state of a training"),
        ({"config.json": b'{"_class_name": "WanModel"}', "Wan2.1_VAE.pth": b""}, "WanModel"),
        ({"wan.safetensors": b""}, "from_single_file"),
        ({"wan.gguf": b""}, "GGUF"),
    ],
)
def test_folder_that_is_no_model_is_described(tmp_path: Path, files: Mapping[str, bytes], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=re.escape(says)):
        resolve_model(tmp_path)


def test_component_given_as_a_model_names_the_model(original: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"did you mean {re.escape(str(original))}\\?"):
        resolve_model(original / "transformer")


def test_file_given_as_a_model_is_described(original: Path, tmp_path: Path) -> None:
    cases = {weights(original): "from_single_file", original / "model_index.json": f"holds it: {original}"}
    (tmp_path / "wan.gguf").write_bytes(b"GGUF")
    cases[tmp_path / "wan.gguf"] = "GGUF"
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 24)}, tmp_path / "lora.safetensors")
    cases[tmp_path / "lora.safetensors"] = "lora="
    for file, says in cases.items():
        with pytest.raises(ModelLoadError, match=re.escape(says)):
            resolve_model(file)


def test_model_given_as_a_lora_is_described(original: Path) -> None:
    targets = {"transformer": Target({"a.weight": (2, 2)}, str)}
    for path, says in ((original, "is a model, not a LoRA"), (weights(original), "no key of a LoRA")):
        with pytest.raises(ModelLoadError, match=says):
            read_lora(path, targets)


def test_weight_files_ignores_what_is_not_weights(copy: Path) -> None:
    (copy / "transformer" / "README.md").write_text("words")
    assert weight_files(copy / "transformer") == [weights(copy)]


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_damaged_component_is_refused_before_anything_is_loaded(copy: Path, name: str) -> None:
    file = next((copy / name).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    generator = VideoGenerator.from_pretrained(copy, device="cpu")
    with pytest.raises(ModelLoadError, match=r"is truncated: it has \d+ of the \d+ bytes"):
        generator.generate_video("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
    assert not HEAVY & generator.pipeline.loaded_modules().keys()


def test_wrong_shape_is_refused_before_anything_is_loaded(copy: Path) -> None:
    save_file({**load_file(weights(copy)), "proj_out.bias": torch.zeros(3)}, weights(copy))
    generator = VideoGenerator.from_pretrained(copy, device="cpu")
    with pytest.raises(ModelLoadError, match=r"wrong shape: proj_out\.bias"):
        generator.generate_video("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
    assert not HEAVY & generator.pipeline.loaded_modules().keys()
