"""Where the memory of a run goes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from kinetoscope.loading.components import empty_transformer, parameter_dtype
from kinetoscope.loading.offload import heavy_layers
from kinetoscope.loading.quantize import QUANTIZATIONS, quantized_layers
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.runtime.memory import PeakMemory

TEXT, DENOISING, DECODING = "text and image encoding", "denoising", "decoding"
CANNOT_DECODE = (RuntimeError, TypeError, ValueError)
"""What the decode of an `empty_vae` raises that looks at values, or wants more than latents."""
STREAM_FRAMES = 3
"""Latent frames after which a decoder that works frame by frame needs no more memory for the next."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one run.

    Attributes:
        weights: component -> its weights in the dtypes they are kept in.
        activations: of one forward of the transformer, estimated: with d the width of the residual stream, f that of
            the hidden layer, e bytes of the dtype: max(10 d (e + 4) / 2, 4 d (e + 4) / 2 + 3 f e) a token, for all rows
            of a forward. What families were measured to need is within a factor of 2 of it. Keys and values that a run
            keeps (of text, of past frames) come on top, and the scores of chunked attention, 17 MB at most.
        decoding: of the VAE's decode: tensors of a decode without values; None where it cannot be told so.
        two_blocks: the largest two consecutive blocks' moving weights, for `offload="blocks"`; else 0.
        resting: weights that wait on the host while their component runs (the blocks' other weights).
        peaks: stage -> weights on the device and working memory.
        host: weights that rest on the host.
    """

    weights: Mapping[str, int]
    activations: int
    decoding: int | None
    two_blocks: int
    resting: int
    peaks: Mapping[str, int]
    host: int

    @property
    def peak(self) -> int:
        """The most that the device needs at once."""
        return max(self.peaks.values())


def plan_memory(
    pipeline: ComposedPipeline,
    options: Mapping[str, Any],
    parameters: Mapping[str, int],
    tokens: int,
    latent_size: tuple[int, int, int],
    frames: int,
) -> MemoryPlan:
    """The memory of a run.

    Args:
        options: of the generator: quantize, offload, vae.
        parameters: component -> numbers in its files.
        tokens: of all rows of a forward.
        latent_size: [T, H, W].
        frames: of the video.
    """
    model, dtype, offload = pipeline.model, pipeline.args.dtype, options.get("offload")
    weights: dict[str, int] = {}
    moving: dict[str, list[int]] = {}
    for name, count in parameters.items():
        if not count:
            continue
        transformer = empty_transformer(model, name)
        if transformer is None:
            weights[name] = count * (4 if name == "vae" else dtype.itemsize)
            continue
        sizes = _sizes(transformer, dtype, options.get("quantize"))
        weights[name] = sum(sizes.values())
        blocks: list[nn.Module] = list(getattr(transformer, "blocks", ()))
        moving[name] = [sum(sizes[id(m.weight)] for m in heavy_layers(b)) for b in blocks]
    width, hidden = pipeline.widths()
    mixed = (dtype.itemsize + 4) / 2  # some of the copies are float32 whatever the dtype
    a_token = max(10 * width * mixed, 4 * width * mixed + 3 * hidden * dtype.itemsize)
    activations = int(tokens * a_token)
    decoding = decode_peak(model.components().get("vae"), model.config("vae"), latent_size, str(options.get("vae")))
    two = max((a + b for m in moving.values() for a, b in zip(m, [*m[1:], 0], strict=True)), default=0)
    resting = {n: sum(m) for n, m in moving.items()} if offload == "blocks" else {}
    two_blocks = two if offload == "blocks" else 0
    encoders = [w for n, w in weights.items() if n != "vae" and n not in moving]
    everything = sum(weights.values())
    here = {
        TEXT: max(encoders, default=0),
        DENOISING: max((weights[n] - resting.get(n, 0) for n in moving), default=0) + two_blocks,
        DECODING: weights.get("vae", 0),
    }
    working = {TEXT: 0, DENOISING: activations, DECODING: decoding or 0}
    return MemoryPlan(
        weights=weights,
        activations=activations,
        decoding=decoding,
        two_blocks=two_blocks,
        resting=sum(resting.values()),
        peaks={stage: (here[stage] if offload else everything) + working[stage] for stage in here},
        host=everything if offload else 0,
    )


def _sizes(transformer: nn.Module, dtype: torch.dtype, quantize: str | None) -> dict[int, int]:
    """id of a parameter -> its bytes."""
    coarse: dict[int, int] = {}
    if quantize is not None:
        bits = QUANTIZATIONS[quantize].weight_bits
        for _, layer in quantized_layers(transformer):
            scales = 4 + quantize.startswith("int8")  # a float32 scale, and the zero point that int8 carries
            coarse[id(layer.weight)] = layer.weight.numel() * bits // 8 + layer.out_features * scales
    return {
        id(p): coarse.get(id(p), p.numel() * parameter_dtype(transformer, dtype, n).itemsize)
        for n, p in transformer.named_parameters()
    }


def empty_vae(class_name: str | None, config: Mapping[str, Any]) -> Any | None:
    """A VAE of diffusers without values, to be decoded with on the meta device; None: there is no such class."""
    kind: Any = getattr(diffusers, class_name or "", None)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()


def decode_peak(
    class_name: str | None, config: Mapping[str, Any], latent_size: tuple[int, int, int], mode: str
) -> int | None:
    """Bytes of the tensors of a decode in float32, at their most, found by decoding latents without values.

    Wan's decoder works a latent frame at a time, and after `STREAM_FRAMES` only the video that it joins grows. None
    where that tells nothing: tiles of other VAEs, decoders that look at values or want more than latents.

    Args:
        class_name: of diffusers.
        config: its config.json.
        latent_size: [T, H, W].
        mode: of `pipelines.stages.decoding.VAE_MODES`.
    """
    vae = empty_vae(class_name, config)
    by_frame = class_name == "AutoencoderKLWan"
    if vae is None or (mode == "tiled" and not by_frame):
        return None
    channels = config.get("z_dim", config.get("latent_channels"))
    frames, height, width = latent_size
    scale = int(config.get("scale_factor_spatial", 8))
    tile = vae.tile_sample_min_height // scale if mode == "tiled" else max(height, width)
    counted = min(frames, STREAM_FRAMES) if by_frame else frames
    latents = torch.empty(1, channels, counted, min(tile, height), min(tile, width), device="meta")
    try:
        with torch.no_grad(), PeakMemory([*vae.parameters(), *vae.buffers(), latents]) as memory:
            video: Tensor = vae.decode(latents, return_dict=False)[0]
    except CANNOT_DECODE:
        return None
    if not by_frame:
        return memory.peak
    every = int(config.get("scale_factor_temporal", 4))
    total = 1 + every * (frames - 1)  # frames of the video
    frame = video[:, :, -1].numel() * video.element_size()
    decoder = memory.peak - (video.shape[2] - every) * frame  # without what had been joined
    if mode == "streaming":
        return decoder + total * frame // 4  # frames that are done are bytes
    if mode == "whole" or tile >= max(height, width):
        return max(decoder + (total - every) * frame, 2 * total * frame)
    whole = total * height * width * scale**2 * 3 * video.element_size()
    overlap = (vae.tile_sample_min_height / vae.tile_sample_stride_height) ** 2
    return decoder + total * frame + int((overlap + 1) * whole)  # tiles, and rows that are joined from them
