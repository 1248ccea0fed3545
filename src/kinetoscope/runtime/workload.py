"""What one video asks of devices, in numbers, from configurations alone: no weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kinetoscope.core.errors import CompositionError, ModelLoadError
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.scheduler import count_evaluations
from kinetoscope.engine.rows import BATCH_POSITIONS
from kinetoscope.loading import ModelDir
from kinetoscope.loading.components import empty_transformer, parameter_dtype, shard_plan
from kinetoscope.parallel.tensor.plan import shared_parameters
from kinetoscope.parallel.vae import check_shared
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.preflight import fitting_defaults
from kinetoscope.pipelines.stages.validation import check_params
from kinetoscope.runtime.footprint import CANNOT_DECODE, STREAM_FRAMES, decode_peak, empty_vae


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights, by who shares them.

    Attributes:
        cut_matrices, whole_matrices: of linear layers, which FSDP shares out: cut by tensor parallel, and not.
        cut_rest, whole_rest: all else (norms, biases, tables).
    """

    cut_matrices: int = 0
    whole_matrices: int = 0
    cut_rest: int = 0
    whole_rest: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(getattr(self, n) + getattr(other, n) for n in Weights.__dataclass_fields__))

    @property
    def total(self) -> int:
        """All of them."""
        return self.held()

    def matrices(self, tp: int = 1) -> int:
        """Of linear layers, those of a device of `tp`."""
        return self.cut_matrices // tp + self.whole_matrices

    def held(self, tp: int = 1, shard: int = 1) -> int:
        """Of one device where `tp` share heads and hidden units, and `shard` what is left of the matrices."""
        return self.matrices(tp) // shard + self.cut_rest // tp + self.whole_rest


@dataclass(frozen=True, slots=True)
class Workload:
    """One video of one model; sizes are of one device alone.

    Attributes:
        model: its name.
        params: the request, resolved.
        tokens, text: of one row: of the video, and of the text at its longest.
        joint: whether video and text attend to each other as one sequence.
        branches, steps: of guidance in a step, and steps.
        batched: whether the branches of a device go through one forward.
        dim, hidden, heads: width of the residual stream and of the feed-forward layer, attention heads.
        blocks, wide_blocks: blocks, and those of them with two streams (joint attention).
        across_heads: whether queries and keys are normalised over all heads.
        itemsize: bytes of a number of activations.
        flops, attention_flops: of one row's forward, and the part of it that grows with the square of the tokens.
        latent: numbers of the transformer's output for one row.
        latent_size: [T, H, W].
        modulation: numbers of a step's modulation, where devices of tensor parallel compute parts of it.
        refined: sums over the text alone that tensor parallel makes in a forward (token refiners).
        gathers: how often a forward with FSDP gathers each block.
        transformer: weights of one; where there are two, of the larger.
        transformers, encoders: weights of all.
        largest_block, vae_bytes: weights.
        activation_bytes: of one row's forward (`runtime.footprint`).
        kept_bytes: keys and values that a run keeps of the text for one row, and of past frames in causal models.
        vae, vae_shared: class of the VAE, and whether devices can share it.
        vae_flops, vae_activation_bytes, vae_fixed_bytes: of decoding; the second is shared out, the third (the joined
            video) is not.
    """

    model: str
    params: SamplingParams
    tokens: int
    text: int
    joint: bool
    branches: int
    steps: int
    batched: bool
    dim: int
    hidden: int
    heads: int
    blocks: int
    wide_blocks: int
    across_heads: bool
    itemsize: int
    flops: float
    attention_flops: float
    latent: int
    latent_size: tuple[int, int, int]
    modulation: int
    refined: int
    gathers: int
    transformer: Weights
    transformers: Weights
    encoders: Weights
    largest_block: int
    vae_bytes: int
    activation_bytes: int
    kept_bytes: int
    vae: str
    vae_shared: bool
    vae_flops: float
    vae_activation_bytes: int
    vae_fixed_bytes: int


