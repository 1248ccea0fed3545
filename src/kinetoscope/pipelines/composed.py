"""A pipeline is a list of stages over the components of a model directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

from kinetoscope.core.errors import ConfigError, ModelLoadError
from kinetoscope.core.events import drive
from kinetoscope.core.serial import serialize_calls
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.engine.hooks.base import Hook, arrange
from kinetoscope.engine.protocols import Event
from kinetoscope.loading import ModelDir, load_component
from kinetoscope.pipelines.component_care import ComponentCare
from kinetoscope.pipelines.lazy import Lazy
from kinetoscope.pipelines.stage_event import StageEvent
from kinetoscope.pipelines.stages.base import Stage, Stages
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.pipelines.stages.validation import VideoGeometry
from kinetoscope.pipelines.unread import NO_NEGATIVE, ONE_ROW, UNGUIDED, Unread


class Changes(Protocol):
    """Compares a pipeline with how it was opened (`pipelines.changes`)."""

    def changes(self, *, weights: bool = False) -> list[str]:
        """Return what a program changed since, one phrase each."""
        ...


class ComposedPipeline:
    """Stages in order over lazily loaded components.

    A subclass names what it needs and builds its stages; a user adds, replaces or removes stages by name.

    Args:
        model: the directory.
        args: how to compute.
        hooks: engine hooks of every run.
        modules: components given ready-made, for instance shared with another pipeline.
        care: what is done to components; None: they are loaded to the device of `args` and used as they are.

    Attributes:
        given: names of the components that were given ready-made.
        load_listeners: called with (name, component) when one has been loaded and cared for, before first use.

    Raises:
        ModelLoadError: a required component is neither in the directory nor given.
    """

    required: ClassVar[tuple[str, ...]] = ()
    tasks: ClassVar[tuple[str, ...]] = ()
    """What it does: "t2v", "i2v", "flf2v", "v2v", "vc" (continues a video), "control" (follows one), "camera", ...

    Of an open directory: what this one does of it, by the inputs that it takes.
    """
    attention_roles: ClassVar[tuple[str, ...]] = ()
    text_tokens: ClassVar[int] = 0
    """Tokens of the text (or image features) that a row reads, at most."""
    text_modes: ClassVar[tuple[str, ...]] = ("true_length",)
    """How the text beyond a prompt's true length may be read (`nn.text_padding`); the first is what was trained."""
    extra_defaults: ClassVar[Mapping[str, Any]] = {}
    """Parameters beyond `SamplingParams`' own that requests may set, by published name, with their defaults."""
    unread: ClassVar[tuple[Unread, ...]] = (UNGUIDED, ONE_ROW, NO_NEGATIVE)
    """Settings that some runs do not read, and why; a request that gives one of them is refused."""
    guided: ClassVar[bool] = True
    """Whether guidance may ask for an unconditional row."""
    streams: ClassVar[bool] = False
    """Whether it makes videos block by block for as long as wanted (`runtime.session.Session`)."""
    any_length: ClassVar[bool] = False
    """Whether videos longer than those of its training are made in parts that are as long."""
    block_inputs: ClassVar[tuple[str, ...]] = ()
    """What may be said of each block of a stream ("keyboard", "mouse"); the arguments of `block_item`."""
    geometry: VideoGeometry

    def __init__(
        self,
        model: ModelDir,
        args: ExecutionArgs,
        *,
        hooks: Sequence[Hook] = (),
        modules: Mapping[str, Any] | None = None,
        care: ComponentCare | None = None,
    ) -> None:
        self.model = model
        self.args = args
        self._hooks = arrange(hooks)
        self._care = care
        given = dict(modules or {})
        missing = [n for n in self.required if n not in given and n not in model.components()]
        if missing:
            raise ModelLoadError(
                f"{model.path}: {type(self).__name__} needs {', '.join(missing)}, which model_index.json does not list"
            )
        self._modules = {
            n: Lazy(self._loader(n), partial(care.need, n) if care else None) for n in {*model.components(), *given}
        }
        self.given = tuple(given)
        self.snapshot: Changes | None = None
        self.load_listeners: list[Callable[[str, Any], None]] = []
        for name, module in given.items():
            if not name.startswith("transformer"):
                serialize_calls(module)
            self._modules[name] = Lazy(lambda module=module: module)
            self._modules[name].peek()
        self._stages = Stages()
        self.create_stages()
        self._needed = frozenset(name for name, stage in self.stages.items() if not stage.optional)
        self.tasks = self._own_tasks()  # pyright: ignore[reportAttributeAccessIssue] - the class's, narrowed

    # -- for subclasses -----------------------------------------------------------------------------------------------

    @classmethod
    def variant(cls, model: ModelDir) -> type[ComposedPipeline]:
        """The pipeline that opens a directory of this class: itself, unless a family tells its directories apart."""
        return cls

    def create_stages(self) -> None:
        """Add the stages, in order."""
        raise TypeError(f"{type(self).__name__} does not override create_stages")

    @property
    def inputs(self) -> Mapping[str, bool]:
        """What a request may bring beside its prompt ("image", "last_image", "video", ...), and whether it must."""
        return {}

    def _own_tasks(self) -> tuple[str, ...]:
        """The class's tasks that this directory's inputs allow, and "i2v" where text-to-video may keep an image."""
        inputs, tasks = self.inputs, list(type(self).tasks)
        if "t2v" in tasks and inputs.get("image") is False and "i2v" not in tasks:
            tasks.append("i2v")
        if "last_image" not in inputs:
            tasks = [t for t in tasks if t != "flf2v"]
        elif inputs["last_image"]:
            tasks = [t for t in tasks if t != "i2v"]
        return tuple(tasks)

    def defaults(self) -> SamplingParams:
        """Sampling defaults of this model; every field a request needs has a value."""
        raise TypeError(f"{type(self).__name__} does not override defaults")

    def forward_flops(self, tokens: int) -> float:
        """Floating-point operations of one row of one forward of the transformer."""
        raise TypeError(f"{type(self).__name__} does not override forward_flops")

    def widths(self) -> tuple[int, int]:
        """Channels of the transformer's residual stream and of its feed-forward hidden layer."""
        raise TypeError(f"{type(self).__name__} does not override widths")

    def rows(self, params: SamplingParams) -> int:
        """Rows of a step for one sample."""
        return 2 if params.guided else 1

    @classmethod
    def teacache_coefficients(cls, model: ModelDir) -> Sequence[float] | None:
        """TeaCache's polynomial, highest power first, where one was published for this very network; else None."""
        return None

    # -- streams, for subclasses that make them -----------------------------------------------------------------------

    def block_latents(self, batch: ForwardBatch, index: int) -> int:
        """Latent frames of block `index` of a stream."""
        raise TypeError(f"{type(self).__name__} does not override block_latents")

    def block_frames(self, batch: ForwardBatch, index: int) -> int:
        """Frames that block `index` of a stream becomes."""
        return self.geometry.temporal * (self.block_latents(batch, index) - (index == 0)) + (index == 0)

    def block_item(self, batch: ForwardBatch, index: int, **inputs: Any) -> Any:
        """What the strategy makes block `index` of a stream from; None: it knows by itself.

        Raises:
            InputError: an input that does not fit.
        """
        return None

    def check_blocks(self, batch: ForwardBatch, blocks: int) -> None:
        """Refuse, before anything is computed, more blocks than a stream can have.

        Raises:
            InputError: says how many there can be.
        """

    def changes(self, *, weights: bool = False) -> list[str]:
        """Return what a program changed on this pipeline since a generator opened it (`PipelineSnapshot.changes`)."""
        return self.snapshot.changes(weights=weights) if self.snapshot else []

    # -- modules ------------------------------------------------------------------------------------------------------

    def lazy(self, name: str) -> Lazy[Any]:
        """The component as something that loads on first use.

        Raises:
            ModelLoadError: the model has no such component.
        """
        if name not in self._modules:
            raise ModelLoadError(
                f"{self.model.path} has no component {name!r}; it has {', '.join(sorted(self._modules))}"
            )
        return self._modules[name]

    def get_module(self, name: str) -> Any:
        """The component, loaded now if it was not."""
        return self.lazy(name).get()

    def loaded_modules(self) -> dict[str, Any]:
        """The components given or loaded so far; pass them as `modules=` to share them with another pipeline."""
        return {n: m.peek() for n, m in self._modules.items() if m.loaded}

    def _loader(self, name: str) -> Callable[[], Any]:
        def load() -> Any:
            care = self._care
            home = care.home(name) if care else self.args.device
            place = care.place(name) if care else None
            module = load_component(self.model, name, dtype=self.args.dtype, device=home, place=place)
            if care:
                care.loaded(name, module)
            for listener in self.load_listeners:
                listener(name, module)
            return module

        return load

    # -- stages -------------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> dict[str, Stage]:
        """Name -> stage, in the order in which they run; to set one refuses what lacks a method of `Stage`."""
        return self._stages

    @stages.setter
    def stages(self, stages: Mapping[str, Stage]) -> None:
        self._stages = Stages(stages)

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """Engine hooks of every run in the order in which they fire; to set them changes the runs that start later."""
        return self._hooks

    @hooks.setter
    def hooks(self, hooks: Sequence[Hook]) -> None:
        self._hooks = arrange(hooks)
        for stage in self._stages.values():
            if isinstance(stage, DenoisingStage):
                stage.hooks = self._hooks

    def add_stage(self, name: str, stage: Stage, *, before: str | None = None, after: str | None = None) -> None:
        """Add a stage at the end, or before or after another; a stage of the same name is replaced where it stands.

        Raises:
            ConfigError: the stage named by `before` or `after` does not exist.
            CompositionError: the stage lacks a method of `Stage`.
        """
        if name in self.stages and before is None and after is None:
            self.stages[name] = stage
            return
        anchor = before or after
        names = [n for n in self.stages if n != name]
        if anchor is not None and anchor not in names:
            raise ConfigError(f"no stage {anchor!r} to put {name!r} next to; stages: {', '.join(names)}")
        place = len(names) if anchor is None else names.index(anchor) + (after is not None)
        names.insert(place, name)
        everything = {**self.stages, name: stage}
        self.stages = {n: everything[n] for n in names}

    def remove_stage(self, name: str) -> Stage:
        """Take a stage out and return it. A stage that the model needs stays: later ones read what it makes.

        Raises:
            ConfigError: there is no such stage, or the pipeline cannot run without it.
        """
        if name not in self.stages:
            raise ConfigError(f"no stage {name!r} to remove; stages: {', '.join(self.stages)}")
        if name in self._needed:
            removable = [n for n in self.stages if n not in self._needed]
            raise ConfigError(
                f"stage {name!r} of {type(self).__name__} cannot be removed: later stages read what it makes; "
                f"replace it with add_stage({name!r}, ...). Removable: {', '.join(removable) or 'none'}"
            )
        removed = self.stages[name]
        self.stages = {n: s for n, s in self.stages.items() if n != name}  # a run in progress goes on with the old ones
        return removed

    # -- running ------------------------------------------------------------------------------------------------------

    def iterate(
        self, batch: ForwardBatch, *, until: str | None = None
    ) -> Generator[StageEvent | Event, None, ForwardBatch]:
        """Run all stages, or those before `until`, yielding their events; the return value is the batch.

        Closing it stops the run.
        """
        for name, stage in self.stages.items():
            if name == until:
                break
            yield StageEvent("stage_start", name, videos=batch.videos)
            start = time.perf_counter()
            try:
                batch = yield from stage.iterate(batch, self.args)
            finally:
                self.stage_ended()
            batch.timings[name] = time.perf_counter() - start
            yield StageEvent("stage_end", name, batch.timings[name], batch.videos)
        return batch

    def stage_ended(self) -> None:
        """Send away what the stage used, where components wait in host memory while they are not used."""
        if self._care:
            self._care.stage_ended()

    def joins(self, batch: ForwardBatch) -> bool:
        """Whether the samples of a batch would share the forwards of their steps as runs of their own."""
        denoising = self.stages.get("denoising")
        return isinstance(denoising, DenoisingStage) and denoising.joins(batch)

    def iterate_together(
        self, batches: Sequence[ForwardBatch]
    ) -> Generator[StageEvent | Event, None, list[ForwardBatch | Exception]]:
        """Run several batches stage by stage; in denoising their steps share forwards where they can.

        A batch that fails leaves the others as they are.

        Returns:
            each batch, finished, with the seconds that a stage took for all of them; or the error that ended it (of
            `ExecutionArgs.run_errors`; another ends them all).
        """
        outcomes: list[ForwardBatch | Exception] = list(batches)
        for name, stage in self.stages.items():
            going = {i: batch for i, batch in enumerate(outcomes) if isinstance(batch, ForwardBatch)}
            if not going:
                break
            videos = tuple(index for batch in going.values() for index in batch.videos)
            yield StageEvent("stage_start", name, videos=videos)
            start = time.perf_counter()
            try:
                if isinstance(stage, DenoisingStage):
                    done = yield from stage.iterate_together(list(going.values()), self.args)
                    for index, outcome in zip(going, done, strict=True):
                        outcomes[index] = outcome
                else:
                    for index, batch in going.items():
                        try:
                            outcomes[index] = yield from stage.iterate(batch, self.args)
                        except self.args.run_errors as error:
                            outcomes[index] = error
            finally:
                self.stage_ended()
            seconds = time.perf_counter() - start
            for batch in outcomes:
                if isinstance(batch, ForwardBatch):
                    batch.timings[name] = seconds
            yield StageEvent("stage_end", name, seconds, videos)
        return outcomes

    def run(self, batch: ForwardBatch) -> ForwardBatch:
        """Run all stages."""
        return drive(self.iterate(batch))
