"""The LoRAs of a generator: loaded, weighted and unloaded between runs."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinetoscope.core.errors import CompositionError, ConfigError, KinetoscopeError, ModelLoadError
from kinetoscope.core.files import path_exists
from kinetoscope.core.lora import Weighted
from kinetoscope.loading import ModelDir
from kinetoscope.loading.components import lora_target
from kinetoscope.loading.lora import BOTH, SHOWN, LoraFile, Target, read_lora
from kinetoscope.loading.lora_keys import TWO, names_text_encoder
from kinetoscope.loading.lora_sampling import LoraSampling, SampledDir, sampled_as
from kinetoscope.nn.lora import carrier_of
from kinetoscope.pipelines.composed import ComposedPipeline

logger = logging.getLogger("kinetoscope.lora")

COMPONENTS = ("transformer", TWO)
"""What a LoRA may change, where a model has it."""
FIELDS = ("path", "name", "weight", "component", "sha256")

LoraSpec = str | Path | Mapping[str, Any]
"""A file; as text also "[COMPONENT=]FILE[:WEIGHT]"; or the arguments of `VideoGenerator.load_lora` by name."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A loaded LoRA, and what loading it found.

    Attributes:
        name: what `set_lora` and `unload_lora` call it.
        path, sha256: the file.
        weight: what its changes are multiplied by.
        component: as it was given; None: the file or the model decides.
        components: the transformers that it changes.
        parameters: how many of their parameters.
        styles: whose key names the file has ("diffusers", "peft", "kohya", "comfyui", "onetrainer", "bare").
        ranks: of its matrices, each once.
        unmatched: keys of the file that fit no parameter of the model; they do nothing.
    """

    name: str
    path: Path
    sha256: str
    weight: float
    component: str | None
    components: tuple[str, ...]
    parameters: int
    styles: tuple[str, ...]
    ranks: tuple[int, ...]
    unmatched: tuple[str, ...]


class Loras:
    """Which LoRAs the runs of one generator start with.

    A change while a run is in progress is for the runs that start later. Modules are changed when no run holds them:
    at once if they are loaded, else when they load or at the start of the next run. Threads may share it.

    Args:
        pipeline: whose transformers they change.
    """

    def __init__(self, pipeline: ComposedPipeline) -> None:
        self._pipeline = pipeline
        self._dtype = torch.float32 if pipeline.args.autocast else pipeline.args.dtype
        self._targets: dict[str, Target] = {}
        self._loaded: dict[str, tuple[Lora, LoraFile]] = {}
        self._runs: dict[object, Mapping[str, Mapping[str, Weighted]]] = {}
        self._lock = threading.RLock()
        self._modules: dict[str, nn.Module] = {n: m for n, m in pipeline.loaded_modules().items() if n in COMPONENTS}
        pipeline.load_listeners.append(self._take)

    @property
    def loras(self) -> dict[str, Lora]:
        """name -> LoRA, in the order of loading."""
        with self._lock:
            return {name: lora for name, (lora, _) in self._loaded.items()}

    def records(self) -> list[dict[str, Any]]:
        """What loads the same again, as JSON."""
        return [
            {f: str(lora.path) if f == "path" else getattr(lora, f) for f in FIELDS} for lora in self.loras.values()
        ]

    # -- changes ------------------------------------------------------------------------------------------------------

    def load(
        self,
        path: str | Path,
        name: str | None = None,
        weight: float = 1.0,
        component: str | None = None,
        sha256: str | None = None,
    ) -> Lora:
        """Read a file, check it, and add it to the others. `VideoGenerator.load_lora` documents the arguments."""
        weight = _checked(weight, name or str(path))
        if name is not None and name in self._loaded:
            raise ConfigError(f"a LoRA named {name!r} is loaded already; unload it, or give another name")
        file = read_lora(path, self._all_targets(), component)
        if sha256 is not None and sha256 != file.sha256:
            raise ModelLoadError(
                f"LoRA {file.path} has changed since (hash {sha256[:12]} then, {file.sha256[:12]} now); bring back the "
                "old one"
            )
        if file.unmatched:
            more = f" and {len(file.unmatched) - SHOWN} more" if len(file.unmatched) > SHOWN else ""
            if text := [key for key in file.unmatched if names_text_encoder(key)]:
                more += f"; {len(text)} of them change a text encoder, and LoRAs of text encoders are not applied"
            logger.warning(
                "LoRA %s: %d of %d keys fit no parameter of the model and do nothing: %s%s",
                file.path, len(file.unmatched), len(file.unmatched) + file.matched,
                ", ".join(file.unmatched[:SHOWN]), more,
            )  # fmt: skip
        with self._lock:
            own = name or self._free_name(file.path)
            lora = Lora(
                own, file.path, file.sha256, weight, component, tuple(n for n, c in file.changes.items() if c),
                sum(len(c) for c in file.changes.values()), file.styles, file.ranks, file.unmatched,
            )  # fmt: skip
            self._loaded[own] = (lora, file)
            try:
                self._apply()
            except KinetoscopeError:
                del self._loaded[own]
                self._apply()
                raise
        return lora

    def set(self, weights: Mapping[str, float]) -> None:
        """Give weights by name; those not named rest at 0."""
        checked = {name: _checked(weight, name) for name, weight in weights.items()}
        with self._lock:
            for name in weights:
                self._known(name)
            for name, (lora, file) in self._loaded.items():
                self._loaded[name] = (replace(lora, weight=checked.get(name, 0.0)), file)
            self._apply()

    def unload(self, name: str) -> None:
        """Forget a LoRA."""
        with self._lock:
            self._known(name)
            del self._loaded[name]
            self._apply()

    def _known(self, name: str) -> None:
        if name not in self._loaded:
            raise ConfigError(f"no LoRA named {name!r} is loaded; loaded: {', '.join(self._loaded) or 'none'}")

    def _free_name(self, path: Path) -> str:
        stem = path.stem
        return next(n for i in range(1, len(self._loaded) + 2) if (n := stem if i == 1 else f"{stem}-{i}")
                    not in self._loaded)  # fmt: skip

    def _all_targets(self) -> dict[str, Target]:
        if not self._targets:
            model = self._pipeline.model
            for name in COMPONENTS:
                if name in self._pipeline.given:
                    self._targets[name] = lora_target(model, name, self._pipeline.get_module(name))
                elif name in model.components():
                    self._targets[name] = lora_target(model, name)
            if not self._targets:
                raise CompositionError(f"LoRA needs a component named transformer, which {model.name} does not have")
        return self._targets

    # -- modules ------------------------------------------------------------------------------------------------------

    def _take(self, name: str, module: Any) -> None:
        """A component was loaded: it gets what the runs in progress began with, or else what is set now."""
        if name not in COMPONENTS:
            return
        with self._lock:
            self._modules[name] = module
            for run, wanted in self._runs.items():
                carrier_of(module).hold(run, module, wanted.get(name, {}), self._dtype)
            if not self._runs and self._loaded:
                carrier_of(module).carry_unless_held(module, self._wanted().get(name, {}), self._dtype)

    @contextmanager
    def run(self) -> Generator[None]:
        """A run: what is set now stays so until its end, whatever is set meanwhile.

        Raises:
            CompositionError: a run in progress uses the same weights with other LoRAs.
        """
        run = object()
        try:
            with self._lock:
                wanted = self._wanted()
                if any(other != wanted for other in self._runs.values()):
                    raise CompositionError(
                        "LoRAs were changed while a run is in progress; finish or close it before starting the next one"
                    )
                for name, module in self._modules.items():
                    carrier_of(module).hold(run, module, wanted.get(name, {}), self._dtype)
                self._runs[run] = wanted
            yield
        finally:
            with self._lock:
                self._runs.pop(run, None)
                for module in self._modules.values():
                    carrier_of(module).release(run)

    @property
    def held(self) -> int:
        """Number of runs in progress, each of which holds the LoRAs that it began with."""
        return len(self._runs)

    def _apply(self) -> None:
        wanted = self._wanted()
        for name, module in self._modules.items():
            carrier_of(module).carry_unless_held(module, wanted.get(name, {}), self._dtype)

    def _wanted(self) -> dict[str, dict[str, Weighted]]:
        """component -> parameter -> changes of all LoRAs."""
        wanted: dict[str, dict[str, Weighted]] = {}
        for lora, file in self._loaded.values():
            for component, changes in file.changes.items():
                mine = wanted.setdefault(component, {})
                for name, own in changes.items():
                    mine[name] = (*mine.get(name, ()), *((change, lora.weight) for change in own))
        return wanted


class HasLoras:
    """A generator's methods for LoRA files.

    Attributes:
        options: settings of the generator; "lora" is kept up to date.
    """

    options: dict[str, Any]
    _loras: Loras

    @property
    def loras(self) -> dict[str, Lora]:
        """name -> LoRA, in the order in which they were loaded."""
        return self._loras.loras

    def load_lora(
        self,
        path: str | Path,
        name: str | None = None,
        weight: float = 1.0,
        component: str | None = None,
        *,
        sha256: str | None = None,
    ) -> Lora:
        """Add a LoRA to the model and to those loaded before; runs that start from now on have it.

        The key styles of diffusers, PEFT, kohya and ComfyUI are read, with alphas and deltas of weights, biases, norms
        and modulation. A run in progress goes on as it began, and the model is sampled as before, whatever a file says.

        Args:
            path: a .safetensors file, or a folder in which PEFT or diffusers saved one.
            name: to call it by; None: the file's.
            weight: its changes are multiplied by it.
            component: for a model with two transformers (Wan 2.2) and a file that does not say it itself: which one it
                changes, "transformer" (high noise), "transformer_2" (low noise) or "both".
            sha256: refuse the file if it is another one.

        Returns:
            what was found, with every key of the file that fits no parameter (they are logged, too).

        Raises:
            ModelLoadError: the file is missing, damaged, changed, of a kind that is not supported, or does not fit the
                model.
            ConfigError: the name is taken, the weight is not a finite number, or `component` is needed or wrong.
            CompositionError: the model, or the form that its weights are in, takes no such change.
        """
        lora = self._loras.load(path, name, weight, component, sha256)
        self.options["lora"] = self._loras.records()
        return lora

    def set_lora(self, weights: Mapping[str, float]) -> None:
        """Give the loaded LoRAs weights by name; those not named rest at 0. Runs that start from now on have them.

        Raises:
            ConfigError: an unknown name, or a weight that is not a finite number.
        """
        self._loras.set(weights)
        self.options["lora"] = self._loras.records()

    def unload_lora(self, name: str) -> None:
        """Forget a LoRA; without any, the weights are bit for bit those of the model.

        Raises:
            ConfigError: an unknown name.
        """
        self._loras.unload(name)
        self.options["lora"] = self._loras.records()

    def held(self) -> AbstractContextManager[None]:
        """While it is entered, the LoRAs that are set now stay, whatever is set meanwhile."""
        return self._loras.run()


def lora_specs(lora: LoraSpec | Sequence[LoraSpec] | None) -> list[dict[str, Any]]:
    """What was given as `from_pretrained(lora=...)`, as arguments of `load`.

    Raises:
        ConfigError: a field that does not exist, or none where a file should be.
    """
    given = [] if lora is None else list(lora) if isinstance(lora, list | tuple) else [lora]
    specs: list[dict[str, Any]] = []
    for one in given:
        spec = dict(one) if isinstance(one, Mapping) else _read_text(one) if isinstance(one, str) else {"path": one}
        if not isinstance(spec.get("path"), str | Path) or not spec.keys() <= set(FIELDS):
            raise ConfigError(
                f"lora={one!r} should be a file, or an object with path and perhaps {', '.join(FIELDS[1:])}"
            )
        specs.append(spec)
    return specs


def sampled_with(model: ModelDir, specs: Sequence[Mapping[str, Any]]) -> ModelDir:
    """The directory as it is sampled with LoRAs (`lora_specs`): a distilled one says in its file how.

    Raises:
        ModelLoadError: a file is missing, or its header is not readable.
        CompositionError: two of them say different things.
    """
    said = {str(spec["path"]): found for spec in specs if (found := LoraSampling.read(spec["path"]))}
    ways = list(said.items())
    for path, sampling in ways:
        if sampling != ways[0][1]:
            raise CompositionError(
                f"LoRAs {ways[0][0]} and {path} are for other ways of sampling, and cannot be used together"
            )
    if not ways or isinstance(model, SampledDir):
        return model
    path, sampling = ways[0]
    own = model.model_index.get("_class_name")
    if own != sampling.of:
        logger.warning(
            "LoRA %s says how a %s is sampled with it, and %s is a %s: it is sampled as without the LoRA",
            path, sampling.of, model.name, own,
        )  # fmt: skip
        return model
    told = ", ".join(f"{name} {value}" for name, value in sampling.defaults.items() if name != "extra")
    logger.info("LoRA %s: sampled as it was trained%s", path, told and f" ({told})")
    return sampled_as(model, sampling)


def _read_text(text: str) -> dict[str, Any]:
    """ "[COMPONENT=]FILE[:WEIGHT]" """
    spec: dict[str, Any] = {}
    for component in (*COMPONENTS, BOTH):
        if text.startswith(f"{component}="):
            spec["component"] = component
            text = text.removeprefix(f"{component}=")
    file, colon, weight = text.rpartition(":")
    try:
        number = float(weight) if colon and not path_exists(text) else None
    except ValueError:  # the colon belongs to the file's name
        number = None
    return spec | ({"path": text} if number is None else {"path": file, "weight": number})


def _checked(weight: Any, name: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"weight {weight!r} of LoRA {name} is not a finite number")
    return float(weight)
