"""The Python API: a model, and videos from it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.events import drive
from kinetoscope.core.extensions import load_extensions
from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.hooks import Hook
from kinetoscope.loading import ModelDir
from kinetoscope.media import Clip, Picture
from kinetoscope.parallel import Groups
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.changes import PipelineSnapshot
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.preflight import check_opened, fitting_defaults, log_lowered_defaults
from kinetoscope.pipelines.stages.validation import check_params
from kinetoscope.runtime.device import resolve_device
from kinetoscope.runtime.executors.base import POOLS, Executor, HasExecutor, Job
from kinetoscope.runtime.executors.choose import (
    Parallel,
    check_pool,
    choose_executor,
    of_one,
    open_pool,
    resolve_layout,
)
from kinetoscope.runtime.executors.inprocess import InProcess
from kinetoscope.runtime.executors.pool import Pool
from kinetoscope.runtime.executors.stream import RemoteSession, drain
from kinetoscope.runtime.executors.torchrun import Torchrun, join_launch
from kinetoscope.runtime.lora import HasLoras, Loras, LoraSpec, lora_specs, sampled_with
from kinetoscope.runtime.notices import NoticeEvent, announced, log_once, notices
from kinetoscope.runtime.opening import chosen_attention, open_pipeline
from kinetoscope.runtime.parallel import check_layout
from kinetoscope.runtime.request import VideoRequest
from kinetoscope.runtime.results import settled
from kinetoscope.runtime.running import GenerationResult, RunEvent, plan_request, usual_batch_size
from kinetoscope.runtime.session import Session, session_batch

__all__ = ["GenerationResult", "RunEvent", "VideoGenerator"]


class VideoGenerator(HasExecutor, HasLoras):
    """Makes videos with one model; made by `VideoGenerator.from_pretrained`.

    Args:
        pipeline: the model's pipeline.
        options: the settings it was opened with, as the replay record keeps them.
        groups: this process's place in a layout of several, all of which make the same requests; its first process
            writes the files.
    """

    def __init__(self, pipeline: ComposedPipeline, options: Mapping[str, Any], groups: Groups | None = None) -> None:
        self.pipeline = pipeline
        self.options = dict(options)
        self._loras = Loras(pipeline)
        self.options["lora"] = self._loras.records()
        self.executor: Executor = InProcess(pipeline, self._loras, groups)
        pipeline.snapshot = PipelineSnapshot(pipeline)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ModelDir,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        *,
        scheduler: str | None = None,
        attention: str | Mapping[str, str] | None = None,
        cfg: str = "auto",
        text_mode: str | None = None,
        cache: str | None = None,
        compile: bool | str = False,
        quantize: str | None = None,
        offload: str | None = None,
        vae: str = "whole",
        autocast: bool = False,
        hooks: Sequence[Hook] = (),
        perf_logging: bool | None = None,
        threads: int | None = None,
        modules: Mapping[str, Any] | None = None,
        lora: LoraSpec | Sequence[LoraSpec] | None = None,
        parallel: Parallel | None = None,
        executor: str | None = None,
    ) -> VideoGenerator:
        """Open a model. Weights load when they are first used.

        Args:
            model: an embedded name ("tiny-t2v"), a directory in diffusers layout, or a hub id.
            device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
            dtype: what the transformer computes in: "auto" (bfloat16 on CUDA, float32 on CPU), "float32",
                "bfloat16", "float16".
            scheduler: solver instead of the directory's own: "unipc", "euler", "dpm++", "heun" or a registered one.
            attention: a backend for all roles, or role -> backend; "auto" chooses and `kinetoscope doctor` says why;
                None reads `KINETOSCOPE_ATTENTION`, and is "auto" without it.
            cfg: "sequential", "batched" or "auto": how the branches of guidance are executed.
            text_mode: "padded" or "true_length": whether the padding of short prompts is attended to; None: as the
                model was trained. Another than that makes other videos.
            cache: a step cache with its settings, for instance "fbcache:threshold=0.05" (docs/caches.md); lossy.
            compile: compile the transformer's blocks with `torch.compile`: True, or a mode ("default",
                "reduce-overhead", "max-autotune"); needs a C++ compiler or Triton, and the first step takes seconds to
                minutes.
            quantize: store the weights of the transformer's blocks in 8 bits: "int8", "int8-dynamic", "fp8" or
                "fp8-dynamic"; needs torchao, and changes the video a little.
            offload: keep weights in host memory while they are not used: "components" (each is on the device while its
                stage runs) or "blocks" (and of the transformer two blocks at a time); the same video, more slowly.
            vae: how latents are decoded: "whole", "streaming" (one latent frame at a time: the same frames in less
                memory; Wan's VAE) or "tiled" (in overlapping tiles that are blended: other frames, less memory).
            autocast: keep weights in float32 and compute under `torch.autocast(dtype)`.
            hooks: engine hooks of every run.
            perf_logging: log step times; None reads `KINETOSCOPE_DENOISING_PERF_LOGGING`.
            threads: CPU threads of torch, for the whole process; None leaves them.
            modules: components to share instead of loading (`other.pipeline.loaded_modules()`).
            lora: LoRA files, each a path, text "FILE:WEIGHT", or an object with the arguments of `load_lora`. A file
                that says how the model is sampled with it (few steps) decides that, as a directory's own defaults do.
            parallel: a layout of devices: {"ulysses": 2, "cfg": 2}, or "ulysses=2,cfg=2" (docs/parallel.md); "auto", or
                "auto:size=480x832,frames=81", chooses it (`generator.options["parallel"]`) and logs why.
            executor: what carries out the requests: "in-process", "processes" (one a device, on this machine),
                "torchrun" (this script runs once a device) or "ray" (a cluster); None: in-process for one device,
                else torchrun where it started this process, else processes.

        Raises:
            ModelLoadError: there is no such model, or the directory does not hold what it should.
            ConfigError: an unknown device, dtype, scheduler or plan; a layout that the model or the machine cannot
                have.
            CompositionError: a named attention backend cannot serve on this device and dtype; or two settings that do
                not go together.
            WorkerError: the processes of a layout cannot start.
        """
        load_extensions()
        if not isinstance(model, ModelDir):
            model = find_model(str(model))
        loras = lora_specs(lora)
        model = sampled_with(model, loras)
        given: dict[str, Any] = {
            "attention": chosen_attention(attention), "cfg": cfg, "text_mode": text_mode, "cache": cache,
            "compile": compile, "quantize": quantize, "offload": offload, "vae": vae, "autocast": autocast,
            "perf_logging": perf_logging,
        }  # fmt: skip
        layout = resolve_layout(parallel, model, device, dtype, {**given, "modules": modules})
        spec = choose_executor(executor, layout)
        here: dict[str, Any] = {"hooks": hooks, "modules": modules, "threads": threads}
        check_layout(layout, model, {**given, "modules": modules})
        groups = None
        if spec.name in POOLS:
            check_pool(spec.name, hooks, modules)
            here["threads"] = None  # they are of the workers
        elif spec.name == "torchrun":
            groups = join_launch(layout, resolve_device(device), spec.timeout)
        pipeline, options = open_pipeline(model, device, dtype, **given, **here, groups=groups)
        generator = cls(pipeline, {"scheduler": scheduler, **options, "parallel": of_one(layout)}, groups)
        check_opened(pipeline, generator.defaults())  # refuses an unknown scheduler, or bad defaults of the directory
        log_lowered_defaults(pipeline)
        for one in loras:
            generator.load_lora(**one)
        if groups is not None:
            generator.executor = Torchrun(pipeline, generator._loras, groups)
        if spec.name in POOLS:
            kept = {**given, "scheduler": scheduler, "lora": generator.options["lora"]}
            args = pipeline.args
            pipeline.snapshot = PipelineSnapshot(pipeline, weights=True)
            generator.executor = open_pool(spec, layout, model, args.device, args.dtype, kept, threads)
        return generator

    # -- videos -------------------------------------------------------------------------------------------------------

    def defaults(self) -> SamplingParams:
        """What a request gets for the fields it leaves out."""
        params = SamplingParams(scheduler=self.options.get("scheduler")).over(fitting_defaults(self.pipeline))
        check_params(params, self.pipeline.geometry)
        return params

    @overload  # a str is a sequence of str too, but then it is one prompt
    def generate_video(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: str, *args: Any, **fields: Any
    ) -> GenerationResult: ...
    @overload
    def generate_video(self, prompt: Sequence[str], *args: Any, **fields: Any) -> list[GenerationResult]: ...
    def generate_video(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        output_path: str | Path | Sequence[str | Path] | None = None,
        on_event: Callable[[RunEvent], None] | None = None,
        *,
        guidance_rescale: float | None = None,
        guidance: str | None = None,
        flow_shift: float | None = None,
        scheduler: str | None = None,
        trace: bool = False,
        hooks: Sequence[Hook] = (),
        batch_size: int | None = None,
        image: Picture | Sequence[Picture] | None = None,
        last_image: Picture | Sequence[Picture] | None = None,
        video: Clip | None = None,
        strength: float | None = None,
        guidance_scale_2: float | None = None,
        preview: bool | str | Path = False,
        **extra: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """A video from a prompt, or a list of videos from a list of prompts. What is None comes from `defaults()`.

        Args:
            prompt: one prompt, or several; several run in batches, and each video is, to rounding, what it would be
                alone.
            negative_prompt: one for all, or one each.
            height, width: pixels, in multiples of what the model needs (16 for Wan).
            num_frames: 1 + a multiple of 4 for Wan.
            fps: frames a second of the file.
            num_inference_steps: denoising steps.
            guidance_scale: w in u + w (c - u); 1 switches guidance off.
            seed: one for all, or one each, in [0, 2**32).
            latents: starting noise [C, T, H, W], or [B, C, T, H, W] for several prompts, instead of the seed's.
            output_path: where to write: an .mp4 file; or a directory, which gets one file a prompt; or one path each.
            on_event: called with every stage and step event.
            guidance_rescale: phi of arXiv 2305.08891.
            guidance: its kind with parameters, for instance "cfg-zero", "apg:eta=0,norm=15" or "cfg:reuse=0.5"; see
                `diffusion.guidance.Guidance`.
            flow_shift, scheduler: instead of the model's.
            trace: record every step in `result.logging_info["step_trace"]`.
            hooks: engine hooks of this call.
            batch_size: prompts a run; None chooses by size.
            image, last_image: first and last picture, for models that take them: a path, an http(s) address, a PIL
                image or an array; one for all prompts, or one each. They are turned by their EXIF orientation, scaled
                to cover the size, and cut evenly.
            video: a file, an array [T, H, W, 3] or a list of pictures to start from.
            strength: how much of it is noised, in (0, 1].
            guidance_scale_2: of the low-noise expert, for models with two; None: as a given `guidance_scale`, else the
                model's.
            preview: `on_event` also gets a `PreviewEvent` with small frames after every step; True uses the map beside
                the model (`kinetoscope fit-preview`), a path another one. It changes nothing of the video.
            extra: parameters of the model's family by their published names.

        Returns:
            a `GenerationResult`, or a list of them when `prompt` is a list.

        Raises:
            InputError: a field is out of range; the message names the nearest values that are not.
            OutputError: the output cannot be written (asked before anything is computed).
            BatchError: some prompts of a list failed; it has the results of the others, whose files are written, and
                the error of each.
        """
        request = VideoRequest(
            prompt, negative_prompt, height, width, num_frames, fps, num_inference_steps, guidance_scale, seed, latents,
            output_path, guidance_rescale, guidance, flow_shift, scheduler, trace, hooks, batch_size, image, last_image,
            video, strength, guidance_scale_2, preview, extra,
        )  # fmt: skip
        results = drive(self._run(request), on_event)
        return results[0] if isinstance(prompt, str) else results

    def iterate(self, prompt: str | Sequence[str], **fields: Any) -> Generator[RunEvent, None, list[GenerationResult]]:
        """As `generate_video` with the same fields, yielding events; its return value is the list of results.

        The request is checked now. Closing the generator cancels, and an unfinished video leaves no file. Each video is
        also an event as soon as it is finished or has failed (`ResultEvent`); errors are raised at the end.
        """
        own = {k: fields.pop(k) for k in [*fields] if k not in VideoRequest.__dataclass_fields__ or k == "extra"}
        return self._run(VideoRequest(prompt, **fields, extra=own))

    def start_session(
        self,
        prompt: str | None = None,
        *,
        on_event: Callable[[RunEvent], None] | None = None,
        blocks: int | None = None,
        **fields: Any,
    ) -> Session | RemoteSession:
        """A video that is made while it is watched, one block a `step`; for models that make videos block by block.

        Args:
            prompt: None for models that read none.
            on_event: called with every stage and step event.
            blocks: how many there will be, if known: a model or a script that does not last so long is refused now.
            fields: of `generate_video`, but those of whole videos (`num_frames`, `output_path`, `latents`,
                `batch_size`, `preview`); `seed` is one number. An image that becomes the first frame is the
                first block.

        Raises:
            CompositionError: the model makes no streams.
            InputError: a field is out of range, or has no meaning in a stream.
        """
        return self._session(prompt, blocks, fields, on_event)()

    def stream(
        self,
        prompt: str | None = None,
        *,
        blocks: int | None = None,
        on_event: Callable[[RunEvent], None] | None = None,
        **fields: Any,
    ) -> Generator[np.ndarray[Any, Any], None, None]:
        """Frames uint8 [T, H, W, 3] as they are made, a block at a time; closing the generator ends the run.

        The joined frames of n blocks are those of `generate_video` with as many frames.

        Args:
            prompt, on_event, fields: as for `start_session`. The request is checked now.
            blocks: how many to make; None: until closed.

        Raises:
            CompositionError, InputError: as `start_session`.
        """
        return drain(self._session(prompt, blocks, fields, on_event), blocks)

    def _session(
        self,
        prompt: str | None,
        blocks: int | None,
        fields: Mapping[str, Any],
        on_event: Callable[[RunEvent], None] | None,
    ) -> Callable[[], Session | RemoteSession]:
        """What opens the session; the request is checked now."""
        batch = session_batch(self.pipeline, self.defaults(), prompt, fields)
        if blocks is not None:
            if type(blocks) is not int or blocks < 1:
                raise InputError(f"blocks={blocks!r} is not a positive whole number")
            self.pipeline.check_blocks(batch, blocks)
        for notice in self._notices(batch.params, [*batch.prompts, *batch.negative_prompts], streaming=True):
            log_once(notice)
            if on_event:
                on_event(notice)
        if isinstance(self.executor, Pool):
            check_pool(self.executor.name, fields.get("hooks") or (), None, self._changes())
            order = {"prompt": prompt, "blocks": blocks, "fields": dict(fields), "lora": list(self.options["lora"])}
            return partial(RemoteSession, self.executor, order, on_event)
        return lambda: Session(self.pipeline, batch, self.options, on_event, self._loras.run())

    def _run(self, request: VideoRequest) -> Generator[RunEvent, None, list[GenerationResult]]:
        plan = plan_request(self.pipeline, self.defaults(), request)
        size = request.batch_size or usual_batch_size(self.pipeline, plan.params)
        if isinstance(self.executor, Pool):
            check_pool(self.executor.name, request.hooks, None, self._changes())
        events = self.executor.run(Job(plan, size, self.options, request.trace, request.preview))
        texts = [*plan.prompts, *(plan.negative_prompts if plan.params.guided else [])]
        return settled(announced(self._notices(plan.params, texts), events), plan.prompts)

    def _changes(self) -> list[str]:
        """Return what this program changed on the pipeline; LoRAs change weights too, and workers have them."""
        return self.pipeline.changes(weights=not self.loras)

    def _notices(self, params: SamplingParams, prompts: Sequence[str], streaming: bool = False) -> list[NoticeEvent]:
        """Return what the user should know before a run starts."""
        if not self.executor.announces:
            return []
        return notices(self.pipeline, params, prompts, self.executor.config, streaming=streaming)
