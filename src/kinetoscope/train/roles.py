"""Roles: the models that a method trains or asks, and what it may ask of them, whatever their family.

A role is a transformer with its convention, thin over `Denoiser`: training and sampling read the network's output by
the same arithmetic. What a family says differently is in `train.plugins`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kinetoscope.attention import make_sparse
from kinetoscope.core.context import AttentionFn, ForwardContext, forward_context, with_stack
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import ForwardBatch
from kinetoscope.diffusion.convention import Convention, shift_sigma
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.nn.compile import compiled, missing_compiler
from kinetoscope.nn.ring_cache import with_own_caches
from kinetoscope.nn.stack import BlockCall, check_stack, run_calls
from kinetoscope.parallel.sequence import SequenceShard
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.images import encode_video
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.train.batch import Text, TrainBatch
from kinetoscope.train.recompute import recomputed

Uncond = Literal["negative", "empty", "zero"]
"""What the unconditional branch reads: the negative prompt, the empty one, or zeros in place of text."""


class ModelBase:
    """A model in a role (student, teacher, critic).

    Noise levels `s` are as in `Denoiser`: float [B], or [B, T] for one a latent frame.

    Args:
        transformer: the network; it is frozen unless `trainable`.
        trainable: whether gradients go into its parameters.
        shift: of noise levels; None: the convention's.
        uncond: what the unconditional branch reads.
        attention: "dense", or a sparse kind with its settings ("vsa:sparsity=0.8"), for self-attention.
        checkpointing: recompute each block in the backward pass rather than keep what it computed; also in passes over
            a part of a video with a memory of the other parts.
        compile: generate fused kernels of the blocks for predictions of whole videos; the first ones take a minute.
        shard: the processes that share the tokens of each forward; None: all are computed here.

    Raises:
        ConfigError: an unknown kind of attention, or nothing can be compiled here.
    """

    convention: ClassVar[Convention]
    grid_role: ClassVar[str] = "self"
    """The attention over the tokens of the video, which may be sparse."""
    has_unconditional: ClassVar[bool] = True
    """Whether there is an unconditional branch, which reads no prompt."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        trainable: bool = False,
        shift: float | None = None,
        uncond: Uncond = "negative",
        attention: str = "dense",
        checkpointing: bool = False,
        compile: bool = False,
        shard: SequenceShard | None = None,
    ) -> None:
        self.transformer = transformer.requires_grad_(trainable)
        self.trainable, self.uncond, self.checkpointing, self.shard = trainable, uncond, checkpointing, shard
        if compile and (reason := missing_compiler(next(transformer.parameters()).device)):
            raise ConfigError(f"compile: {reason}")
        self._kernels: dict[Any, Callable[..., Any]] | None = {} if compile else None
        self.shift = self.convention.default_shift if shift is None else shift
        self.denoiser = Denoiser(transformer, self.convention)
        self._uncond: Text | None = None
        self.attend_with(attention)

    def attend_with(self, attention: str) -> None:
        """Another kind of self-attention from now on: "dense", or a sparse kind with its settings.

        Raises:
            ConfigError: an unknown kind.
        """
        self._attention = {} if attention == "dense" else {self.grid_role: make_sparse(attention)}

    @property
    def attention(self) -> dict[str, AttentionFn]:
        """Return the kinds of attention that are not dense now, by role."""
        return dict(self._attention)

    # -- of a directory -----------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, pipeline: ComposedPipeline, **options: Any) -> ModelBase:
        """The model of an opened directory. A family overrides this whose directories say more than their
        transformers; `options` are those of the class.

        Raises:
            ConfigError: a model of the family that cannot be trained, for instance of two networks.
        """
        if "transformer_2" in pipeline.model.components():
            raise ConfigError(
                f"{pipeline.model.name} has two transformers, one for each part of the noise levels; a "
                "role is one: train a model that has one"
            )
        return cls(pipeline.get_module("transformer"), **options)

    @classmethod
    def encode_text(cls, pipeline: ComposedPipeline, prompts: Sequence[str]) -> Text:
        """Prompts by the text stage of the family's pipeline, as sampling encodes them; no tokens where it has none.

        Raises:
            InputError: a prompt is longer than the model reads.
        """
        if "text_encoding" not in pipeline.stages:
            return Text(torch.zeros(len(prompts), 0, 1), torch.zeros(len(prompts), dtype=torch.long))
        stage = pipeline.stages["text_encoding"]
        assert isinstance(stage, TextEncodingStage)
        return Text(*stage.encode(list(prompts), pipeline.args.device))

    @classmethod
    def encode_video(cls, pipeline: ComposedPipeline, video: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w] float32 of videos [B, 3, T, H, W] in [-1, 1], by the family's VAE."""
        return encode_video(pipeline.get_module("vae"), video)

    # -- before training ----------------------------------------------------------------------------------------------

    def init_preprocessors(self, encoder: Any, negative_prompt: str = "") -> None:
        """Encode what the unconditional branch reads, once, on every rank (one that did it alone would leave the
        others waiting in the encoder's collectives).

        Args:
            encoder: list of prompts -> `Text`.
        """
        found: Text = encoder([negative_prompt if self.uncond == "negative" else ""])
        if self.uncond == "zero":
            extra = {k: torch.zeros_like(v) for k, v in found.extra.items()}
            found = Text(torch.zeros_like(found.states), torch.zeros_like(found.lengths), extra)
        self._uncond = found

    def on_train_start(self) -> None:
        """Modes of the modules; called once, after weights were loaded or resumed."""
        self.transformer.train(self.trainable)

    def need_unconditional(self, setting: str, without: str) -> None:
        """Refuse a setting of a method that needs the unconditional branch, where there is none.

        Args:
            setting: "name=value".
            without: the value that needs no such branch.

        Raises:
            ConfigError: the family has no unconditional branch.
        """
        if not self.has_unconditional:
            name = setting.partition("=")[0]
            raise ConfigError(
                f"{setting}: a {type(self.transformer).__name__} reads no text and has no unconditional branch; set "
                f"{name}={without}"
            )

    # -- batches and noise --------------------------------------------------------------------------------------------

    def prepare_batch(
        self,
        text: Text,
        latents: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        captions: Sequence[str] = (),
        extra: Mapping[str, Tensor] | None = None,
    ) -> TrainBatch:
        """A batch of latents from data, or of zeros of `shape` [C, T, H, W] where a method needs prompts alone.

        Raises:
            InputError: neither or both are given, or they are not one a prompt.
        """
        if (latents is None) == (shape is None):
            raise InputError("a batch is made of latents, or of the shape of zeros in their place")
        if latents is None:
            assert shape is not None
            latents = torch.zeros(len(text.states), *shape)
        for name, rows in {"latents": latents, **(extra or {})}.items():
            if len(rows) != len(text.states):
                raise InputError(f"{len(rows)} rows of {name} and {len(text.states)} prompts do not make a batch")
        return TrainBatch(latents, text, tuple(captions), extra or {}).to(next(self.transformer.parameters()).device)

    def add_noise(self, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """Noisy latents at level `s`."""
        return self.denoiser.add_noise(x0, noise, s)

    def shift_and_clamp_timestep(self, s: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Levels in [0, 1] by the role's shift, and then within [low, high] (DMD2 keeps to [.02, .98])."""
        return shift_sigma(s, self.shift).clamp(low, high)

    # -- predictions --------------------------------------------------------------------------------------------------

    def conditioning(self, batch: TrainBatch, conditional: bool, frames: slice | None = None) -> dict[str, Any]:
        """Arguments of the network that tell it what to make: the prompt, and what the family's plugin adds.

        Args:
            conditional: which branch.
            frames: latent frames of the block at hand, of a video that is predicted block by block; None: all.
        """
        text = self.text_of(batch, conditional)
        return {"encoder_hidden_states": text.states, "text_lengths": text.lengths, **text.extra}

    def text_of(self, batch: TrainBatch, conditional: bool) -> Text:
        """What a branch reads.

        Raises:
            InputError: the unconditional branch before `init_preprocessors`.
        """
        if conditional:
            return batch.text
        if self._uncond is None:
            raise InputError("the unconditional branch has nothing to read; call init_preprocessors first")
        return self._uncond.to(batch.latents.device).expand(batch.rows)

    def predict(self, x: Tensor, s: Tensor, batch: TrainBatch, *, conditional: bool = True, **more: Any) -> Tensor:
        """The network's output in the convention's terms, float32 [B, C, T, H, W]; `more` goes to the network."""
        with self.context():
            return self.denoiser.predict(x, s, **self.conditioning(batch, conditional), **more)

    def predict_noise(
        self, x: Tensor, s: Tensor, batch: TrainBatch, *, conditional: bool = True, **more: Any
    ) -> Tensor:
        """Estimate of the noise in `x`."""
        return self.denoiser.to_noise(self.predict(x, s, batch, conditional=conditional, **more), x, s)

    def predict_x0(
        self,
        x: Tensor,
        s: Tensor,
        batch: TrainBatch,
        *,
        conditional: bool = True,
        guidance: float | None = None,
        **more: Any,
    ) -> Tensor:
        """Estimate of the clean latents.

        Args:
            guidance: u + w (c - u) of both branches' estimates (arXiv 2207.12598), which for every convention is the
                same as guiding the network's output; None: one branch, which `conditional` says.
        """
        if guidance is None:
            return self.denoiser.to_x0(self.predict(x, s, batch, conditional=conditional, **more), x, s)
        cond, uncond = (self.predict_x0(x, s, batch, conditional=c, **more) for c in (True, False))
        return uncond + guidance * (cond - uncond)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, accumulate: int = 1) -> None:
        """Gradients of a micro-batch, one of `accumulate` that make an update."""
        (loss / accumulate).backward()

    @contextmanager
    def context(self, *, whole: bool = True) -> Generator[None]:
        """Open the context of a forward of this role: its attention and its loop over blocks.

        Args:
            whole: whether the forward is of a whole video; compiled blocks are not used for a part of one with a memory
                of the other parts.
        """
        compiled = whole and self._kernels is not None
        stack = partial(self._stack, compiled=compiled) if compiled or self.checkpointing else None
        with forward_context(ForwardContext(attention=self.attention, stack=stack, shard=self.shard)) as context:
            yield
        if stack is not None or self.shard is not None:
            option = "checkpointing=true" if self.checkpointing else "compile" if compiled else "ulysses or ring"
            check_stack(context, option, self.transformer)

    def _stack(self, x: Any, calls: Sequence[BlockCall], *, compiled: bool) -> Any:
        """Run the loop over blocks, compiled, and recomputed in the backward pass, as the role says."""
        return run_calls(x, [replace(call, block=self._trained(call.block, compiled)) for call in calls])

    def _trained(self, block: Callable[..., Any], fused: bool) -> Callable[..., Any]:
        if fused and self._kernels is not None and isinstance(block, nn.Module):
            if block not in self._kernels:
                self._kernels[block] = compiled(block, block)
            block = self._kernels[block]
        return recomputed(block) if self.checkpointing and torch.is_grad_enabled() else block


class CausalModelBase(ModelBase, ABC):
    """A model that also predicts block by block, with keys and values of earlier blocks in memory.

    The engine samples it by `strategy`, which is given the transformer and told what to make by `tell`. Memories are
    named by `cache_tag` and by branch, and made anew where the shape, the dtype or the device of what is
    predicted changes. Gradients go through the block at hand, never into the past.
    """

    strategy: ClassVar[type[Any]]
    memory: ClassVar[str] = "cache"
    """Name of the network's argument that is the memory."""

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        if self._attention:
            raise ConfigError("a causal model attends densely: blocks with a cache are not a grid; set attention=dense")
        self._caches: dict[tuple[str, bool], tuple[Any, Any]] = {}

    @contextmanager
    def partial_passes(self) -> Generator[None]:
        """Recompute blocks in the backward pass, if the role says so, in forwards of parts of a video that somebody
        else runs (the engine, in rollouts), in the context that is open there.

        What a block reads of the memory must stay as it is until the backward pass: such a forward has a memory of its
        own (`nn.ring_cache.with_own_caches`), and the second computation writes the same values to the same places.
        """
        if not self.checkpointing:
            yield
            return
        with with_stack(partial(self._stack, compiled=False)):
            yield

    @property
    def devices(self) -> int:
        """How many share the heads in attention, each of which remembers its own."""
        return 1 if self.shard is None else self.shard.ulysses.size

    @abstractmethod
    def blocks(self, frames: int) -> tuple[int, ...]:
        """Sizes of the blocks of a video, in latent frames."""

    def predict(self, x: Tensor, s: Tensor, batch: TrainBatch, *, conditional: bool = True, **more: Any) -> Tensor:
        """The whole video under the block-causal mask."""
        more.setdefault("blocks", self.blocks(x.shape[2]))
        return super().predict(x, s, batch, conditional=conditional, **more)

    def predict_streaming(
        self,
        x: Tensor,
        s: Tensor,
        batch: TrainBatch,
        *,
        cur_start_frame: int,
        cache_tag: str = "",
        store_kv: bool = False,
        conditional: bool = True,
    ) -> Tensor | None:
        """The network's output for one block [B, C, t, H, W] that begins at latent frame `cur_start_frame`.

        Args:
            store_kv: keep the keys and values of this block (as a rule its clean frames at level 0) for later blocks.
                Such a pass records no gradient and returns nothing. Without it, memory is as if nothing had happened
                once the block is stored; blocks come in order.
        """
        key = (cache_tag, conditional)
        made_for = (x.shape[0], *x.shape[3:], x.device, next(self.transformer.parameters()).dtype)
        if key not in self._caches or self._caches[key][0] != made_for:
            if cur_start_frame:
                raise InputError(
                    f"a block at latent frame {cur_start_frame} has no past in cache {cache_tag!r}; store the blocks "
                    "before it, of the same shape, first"
                )
            self._caches[key] = (made_for, self.new_cache(x))
        cache = self._caches[key][1]
        told = self.conditioning(batch, conditional, slice(cur_start_frame, cur_start_frame + x.shape[2]))
        gradient = torch.is_grad_enabled() and not store_kv
        if gradient:  # what the backward pass will read must not be written over by later passes
            cache = with_own_caches(cache)
        with torch.set_grad_enabled(gradient), self.context(whole=False):
            x = x if gradient else x.detach()
            out = self.denoiser.predict(x, s, **told, **{self.memory: cache}, start_frame=cur_start_frame)
        return None if store_kv else out

    def predict_noise_streaming(self, x: Tensor, s: Tensor, batch: TrainBatch, **options: Any) -> Tensor | None:
        """Estimate of the noise in a block; see `predict_streaming`."""
        out = self.predict_streaming(x, s, batch, **options)
        return None if out is None else self.denoiser.to_noise(out, x, s)

    def predict_x0_streaming(self, x: Tensor, s: Tensor, batch: TrainBatch, **options: Any) -> Tensor | None:
        """Estimate of a block's clean latents; see `predict_streaming`."""
        out = self.predict_streaming(x, s, batch, **options)
        return None if out is None else self.denoiser.to_x0(out, x, s)

    def clear_caches(self, cache_tag: str | None = None) -> None:
        """Forget the past, of one tag or (None) of all."""
        self._caches = {k: v for k, v in self._caches.items() if cache_tag is not None and k[0] != cache_tag}

    @abstractmethod
    def new_cache(self, x: Tensor) -> Any:
        """An empty memory for videos like the block `x` [B, C, t, H, W]: a `RingCache`, or a NamedTuple of them."""

    @abstractmethod
    def tell(self, request: ForwardBatch, batch: TrainBatch) -> None:
        """Fill a request of the engine with what `strategy` makes videos like the batch's from."""
