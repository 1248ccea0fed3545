"""The training loop: updates, moving average, checkpoints, progress. It knows no model.

What a step sees (data, noise) is a function of the seed and the step number alone, so there is no random state to save
and a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinetoscope.core.errors import KinetoscopeError, RunCancelled
from kinetoscope.core.files import append_line, write_text
from kinetoscope.diffusion.noise import NoiseSource, generator_for
from kinetoscope.train.checkpoint import load_checkpoint, save_checkpoint
from kinetoscope.train.recipe import OptimizerSection

LOG_EVERY = 20
GO_ON, SAVE, STOP = range(3)
"""What the loop does after a step."""


class Task(Protocol):
    """One thing to train.

    Attributes:
        name: of the folder that holds its checkpoint and log.
        module: what is trained.
    """

    name: str

    @property
    def module(self) -> nn.Module: ...

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar terms of a step by name; `total` is minimised. All randomness comes from `step` and `generator`."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is: sent to the caller after every step."""

    task: str
    step: int
    steps: int
    losses: dict[str, float]
    seconds_per_step: float


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step."""
    return generator_for(NoiseSource([seed]).fork(step).seeds[0])


def learning_rate(section: OptimizerSection, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to `final_fraction` of the highest, in
    every cycle; after the last cycle it stays at the value that the cycle ended with."""
    begin, end = section.cycle(step)
    step = min(step, end)
    warm = min(1.0, (step - begin + 1) / max(section.warmup, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
    return section.learning_rate * warm * (section.final_fraction + (1 - section.final_fraction) * cosine)


def clip_norm(module: nn.Module, limit: float) -> float:
    """Scale gradients so that their norm is at most `limit`; the norm before."""
    return float(nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], limit))


