"""How many devices do what: one value for inference, training, the command line and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import unknown

AXES = ("replica", "cfg", "ring", "ulysses", "tp")
"""Axes of the mesh of processes, outermost first: neighbours in rank talk most."""


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; 1 is none. `replicas x cfg x ring x ulysses x tp` processes, one device each.

    Attributes:
        tp: devices that share each weight (tensor parallel).
        ulysses: devices that share the tokens and, in attention, the heads (arXiv 2309.14509).
        ring: devices that share the tokens and pass keys and values around (arXiv 2310.01889); with `ulysses` both
            (USP, arXiv 2405.07719).
        cfg: devices that share the branches of guidance.
        vae: devices that share the decoding of a video; a divisor of those of a replica.
        replicas: copies of all of the above, for many prompts.
        fsdp: keep only a share of the weights on each of the devices that do not share them by `tp`, and gather a
            block's when it runs (FSDP2).
    """

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    vae: int = 1
    replicas: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "fsdp":
                if not isinstance(value, bool):
                    raise ConfigError(f"parallel: fsdp={value!r} is not true or false")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"parallel: {field.name}={value!r} is not a positive whole number")
        if self.ranks % self.vae:
            raise ConfigError(f"parallel: vae={self.vae} does not divide the {self.ranks} devices of a replica")

    @property
    def sequence(self) -> int:
        """Devices that share the tokens of one row."""
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        """Devices of one replica."""
        return self.cfg * self.sequence * self.tp

    @property
    def world(self) -> int:
        """All devices."""
        return self.replicas * self.ranks

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `AXES`."""
        return (self.replicas, self.cfg, self.ring, self.ulysses, self.tp)

    @classmethod
    def of(cls, value: ParallelConfig | Mapping[str, Any] | str | None) -> ParallelConfig:
        """From a mapping, or text such as "ulysses=2,cfg=2,fsdp=true"; None is one device.

        Raises:
            ConfigError: an unknown name (the nearest is named), or a value that is no degree.
        """
        if value is None:
            return cls()
        if isinstance(value, ParallelConfig):
            return value
        given = _read(value) if isinstance(value, str) else dict(value)
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"parallel: {unknown('degree', name, known)}")
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """The degrees that are not 1, as `of` reads them."""
        plain = ParallelConfig()
        return {k: v for k, v in asdict(self).items() if v != getattr(plain, k)}

    def __str__(self) -> str:
        return ",".join(f"{k}={str(v).lower()}" for k, v in self.as_dict().items()) or "one device"


def _read(text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or name in given:
            raise ConfigError(f"parallel={text!r}: {part!r} is {'given twice' if equals else 'not of the form name=N'}")
        if value in ("true", "false"):
            given[name] = value == "true"
        else:
            given[name] = int(value) if value.isdigit() else value
    return given
