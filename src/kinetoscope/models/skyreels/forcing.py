"""Diffusion forcing (arXiv 2407.01392) as SkyReels-V2 schedules it: which step each latent frame takes, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.models.skyreels.spec import FORCING_EXTRA

NOT_STARTED = 999
"""The timestep that the network is told for a frame that waits for its first step."""
MAX_NOISED = 1000
MAX_FRAMES = 2**31


@dataclass(frozen=True, slots=True)
class ForcingPlan:
    """A request's parameters in latent frames.

    Attributes:
        windows: latent frames of each window, overlap included.
        history, overlap: frames, and latent frames, that a window takes over from the one before; 0 without.
        block: latent frames of a causal block, which move together.
        ar_step: steps by which a block lags behind the one before.
        noised: timestep that the network is told for frames taken over, and to which they are noised; 0: clean.
    """

    windows: tuple[int, ...]
    history: int
    overlap: int
    block: int
    ar_step: int
    noised: float


def plan_forcing(
    extra: Mapping[str, Any] | None,
    num_frames: int,
    *,
    temporal: int,
    default_block: int,
    ends: int = 0,
    continues: bool = False,
) -> ForcingPlan:
    """Check a request's parameters and cut its video into windows.

    Args:
        extra: the parameters of `FORCING_EXTRA`; those left out have their defaults.
        num_frames: frames of the video.
        temporal: frames a latent frame spans.
        default_block: causal block size of the model's configuration.
        ends: clean latent frames put behind the video (a last image).
        continues: whether the first window begins with `overlap_history` frames of a given video.

    Raises:
        InputError: a parameter out of range, a video longer than its window without overlap or with a last image, or
            a window that is not a whole number of causal blocks.
    """
    given = {**FORCING_EXTRA, **(extra or {})}
    block = default_block if given["causal_block_size"] is None else given["causal_block_size"]
    whole = {name: (given[name], low) for name, low in (("base_num_frames", 1), ("ar_step", 0))}
    whole["causal_block_size"] = (block, 1)
    if given["overlap_history"] is not None:
        whole["overlap_history"] = (given["overlap_history"], 1)
    for name, (value, low) in whole.items():
        if type(value) is not int or not low <= value <= MAX_FRAMES:
            raise InputError(f"{name}={value!r} should be a whole number, at least {low}")
    noised = given["addnoise_condition"]
    if type(noised) not in (int, float) or not 0 <= noised <= MAX_NOISED:
        raise InputError(f"addnoise_condition={noised!r} should be a number in [0, {MAX_NOISED}]")

    def latent(frames: int) -> int:
        return (frames - 1) // temporal + 1

    base, overlap = given["base_num_frames"], 0
    history: Any = given["overlap_history"]
    total, window = latent(num_frames), latent(base)
    windows = (min(total, window),)
    if num_frames > base or continues:
        shortest = min(num_frames, base)
        if type(history) is not int or not 1 <= history < shortest or latent(history) >= windows[0]:
            why = f"{num_frames} frames are more than base_num_frames={base}, the frames of a window"
            if continues:
                why = "a window begins with the last frames of the given video"
            raise InputError(
                f"{why}: overlap_history must be in [1, {shortest - 1}] and leave new frames in a window (17 is "
                f"usual); got {history!r}"
            )
        if ends and num_frames > base:
            raise InputError(f"a last image needs a video of one window, at most {base} frames; got {num_frames}")
        overlap = latent(history)
        windows = _windows(total, windows[0], overlap)
    if uneven := [w + ends for w in windows if (w + ends) % block]:
        raise InputError(
            f"a window of {uneven[0]} latent frames is not a whole number of causal blocks of {block}; change "
            "num_frames, base_num_frames or causal_block_size"
        )
    return ForcingPlan(windows, history if overlap else 0, overlap, block, given["ar_step"], float(noised))


def _windows(total: int, window: int, overlap: int) -> tuple[int, ...]:
    """Latent frames of each window; the last one is as long as what is left needs."""
    windows, done = [window], window
    while done < total:
        windows.append(min(total - done + overlap, window))
        done += windows[-1] - overlap
    return tuple(windows)


def step_matrix(frames: int, steps: int, *, ready: int = 0, block: int = 1, ar_step: int = 0) -> Tensor:
    """How many steps each frame has taken after each iteration.

    A block moves one step an iteration. The first block that is not done leads; each one behind it lags `ar_step`
    steps, until the block before it is done.

    Args:
        frames: latent frames, a whole number of blocks.
        steps: of the schedule.
        ready: frames at the start that are done already; blocks that are not ready as a whole are denoised.
        block: latent frames of a causal block.
        ar_step: lag in steps; 0 moves all blocks together.

    Returns:
        int64 [iterations, frames] with entries in [0, steps + 1]: k in [1, steps] where the frame takes its k-th step
        in this iteration or waits after it, 0 before the first step, steps + 1 once done.
    """
    done = steps + 1
    row = torch.zeros(frames // block, dtype=torch.long)
    row[: ready // block] = done
    rows: list[Tensor] = []
    while (row < steps).any():
        before, row = row, torch.zeros_like(row)
        for i in range(len(row)):
            leads = i == 0 or before[i - 1] >= steps
            row[i] = before[i] + 1 if leads else row[i - 1] - ar_step
        row = row.clamp(0, done)
        rows.append(row)
    return torch.stack(rows).repeat_interleave(block, dim=1)


def frames_timesteps(matrix: Tensor, times: Sequence[float]) -> Tensor:
    """Return the timestep that each frame is told in each iteration, [iterations, frames] int64 on the CPU.

    Args:
        matrix: [iterations, frames] steps taken (`step_matrix`).
        times: timesteps of the S steps, which are cut to whole numbers.
    """
    return torch.tensor([NOT_STARTED, *map(int, times), 0])[matrix]


def moving_frames(matrix: Tensor, steps: int) -> Tensor:
    """Whether each frame takes a step in each iteration of a `step_matrix`: bool [iterations, frames]"""
    before = torch.cat([torch.zeros_like(matrix[:1]), matrix[:-1]])
    return (matrix != before) & (matrix <= steps)


def groups_that_move_together(matrix: Tensor) -> list[Sequence[int]]:
    """Runs of neighbouring frames with equal columns, as ranges; one scheduler serves a run."""
    starts = [0] + [i for i in range(1, matrix.shape[1]) if not torch.equal(matrix[:, i], matrix[:, i - 1])]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], matrix.shape[1]], strict=True)]
