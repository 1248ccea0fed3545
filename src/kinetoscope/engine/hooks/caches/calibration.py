"""Measuring what `MagCache` and `TeaCache` must know of a model, over runs in which every step is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
from torch import Tensor

from kinetoscope.core.context import StepInfo, current_context, with_stack
from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.engine.hooks.base import Forward, Interceptor
from kinetoscope.engine.hooks.caches.base import CACHES, relative_changes
from kinetoscope.engine.hooks.caches.rows import tokens_of
from kinetoscope.engine.hooks.caches.teacache import TIME_ARGUMENTS, time_signal
from kinetoscope.engine.protocols import BlockContext, ModelInputs, StrategyState
from kinetoscope.nn.stack import BlockCall, Hidden, run_calls

DEGREE = 4  # of TeaCache's polynomial
TINY = 1e-8


class Measured(NamedTuple):
    """One branch of one sample at one step, against the step before.

    Attributes:
        step, branch: which.
        magnitude: mean over tokens of |residual| / |residual before|.
        residual: mean|residual - before| / mean|before|.
        signal: the same of the time embedding; None where the blocks are told none.
    """

    step: int
    branch: str
    magnitude: float
    residual: float
    signal: float | None


@dataclass(slots=True)
class _Past:
    """The step before, of one branch of one sample: its index, network, residual and time embedding."""

    step: int
    network: object
    residual: Tensor
    signal: Tensor | None


class CacheCalibration(Interceptor):
    """Appends a `Measured` for each row of each step to `measured`. It changes nothing, and keeps one run at a time.

    The first step of a run, of a block and of an expert has nothing before it and is left out.
    """

    name: ClassVar[str] = "cache-calibration"
    order: ClassVar[int] = 150
    conflicts: ClassVar[frozenset[str]] = CACHES

    def __init__(self) -> None:
        self.measured: list[Measured] = []

    def on_run_start(self, state: StrategyState) -> None:
        """Nothing was before."""
        state.scratch[self] = {}

    def on_block_start(self, state: StrategyState, context: BlockContext) -> None:
        """Nothing was before."""
        state.scratch[self] = {}

    def around_forward(self, call: Forward, state: StrategyState, inputs: ModelInputs) -> Tensor:
        """The forward as it is, measured."""
        keys = [(branch, sample) for branch in inputs.branches for sample in range(inputs.batch)]

        def stack(x: Hidden, calls: Sequence[BlockCall]) -> Hidden:
            made = run_calls(x, calls)
            context = current_context()
            if context is not None and context.step is not None:
                residual = tokens_of(made) - tokens_of(x)
                self._measure(state.scratch[self], keys, context.step, calls, residual)
            return made

        with with_stack(stack):
            return call(state, inputs)

    def _measure(
        self,
        past: dict[tuple[str, int], _Past],
        keys: Sequence[tuple[str, int]],
        step: StepInfo,
        calls: Sequence[BlockCall],
        residual: Tensor,
    ) -> None:
        network = calls[0].block
        signal = _signal(calls)
        for i, key in enumerate(keys):
            own = None if signal is None else signal if signal.shape[0] == 1 else signal[i : i + 1]
            now = _Past(step.index, network, residual[i : i + 1], own)
            before = past.get(key)
            past[key] = now
            if before is None or before.step != step.index - 1 or before.network != network:
                continue
            magnitude = (_norms(now.residual) / (_norms(before.residual) + TINY)).mean().item()
            change = relative_changes(now.residual, [before.residual])[0]
            told = None if own is None else relative_changes(own, [before.signal])[0]
            assert change is not None
            self.measured.append(Measured(step.index, key[0], magnitude, change, told))


def _norms(x: Tensor) -> Tensor:
    """[..., d] -> [...] float32"""
    return x.float().square().sum(-1).sqrt()


def _signal(calls: Sequence[BlockCall]) -> Tensor | None:
    try:
        return time_signal(calls)
    except CompositionError:
        return None


def magnitude_ratios(measured: Sequence[Measured], steps: int) -> Mapping[str, list[float]]:
    """branch -> gamma of each of `steps` steps: the mean over samples.

    A step that has nothing before it (the first, and an expert's first) gets 1: it runs anyway.

    Raises:
        InputError: nothing was measured.
    """
    if not measured:
        raise InputError("magcache: nothing was measured; give at least two steps")
    found: dict[str, list[float]] = {}
    for branch in dict.fromkeys(m.branch for m in measured):
        values = [[m.magnitude for m in measured if m.branch == branch and m.step == i] for i in range(steps)]
        found[branch] = [fmean(v) if v else 1.0 for v in values]
    return found


def fit_coefficients(measured: Sequence[Measured]) -> tuple[list[float], float]:
    """TeaCache's polynomial by least squares, highest power first, and the fraction of variance it explains.

    It foretells the change of the residual, which is what a left-out step keeps, from that of the time embedding.

    Raises:
        InputError: the blocks are told no time that TeaCache knows, or there are too few steps for a polynomial.
    """
    told = [(m.signal, m.residual) for m in measured if m.signal is not None]
    different = len({signal for signal, _ in told})
    if different <= DEGREE:
        raise InputError(
            f"teacache: {different} different changes of the time embedding do not fix a polynomial of degree "
            f"{DEGREE}; give more steps, on a model whose blocks are given {' or '.join(TIME_ARGUMENTS)}"
        )
    x, y = (np.array(values, dtype=np.float64) for values in zip(*told, strict=True))
    scale = float(x.max())  # powers of numbers near one are easier to tell apart
    powers = np.vander(x / scale, DEGREE + 1)
    fitted: list[float] = cast(Any, np.linalg).lstsq(powers, y, rcond=None)[0].tolist()
    unexplained = np.square(y - powers @ np.array(fitted)).sum() / np.square(y - y.mean()).sum()
    return [c / scale ** (DEGREE - i) for i, c in enumerate(fitted)], 1.0 - float(unexplained)
