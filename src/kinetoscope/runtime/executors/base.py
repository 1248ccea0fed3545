"""What all executors have in common: a request as they take it, and what they tell."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from typing_extensions import Self

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import number, one_of, parse_spec
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime.request import VideoPlan
from kinetoscope.runtime.results import ResultEvent
from kinetoscope.runtime.running import RunEvent

EXECUTORS = ("in-process", "processes", "torchrun", "ray")
POOLS = ("processes", "ray")
"""Those with processes of their own."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request.

    Attributes:
        plan: the videos; its `hooks` are those of the caller's program.
        size: videos of a run.
        options: of the generator, for the record; read when the job starts.
        trace: record every step.
        preview: of the request.
    """

    plan: VideoPlan
    size: int
    options: Mapping[str, Any]
    trace: bool = False
    preview: bool | str | Path = False


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of one process.

    Attributes:
        replica, rank: which it is.
        pid: of the process; None where it is not on this machine.
        alive: it runs and has given a sign of life lately.
        stage: what it is doing: "starting", "idle", or a stage of the pipeline.
        step: steps that it has finished in this stage.
        silent: seconds since its last sign of life.
    """

    replica: int
    rank: int
    pid: int | None
    alive: bool
    stage: str
    step: int
    silent: float


class Executor(Protocol):
    """Carries out the requests of one generator.

    Attributes:
        name: one of `EXECUTORS`.
        config: the layout.
        announces: whether this process, of all that carry out a request, tells its user about it.
    """

    name: str
    config: ParallelConfig
    announces: bool

    def run(self, job: Job) -> Generator[RunEvent, None, list[ResultEvent]]:
        """The events of a request; the return value is the outcome of each prompt, in order.

        Closing it cancels. Events of other processes carry no tensors but those of results. Prompts whose process died,
        stalled, ran out of memory or failed get a `WorkerError`.
        """
        ...

    def health(self) -> list[Health]:
        """What is known of each process."""
        ...

    def close(self) -> None:
        """Stop what is running, and end the processes. Closing twice is fine."""
        ...


class HasExecutor:
    """What may own processes; a context manager, which ends them.

    Attributes:
        executor: what carries out the requests.
    """

    executor: Executor

    def health(self) -> list[Health]:
        """What is known of each process of the executor; none where the model runs in this one."""
        return self.executor.health()

    def close(self) -> None:
        """End the processes of the executor, if it has any; what waits or runs is cancelled. Closing twice is fine."""
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """An executor as it is asked for: "processes:stall=30,timeout=600".

    Attributes:
        name: one of `EXECUTORS`.
        stall: seconds without a sign of life after which a process counts as stopped.
        timeout: seconds without progress of any process after which a request has failed.
        start: seconds that processes have to start.
        address: of a Ray cluster; None starts one on this machine.
    """

    name: str
    stall: float = 60.0
    timeout: float = 600.0
    start: float = 300.0
    address: str | None = None

    @classmethod
    def of(cls, text: str) -> ExecutorSpec:
        """From text.

        Raises:
            InputError: an unknown name or setting, or a value that is no number.
            ConfigError: a time that is not positive.
        """
        name, values = parse_spec(text, "executor")
        one_of(name, EXECUTORS, "executor")
        times = ("stall", "timeout", "start") if name in POOLS else ("timeout",) if name == "torchrun" else ()
        known = [*times, *(["address"] if name == "ray" else [])]
        spec = cls(name)
        for key in values:
            one_of(key, known, f"setting of executor {name}")
            if key == "address":
                spec = replace(spec, address=values[key])
                continue
            seconds = number(values, key, f"executor={text!r}")
            if seconds is None or not seconds > 0:
                raise ConfigError(f"executor={text!r}: {key} should be a number of seconds above 0")
            spec = replace(spec, **{key: seconds})
        return spec


def replica_shares(count: int, size: int, replicas: int) -> list[slice]:
    """The runs that `count` videos are made in, of at most `size` videos and so that every replica gets some."""
    step = max(1, min(size, -(-count // replicas)))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def part_of(plan: VideoPlan, part: slice, paths: Sequence[Path | None] | None = None) -> VideoPlan:
    """Some videos of a plan, written to `paths` or nowhere."""
    given: dict[str, Any] = {name: value[part] for name, value in plan.given().items()}
    prompts = plan.prompts[part]
    return replace(
        plan,
        prompts=prompts,
        negative_prompts=plan.negative_prompts[part],
        seeds=plan.seeds[part],
        paths=list(paths) if paths is not None else [None] * len(prompts),
        **given,
    )
