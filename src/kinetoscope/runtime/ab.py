"""Two configurations over the same prompts and seeds, in one process, in turns; or two sets of existing videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import CompositionError, ConfigError, InputError, KinetoscopeError, shown
from kinetoscope.core.files import name_problem
from kinetoscope.evaluation.compare import Comparison, Pair, compare_videos
from kinetoscope.evaluation.metrics import Array, judge, latent_difference, lpips_distance, named_attributes
from kinetoscope.evaluation.prompt_following import heldout_specs
from kinetoscope.loading import ModelDir
from kinetoscope.media import read_metadata, read_video, write_video
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.presets import pipeline_class
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.reference import embedded_models
from kinetoscope.runtime.compared import Compared
from kinetoscope.runtime.device import dtype_name
from kinetoscope.runtime.generator import GenerationResult, RunEvent, VideoGenerator
from kinetoscope.runtime.output_names import slug
from kinetoscope.runtime.peak import PeakMemory
from kinetoscope.runtime.record import versions
from kinetoscope.runtime.settings import Configuration, known_options, parse_configuration
from kinetoscope.worlds import get_world

DEFAULT_PROMPTS = 4
MAX_REPEATS = 10_000
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif")

# What a setting changes of the components decides what two generators may share.
_AT_LOADING = {"model", "device", "dtype", "autocast"}
_WHILE_RUNNING = {"cfg", "attention", "scheduler", "perf_logging", "threads", "cache", "guidance"}
_OF_TRANSFORMERS = {"compile", "quantize", "lora"}

Report = Callable[[str, int, int], None]
"""(what, done, of how many)."""


@dataclass(frozen=True, slots=True)
class ABPlan:
    """What to run.

    Attributes:
        a, b: the two configurations, over what is common to both.
        model: of both, unless a configuration names its own or brings a generator.
        options, fields: common to both, of `from_pretrained` and of `generate_video`.
        prompts: None: four held-out captions of the model's world.
        seeds: each prompt is run with each.
        repeats: times each pair is run, for the clock; scores are of the first.
        warmup: runs of each side that are not counted.
        videos: folder to keep the videos in, as a/NAME.mp4 and b/NAME.mp4.
    """

    a: Configuration
    b: Configuration
    model: str | ModelDir
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prompts: Sequence[str] | None = None
    seeds: Sequence[int] = (0,)
    repeats: int = 1
    warmup: int = 1
    videos: Path | None = None


def parse_pair(a: str, b: str, model: str) -> tuple[Configuration, Configuration]:
    """Both configurations of a model, from text (`runtime.settings`).

    Raises:
        ConfigError: see `parse_configuration`.
        ModelLoadError: there is no such model.
    """
    extra = pipeline_class(find_model(model)).extra_defaults
    first, second = parse_configuration(a, extra), parse_configuration(b, extra)
    for side in (first, second):
        if "model" in side.options:
            find_model(side.options["model"])
    return first, second


def compare_configurations(
    plan: ABPlan,
    on_event: Callable[[RunEvent], None] | None = None,
    on_pair: Report | None = None,
) -> Compared:
    """Run both configurations in turns, and score B's videos against A's.

    Args:
        on_event: called with the events of every run.
        on_pair: called after every pair.

    Raises:
        KinetoscopeError: what either configuration or request is refused for.
    """
    for name in ("repeats", "warmup"):
        least = int(name == "repeats")
        if not least <= getattr(plan, name) <= MAX_REPEATS:
            raise InputError(f"{name}={shown(getattr(plan, name))} is outside [{least}, {MAX_REPEATS}]")
    if not plan.seeds or len(set(plan.seeds)) != len(plan.seeds):
        raise InputError(f"seeds {list(plan.seeds)} should be one or more different numbers")
    threads = torch.get_num_threads()
    try:
        run = _Run(plan, on_event)
        try:
            return run.all(on_pair)
        finally:
            run.close()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """The two generators and what runs them."""

    def __init__(self, plan: ABPlan, on_event: Callable[[RunEvent], None] | None) -> None:
        self.plan, self.on_event = plan, on_event
        given = [{**plan.options, **c.options}.get("threads") for c in (plan.a, plan.b)]
        self.threads: list[int] = [n or torch.get_num_threads() for n in given]
        self.fields = [{**plan.fields, **c.fields} for c in (plan.a, plan.b)]
        self.sides = self._open()
        sidecar = self.sides[0].pipeline.model.sidecar
        self.world = get_world(sidecar["world"]) if "world" in sidecar else None
        self.prompts = self._prompts()

    def _open(self) -> tuple[VideoGenerator, VideoGenerator]:
        """Both, checked; then the second again on what the first has loaded, as far as they may share."""
        sides = (self.plan.a, self.plan.b)
        options = [self._options(c) for c in sides]
        a, b = (c.generator or VideoGenerator.from_pretrained(**o) for c, o in zip(sides, options, strict=True))
        given = any(c.generator is not None for c in sides)
        self.shared = [] if given else shareable(options[0], options[1], list(a.pipeline.model.components()))
        if self.shared:
            modules = {name: a.pipeline.get_module(name) for name in self.shared}
            b = VideoGenerator.from_pretrained(**options[1], modules=modules)
        for side, generator in zip(sides, (a, b), strict=True):
            stage = generator.pipeline.stages.get("denoising")
            if side.strategy is None:
                continue
            if not isinstance(stage, DenoisingStage):
                raise CompositionError(
                    f"strategy={side.strategy!r}: {generator.pipeline.model.name} has no denoising stage"
                )
            stage.strategy_cls = side.strategy
        return a, b

    def close(self) -> None:
        """End the processes of the generators that were opened here."""
        for side, generator in zip((self.plan.a, self.plan.b), self.sides, strict=True):
            if side.generator is None:
                generator.close()

    def _options(self, side: Configuration) -> dict[str, Any]:
        return {"model": self.plan.model, **self.plan.options, **side.options}

    def _prompts(self) -> list[str]:
        if self.plan.prompts is not None:
            if len(set(self.plan.prompts)) != len(self.plan.prompts) or not self.plan.prompts:
                raise InputError("the prompts should be one or more different ones")
            return list(self.plan.prompts)
        if self.world is None:
            name = self.sides[0].pipeline.model.name
            raise InputError(f"model {name} has no prompts of its own; give --prompt or --prompts-file")
        return [s.caption() for s in heldout_specs(self.world, DEFAULT_PROMPTS)]

    def all(self, on_pair: Report | None) -> Compared:
        a = self.sides[0]
        lpips, missing = lpips_distance()
        notes = [] if lpips else [f"LPIPS: {missing}"]
        if self.world is None:
            notes.append("prompt following: the model names no world with a judge")
        elif not any(named_attributes(self.world, p) for p in self.prompts):
            notes.append(f"prompt following: no prompt names attributes of the world {self.world.name!r}")
        out = Compared(Comparison((self.plan.a.text, self.plan.b.text), [], {}, notes))
        jobs = list(product(self.prompts, self.plan.seeds))
        for _ in range(self.plan.warmup):
            for side in (0, 1):
                self._one(side, *jobs[0])
        params: Any = None
        for index, (prompt, seed) in enumerate(jobs):
            pair = Pair(f"{prompt}, seed {seed}", facts={"prompt": prompt, "seed": seed})
            made: list[GenerationResult] = []
            for repeat in range(self.plan.repeats):
                results = self._both(pair, prompt, seed, turned=(index + repeat) % 2 == 1)
                made = made or results
            self._score(out, pair, made, lpips)
            params = made[0].params
            if on_pair:
                on_pair("pairs", index + 1, len(jobs))
        model = a.pipeline.model
        out.comparison.facts = {
            "kind": "configurations",
            "model": model.name,
            "model_hash": model.fingerprint(),
            "device": str(a.pipeline.args.device),
            "dtype": dtype_name(a.pipeline.args.dtype),
            "threads": self.threads[0] if self.threads[0] == self.threads[1] else self.threads,
            "size": [params.num_frames, params.height, params.width],
            "steps": params.num_inference_steps,
            "seeds": list(self.plan.seeds),
            "repeats": self.plan.repeats,
            "warmup": self.plan.warmup,
            "shared_components": self.shared,
            "options": [dict(side.options) for side in self.sides],
            "versions": versions(),
        }
        return out

    def _both(self, pair: Pair, prompt: str, seed: int, *, turned: bool) -> list[GenerationResult]:
        """A and B, B first where `turned`, so that neither always runs on what the other has warmed."""
        results: dict[int, tuple[GenerationResult, int | None]] = {}
        for side in (1, 0) if turned else (0, 1):
            results[side] = self._one(side, prompt, seed)
        (a, peak_a), (b, peak_b) = results[0], results[1]
        pair.runs.append((dict(a.timings), dict(b.timings)))
        if peak_a is not None and peak_b is not None:
            before = pair.peaks or (0, 0)
            pair.peaks = (max(before[0], peak_a), max(before[1], peak_b))
        return [a, b]

    def _one(self, side: int, prompt: str, seed: int) -> tuple[GenerationResult, int | None]:
        generator = self.sides[side]
        torch.set_num_threads(self.threads[side])
        peak = PeakMemory(generator.pipeline.args.device)
        result = generator.generate_video(prompt, seed=seed, on_event=self.on_event, **self.fields[side])
        return result, peak.read()

    def _score(self, out: Compared, pair: Pair, made: Sequence[GenerationResult], lpips: Any) -> None:
        a, b = made
        if a.latents.shape == b.latents.shape:
            pair.latents = latent_difference(a.latents, b.latents)
        if self.world is not None:
            world = self.world
            pair.judged = judge(world, a.prompt, a.frames), judge(world, b.prompt, b.frames)
        if self.plan.videos is not None:
            for result, name in zip(made, "ab", strict=True):
                path = self.plan.videos / name / f"{len(out.comparison.pairs):03d}-{slug(a.prompt)}-{a.seed}.mp4"
                write_video(path, result.frames, result.params.fps or 12.0, metadata=result.record)
        _take_in(out, pair, a.frames, b.frames, a.params.fps or 12.0, lpips)


def shareable(a: Mapping[str, Any], b: Mapping[str, Any], components: Sequence[str]) -> list[str]:
    """Components that generators with these options of `from_pretrained` may share: both load them alike, and no option
    changes them. An option that is not known here is taken to change everything.

    Args:
        components: of the model.
    """
    from inspect import signature

    defaults = {n: p.default for n, p in signature(VideoGenerator.from_pretrained).parameters.items()}
    used = {n for n in known_options() for side in (a, b) if n in side and side[n] != defaults[n]}
    alike = all(a.get(n, defaults.get(n)) == b.get(n, defaults.get(n)) for n in _AT_LOADING)
    if not alike or used - _AT_LOADING - _WHILE_RUNNING - _OF_TRANSFORMERS:
        return []
    touched = bool(used & _OF_TRANSFORMERS)
    return [c for c in components if not (touched and c.startswith("transformer"))]


def compare_files(a: Path, b: Path, on_pair: Report | None = None) -> Compared:
    """Score the videos of `b` against those of `a`: two files, or two folders whose files have the same names.

    A video that is in one folder only, cannot be read, or has another size or length is a problem of its pair.

    Raises:
        InputError: a path is missing, or the folders have no name in common.
    """
    files = _video_pairs(a, b)
    lpips, missing = lpips_distance()
    notes = ["latents, wall time and memory: existing videos do not tell"]
    notes += [] if lpips else [f"LPIPS: {missing}"]
    facts = {"kind": "videos", "folders": [str(a), str(b)], "versions": versions()}
    out = Compared(Comparison((str(a), str(b)), [], facts, notes))
    for index, (name, first, second) in enumerate(files):
        pair = Pair(name)
        if first is None or second is None:
            pair.problem = f"only in {b if first is None else a}"
            out.comparison.pairs.append(pair)
        else:
            _compare_pair(out, pair, first, second, lpips)
        if on_pair:
            on_pair("pairs", index + 1, len(files))
    return out


def _compare_pair(out: Compared, pair: Pair, first: Path, second: Path, lpips: Any) -> None:
    try:
        a, fps = read_video(first)
        b, _ = read_video(second)
    except InputError as error:
        pair.problem = str(error)
        out.comparison.pairs.append(pair)
        return
    prompt, world = _told_by(first)
    if world is not None:
        pair.facts["prompt"] = prompt
        pair.judged = judge(world, prompt, a), judge(world, prompt, b)
    _take_in(out, pair, a, b, fps or 12.0, lpips)


def _take_in(out: Compared, pair: Pair, a: Array, b: Array, fps: float, lpips: Any) -> None:
    try:
        pair.scores = compare_videos(a, b, lpips)
    except InputError as error:
        pair.problem = str(error)
        out.comparison.pairs.append(pair)
        return
    out.add(pair, a, b, fps)


def _told_by(path: Path) -> tuple[str, Any]:
    """Prompt and world of a video's replay record; no world where there is none, or its model is not embedded."""
    try:
        record = read_metadata(path)
        model = embedded_models().get(record["model"])
        world = None if model is None else find_model(record["model"]).sidecar.get("world")
        return str(record["prompt"]), None if world is None else get_world(world)
    except (KinetoscopeError, KeyError):
        return "", None


