"""Models on paper: directories of configurations alone, also of published models that are not on this machine."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kinetoscope.core.config import settings
from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.files import path_exists
from kinetoscope.core.spec import nearest
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading import ModelDir
from kinetoscope.loading.resolve import HUB_ID
from kinetoscope.models.ltx import spec as ltx
from kinetoscope.models.skyreels import spec as skyreels
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.reference import embedded_models

# Configuration files as published, without what is the class's default. A component is (class name, configuration).
_UMT5 = ("UMT5EncoderModel", {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384,
    "feed_forward_proj": "gated-gelu",
})  # fmt: skip
_T5 = ("T5EncoderModel", {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
})  # fmt: skip
_LLAMA = ("LlamaModel", {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128320,
})  # fmt: skip
_CLIP_TEXT = ("CLIPTextModel", {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
})  # fmt: skip
_CLIP_VISION = ("CLIPVisionModel", {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224,
})  # fmt: skip
_WAN_VAE = ("AutoencoderKLWan", {"z_dim": 16})
_WAN22_VAE = ("AutoencoderKLWan", {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
})  # fmt: skip
_SMALL, _LARGE = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, {}
_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}


def _wan(transformer: dict[str, Any], vae: Any = _WAN_VAE, kind: str = "WanPipeline", **index: Any) -> dict[str, Any]:
    net = ("WanTransformer3DModel", transformer)
    parts: dict[str, Any] = {"tokenizer": ("T5TokenizerFast", None), "text_encoder": _UMT5, "transformer": net}
    if "boundary_ratio" in index:
        parts["transformer_2"] = net
    if transformer.get("image_dim"):
        parts |= {"image_encoder": _CLIP_VISION, "image_processor": ("CLIPImageProcessor", None)}
    parts |= {"vae": vae, "scheduler": ("UniPCMultistepScheduler", {"flow_shift": 3.0})}
    return {"_class_name": kind, **index, "parts": parts}


def _skyreels(transformer: dict[str, Any], kind: str) -> dict[str, Any]:
    made = _wan(transformer, kind=kind)
    made["parts"]["transformer"] = ("SkyReelsV2Transformer3DModel", transformer)
    return made


def _two_texts(transformer: dict[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "HunyuanVideoPipeline",
        "parts": {
            "tokenizer": ("LlamaTokenizerFast", None), "text_encoder": _LLAMA, "tokenizer_2": ("CLIPTokenizer", None),
            "text_encoder_2": _CLIP_TEXT, "transformer": ("HunyuanVideoTransformer3DModel", transformer),
            "vae": ("AutoencoderKLHunyuanVideo", {"latent_channels": 16}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
        },
    }  # fmt: skip


def _ltx(transformer: dict[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "LTXPipeline",
        "parts": {
            "tokenizer": ("T5TokenizerFast", None), "text_encoder": _T5,
            "transformer": ("LTXVideoTransformer3DModel", transformer),
            "vae": ("AutoencoderKLLTXVideo", {"latent_channels": 128}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        },
    }  # fmt: skip


_I2V = "WanImageToVideoPipeline"
_FORCING, _PLAIN = "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Pipeline"
_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
PAPER: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(_SMALL),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(_LARGE),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _wan(_IMAGE, kind=_I2V),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _wan(_IMAGE, kind=_I2V),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(_LARGE, boundary_ratio=0.875),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan({"in_channels": 36}, kind=_I2V, boundary_ratio=0.9),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(_5B, _WAN22_VAE, expand_timesteps=True),
    "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers": _skyreels(skyreels.PUBLISHED["T2V-14B"], _PLAIN),
    "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers": _skyreels(skyreels.PUBLISHED["DF-1.3B"], _FORCING),
    "Skywork/SkyReels-V2-DF-14B-720P-Diffusers": _skyreels(skyreels.PUBLISHED["DF-14B"], _FORCING),
    "hunyuanvideo-community/HunyuanVideo": _two_texts({}),
    "FastVideo/FastHunyuan-diffusers": _two_texts({}),
    "Lightricks/LTX-Video": _ltx(ltx.PUBLISHED["2B"]),
}
"""Published id -> model_index.json and its components."""


@contextmanager
def paper_pipeline(name: str) -> Generator[ComposedPipeline]:
    """The pipeline of a model, of which nothing is or can be loaded but configurations.

    Args:
        name: an embedded name, a directory that may hold configurations alone, a name of `PAPER`, or a hub id, of which
            the configurations are fetched.

    Raises:
        ModelLoadError: there is no such model; it names those that are known here.
    """
    with TemporaryDirectory() as folder:
        if name in PAPER and not path_exists(name):
            model = _write(PAPER[name], Path(folder), name)
        else:
            model = _find(name)
        yield build_pipeline(model, ExecutionArgs(torch.device("cpu"), torch.float32))


def write_model(transformer: dict[str, Any], folder: Path) -> ModelDir:
    """The configurations of a Wan 2.1 text-to-video model with a transformer of these sizes, written to `folder`."""
    folder.mkdir(exist_ok=True)
    return _write(_wan(transformer), folder, folder.name)


def _find(name: str) -> ModelDir:
    if name in embedded_models() or path_exists(Path(name).expanduser()) or not HUB_ID.fullmatch(name):
        return find_model(name)
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(name, allow_patterns=["*.json", "*/*.json"], local_files_only=settings().offline)
    except Exception as error:  # which network errors there are depends on the hub client's HTTP library
        near = nearest(name, PAPER)
        hint = f"; did you mean {near}?" if near else "."
        raise ModelLoadError(
            f"the configurations of {name!r} are neither here nor could they be fetched ({type(error).__name__}){hint} "
            f"Give a directory that holds them, or one of {', '.join(PAPER)}"
        ) from error
    return ModelDir(Path(path), name)


def _write(described: dict[str, Any], folder: Path, name: str) -> ModelDir:
    parts: dict[str, Any] = described["parts"]
    index = {k: v for k, v in described.items() if k != "parts"}
    index |= {part: ["diffusers", class_name] for part, (class_name, _) in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, (class_name, config) in parts.items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir()
        (folder / part / file).write_text(json.dumps({"_class_name": class_name, **(config or {})}))
    return ModelDir(folder, name)
