"""Settings of a generator and its requests as text: "cfg=batched,cache=fbcache:threshold=0.05,num_inference_steps=20".

What there is comes from the signature of `VideoGenerator.from_pretrained`, the fields of `VideoRequest` and the model's
own parameters; there is no list here.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from kinetoscope.core.errors import ConfigError
from kinetoscope.engine.protocols import DenoisingStrategy
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.runtime.generator import VideoGenerator
from kinetoscope.runtime.request import VideoRequest

NOT_TEXT = {"hooks", "modules", "latents", "extra"}
"""Values of a program."""
PER_VIDEO = {"prompt", "seed", "output_path", "batch_size", "trace", "preview"}
"""What the caller of a comparison sets for each video."""
SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A way to open a model and to ask it.

    Attributes:
        text: as written; "" is the defaults.
        options: of `VideoGenerator.from_pretrained`.
        fields: of `VideoGenerator.generate_video`.
        generator: opened already, in place of `options`; None: it is opened with them.
        strategy: what makes the strategy of a run from its denoising stage; None: the model's own.
    """

    text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    generator: VideoGenerator | None = None
    strategy: Callable[[DenoisingStage], DenoisingStrategy] | None = None


def known_options() -> dict[str, str]:
    """Option of `from_pretrained` that has a meaning as text -> its annotation."""
    parameters = inspect.signature(VideoGenerator.from_pretrained).parameters
    return {name: str(p.annotation) for name, p in parameters.items() if name not in NOT_TEXT}


def known_fields() -> dict[str, str]:
    """Field of a request that has a meaning as text -> its annotation."""
    return {f.name: str(f.type) for f in fields(VideoRequest) if f.name not in NOT_TEXT | PER_VIDEO}


def parse_configuration(text: str, extra: Mapping[str, Any] | None = None) -> Configuration:
    """The settings of "name=value,name=value".

    A value may have parameters of its own, "name:key=value,key=value": what follows it and is no setting belongs to it.
    A setting that takes several values (LoRA files) is given once for each.

    Args:
        extra: the model's own parameters (`ComposedPipeline.extra_defaults`); their values are read as YAML.

    Raises:
        ConfigError: an unknown name (the message has the nearest), a value of the wrong kind, a name twice.
    """
    options, asked, own = known_options(), known_fields(), extra or {}
    found: dict[str, Any] = {}
    for name, value in _split(text, {*options, *asked, *own}):
        kind = options.get(name, asked.get(name))
        read = _read_yaml(name, value) if kind is None else read_value(name, value, kind)
        if name not in found:
            found[name] = read
        elif kind is not None and "Sequence[" in kind:
            found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), read]
        else:
            raise ConfigError(f"setting {name!r} is given twice in {text!r}")
    chosen = {n: v for n, v in found.items() if n in options}
    return Configuration(text.strip(), chosen, {n: v for n, v in found.items() if n not in options})


def _split(text: str, known: set[str]) -> list[tuple[str, str]]:
    """(name, value) of each setting."""
    parts: list[tuple[str, str]] = []
    for part in filter(None, (p.strip() for p in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise ConfigError(f"setting {part!r} is not of the form NAME=VALUE")
        if name in known:
            parts.append((name, value))
        elif parts and ":" in parts[-1][1] and name not in PER_VIDEO | NOT_TEXT:
            parts[-1] = parts[-1][0], f"{parts[-1][1]},{part}"
        else:
            raise ConfigError(_unknown(name, sorted(known)))
    return parts


def read_value(name: str, value: str, annotation: str) -> Any:
    """A value in the first kind of its annotation that can read it: None, a switch, a number, else text.

    Raises:
        ConfigError: none can.
    """
    kinds = {k.strip() for k in annotation.split("|")}
    if "None" in kinds and value.lower() in ("none", "null"):
        return None
    if "bool" in kinds and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    for kind, read in (("int", int), ("float", float)):
        if kind in kinds:
            try:
                return read(value)
            except ValueError:
                continue
    if kinds <= {"bool", "int", "float", "None"}:
        raise ConfigError(f"setting {name}={value!r} is not of the kind {annotation}")
    return value


def _read_yaml(name: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"setting {name}={value!r} cannot be read") from error


def _unknown(name: str, known: list[str]) -> str:
    if name in PER_VIDEO | NOT_TEXT:
        return f"setting {name!r} cannot differ between the two; prompts and seeds are common to both"
    near = [k for k in known if name in k.split("_")] or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown setting {name!r}; {hint}Known: {', '.join(known)}"
