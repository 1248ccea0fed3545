"""The training loop: updates, moving average, checkpoints, progress. It knows no model.

What a step sees (data, noise) is a function of the seed and the step number alone, so there is no random state to save
and a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import KinetoscopeError, RunCancelled
from kinetoscope.diffusion.noise import NoiseSource, generator_for
from kinetoscope.train.checkpoint import load_checkpoint, save_checkpoint
from kinetoscope.train.recipe import OptimizerSection

LOG_EVERY = 20


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
    """Linear warm-up, then cosine decay to `final_fraction` of the highest, in every cycle."""
    begin, end = section.cycle(step)
    warm = min(1.0, (step - begin + 1) / max(section.warmup, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
    return section.learning_rate * warm * (section.final_fraction + (1 - section.final_fraction) * cosine)


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
    path, log = folder / f"{task.name}.pt", folder / f"{task.name}.jsonl"
    parameters = task.module.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=section.betas, weight_decay=section.weight_decay)
    average = {k: v.detach().clone() for k, v in task.module.state_dict().items()}
    start, spent = 0, 0.0
    if path.exists():
        state = load_checkpoint(path)
        task.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, spent = state["average"], state["step"], state["seconds"]
    _keep_log(log, start)
    begun = saved = time.monotonic()

    def save(step: int) -> None:
        seconds = spent + time.monotonic() - begun
        values = {"module": task.module.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        save_checkpoint(path, {**values, "step": step, "seconds": seconds})

    losses: dict[str, float] = {}
    task.module.train()
    with _stop_signal() as stopping, log.open("a", encoding="utf-8") as lines:
        for step in range(start, section.steps):
            tick = time.monotonic()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                terms = task.losses(step, step_generator(seed, step))
            losses = _update(task, terms, optimizer, section, step)
            _blend(average, task.module, min(section.ema, (1 + step) / (10 + step)))
            if on_progress:
                on_progress(Progress(task.name, step + 1, section.steps, losses, time.monotonic() - tick))
            if (step + 1) % LOG_EVERY == 0 or step + 1 == section.steps:
                lines.write(json.dumps({"step": step + 1, **losses}) + "\n")
                lines.flush()
            if stopping():
                save(step + 1)
                raise RunCancelled(f"{task.name}: stopped after step {step + 1}; run the same command to continue")
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                save(step + 1)
                saved = time.monotonic()
    if start < section.steps:
        save(section.steps)
    task.module.load_state_dict(average)
    task.module.eval()
    return {"steps": section.steps, "seconds": load_checkpoint(path)["seconds"], "losses": losses}


def _update(
    task: Task,
    terms: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    section: OptimizerSection,
    step: int,
) -> dict[str, float]:
    optimizer.zero_grad(set_to_none=True)
    terms["total"].backward()
    norm = nn.utils.clip_grad_norm_(task.module.parameters(), section.clip)
    values = {name: float(value.detach()) for name, value in terms.items()} | {"grad_norm": float(norm)}
    if not all(math.isfinite(v) for v in values.values()):
        raise KinetoscopeError(
            f"{task.name}: step {step} gave values that are not finite ({values}); lower learning_rate"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(section, step)
    optimizer.step()
    return values


@torch.no_grad()
def _blend(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1.0 - decay)
        else:
            average[name].copy_(value)


def _keep_log(log: Path, steps: int) -> None:
    """Drop the lines of steps that the checkpoint does not hold; they will be written again."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        kept = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= steps]
        log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


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
