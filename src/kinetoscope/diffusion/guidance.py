"""Which rows a step needs, and how their predictions become one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.spec import number, one_of, parse_spec

UNCOND, COND = "uncond", "cond"
KINDS = ("cfg", "cfg-zero", "apg")
_KEYS = ("start", "stop", "cosine", "reuse", "init", "eta", "norm", "momentum", "dims")
_OWN = {"init": "cfg-zero", "eta": "apg", "norm": "apg", "momentum": "apg", "dims": "apg"}
_AXES = {"c": 1, "t": 2, "h": 3, "w": 4}


@dataclass(slots=True)
class GuidanceMemory:
    """What guidance remembers from step to step of one run (or one block of it).

    Attributes:
        owner: the guidance it belongs to; another one (another expert's) begins anew.
        average: running average of c - u, for momentum.
        delta: c - u of the last step that evaluated both, for steps that reuse it.
        agreed: [B] bool: the samples whose branches have come to agree; each follows its conditional branch from then
            on, whatever its neighbours do. None: no sample was asked.
        all_agreed: every sample has, so that the unconditional branch is left out from now on.
    """

    owner: Guidance | None = None
    average: Tensor | None = None
    delta: Tensor | None = None
    agreed: Tensor | None = None
    all_agreed: bool = False

    def of(self, guidance: Guidance, index: int) -> GuidanceMemory:
        """Itself, emptied at the first step and where the guidance has changed."""
        if index == 0 or self.owner is not guidance:
            self.owner, self.average, self.delta = guidance, None, None
            self.agreed, self.all_agreed = None, False
        return self


class GuidanceRule(Protocol):
    """What the engine and its hooks ask of a run's guidance."""

    @property
    def scale(self) -> float:
        """The scale, for the trace."""
        ...

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that some step may evaluate, in row order."""
        ...

    def needed(self, index: int, count: int, memory: GuidanceMemory) -> tuple[str, ...]:
        """Return the branches that step `index` of `count` evaluates, in row order."""
        ...

    def combine(
        self, predictions: Mapping[str, Tensor], index: int, count: int, memory: GuidanceMemory | None
    ) -> Tensor:
        """Return one prediction [B, ...] float32 from the prediction of each branch [B, ...]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """Guidance by two predictions, c with and u without the prompt, combined in float32.

    Attributes:
        scale: w, at least 1; 1 needs no unconditional row.
        rescale: phi of arXiv 2305.08891, section 3.4: the guided prediction is scaled to the standard deviation of the
            conditional one and mixed in by this fraction.
        kind: "cfg": u + w (c - u) (arXiv 2207.12598). "cfg-zero": the same with u scaled by `cfg_zero_scale`, and
            nothing at all in the first `init` steps (CFG-Zero*, arXiv 2503.18886). "apg": u + w d, where d is c - u
            with momentum, limited in norm, its part along c times `eta` (arXiv 2410.02416).
        start, stop: guidance acts in steps [int(start * count), int(stop * count)); the others are conditional alone.
        cosine: a sample whose cosine of c and u exceeds this follows c alone from the next step on (arXiv 2312.12487);
            unconditional rows are left out once that holds for every sample of the run.
        reuse: from this fraction of the steps on evaluate c alone, and take c - u from the last step that had both.
        init: first steps of "cfg-zero" whose prediction is zero.
        eta, norm, momentum: of "apg". `norm` 0 sets no limit; the published value for images is 15, and a norm over a
            whole video grows with its size, so choose `dims`.
        dims: axes over which norms and projections of "apg" are taken, of (C, T, H, W) = (1, 2, 3, 4).

    Raises:
        InputError: a value outside its range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    kind: str = "cfg"
    start: float = 0.0
    stop: float = 1.0
    cosine: float | None = None
    reuse: float | None = None
    init: int = 1
    eta: float = 1.0
    norm: float = 15.0
    momentum: float = 0.0
    dims: tuple[int, ...] = field(default=(1, 2, 3, 4))

    def __post_init__(self) -> None:
        if not self.scale >= 1.0:
            raise InputError(f"guidance_scale={self.scale} is below 1; use 1 to switch guidance off")
        if not 0.0 <= self.rescale <= 1.0:
            raise InputError(f"guidance_rescale={self.rescale} is outside [0, 1]")
        one_of(self.kind, KINDS, "guidance")
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise InputError(f"guidance: the window start={self.start}, stop={self.stop} is empty or outside [0, 1]")
        if self.cosine is not None and not -1.0 <= self.cosine <= 1.0:
            raise InputError(f"guidance: cosine={self.cosine} is outside [-1, 1]")
        if self.reuse is not None and not 0.0 < self.reuse <= 1.0:
            raise InputError(f"guidance: reuse={self.reuse} is outside (0, 1]; it is the fraction of full steps")
        if self.init < 0 or not self.norm >= 0 or not math.isfinite(self.eta) or not abs(self.momentum) < 1:
            raise InputError(
                f"guidance: init={self.init}, norm={self.norm}, eta={self.eta}, momentum={self.momentum}: init and "
                "norm must not be negative, eta must be finite, and momentum between -1 and 1"
            )

    @classmethod
    def make(cls, scale: float, rescale: float = 0.0, spec: str | None = None) -> Guidance:
        """From a request: `spec` is a kind with parameters, such as "apg:eta=0,norm=15,dims=chw" or "cfg:reuse=0.5".

        Raises:
            InputError: an unknown kind or parameter, or a value outside its range.
        """
        if spec is None:
            return cls(scale, rescale)
        kind, given = parse_spec(spec, "guidance")
        one_of(kind, KINDS, "guidance")
        values: dict[str, float | int | tuple[int, ...]] = {}
        for key in given:
            one_of(key, _KEYS, "parameter of guidance")
            if _OWN.get(key, kind) != kind:
                raise InputError(f"guidance={spec!r}: {key} is a parameter of {_OWN[key]!r}, not of {kind!r}")
            if key == "dims":
                values[key] = _axes(given[key])
            else:
                value = number(given, key, "guidance")
                assert value is not None
                if key == "init" and value != int(value):
                    raise InputError(f"guidance: init={given[key]} is not a whole number of steps")
                values[key] = int(value) if key == "init" else value
        return replace(cls(scale, rescale, kind), **values)  # pyright: ignore[reportArgumentType]

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that some step may evaluate, in row order."""
        return (UNCOND, COND) if self.scale != 1.0 else (COND,)

    def needed(self, index: int, count: int, memory: GuidanceMemory) -> tuple[str, ...]:
        """The branches that step `index` of `count` evaluates, in row order."""
        if self.scale == 1.0 or not self._acts(index, count) or (self.kind == "cfg-zero" and index < self.init):
            return (COND,)
        memory = memory.of(self, index)
        reuses = self.reuse is not None and index >= int(self.reuse * count) and memory.delta is not None
        return (COND,) if memory.all_agreed or reuses else (UNCOND, COND)

    def combine(
        self,
        predictions: Mapping[str, Tensor],
        index: int = 0,
        count: int = 1,
        memory: GuidanceMemory | None = None,
    ) -> Tensor:
        """One prediction [B, ...] float32 from the prediction of each branch [B, ...].

        Args:
            predictions: of the branches that `needed` named.
            index, count: step and number of steps.
            memory: of the run; updated.
        """
        cond = predictions[COND].float()
        if self.kind == "cfg-zero" and self.scale != 1.0 and index < self.init:
            return torch.zeros_like(cond)
        if self.scale == 1.0 or not self._acts(index, count):
            return cond
        memory = (memory or GuidanceMemory()).of(self, index)
        if UNCOND not in predictions:
            return self._without_uncond(cond, memory)
        agreed = memory.agreed
        guided = self._rescaled(self._guide(cond, predictions[UNCOND].float(), memory), cond)
        if agreed is None:
            return guided
        return torch.where(_of_samples(agreed, cond), self._without_uncond(cond, memory), guided)

    def _without_uncond(self, cond: Tensor, memory: GuidanceMemory) -> Tensor:
        """Return the prediction of a step that evaluates c alone: c, or with the c - u that an earlier step kept."""
        if memory.delta is None:
            return cond
        return self._rescaled(cond + (self.scale - 1.0) * memory.delta, cond)

    def _rescaled(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Return the guided prediction, mixed with itself at the standard deviation of the conditional one."""
        if self.rescale == 0.0:
            return guided
        axes = tuple(range(1, guided.ndim))
        matched = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        return self.rescale * matched + (1.0 - self.rescale) * guided

    def _acts(self, index: int, count: int) -> bool:
        """Whether step `index` is in the window."""
        return int(self.start * count) <= index < int(self.stop * count)

    def _guide(self, cond: Tensor, uncond: Tensor, memory: GuidanceMemory) -> Tensor:
        if self.kind == "cfg-zero":
            uncond = cfg_zero_scale(cond, uncond) * uncond
        delta = cond - uncond
        if self.kind == "apg":
            delta = self._project(delta, cond, memory)
        if self.reuse is not None:  # a sample that follows c alone keeps the c - u of its last step with both
            before, agreed = memory.delta, memory.agreed
            if before is not None and agreed is not None:
                memory.delta = torch.where(_of_samples(agreed, delta), before, delta)
            else:
                memory.delta = delta
        if self.cosine is not None:
            agrees = torch.nn.functional.cosine_similarity(cond.flatten(1), uncond.flatten(1), dim=1) > self.cosine
            memory.agreed = agrees if memory.agreed is None else agrees | memory.agreed
            memory.all_agreed = bool(memory.agreed.all())
        return uncond + self.scale * delta

    def _project(self, delta: Tensor, cond: Tensor, memory: GuidanceMemory) -> Tensor:
        """c - u as APG changes it."""
        dims = [d for d in self.dims if d < delta.ndim]
        if self.momentum:
            delta = delta if memory.average is None else delta + self.momentum * memory.average
            memory.average = delta
        if self.norm:
            delta = delta * (self.norm / _length(delta, dims)).clamp(max=1.0)
        along = cond.double() / _length(cond.double(), dims)
        parallel = ((delta.double() * along).sum(dims, keepdim=True) * along).float()
        return delta - parallel + self.eta * parallel


def _of_samples(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask [B] as [B, 1, ...], to choose samples of `like` [B, ...]."""
    return mask.view(-1, *[1] * (like.ndim - 1))


def _length(x: Tensor, dims: list[int]) -> Tensor:
    """Euclidean, over `dims`, at least 1e-12."""
    return x.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)


def _axes(text: str) -> tuple[int, ...]:
    unknown = sorted(set(text) - set(_AXES))
    if unknown or len(set(text)) != len(text):
        raise InputError(f"guidance: dims={text} should be letters of cthw, each once, such as chw")
    return tuple(sorted(_AXES[letter] for letter in text))


def cfg_zero_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """How much of `uncond` lies along `cond`: <c, u> / (|u|^2 + 1e-8) a sample (arXiv 2503.18886, equation 7).

    CFG-Zero* is classifier-free guidance with the unconditional prediction times this.

    Args:
        cond, uncond: [B, ...] float32.

    Returns:
        [B, 1, ...], to multiply `uncond` with.
    """
    axes = tuple(range(1, cond.ndim))
    return (cond * uncond).sum(axes, keepdim=True) / (uncond.square().sum(axes, keepdim=True) + 1e-8)