def _video_pairs(a: Path, b: Path) -> list[tuple[str, Path | None, Path | None]]:
    for path in (a, b):
        if why := name_problem(path):
            raise InputError(f"{shown(str(path))}: {why}")
        if not path.exists():
            raise InputError(f"{path} does not exist")
    if a.is_file() and b.is_file():
        return [(a.name if a.name == b.name else f"{a.name} against {b.name}", a, b)]
    if a.is_file() or b.is_file():
        raise InputError(f"{a} and {b} should be two files or two folders")
    first, second = _videos_in(a), _videos_in(b)
    if not first.keys() & second.keys():
        raise InputError(f"{a} ({len(first)} videos) and {b} ({len(second)}) have no file name in common")
    return [(n, first.get(n), second.get(n)) for n in sorted(first.keys() | second.keys())]


def _videos_in(folder: Path) -> dict[str, Path]:
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    return {f.name: f for f in files if f.suffix.lower() in VIDEO_SUFFIXES and not f.name.startswith(".")}


def check_thresholds_of_files(asked: Mapping[str, float]) -> None:
    """Refuse thresholds that existing videos cannot be held against.

    Raises:
        ConfigError: one is asked for.
    """
    for name in ("max_latent_diff", "max_slowdown", "max_memory"):
        if name in asked:
            raise ConfigError(f"--{name.replace('_', '-')} is for two configurations; existing videos do not tell")