def workload(
    pipeline: ComposedPipeline, request: SamplingParams, *, dtype: torch.dtype | None = None, vae: str = "whole"
) -> Workload:
    """The numbers of one video.

    Args:
        pipeline: opened; nothing of it is loaded.
        request: over the model's defaults.
        dtype: the transformer computes in; None: the pipeline's own.
        vae: of `pipelines.stages.decoding.VAE_MODES`.

    Raises:
        InputError: the request is not one the model can serve.
    """
    model, kind = pipeline.model, dtype or pipeline.args.dtype
    params = request.over(fitting_defaults(pipeline))
    check_params(params, pipeline.geometry)
    assert params.num_frames and params.height and params.width and params.num_inference_steps
    tokens = pipeline.geometry.tokens(params.num_frames, params.height, params.width)
    size = pipeline.geometry.latent_size(params.num_frames, params.height, params.width)
    branches = pipeline.rows(params)
    roles = {str(role).partition("(")[0] for role in pipeline.attention_roles}
    joint = "joint" in roles
    names = [n for n in model.components() if n.startswith("transformer")]
    made = {n: t for n in names if (t := empty_transformer(model, n)) is not None}
    if not made:
        raise ModelLoadError(f"{model.path} has no transformer of ours; its layouts cannot be compared")
    weighed = {n: weights_of(t, model.components()[n], kind) for n, t in made.items()}
    larger = max(made, key=lambda n: weighed[n].total)
    first, blocks = made[larger], list(getattr(made[larger], "blocks"))  # noqa: B009 - every family's own
    plan = shard_plan(model.components()[larger])
    cut = {} if plan is None else shared_parameters(first, plan.styles)
    shapes = {n: p.shape for n, p in first.named_parameters()}
    config: Any = getattr(pipeline, "config")  # noqa: B009 - every family's own
    dim, hidden = pipeline.widths()
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    text = pipeline.text_tokens
    mixed = (kind.itemsize + 4) / 2  # as in `runtime.footprint`
    vae_config = model.config("vae")
    channels = int(vae_config["z_dim"] if "z_dim" in vae_config else vae_config["latent_channels"])
    rows = pipeline.args.cfg
    batched = rows == "batched" or (rows == "auto" and branches * math.prod(size) <= BATCH_POSITIONS)
    flops, none = pipeline.forward_flops(tokens), pipeline.forward_flops(0)
    parts = {n: m for n in model.components() if n not in made and (m := empty_module(model, n)) is not None}
    decoding = decode_peak(model.components()["vae"], vae_config, size, vae) or 0
    joined = 3 * params.num_frames * params.height * params.width * 4
    fixed = min(2 * joined, decoding)
    return Workload(
        model=model.name,
        params=params,
        tokens=tokens,
        text=text,
        joint=joint,
        branches=branches,
        steps=count_evaluations(params.scheduler, model.components().get("scheduler"), params.num_inference_steps),
        batched=batched,
        dim=dim,
        hidden=hidden,
        heads=heads,
        blocks=len(blocks),
        wide_blocks=len(getattr(first, "transformer_blocks", ())) if joint else 0,
        across_heads=str(getattr(config, "qk_norm", "")).endswith("across_heads"),
        itemsize=kind.itemsize,
        flops=flops,
        attention_flops=(pipeline.forward_flops(2 * tokens) - 2 * flops + none) / 2,
        latent=channels * math.prod(size),
        latent_size=size,
        modulation=sum(shapes[n][0] for n, style in cut.items() if style == "gathered" and n.endswith(".weight")),
        refined=2 * getattr(config, "num_refiner_layers", 0),
        gathers=2 if plan is not None and plan.twice and pipeline.inputs else 1,
        transformer=weighed[larger],
        transformers=sum(weighed.values(), Weights()),
        encoders=sum((weights_of(m, model.components()[n], kind) for n, m in parts.items() if n != "vae"), Weights()),
        largest_block=max(sum(p.numel() for p in block.parameters()) for block in blocks) * kind.itemsize,
        vae_bytes=sum(p.numel() for p in parts["vae"].parameters()) * 4,
        activation_bytes=int(tokens * max(10 * dim * mixed, 4 * dim * mixed + 3 * hidden * kind.itemsize)),
        kept_bytes=_kept(config, len(blocks), dim, text, tokens // size[0], size[0], joint) * kind.itemsize,
        vae=model.components()["vae"],
        vae_shared=_shared(model.components()["vae"], vae_config),
        vae_flops=decode_flops(model.components()["vae"], vae_config, size),
        vae_activation_bytes=decoding - fixed,
        vae_fixed_bytes=fixed,
    )


def weights_of(module: nn.Module, class_name: str, dtype: torch.dtype) -> Weights:
    """What devices can share of a component, by the plan of its class.

    Args:
        dtype: it computes in.
    """
    plan = shard_plan(class_name)
    cut = {} if plan is None else shared_parameters(module, plan.styles)
    matrices = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Linear)} if plan else set[str]()
    found = dict.fromkeys(Weights.__dataclass_fields__, 0)
    for name, parameter in module.named_parameters():
        kind = f"{'cut' if name in cut else 'whole'}_{'matrices' if name in matrices else 'rest'}"
        found[kind] += parameter.numel() * parameter_dtype(module, dtype, name).itemsize
    return Weights(**found)


def empty_module(model: ModelDir, name: str) -> nn.Module | None:
    """A component that is not ours on the meta device, by its class and configuration; None for tokenizers and such."""
    import transformers

    class_name = model.components()[name]
    kind: Any = getattr(diffusers, class_name, None) or getattr(transformers, class_name, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return None
    config = {k: v for k, v in model.config(name).items() if not k.startswith("_")}
    with torch.device("meta"):
        return kind(**config) if hasattr(diffusers, class_name) else _encoder(kind, config)


def _encoder(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    made = kind(kind.config_class(**{k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}))
    made.tie_weights()
    return made


def decode_flops(class_name: str, config: Mapping[str, Any], latent_size: tuple[int, int, int]) -> float:
    """Operations of decoding, counted on a decode without values; 0 where that cannot be done."""
    vae = empty_vae(class_name, config)
    if vae is None:
        return 0.0
    frames, height, width = latent_size
    by_frame = class_name == "AutoencoderKLWan"
    channels = config.get("z_dim", config.get("latent_channels"))

    def count(frames: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.decode(torch.empty(1, channels, frames, height, width, device="meta"), return_dict=False)
        return counter.get_total_flops()

    try:
        if by_frame and frames > STREAM_FRAMES:
            start = count(STREAM_FRAMES)
            return start + (start - count(STREAM_FRAMES - 1)) * (frames - STREAM_FRAMES)
        return float(count(frames))
    except CANNOT_DECODE:
        return 0.0


def _shared(class_name: str, config: Mapping[str, Any]) -> bool:
    try:
        check_shared(class_name, config)
    except CompositionError:
        return False
    return True


def _kept(config: Any, blocks: int, dim: int, text: int, frame_tokens: int, frames: int, joint: bool) -> int:
    """Numbers kept for one row: keys and values of the text, and of the window of past frames of causal models."""
    window = 0
    if hasattr(config, "local_attn_size"):
        longest = getattr(config, "sliding_window_num_frames", frames)
        window = (longest if config.local_attn_size < 0 else config.local_attn_size) * frame_tokens
    return 2 * blocks * dim * ((0 if joint else text) + window)
