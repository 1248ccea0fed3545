"""Directories of small networks, as diffusers' own tests make them: they open, and make what diffusers makes.

Their position embeddings cover less than the default size of the published models, and parts that published models have
are missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.loading import resolve_model
from kinetoscope.pipelines.stages.validation import VideoGeometry
from models.tiny_cosmos import NoGuardrail, without_torchvision
from models.tiny_hunyuan import tiny_clip_text, tiny_clip_tokenizer, tiny_llama_tokenizer
from tiny import make_tiny_wan, perturb, tiny_tokenizer

PROMPT, NEGATIVE = "a red circle moving left", "a blue cat"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tiny_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def vision(size: int) -> dict[str, Any]:
    """A CLIP that reads pictures of `size` pixels, one a token, and its processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=size,
        intermediate_size=16, patch_size=1,
    )  # fmt: skip
    crop = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
    return {"image_encoder": CLIPVisionModelWithProjection(config), "image_processor": processor}


def wan_like(kind: str, scheduler: str, **changes: Any) -> dict[str, Any]:
    """The parts of a pipeline built on Wan's layers, with positions for 32 tokens along an axis."""
    import diffusers

    sizes: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
        "out_channels": 16, "text_dim": 32, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return {
        "transformer": getattr(diffusers, f"{kind}Transformer3DModel")(**sizes | changes),
        "vae": wan_vae(),
        "scheduler": getattr(diffusers, scheduler)(**({"shift": 7.0} if "Euler" in scheduler else FLOW)),
        "text_encoder": t5(),
        "tokenizer": tiny_tokenizer(),
    }


def cosmos() -> dict[str, Any]:
    import diffusers

    sizes: dict[str, Any] = {
        "in_channels": 17, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": True, "extra_pos_embed_type": "learnable",
    }  # fmt: skip
    return {
        "transformer": diffusers.CosmosTransformer3DModel(**sizes),
        "vae": wan_vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "text_encoder": t5(),
        "tokenizer": tiny_tokenizer(),
        "safety_checker": NoGuardrail(),
    }


def hunyuan() -> dict[str, Any]:
    import diffusers
    from transformers import LlamaConfig, LlamaModel

    tokenizer, tokenizer_2 = tiny_llama_tokenizer(), tiny_clip_tokenizer()
    llama = LlamaConfig(
        hidden_size=16, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=1000,
        hidden_act="gelu", pad_token_id=1,
    )  # fmt: skip
    return {
        "transformer": diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16,
            pooled_projection_dim=20, rope_axes_dim=(2, 4, 4),
        ),
        "vae": diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": LlamaModel(llama),
        "text_encoder_2": tiny_clip_text(tokenizer_2),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
    }  # fmt: skip


def i2v(kind: str, positions: int | None, size: int) -> dict[str, Any]:
    """Image-to-video whose layers read image features as text: there are no layers of their own for them."""
    features = {"in_channels": 36, "image_dim": 4, "pos_embed_seq_len": positions}
    scheduler = "FlowMatchEulerDiscreteScheduler" if kind == "Wan" else "UniPCMultistepScheduler"
    return wan_like(kind, scheduler, **features) | vision(size)


CASES: dict[str, tuple[str, Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "wan": ("WanPipeline", lambda: wan_like("Wan", "FlowMatchEulerDiscreteScheduler"), ()),
    "wan-one-head": ("WanPipeline", lambda: wan_like("Wan", "UniPCMultistepScheduler", num_attention_heads=1), ()),
    "wan-i2v": ("WanImageToVideoPipeline", lambda: i2v("Wan", None, 8), ("image",)),
    "wan-flf2v": ("WanImageToVideoPipeline", lambda: i2v("Wan", 34, 4), ("image", "last_image")),
    "wan-v2v": ("WanVideoToVideoPipeline", lambda: wan_like("Wan", "UniPCMultistepScheduler"), ("video",)),
    "skyreels": ("SkyReelsV2Pipeline", lambda: wan_like("SkyReelsV2", "UniPCMultistepScheduler"), ()),
    "skyreels-i2v": ("SkyReelsV2ImageToVideoPipeline", lambda: i2v("SkyReelsV2", None, 8), ("image",)),
    "skyreels-df-image-dim": (  # diffusers' pipeline gives it no image features
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: wan_like("SkyReelsV2", "UniPCMultistepScheduler", image_dim=4),
        (),
    ),
    "hunyuan": ("HunyuanVideoPipeline", hunyuan, ()),
    "cosmos": ("Cosmos2VideoToWorldPipeline", cosmos, ("image",)),
}  # fmt: skip


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)


def save(case: str, path: Path) -> str:
    import diffusers

    name, make, _ = CASES[case]
    torch.manual_seed(0)  # noqa: TID251 - diffusers initialises from the global generator
    parts = make()
    for index, (part, module) in enumerate(parts.items()):
        if isinstance(module, torch.nn.Module):
            perturb(module, index, 0.0 if part == "vae" else 0.05)
            module.eval()
    getattr(diffusers, name)(**parts).save_pretrained(path)
    return name


