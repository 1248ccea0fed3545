"""Solvers: how a sample moves from noise level to noise level, one evaluation of the network at a time.

A solver never calls the network. It names ahead the noise levels at which it needs predictions, and is then given one
prediction after another; its answer to each is the sample at which it needs the next. So a solver of two evaluations a
step gets for each of them the engine's own forward, with its rows, tables, hooks, caches and guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.protocols import check_protocol
from kinetoscope.core.registry import Registry, check_place
from kinetoscope.core.types import Noise


class Evaluation(NamedTuple):
    """One evaluation of the network.

    Attributes:
        step: index of the solver's step that the evaluation belongs to.
        level: noise level of the sample that the network is given.
    """

    step: int
    level: float


class WithoutNoise:
    """The noise of a schedule that is started for its levels alone: drawing from it is an error."""

    def draw(self, shape: Sequence[int]) -> NoReturn:
        """Raises ConfigError: this schedule was started without a source of noise."""
        raise ConfigError("this schedule was started without a source of noise; give start(..., noise=)")

    def fork(self, *key: int) -> NoReturn:
        """Raises ConfigError, as `draw`."""
        self.draw(())


@dataclass(frozen=True, slots=True)
class SolverInputs:
    """What a solver is made from.

    Attributes:
        levels: S + 1 noise levels of S steps, decreasing; the last one is that of the result (usually 0).
        noise: source of the run's random numbers, one generator a sample, for solvers that add noise.
        config: fields of the published `scheduler_config.json`.
        total_steps: steps of the whole schedule, of which the run leaves out the first ones where it starts from a
            given video; 0: S.
    """

    levels: tuple[float, ...]
    noise: Noise = field(default_factory=WithoutNoise)
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    total_steps: int = 0


@runtime_checkable
class Solver(Protocol):
    """The solver of one run. It owns all that changes during the run, so that interleaved runs never meet.

    The sample follows a flow x_s = (1 - s) x0 + s n; a prediction is the velocity v = n - x0, and dx/ds = v. All
    tensors are float32. A solver acts on each element by itself, since a model may hand it some of the frames only.
    """

    @property
    def evaluations(self) -> Sequence[Evaluation]:
        """Every evaluation of the run in order, known when the run starts."""
        ...

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """Return the sample of evaluation `index` + 1; after the last evaluation, the result at the last level.

        Args:
            prediction: [B, ...] guided velocity at `sample`.
            index: evaluation that made the prediction.
            sample: [B, ...] the sample that the network was given.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of what the solver remembers, as tensors, numbers and lists of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned for a solver of the same levels."""
        ...


SolverFactory = Callable[[SolverInputs], Solver]

LEVELS = {"unipc": "unipc", "euler": "euler", "dpm++": "dpm++", "heun": "euler"}
"""Solver -> the built-in solver whose noise levels it takes."""
BUILT_IN = tuple(LEVELS)
SOLVERS = Registry(
    "scheduler={name!r}: unknown; the known ones are: {known}",
    {
        "unipc": "kinetoscope.diffusion.multistep:make_unipc",
        "euler": "kinetoscope.diffusion.runge_kutta:EulerSolver",
        "dpm++": "kinetoscope.diffusion.multistep:make_dpm",
        "heun": "kinetoscope.diffusion.runge_kutta:HeunSolver",
    },
)


def solver_names() -> list[str]:
    """Return the names that `scheduler=` may have, the built-in ones first."""
    return [*BUILT_IN, *sorted(n for n in SOLVERS if n not in BUILT_IN)]


def register_solver(name: str, factory: SolverFactory | str, *, levels: str = "euler") -> None:
    """Make a solver known by `name` to `scheduler=`, `--scheduler`, `kinetoscope ab`, recipes and replay.

    Args:
        name: letters, digits, "+", "-", "_" and "."; not the name of a built-in solver.
        factory: makes the `Solver` of each run from `SolverInputs`; a class, a function, or "module:name" of one, which
            is imported on first use.
        levels: the built-in solver whose noise levels the new one takes: "euler" (with it a model's own levels, where
            the model prescribes them), "unipc" or "dpm++".

    Raises:
        ConfigError: the name cannot stand in a command line or is built in, `factory` is neither callable nor a place,
            or `levels` names no built-in solver.
    """
    if not name or not all(c.isalnum() or c in "+-_." for c in name):
        raise ConfigError(f"register_solver: name={name!r} may have letters, digits and any of + - _ . only")
    if name in BUILT_IN:
        raise ConfigError(f"register_solver: name={name!r} is a built-in solver; choose another name")
    check_place(f"register_solver: factory of {name!r}", factory)
    if levels not in BUILT_IN:
        raise ConfigError(f"register_solver: levels={levels!r} is not one of {', '.join(BUILT_IN)}")
    SOLVERS[name], LEVELS[name] = factory, levels


def make_solver(name: str, inputs: SolverInputs) -> Solver:
    """Return the solver of one run.

    Raises:
        ConfigError: the name is unknown or cannot be imported, or what is registered under it makes no `Solver`.
    """
    solver = SOLVERS.find(name)(inputs)
    check_protocol(solver, Solver, f"scheduler {name!r}", ConfigError)
    steps = [e.step for e in solver.evaluations]
    if len(inputs.levels) > 1 and (
        not steps or steps != sorted(steps) or solver.evaluations[0].level != inputs.levels[0]
    ):
        raise ConfigError(
            f"scheduler {name!r}: {type(solver).__name__}.evaluations should begin at the first noise level "
            f"({inputs.levels[0]:g}) with step 0 and name the steps in order; it is {list(solver.evaluations)[:4]}..."
        )
    return solver
