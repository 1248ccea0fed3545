"""Multistep solvers of flows: UniPC and DPM-Solver++, by coefficients that are computed when a run starts.

The arithmetic is that of diffusers' schedulers, operation by operation in float32, so that a step has the same bits.
What depends on noise levels alone is computed on the host and becomes Python numbers: a step launches products and sums
of whole samples, and copies nothing to the device. UniPC of third order sums two products where diffusers calls a
matrix product, and agrees to rounding. Configurations that `covers` does not cover are left to diffusers' scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kinetoscope.core.transfer import as_floats, to_device
from kinetoscope.diffusion.diffusers_solver import DiffusersSolver
from kinetoscope.diffusion.solver import Evaluation, Solver, SolverInputs

HIGHEST = 1.0 - 1e-6
"""Largest noise level that a multistep solver computes with: at 1 the logarithm of the signal is infinite."""
SDE = "sde-dpmsolver++"
FEW = 15
"""DPM-Solver++ lowers its order at the end of runs of fewer steps (`lower_order_final`)."""


def make_unipc(inputs: SolverInputs) -> Solver:
    """Return the UniPC solver of one run."""
    config = inputs.config
    if covers(config) and config.get("predict_x0", True) and not config.get("solver_p"):
        return UniPCSolver(inputs)
    return DiffusersSolver("UniPCMultistepScheduler", inputs)


def make_dpm(inputs: SolverInputs) -> Solver:
    """Return the DPM-Solver++ solver of one run."""
    config = inputs.config
    if covers(config) and config.get("algorithm_type", "dpmsolver++") in ("dpmsolver++", SDE):
        return DPMSolver(inputs)
    return DiffusersSolver("DPMSolverMultistepScheduler", inputs)


def covers(config: Mapping[str, Any]) -> bool:
    """Return whether a published configuration predicts velocities of a flow, without thresholds, in order 1 to 3."""
    return (
        config.get("prediction_type", "flow_prediction") == "flow_prediction"
        and bool(config.get("use_flow_sigmas", True))
        and not config.get("thresholding")
        and config.get("solver_order", 2) in (1, 2, 3)
    )


class Multistep:
    """What multistep solvers share: one evaluation a step, and the clean estimates of the steps before.

    Attributes:
        evaluations: of the run.
        order: `solver_order` of the configuration.
        begin: steps of the whole schedule that the run leaves out.
        levels: S + 1 noise levels, at most `HIGHEST`.
        past: clean estimates [B, ...] of the last steps, newest last; at most `order`.
    """

    def __init__(self, inputs: SolverInputs) -> None:
        self.inputs = inputs
        self.evaluations: Sequence[Evaluation] = [Evaluation(i, s) for i, s in enumerate(inputs.levels[:-1])]
        self.order: int = inputs.config.get("solver_order", 2)
        self.begin = (inputs.total_steps or len(self.evaluations)) - len(self.evaluations)
        self.levels = tuple(min(s, HIGHEST) for s in inputs.levels)
        self.past: list[Tensor] = []

    def remember(self, clean: Tensor) -> None:
        """Add the clean estimate of a step."""
        self.past = [*self.past, clean][-self.order :]

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the clean estimates of the last steps."""
        return {"past": [x.clone() for x in self.past]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Solver.load_state_dict`."""
        self.past = [x.clone() for x in state["past"]]


class LogSignal(NamedTuple):
    """A noise level in the terms of the solvers, float32 [] each: sigma, alpha = 1 - sigma, log(alpha / sigma)."""

    sigma: Tensor
    alpha: Tensor
    ratio: Tensor


def log_signals(levels: Sequence[float]) -> list[LogSignal]:
    """Return the terms of each noise level."""
    sigmas = torch.tensor(levels, dtype=torch.float32).unbind()
    return [LogSignal(s, 1 - s, torch.log(1 - s) - torch.log(s)) for s in sigmas]


# -- UniPC ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UniUpdate:
    """From a sample x with clean estimate m0 to scale x - clean m0 - difference sum_k weight_k (m_k - m0) / ratio_k.

    Attributes:
        scale, clean, difference: see above.
        terms: (weight, ratio) of each further clean estimate m_k.
    """

    scale: float
    clean: float
    difference: float
    terms: tuple[tuple[float, float], ...]

    def __call__(self, x: Tensor, m0: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Return the sample after the update; `others` are the m_k [B, ...]."""
        moved = self.scale * x - self.clean * m0
        total: Tensor | None = None
        for (weight, ratio), other in zip(self.terms, others, strict=True):
            term = other - m0
            term = term if ratio == 1.0 else term / ratio
            term = term if weight == 1.0 else weight * term
            total = term if total is None else total + term
        return moved if total is None else moved - self.difference * total


def uni_update(signals: Sequence[LogSignal], start: int, order: int, kind: str, *, corrects: bool) -> UniUpdate:
    """Return the update from level `start` to the next one (arXiv 2302.04867, equation 8 and 9, B(h) of `kind`).

    Args:
        signals: of all levels.
        start: index of the level of x and m0.
        order: clean estimates used besides that of the next level: those of the levels before `start`.
        kind: "bh1" or "bh2".
        corrects: whether the clean estimate at the next level is known and used (the corrector).
    """
    s0, t = signals[start], signals[start + 1]
    h = t.ratio - s0.ratio
    ratios = [(signals[start - i].ratio - s0.ratio) / h for i in range(1, order)]
    hh = -h
    phi = torch.expm1(hh)
    outer = hh if kind == "bh1" else torch.expm1(hh)
    rows: list[Tensor] = []
    right: list[Tensor] = []
    rks, phi_k, factorial = torch.stack([*ratios, torch.ones(())]), phi / hh - 1, 1
    for i in range(1, order + 1):
        rows.append(torch.pow(rks, i - 1))
        right.append(phi_k * factorial / outer)
        factorial *= i + 1
        phi_k = phi_k / hh - 1 / factorial
    matrix, b = torch.stack(rows), torch.stack(right)
    difference = t.alpha * outer
    if corrects:
        weights = as_floats(_solve(matrix, b)) if order > 1 else [0.5]
    else:
        weights = as_floats(_solve(matrix[:-1, :-1], b[:-1])) if order > 2 else [0.5] * (order - 1)
    scales: list[float] = [*(float(r) for r in ratios), *([1.0] if corrects else [])]
    if weights == [0.5]:  # a product with 1/2 is exact wherever it is made
        difference, weights = 0.5 * difference, [1.0]
    return UniUpdate(
        float(t.sigma / s0.sigma), float(t.alpha * phi), float(difference), tuple(zip(weights, scales, strict=True))
    )


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.solve(matrix, right))  # pyright: ignore[reportUnknownMemberType]


class UniStep(NamedTuple):
    """What one step of UniPC does: the correction of the sample it is given, if any, and the prediction of the next."""

    sigma: float
    corrector: UniUpdate | None
    predictor: UniUpdate


@lru_cache(maxsize=64)
def uni_steps(
    levels: tuple[float, ...], begin: int, highest: int, kind: str, lowers: bool, uncorrected: tuple[int, ...]
) -> tuple[UniStep, ...]:
    """Return the steps between `levels`, the first of which is step `begin` of the schedule.

    Args:
        levels: S + 1 noise levels.
        begin: see above.
        highest: order of the solver.
        kind: see `uni_update`.
        lowers: whether the order falls towards the end of the schedule.
        uncorrected: steps of the schedule whose prediction is not corrected.
    """
    signals, count = log_signals(levels), len(levels) - 1
    orders = [min(highest, count - i if lowers else highest, i + 1) for i in range(count)]
    steps: list[UniStep] = []
    for i in range(count):
        corrects = i > 0 and begin + i - 1 not in uncorrected
        corrector = uni_update(signals, i - 1, orders[i - 1], kind, corrects=True) if corrects else None
        predictor = uni_update(signals, i, orders[i], kind, corrects=False)
        steps.append(UniStep(float(signals[i].sigma), corrector, predictor))
    return tuple(steps)


class UniPCSolver(Multistep):
    """UniPC (arXiv 2302.04867): a predictor, and a corrector that uses the next prediction; one evaluation a step."""

    def __init__(self, inputs: SolverInputs) -> None:
        super().__init__(inputs)
        config = inputs.config
        self.steps = uni_steps(
            self.levels,
            self.begin,
            self.order,
            "bh1" if config.get("solver_type") == "bh1" else "bh2",
            bool(config.get("lower_order_final", True)),
            tuple(config.get("disable_corrector") or ()),
        )
        self.last: Tensor | None = None

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        step = self.steps[index]
        clean = sample - step.sigma * prediction
        if step.corrector is not None and self.last is not None:
            terms = len(step.corrector.terms)
            others = [*self.past[-2::-1][: terms - 1], clean]
            sample = step.corrector(self.last, self.past[-1], others)
        self.remember(clean)
        self.last = sample
        count = len(step.predictor.terms)
        return step.predictor(sample, clean, self.past[-2::-1][:count])

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the clean estimates of the last steps, and of the last sample after its correction."""
        return {**super().state_dict(), "last": None if self.last is None else self.last.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Solver.load_state_dict`."""
        super().load_state_dict(state)
        self.last = None if state["last"] is None else state["last"].clone()


# -- DPM-Solver++ -----------------------------------------------------------------------------------------------------


class DPMStep(NamedTuple):
    """From x to scale x + sum_k weights_k D_k + noise n, where D_0 is the clean estimate and D_1, D_2 its differences.

    Attributes:
        sigma: noise level of x.
        scale, weights, noise: see above.
        inverse: 1 / r_k of the one or two differences between clean estimates.
        mix: of third order, (r_0 / (r_0 + r_1), 1 / (r_0 + r_1)).
    """

    sigma: float
    scale: float
    weights: tuple[float, ...]
    noise: float
    inverse: tuple[float, ...]
    mix: tuple[float, float] | None


def dpm_step(signals: Sequence[LogSignal], start: int, order: int, kind: str, *, sde: bool) -> DPMStep:
    """Return the step from level `start` to the next one (arXiv 2211.01095, algorithm 2; SDE as in diffusers).

    Args:
        signals: of all levels.
        start: index of the level of x.
        order: 1, 2 or 3.
        kind: "midpoint" or "heun", of second order.
        sde: whether the step adds noise.
    """
    s0, t = signals[start], signals[start + 1]
    h = t.ratio - s0.ratio
    if sde:
        decay = 1 - torch.exp(-2.0 * h)
        scale, first = t.sigma / s0.sigma * torch.exp(-h), t.alpha * decay
        half = 0.5 * (t.alpha * decay)
        slope = t.alpha * ((1.0 - torch.exp(-2.0 * h)) / (-2.0 * h) + 1.0)
        curve = t.alpha * ((1.0 - torch.exp(-2.0 * h) - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        noise = t.sigma * torch.sqrt(1.0 - torch.exp(-2 * h))
    else:
        scale, first = t.sigma / s0.sigma, -(t.alpha * (torch.exp(-h) - 1.0))
        half = -(0.5 * (t.alpha * (torch.exp(-h) - 1.0)))
        slope = t.alpha * ((torch.exp(-h) - 1.0) / h + 1.0)
        curve = -(t.alpha * ((torch.exp(-h) - 1.0 + h) / h**2 - 0.5))
        noise = torch.zeros(())
    gaps = [(signals[start - k].ratio - signals[start - k - 1].ratio) / h for k in range(order - 1)]
    weights = [first, *([half if kind == "midpoint" and order == 2 else slope] if order > 1 else [])]
    mix = None
    if order == 3:
        weights.append(curve)
        mix = (float(gaps[0] / (gaps[0] + gaps[1])), float(1.0 / (gaps[0] + gaps[1])))
    inverse = tuple(float(1.0 / gap) for gap in gaps)
    return DPMStep(float(s0.sigma), float(scale), tuple(map(float, weights)), float(noise), inverse, mix)


@lru_cache(maxsize=64)
def dpm_steps(
    levels: tuple[float, ...], total: int, highest: int, kind: str, lowers: bool, euler_last: bool, sde: bool
) -> tuple[DPMStep, ...]:
    """Return the steps between `levels`, the last ones of a schedule of `total` steps.

    Args:
        levels: S + 1 noise levels.
        total: see above.
        highest: order of the solver.
        kind, sde: see `dpm_step`.
        lowers: whether the order falls towards the end of a schedule of fewer than `FEW` steps.
        euler_last: whether the last step has order 1.
    """
    signals, count = log_signals(levels), len(levels) - 1
    lowers = lowers and total < FEW
    orders = [min(highest, i + 1) for i in range(count)]
    for place, order, applies in ((count - 2, 2, lowers), (count - 1, 1, lowers or euler_last)):
        if applies and place >= 0:
            orders[place] = min(orders[place], order)
    return tuple(dpm_step(signals, i, order, kind, sde=sde) for i, order in enumerate(orders))


class DPMSolver(Multistep):
    """DPM-Solver++ (arXiv 2211.01095), one evaluation a step; `algorithm_type` "sde-dpmsolver++" adds noise."""

    def __init__(self, inputs: SolverInputs) -> None:
        super().__init__(inputs)
        config = inputs.config
        self.steps = dpm_steps(
            self.levels,
            len(self.evaluations) + self.begin,
            self.order,
            "heun" if config.get("solver_type") == "heun" else "midpoint",
            bool(config.get("lower_order_final", True)),
            bool(config.get("euler_at_final")) or config.get("final_sigmas_type", "zero") == "zero",
            config.get("algorithm_type") == SDE,
        )

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        step = self.steps[index]
        self.remember(sample - step.sigma * prediction)
        moved = step.scale * sample
        for weight, term in zip(step.weights, self._differences(step), strict=True):
            moved = moved + weight * term
        if step.noise:
            moved = moved + step.noise * to_device(self.inputs.noise.draw(sample.shape[1:]), sample.device)
        return moved

    def _differences(self, step: DPMStep) -> list[Tensor]:
        """Return D_0, and D_1 and D_2 where the step has them: [B, ...] each."""
        m0, *before = reversed(self.past[-len(step.inverse) - 1 :])
        points = [m0, *before]
        slopes = [inverse * (a - b) for inverse, a, b in zip(step.inverse, points, before, strict=False)]
        if step.mix is None:
            return [m0, *slopes]
        change = slopes[0] - slopes[1]
        return [m0, slopes[0] + step.mix[0] * change, step.mix[1] * change]
