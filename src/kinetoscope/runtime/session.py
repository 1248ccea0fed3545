"""Videos that are made while they are watched: block by block, for as long as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch

from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.core.events import drive
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.engine.protocols import Event, PromptedStrategy
from kinetoscope.pipelines.composed import ComposedPipeline, StageEvent
from kinetoscope.pipelines.preflight import (
    check_component_files,
    check_settings,
    chooses_solver,
    without_unread_shift,
)
from kinetoscope.pipelines.stages.decoding import DecodingStage, FrameStream
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.pipelines.stages.validation import check_text
from kinetoscope.runtime.record import make_record
from kinetoscope.runtime.request import VideoRequest

Frames = np.ndarray[Any, Any]
TEXT = "text_encoding"
"""The stage that a pipeline has if it reads prompts."""
UNREAD = "(none)"
"""What stands for the prompt of a model that reads none, in its record too."""
WHOLE = ("num_frames", "output_path", "latents", "batch_size", "preview")
"""Fields of a request that need a video with an end."""


def session_batch(
    pipeline: ComposedPipeline, defaults: SamplingParams, prompt: str | None, fields: Mapping[str, Any]
) -> ForwardBatch:
    """The request of a stream, resolved and checked.

    Args:
        pipeline: of the model.
        defaults: of the model.
        prompt: None for models that read none.
        fields: of `VideoGenerator.generate_video`.

    Raises:
        CompositionError: the model makes no streams.
        InputError: a field is out of range, of the wrong kind, or has no meaning in a stream.
    """
    reads = TEXT in pipeline.stages
    _check_stages(pipeline)
    for name in WHOLE:
        if (value := fields.get(name)) is not None and value is not False:
            raise InputError(f"{name} is for whole videos; a stream has no end, see blocks= and step()")
    if prompt is None and reads:
        raise InputError("this model needs a prompt; describe the video in a sentence")
    if prompt is not None and not reads:
        raise InputError("this model reads no prompt; leave it out")
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"prompt={prompt!r}: a stream is one video and has one prompt")
    own = {k: v for k, v in fields.items() if k not in VideoRequest.__dataclass_fields__ or k == "extra"}
    common = {k: v for k, v in fields.items() if k not in own}
    request = VideoRequest(UNREAD if prompt is None else prompt, **common, extra=own)
    plan = request.plan(defaults, pipeline.geometry, pipeline.inputs, pipeline.extra_defaults)
    plan = replace(plan, params=without_unread_shift(pipeline, plan.params, defaults, request.given()))
    check_settings(pipeline, plan.params, defaults, request.given(), plan.given())
    check_component_files(pipeline)
    given: dict[str, Any] = dict(plan.given())
    return ForwardBatch(
        plan.params,
        plan.prompts,
        plan.negative_prompts,
        plan.seeds,
        hooks=list(plan.hooks),
        streaming=True,
        solver_chosen=chooses_solver(pipeline, plan.params),
        videos=(0,),
        **given,
    )


def _check_stages(pipeline: ComposedPipeline) -> tuple[DenoisingStage, DecodingStage]:
    """The stages that a session takes over.

    Raises:
        CompositionError: the model makes no streams, or its pipeline has been given stages that would not run.
    """
    if not pipeline.streams:
        raise CompositionError(
            f"{pipeline.model.name} does not stream: it makes whole videos, not blocks; use generate_video, or a model "
            "that makes blocks"
        )
    names = list(pipeline.stages)
    denoising, decoding = pipeline.stages.get("denoising"), pipeline.stages.get("decoding")
    if not isinstance(denoising, DenoisingStage) or not isinstance(decoding, DecodingStage):
        raise CompositionError("a stream needs the stages denoising and decoding as the pipeline made them")
    if after := [n for n in names[names.index("denoising") + 1 :] if n != "decoding"]:
        raise CompositionError(f"stages after denoising do not run in a stream: {', '.join(after)}; remove them")
    return denoising, decoding


class Session:
    """A video in progress: each `step` makes its next block. Made by `VideoGenerator.start_session`; a context manager.

    Sessions of one generator may be interleaved: each owns its memory, and none of them grows with the video.

    Args:
        pipeline: of the model.
        batch: from `session_batch`.
        options: of the generator, for the record.
        on_event: called with every stage and step event.
        hold: entered now and left when the session closes: what must not change on the way.

    Attributes:
        params: resolved sampling parameters; their `num_frames` says nothing.
        seed: of the video.
        blocks, frames: made so far.

    Raises:
        CompositionError: the model's VAE cannot decode a stream.
        KinetoscopeError: whatever the stages refuse.
    """

    @torch.no_grad()
    def __init__(
        self,
        pipeline: ComposedPipeline,
        batch: ForwardBatch,
        options: Mapping[str, Any] | None = None,
        on_event: Callable[[StageEvent | Event], None] | None = None,
        hold: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.blocks = self.frames = 0
        self._options = dict(options or {})
        self._on_event = on_event
        self._asked: ForwardBatch | None = None
        self._changed = False
        denoising, decoding = _check_stages(pipeline)
        self._decoder: FrameStream | None = decoding.stream()
        with ExitStack() as unless_made:
            if hold is not None:
                unless_made.enter_context(hold)
            batch = drive(pipeline.iterate(batch, until="denoising"), on_event)
            self.params, self.seed = batch.params, batch.seeds[0]
            self._batch = batch
            self._engine = denoising.engine(batch)
            self._stream: Any = self._engine.streaming_reset(batch, pipeline.args)
            unless_made.callback(pipeline.stage_ended)
            self._held = unless_made.pop_all()

    @property
    def closed(self) -> bool:
        """Whether no more blocks can be made."""
        return self._stream is None or self._stream.closed

    @property
    def logging_info(self) -> dict[str, Any]:
        """What the hooks have reported so far, also after the session has closed: `denoising_perf`, `step_trace`, ...

        The lists grow with the video; a caller that has read them may clear them.
        """
        return self._batch.logging_info

    @property
    def next_frames(self) -> int:
        """Frames that the next block will have; also how many actions, where they are given frame by frame."""
        return self.pipeline.block_frames(self._batch, self.blocks)

    @torch.no_grad()
    def step(self, **inputs: Any) -> Frames:
        """The next block: uint8 [T, H, W, 3] with T = `next_frames`.

        Args:
            inputs: what is done during the block, for models that are played: `keyboard` and `mouse`, see
                `media.actions.play`. What is left out follows the request's `actions`, or is nothing.

        Raises:
            InputError: the session is closed; an input that the model does not take, or of the wrong shape (the
                session goes on, nothing was made).
            KinetoscopeError: the block could not be made; the session is closed then.
        """
        stream = self._open()
        if unknown := [n for n in inputs if n not in self.pipeline.block_inputs]:
            takes = ", ".join(self.pipeline.block_inputs) or "nothing"
            raise InputError(f"a block of this model takes {takes}; got {', '.join(unknown)}")
        item = self.pipeline.block_item(self._batch, self.blocks, **inputs)
        self._changed |= any(value is not None for value in inputs.values())
        self._turn()
        try:
            latents = self._engine.streaming_step(stream, item, self._on_event)
            assert self._decoder is not None
            frames = self._decoder.decode(latents[0], check=True)
        except BaseException:
            self.close()
            raise
        self.blocks += 1
        self.frames += len(frames)
        return frames

    @torch.no_grad()
    def prompt(self, text: str) -> None:
        """Let the video follow `text` from the next block on; what was made stays in its memory.

        Raises:
            InputError: the session is closed; the model reads no prompts; or a text that no request may have (the old
                prompt stays).
        """
        self._open()
        if TEXT not in self.pipeline.stages or not isinstance(self._engine.strategy, PromptedStrategy):
            raise InputError("this model reads no prompt; it cannot change")
        check_text(text, self.seed)
        asked = replace(self._batch, prompts=[text], data=self._batch.data.copy())
        self._asked = self.pipeline.stages[TEXT].forward(asked, self.pipeline.args)

    def record(self, digest: str) -> dict[str, Any] | None:
        """What `replay` needs to make the video so far again; None if a prompt or inputs were given on the way.

        Args:
            digest: SHA-256 of the bytes of all frames.
        """
        if self._changed:
            return None
        made = replace(self._batch, params=replace(self.params, num_frames=self.frames))
        given = {n: v for n in ("image", "last_image", "video") if (v := getattr(made, n)) is not None}
        return make_record(self.pipeline, self._options, made, 0, given, digest=digest)

    def close(self) -> None:
        """End the session: its hooks end and its memory is given back. Closing twice is fine."""
        stream, self._stream = self._stream, None
        self._asked = self._decoder = None
        with self._held:  # what was held is given back, also when the end of a hook fails
            if stream is not None and not stream.closed:
                self._engine.streaming_clear(stream)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self.closed:
            raise InputError(f"this session is closed after {self.blocks} blocks; start a new one")
        return self._stream

    def _turn(self) -> None:
        """Take up the prompt that was asked for since the last block."""
        if self._asked is None:
            return
        for name in ("prompts", "prompt_embeds", "prompt_lengths", "data"):
            setattr(self._batch, name, getattr(self._asked, name))
        assert isinstance(self._engine.strategy, PromptedStrategy)
        self._engine.strategy.reprompt(self._stream.state)
        self._asked, self._changed = None, True
