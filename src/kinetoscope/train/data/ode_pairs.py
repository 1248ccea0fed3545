"""Trajectories of a teacher, kept on disk: where its ODE was at the levels of a few-step student, and where it ended.

They are made by the engine as any video of the teacher is, in shards of one file each. A shard is written whole or not
at all, so an interrupted preparation continues, and more can be added to those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.file_lock import file_lock
from kinetoscope.core.files import replacing, write_text
from kinetoscope.core.types import ForwardBatch
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.protocols import Step, StrategyState
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.train.data import DataSection, SourceContext
from kinetoscope.train.plugins import Opened
from kinetoscope.train.recipe import Positive, SamplingFields
from kinetoscope.train.roles import TrainBatch
from kinetoscope.train.run_inputs import sampled_digest, text_digest
from kinetoscope.worlds import get_world

SHARD = 32
"""Trajectories in a file: what a kill can cost."""
MANIFEST = "pairs.json"
PROMPTS, PROMPTS_COMPARED = "prompts' texts", 4096
"""Name of the digest of the prompts, and of how many first ones it is."""
_STATES = "states"


class OdePairsData(DataSection):
    """Settings of `OdePairs`.

    Attributes:
        folder: where they are kept.
        teacher: whose they are: an embedded name, a directory or a hub id.
        prompts: a text file of one prompt a line, or the name of a world, whose training captions are worded anew for
            each trajectory.
        count: trajectories; those of a longer preparation begin with those of a shorter one.
        batch: samples of a training step.
        steps, warp, shift: the few-step schedule of the student (`FewStepSchedule.make`).
        sampling: of the teacher, over its defaults: fields of `SamplingParams`.
        together: videos made at once.
        seed: of the first trajectory's noise; the others follow.
    """

    source: Literal["ode_pairs"] = "ode_pairs"  # pyright: ignore[reportIncompatibleVariableOverride]
    folder: str
    teacher: str
    prompts: str
    count: Positive
    batch: Positive = 32
    steps: tuple[Positive, ...] = (1000, 750, 500, 250)
    warp: bool = True
    shift: float = Field(5.0, gt=0)
    sampling: SamplingFields = Field(default_factory=dict[str, Any])
    together: Positive = 8
    seed: int = Field(0, ge=0, lt=2**31)

    @property
    def schedule(self) -> FewStepSchedule:
        """Of the student."""
        return FewStepSchedule.make(self.steps, self.shift, warp=self.warp)


@dataclass(frozen=True, slots=True)
class OdeBatch(TrainBatch):
    """Samples with their way from noise; `latents` is where they ended.

    Attributes:
        path: [B, K, C, T, H, W] the teacher's samples at `levels`.
        levels: K noise levels, decreasing.
    """

    path: Tensor = field(default_factory=lambda: torch.empty(0))
    levels: tuple[float, ...] = ()

    def to(self, device: torch.device) -> Self:
        """As `TrainBatch.to`, with the path."""
        moved = super(OdeBatch, self).to(device)  # by name: a class with slots is not the one that is defined here
        return replace(moved, path=self.path.to(device, torch.float32))


class PathRecorder(Hook):
    """Keeps the samples that a run had nearest to some noise levels.

    Args:
        levels: decreasing.
    """

    name = "path_recorder"

    def __init__(self, levels: Sequence[float]) -> None:
        self.wanted = tuple(levels)
        self.levels: tuple[float, ...] = ()
        self.path: list[Tensor] = []
        self._steps: list[int] = []

    def on_run_start(self, state: StrategyState) -> None:
        """Which steps begin nearest.

        Raises:
            ConfigError: two levels share a step, or the run has no levels, or not those of a flow.
        """
        if state.scheduler is None:
            raise ConfigError("a teacher without a schedule of noise levels has no trajectory to record")
        starts = state.scheduler.starts  # a solver of two evaluations a step takes the second at a sample of its own
        sigmas = [state.scheduler.sigmas[i] for i in starts]
        if sigmas[0] > 1:
            raise ConfigError(
                f"trajectories are of teachers whose noise levels are a flow's, in [0, 1]; these begin at {sigmas[0]:g}"
            )
        nearest = [min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level)) for level in self.wanted]
        self._steps = [starts[i] for i in nearest]
        if len(set(self._steps)) < len(self._steps):
            raise ConfigError(
                f"the teacher's {len(sigmas)} steps are too few to tell the levels {list(self.wanted)} apart; "
                "set more sampling.num_inference_steps"
            )
        self.levels, self.path = tuple(sigmas[i] for i in nearest), []

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        """Keep the sample that a chosen step starts from."""
        if step.index in self._steps:
            self.path.append(state.latents.detach().to("cpu", torch.float32))


class OdePairs:
    """Trajectories that are kept in a folder (`OdePairsData`); those that are not there yet are made first.

    Raises:
        ConfigError: the folder holds those of another teacher or schedule.
        OutputError: a file cannot be written.
    """

    settings_class: ClassVar[type[OdePairsData]] = OdePairsData

    def __init__(self, section: OdePairsData, context: SourceContext) -> None:
        self.section, self.encode = section, context.opened.encoder()
        if not is_prepared(section):
            prepare(section, Opened(section.teacher), context.on_count)
        found = _read_manifest(Path(section.folder))
        assert found is not None
        self.levels: tuple[float, ...] = tuple(found["levels"])
        self._shards: list[Any] = [_open_shard(f) for f in _files(section)]
        self._prompts = prompts_of(section)

    def inputs(self) -> dict[str, str]:
        """Return the digest of the trajectories, and of how they were made."""
        made = _read_manifest(Path(self.section.folder))
        shards = [sampled_digest(f) for f in _files(self.section)]
        return {"data trajectories": text_digest(json.dumps(made, sort_keys=True), *shards)}

    def batch(self, step: int, generator: torch.Generator) -> OdeBatch:
        """Random trajectories with their prompts."""
        picked = torch.randint(0, self.section.count, (self.section.batch,), generator=generator).tolist()
        states = torch.stack([self._shards[i // SHARD].get_slice(_STATES)[i % SHARD] for i in picked]).float()
        captions = self._prompts(picked)
        return OdeBatch(states[:, -1], self.encode(captions), tuple(captions), path=states[:, :-1], levels=self.levels)


def is_prepared(section: OdePairsData) -> bool:
    """Whether the folder holds all that are asked for.

    Raises:
        ConfigError: it holds others.
    """
    found, facts = _read_manifest(Path(section.folder)), _facts(section)
    changed: list[str] = []
    if found is not None:
        kept = {PROMPTS: facts[PROMPTS], **found["facts"]}  # earlier versions did not record the prompts' digest
        changed = [k for k in {**facts, **kept} if facts.get(k) != kept.get(k)]
    if changed:
        raise ConfigError(
            f"{section.folder} holds trajectories with another {', '.join(changed)}; choose another folder"
        )
    return found is not None and all(f.exists() for f in _files(section))


def prepare(
    section: OdePairsData, teacher: Opened, on_made: Callable[[int, int], None] | None = None
) -> tuple[float, ...]:
    """Make the trajectories that are not there yet. One process makes them, and others wait for it.

    Args:
        teacher: opened.
        on_made: called with how many are there and how many are wanted.

    Returns:
        the noise levels: those of the teacher's own steps that are nearest to the student's.

    Raises:
        ConfigError: the folder holds trajectories of another teacher or schedule.
        OutputError: a file cannot be written.
    """
    with file_lock(Path(section.folder) / MANIFEST):
        return _prepare(section, teacher, on_made)


def _prepare(section: OdePairsData, teacher: Opened, on_made: Callable[[int, int], None] | None) -> tuple[float, ...]:
    is_prepared(section)  # refuses a folder of others
    folder, facts = Path(section.folder), _facts(section)
    found = _read_manifest(folder)
    prompts = prompts_of(section)
    levels: tuple[float, ...] = () if found is None else tuple(found["levels"])
    for shard, file in enumerate(_files(section)):
        if found is None or not file.exists():
            states, levels = _make(section, teacher, prompts, range(shard * SHARD, (shard + 1) * SHARD))
            _save(file, states, {"facts": facts, "levels": list(levels)})
            found = _read_manifest(folder)
        if on_made:
            on_made(min((shard + 1) * SHARD, section.count), section.count)
    return levels


def prompts_of(section: OdePairsData) -> Callable[[Sequence[int]], list[str]]:
    """Numbers of trajectories -> their prompts.

    Raises:
        ConfigError: the file is empty.
    """
    path = Path(section.prompts)
    if path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ConfigError(f"{path} holds no prompts")
        return lambda numbers: [lines[i % len(lines)] for i in numbers]
    world = get_world(section.prompts)
    return lambda numbers: [world.sample(i, height=16, width=16, num_frames=1).caption for i in numbers]


def _make(
    section: OdePairsData, teacher: Opened, prompts: Callable[[Sequence[int]], list[str]], numbers: range
) -> tuple[Tensor, tuple[float, ...]]:
    """[n, K + 1, C, T, H, W] float16 states of trajectories: at the levels, and the end; and the levels."""
    pipeline, parts = teacher.pipeline, []
    levels: tuple[float, ...] = ()
    for start in range(numbers.start, numbers.stop, section.together):
        part = range(start, min(start + section.together, numbers.stop))
        recorder = PathRecorder(section.schedule.sigmas)
        params = replace(pipeline.defaults(), **section.sampling)
        seeds = [section.seed + i for i in part]
        batch = ForwardBatch(params, prompts(part), [teacher.negative_prompt] * len(part), seeds, hooks=[recorder])
        run = pipeline.iterate(batch, until="decoding")
        while True:
            try:
                next(run)
            except StopIteration as stop:
                batch = stop.value
                break
        assert batch.latents is not None
        levels = recorder.levels
        parts.append(torch.stack([*recorder.path, batch.latents.float().cpu()], 1).to(torch.float16))
    return torch.cat(parts), levels


def _facts(section: OdePairsData) -> dict[str, Any]:
    """Return what the trajectories depend on."""
    named = section.model_dump(mode="json", exclude={"source", "folder", "count", "batch", "together"})
    prompts = text_digest(*prompts_of(section)(range(PROMPTS_COMPARED)))
    return {**named, "weights": find_model(section.teacher).fingerprint(), PROMPTS: prompts}


def _files(section: OdePairsData) -> list[Path]:
    return [Path(section.folder) / f"{shard:05d}.safetensors" for shard in range(-(-section.count // SHARD))]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / MANIFEST} cannot be read ({error}); delete the folder to start over") from error


def _save(file: Path, states: Tensor, manifest: Mapping[str, Any]) -> None:
    """Write a shard, and the manifest with the first; each file whole or not at all."""
    from safetensors.torch import save_file

    listing = file.with_name(MANIFEST)
    with replacing(file) as temporary:
        save_file({_STATES: states.contiguous()}, temporary)
    if not listing.exists():
        write_text(listing, json.dumps(manifest, indent=1))


def _open_shard(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"trajectories {file} cannot be read ({error}); delete the file to make it again") from error
