"""`compare`: the quality gate of `kinetoscope ab` as a function that also takes objects of a program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.spec import unknown
from kinetoscope.evaluation.compare import Thresholds
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.presets import pipeline_class
from kinetoscope.runtime.ab import ABPlan, Report, compare_configurations
from kinetoscope.runtime.compared import Compared
from kinetoscope.runtime.generator import RunEvent, VideoGenerator
from kinetoscope.runtime.settings import PER_VIDEO, Configuration, known_fields, parse_configuration

Side = str | Mapping[str, Any] | VideoGenerator | Configuration
"""One side of a comparison: settings as text ("cfg=batched,cache=fbcache"); settings by name, among them `hooks` and
`strategy`; an open generator; or a `Configuration`."""
OBJECTS = ("hooks", "strategy", "generator")
"""Keys of a mapping whose values are objects of a program."""


def compare(
    a: Side,
    b: Side,
    prompts: Sequence[str] | str | None = None,
    *,
    model: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Any] | None = None,
    thresholds: Thresholds | None = None,
    repeats: int = 1,
    warmup: int = 1,
    videos: str | Path | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
    on_pair: Report | None = None,
    **fields: Any,
) -> Compared:
    """Make the same videos with two configurations in turns, and score those of B against those of A.

    A side is settings as `kinetoscope ab` reads them; a mapping of arguments of `VideoGenerator.from_pretrained` and
    `generate_video`, in which `hooks` are engine hooks of its runs and `strategy` is what `DenoisingStage.strategy_cls`
    is set to; an open generator, with whatever was added to it (`{"generator": it, "hooks": [...]}` adds hooks); or a
    `Configuration`.

    Args:
        prompts: one or several; None: four held-out captions of the model's world.
        model: of the sides that are not generators; None: that of the other side's generator.
        seeds: each prompt is run with each.
        options: arguments of `from_pretrained`, for both sides that are not generators.
        thresholds: what B may do at worst; None: SSIM of every video at least 0.95.
        repeats: runs of each pair, for the clock; scores are of the first.
        warmup: runs of each side that are not counted.
        videos: folder to keep the videos in, as a/NAME.mp4 and b/NAME.mp4.
        on_event: called with the events of every run.
        on_pair: called after every pair with ("pairs", done, of how many).
        fields: arguments of `generate_video`, for both sides.

    Returns:
        numbers, pictures and the verdict: `passed`, `failures`, `as_json()`, `write(folder)`.

    Raises:
        ConfigError: an unknown setting, with the nearest known one, or no model.
        KinetoscopeError: what either configuration or request is refused for.
    """
    opened = [_generator_of(side) for side in (a, b)]
    known = [g.pipeline.model for g in opened if g is not None]
    directory = find_model(model) if model is not None else known[0] if known else None
    if directory is None:
        raise ConfigError("model=None: name the model that both sides open, or give an open generator as a side")
    extra = pipeline_class(directory).extra_defaults
    first, second = (_configuration(side, extra) for side in (a, b))
    plan = ABPlan(
        first,
        second,
        directory,
        options=dict(options or {}),
        fields=fields,
        prompts=[prompts] if isinstance(prompts, str) else prompts,
        seeds=seeds,
        repeats=repeats,
        warmup=warmup,
        videos=None if videos is None else Path(videos),
    )
    found = compare_configurations(plan, on_event, on_pair)
    found.thresholds = thresholds or Thresholds()
    return found


def _generator_of(side: Side) -> VideoGenerator | None:
    if isinstance(side, VideoGenerator):
        return side
    given = side.get("generator") if isinstance(side, Mapping) else getattr(side, "generator", None)
    return given if isinstance(given, VideoGenerator) else None


def _configuration(side: Side, extra: Mapping[str, Any]) -> Configuration:
    """Return a side as a configuration.

    Raises:
        ConfigError: an unknown setting.
        CompositionError: settings of `from_pretrained`, or a strategy, beside an open generator.
    """
    if isinstance(side, Configuration):
        return side
    if isinstance(side, str):
        return parse_configuration(side, extra)
    if isinstance(side, VideoGenerator):
        return Configuration("generator", generator=side)
    own = inspect.signature(VideoGenerator.from_pretrained).parameters
    fields = [f for f in (*known_fields(), "latents", *extra) if f not in PER_VIDEO]
    names = [*OBJECTS, *own, *fields]
    for name in side:
        if name not in names:
            raise ConfigError(unknown("setting", name, sorted(set(names))))
    options = {n: v for n, v in side.items() if n in own and n not in OBJECTS}
    asked = {n: v for n, v in side.items() if n not in options and n not in ("strategy", "generator")}
    generator, strategy = side.get("generator"), side.get("strategy")
    if generator is not None and (options or strategy is not None):
        taken = ", ".join([*options, *(["strategy"] if strategy is not None else [])])
        raise CompositionError(
            f"generator= and {taken} cannot be used together in one side: the generator is open already"
        )
    text = ",".join(f"{name}={_label(value)}" for name, value in side.items())
    return Configuration(text, options, asked, generator=generator, strategy=strategy)


def _label(value: Any) -> str:
    """Return a value as the report shows it: of objects their names."""
    if isinstance(value, (list, tuple)):
        return "+".join(_label(v) for v in value)
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    if isinstance(value, (str, int, float, bool, Path)) or value is None:
        return str(value)
    return str(name or type(value).__name__)
