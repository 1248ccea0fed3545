"""Run configurations: all settings of a generation in one YAML file, written by hand or from a replay record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.files import write_text
from kinetoscope.core.spec import nearest
from kinetoscope.core.yaml_files import override, read_sections
from kinetoscope.runtime.record import FILE
from kinetoscope.runtime.replay import check_repeatable, negative_of
from kinetoscope.runtime.settings import known_fields, known_options

INPUTS = ("image", "last_image", "video", "strength", "actions")
"""Keys of the section `inputs`."""


@dataclass(slots=True)
class RunConfig:
    """What a run configuration holds; None is what is left out.

    Attributes:
        model: embedded name, directory or hub id.
        prompt: one, or several.
        negative_prompt: one for all prompts, or one each.
        seed: of the first video of each prompt, or one for each prompt.
        output: an .mp4 file, or a folder.
        options: arguments of `VideoGenerator.from_pretrained`.
        sampling: arguments of `VideoGenerator.generate_video`, parameters of the model's family among them.
        inputs: images, videos and actions, as `generate_video` takes them; paths are relative to the current folder.
    """

    model: str | None = None
    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    seed: int | list[int] | None = None
    output: str | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    inputs: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the configuration of a YAML file with dotted overrides ("sampling.num_inference_steps=20").

        Args:
            path: the file; None: the overrides alone.
            overrides: values are YAML.

        Raises:
            ConfigError: the file is missing or not YAML; an unknown section or key, with the nearest known one; a value
                of the wrong kind.
        """
        data: dict[str, Any] = {} if path is None else read_sections(path, overrides)
        if path is None:
            for text in overrides:
                override(data, text)
        return cls.of(data, "--set" if path is None else str(path))

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> RunConfig:
        """Return the configuration of parsed sections.

        Args:
            where: the sections come from, for messages.

        Raises:
            ConfigError: see `read`.
        """
        known = [f.name for f in fields(cls)]
        sections = {"options": [o for o in known_options() if o != "model"], "inputs": list(INPUTS)}
        for key, value in data.items():
            if key not in known:
                raise ConfigError(f"{where}: {_unknown(str(key), known, sections)}")
            _check_kind(where, key, value)
        for section, names in sections.items():
            for key in data.get(section) or {}:
                if key not in names:
                    raise ConfigError(f"{where}: {_unknown(f'{section}.{key}', known, sections)}")
        for key in data.get("sampling") or {}:
            if key in INPUTS or key in known:
                home = f"inputs.{key}" if key in INPUTS else key
                raise ConfigError(f"{where}: sampling.{key} is not a sampling parameter; write {home}")
        given: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items() if v is not None}
        return cls(**given)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], where: str) -> RunConfig:
        """Return the configuration that makes the video of a replay record again, alone.

        Args:
            where: the record comes from, for messages.

        Raises:
            InputError: the record holds something that a file cannot (see `runtime.replay.check_repeatable`).
        """
        check_repeatable(where, record)
        extra = {
            name: value[FILE] if isinstance(value, Mapping) and FILE in value else value
            for name, value in (record["params"].get("extra") or {}).items()
        }
        sampling = {k: v for k, v in record["params"].items() if k not in ("negative_prompt", "extra")}
        options = {k: v for k, v in record["options"].items() if v is not None and v != []}
        plain = {"device": record["device"], "dtype": record["dtype"], "threads": record["threads"]}
        return cls(
            model=record["model"],
            prompt=record["prompt"],
            negative_prompt=negative_of(record),
            seed=record["seed"],
            options={**plain, **options},
            sampling={**sampling, **extra},
        )

    def write(self, path: str | Path) -> Path:
        """Write the configuration as YAML that `read` reads back.

        Raises:
            OutputError: the file cannot be written.
        """
        held = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) not in (None, {})}
        return write_text(Path(path), yaml.safe_dump(held, sort_keys=False, allow_unicode=True))


def _check_kind(where: str, key: str, value: Any) -> None:
    """Refuse a value that its key cannot have."""
    texts = isinstance(value, list) and all(isinstance(v, str) for v in value) and value
    whole = isinstance(value, int) and not isinstance(value, bool)
    wholes = isinstance(value, list) and all(isinstance(v, int) for v in value) and value
    allowed = {
        "options": (isinstance(value, Mapping), "a section of keys"),
        "sampling": (isinstance(value, Mapping), "a section of keys"),
        "inputs": (isinstance(value, Mapping), "a section of keys"),
        "seed": (whole or wholes, "a whole number, or a list of them"),
        "model": (isinstance(value, str), "text"),
        "output": (isinstance(value, str), "text"),
    }.get(key, (isinstance(value, str) or texts, "text, or a list of texts"))
    if value is not None and not allowed[0]:
        raise ConfigError(f"{where}: {key}={value!r} is not {allowed[1]}")


def _unknown(key: str, known: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    """Return the message about an unknown key, with the nearest key of any section."""
    section, dot, name = key.rpartition(".")
    homes = {
        **{name: name for name in known},
        **{n: f"sampling.{n}" for n in known_fields() if n not in INPUTS},
        **{n: f"{s}.{n}" for s, names in sections.items() for n in names},
    }
    near = nearest(name, homes)
    names = sections[section] if dot else known
    hint = f"did you mean {homes[near]}? Known" if near else "known"
    return f"unknown key {key!r}; {hint} {'there' if dot else 'at the top'}: {', '.join(names)}"