@pytest.mark.parametrize("case", CASES)
def test_small_network_opens_and_equals_diffusers(case: str, tmp_path: Path) -> None:
    import diffusers

    with ExitStack() as stack:
        stack.enter_context(without_torchvision())
        name = save(case, tmp_path)
        checker = {"safety_checker": NoGuardrail()} if case == "cosmos" else {}
        oracle = getattr(diffusers, name).from_pretrained(tmp_path, **checker)
        oracle.set_progress_bar_config(disable=True)
        ours = VideoGenerator.from_pretrained(tmp_path, device="cpu", dtype="float32")
        given = {"image": picture(0), "last_image": picture(1), "video": [picture(i) for i in range(5)]}
        more = {part: given[part] for part in CASES[case][2]}
        size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0, **more}
        frames = {} if "video" in more else {"num_frames": 5}
        negative = {} if case == "hunyuan" else {"negative_prompt": NEGATIVE}
        theirs = oracle(
            prompt=PROMPT,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
            **size,
            **frames,
            **negative,
        ).frames[0]
        own = {"flow_shift": 3.0} if "skyreels" in case else {}  # else a published model's
        result = ours.generate_video(PROMPT, seed=3, **{"num_frames": 5, **size, **negative, **own})
        assert (result.latents - theirs).abs().max() <= 2e-4 * theirs.std()


def small_wan(path: Path, positions: int = 32, **index: Any) -> Path:
    make_tiny_wan(path)
    for file, fields in (("transformer/config.json", {"rope_max_seq_len": positions}), ("model_index.json", index)):
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | fields))
    return path


def test_default_size_is_lowered_to_what_the_network_can_make(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = VideoGenerator.from_pretrained(small_wan(tmp_path), device="cpu")
    params = generator.defaults()
    assert (params.height, params.width, params.num_frames) == (288, 512, 81)  # from 480 x 832
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"{tmp_path}: the defaults of published models are more than this network can make; its own are height=288, "
        "width=512"
    ]
    with pytest.raises(InputError, match=r"width=832 is outside \[16, 512\]"):
        generator.generate_video("a cat", width=832)


def test_default_length_is_lowered_to_what_the_network_can_make(tmp_path: Path) -> None:
    params = VideoGenerator.from_pretrained(small_wan(tmp_path, 4), device="cpu").defaults()
    assert (params.height, params.width, params.num_frames) == (32, 64, 13)


def test_size_that_the_directory_itself_gives_is_not_lowered(tmp_path: Path) -> None:
    path = small_wan(tmp_path)
    (path / "kinetoscope.json").write_text('{"defaults": {"width": 832, "height": 16}}')
    with pytest.raises(InputError, match=r"width=832 is outside \[16, 512\]"):
        VideoGenerator.from_pretrained(path, device="cpu")


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (VideoGeometry(), (480, 832, 81)),
        (VideoGeometry(max_positions=32), (288, 512, 81)),
        (VideoGeometry(max_positions=(4, 32, 64)), (480, 832, 13)),
        (VideoGeometry(spatial=32, patch=(1, 1, 1)), (480, 832, 81)),
        (VideoGeometry(spatial=16, patch=(1, 2, 4)), (480, 832, 81)),
        (VideoGeometry(spatial=28, patch=(1, 2, 2)), (448, 784, 81)),
        (VideoGeometry(temporal=8, max_positions=2), (16, 32, 9)),
        (VideoGeometry(spatial=8, max_positions=1), (16, 16, 1)),
    ],
)
def test_lowered_size_fits_the_geometry(geometry: VideoGeometry, size: tuple[int, int, int]) -> None:
    lowered = geometry.lowered(SamplingParams(height=480, width=832, num_frames=81))
    assert (lowered.height, lowered.width, lowered.num_frames) == size
    geometry.check(lowered)


def test_empty_components_of_the_index_are_left_out(tmp_path: Path) -> None:
    path = small_wan(tmp_path, transformer_2=[None, None], image_encoder=[None, None], extra_setting=3)
    assert "transformer_2" not in resolve_model(path).components()
    VideoGenerator.from_pretrained(path, device="cpu").generate_video(
        "a cat", height=32, width=32, num_frames=5, num_inference_steps=1
    )


def test_schedule_that_is_no_flow_is_refused_where_a_flow_is_needed(tmp_path: Path) -> None:
    path = small_wan(tmp_path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}))
    generator = VideoGenerator.from_pretrained(path, device="cpu")
    with pytest.raises(ConfigError, match=r"noise levels of UniPCMultistepScheduler .* begin at \d+"):
        generator.generate_video("a cat", video=[picture(0)] * 5, height=32, width=32, num_frames=5)