class Learner:
    """A module in training: its optimizer, its learning rate and the moving average of its weights.

    Frozen parameters are neither optimized, averaged nor kept in checkpoints. Of weights that devices share, a process
    has its part of all of these.

    Args:
        clip: (module, limit) -> norm of the gradients, which are at most of norm `limit` then.

    Attributes:
        average: name -> value of what is exported, on the module's device.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        section: OptimizerSection,
        clip: Callable[[nn.Module, float], float] = clip_norm,
    ) -> None:
        self.name, self.module, self.section, self._clip = name, module, section, clip
        self._frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        mixed = any(isinstance(p, DTensor) for p in self._parameters)  # with others, which kernels for many refuse
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=1.0, betas=section.betas, weight_decay=section.weight_decay,
            foreach=False if mixed else None,
        )  # fmt: skip
        for p in self._parameters:  # as the first update would begin: checkpoints have the same entries from the start
            moments = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        self.average = {k: v.detach().clone() for k, v in self._current().items()}

    def clear(self) -> None:
        """No gradients, before those of an update are gathered."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, step: int, values: dict[str, float]) -> float:
        """Clip and apply the gathered gradients.

        Args:
            step: of the training.
            values: losses that the gradients are of, for the message.

        Returns:
            the norm of the gradients before clipping.

        Raises:
            KinetoscopeError: a loss or the norm is not finite; nothing is applied.
        """
        norm = self._clip(self.module, self.section.clip)
        if not all(math.isfinite(v) for v in (*values.values(), norm)):
            told = values | {"grad_norm": norm}
            raise KinetoscopeError(
                f"{self.name}: step {step} gave values that are not finite ({told}); lower learning_rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.section, step)
        self.optimizer.step()
        _blend(self.average, self._current(), min(self.section.ema, (1 + step) / (10 + step)))
        return norm

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"module": self._current(), "optimizer": self.optimizer.state_dict(), "average": self.average}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._set(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]

    def finish(self) -> None:
        """The module holds the averaged weights from now on."""
        self._set(self.average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module holds the averaged weights inside."""
        kept = {k: v.detach().clone() for k, v in self._current().items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(kept)

    def _current(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.module.state_dict().items() if k not in self._frozen}

    def _set(self, values: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(dict(values), strict=not self._frozen)


class Job(Protocol):
    """A training as the loop sees it.

    Attributes:
        name: of its log, and for progress.
        steps: how many there are.
        log_every: steps between lines of the log.
    """

    name: str
    steps: int
    log_every: int

    def step(self, step: int) -> dict[str, float]:
        """Do step number `step`, and what is worth telling of it."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        ...


class Store(Protocol):
    """Where checkpoints are kept."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep the state after `step` steps; a kill at any moment leaves the last good one."""
        ...

    def load(self) -> dict[str, Any] | None:
        """The newest state, None before the first."""
        ...


@dataclass(frozen=True, slots=True)
class OneFile:
    """The newest checkpoint alone, at `path`."""

    path: Path

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Replace the file as a whole."""
        save_checkpoint(self.path, state)

    def load(self) -> dict[str, Any] | None:
        """What the file holds, if there is one."""
        return load_checkpoint(self.path) if self.path.exists() else None


def run_job(
    job: Job,
    store: Store,
    log: Path | None,
    *,
    checkpoint_minutes: float,
    checkpoint_every: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    agree: Callable[[int], int] = int,
) -> float:
    """Do all steps of `job`, from the newest checkpoint of `store` on.

    Args:
        log: JSON lines of what the steps tell; None: another process writes them.
        checkpoint_every: steps between checkpoints, beside those by the clock; 0: by the clock alone.
        agree: called after every step with `GO_ON`, `SAVE` or `STOP`; the largest of what all processes said.

    Returns:
        wall seconds over all runs.

    Raises:
        RunCancelled: SIGINT or SIGTERM arrived; the checkpoint is written first.
        KinetoscopeError: a loss is not finite.
    """
    start, spent = 0, 0.0
    if (found := store.load()) is not None:
        job.load(found)
        start, spent = found["step"], found["seconds"]
    begun = saved = time.monotonic()

    def save(step: int) -> None:
        store.save(step, {**job.state(), "step": step, "seconds": spent + time.monotonic() - begun})

    with _stop_signal() as stopping, _lines(log, start) as write:
        for step in range(start, job.steps):
            tick = time.monotonic()
            values = job.step(step)
            if on_progress:
                on_progress(Progress(job.name, step + 1, job.steps, values, time.monotonic() - tick))
            if (step + 1) % job.log_every == 0 or step + 1 == job.steps:
                write({"step": step + 1, **values})
            due = checkpoint_every and (step + 1) % checkpoint_every == 0
            due = due or time.monotonic() - saved > 60 * checkpoint_minutes
            next_is = agree(STOP if stopping() else SAVE if due else GO_ON)
            if next_is != GO_ON:
                save(step + 1)
                saved = time.monotonic()
            if next_is == STOP:
                raise RunCancelled(f"{job.name}: stopped after step {step + 1}; run the same command to continue")
    if start < job.steps:
        save(job.steps)
    return spent + time.monotonic() - begun if start < job.steps else spent


class _TaskJob:
    """A `Task` with one module."""

    log_every = LOG_EVERY

    def __init__(self, task: Task, section: OptimizerSection, seed: int, precision: str) -> None:
        self.name, self.steps = task.name, section.steps
        self.learner = Learner(task.name, task.module, section)
        self.last: dict[str, float] = {}
        self._task, self._seed, self._precision = task, seed, precision

    def step(self, step: int) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bfloat16"):
            terms = self._task.losses(step, step_generator(self._seed, step))
        self.learner.clear()
        terms["total"].backward()
        values = {name: float(value.detach()) for name, value in terms.items()}
        self.last = values | {"grad_norm": self.learner.update(step, values)}
        return self.last

    def state(self) -> dict[str, Any]:
        return self.learner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self.learner.load(state)


def train(
    task: Task,
    section: OptimizerSection,
    folder: Path,
    *,
    seed: int,
    checkpoint_minutes: float,
    precision: str = "float32",
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train `task` to the end of its schedule; continues from the checkpoint in `folder` if there is one.

    The module holds the averaged weights afterwards (the last ones where `ema` is 0).

    Returns:
        facts of the training: steps, wall seconds over all its runs, last losses.

    Raises:
        RunCancelled: SIGINT or SIGTERM arrived; the checkpoint is written first.
        KinetoscopeError: a loss is not finite.
    """
    job = _TaskJob(task, section, seed, precision)
    task.module.train()
    seconds = run_job(
        job, OneFile(folder / f"{task.name}.pt"), folder / f"{task.name}.jsonl",
        checkpoint_minutes=checkpoint_minutes, on_progress=on_progress,
    )  # fmt: skip
    job.learner.finish()
    task.module.eval()
    return {"steps": section.steps, "seconds": seconds, "losses": job.last}


@torch.no_grad()
def _blend(average: dict[str, Tensor], values: Mapping[str, Tensor], decay: float) -> None:
    for name, value in values.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1.0 - decay)
        else:
            average[name].copy_(value)


@contextmanager
def _lines(log: Path | None, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes a line of the log that goes on after `steps` steps."""
    if log is None:
        yield lambda values: None
        return
    _keep_log(log, steps)
    yield lambda values: append_line(log, json.dumps(values))


def _keep_log(log: Path, steps: int) -> None:
    """Drop the lines of steps that the checkpoint does not hold; they will be written again."""
    if log.exists():
        kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= steps]
        write_text(log, "".join(line + "\n" for line in kept))


def _logged_step(line: str) -> float:
    """The step of a line; of one that a kill cut in half, one that no checkpoint holds."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag, so that a step is never cut in half."""
    caught: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda n, _: caught.append(n))
    except ValueError:
        pass  # not the main thread: whoever runs us handles signals
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
