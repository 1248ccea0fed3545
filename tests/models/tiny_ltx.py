"""A tiny random LTX-Video directory in diffusers layout."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny import perturb, tiny_tokenizer


def make_tiny_ltx(path: Path, seed: int = 0, *, timed: bool = False, image: bool = False) -> Path:
    """A random LTX pipeline saved at `path`; `timed` gives the VAE a noise level and noise of its own (0.9.1)."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXImageToVideoPipeline,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(timed, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=timed,
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    generator = torch.Generator().manual_seed(seed + 5)
    vae.latents_mean.copy_(torch.randn(8, generator=generator))
    vae.latents_std.copy_(0.5 + torch.rand(8, generator=generator))
    tokenizer = tiny_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )
    for index, module in enumerate((transformer, text_encoder, vae)):
        perturb(module, seed + 1 + index)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=16,
        max_image_seq_len=64,
        shift_terminal=0.1,
    )
    cls = LTXImageToVideoPipeline if image else LTXPipeline
    pipeline = cls(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(path)
    return path
