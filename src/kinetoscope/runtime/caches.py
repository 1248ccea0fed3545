"""Step caches by name: `fbcache:threshold=0.05`, and what they must know of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import CompositionError, ConfigError, InputError, ModelLoadError, OutputError
from kinetoscope.core.files import path_exists, write_text
from kinetoscope.core.spec import one_of, parse_spec
from kinetoscope.engine.hooks.caches import CACHES, DBCache, FBCache, MagCache, StepCache, TaylorSeer, TeaCache
from kinetoscope.loading import ModelDir
from kinetoscope.loading.directory import file_digest, read_json
from kinetoscope.pipelines.presets import pipeline_class

CALIBRATION = "step_caches.json"
"""File beside a model's `model_index.json` that `kinetoscope calibrate` writes and the caches read."""
FORMAT = 1
CALIBRATED = ("magcache", "teacache")
FILE, DIGEST = "calibration", "sha256"  # settings: another file; what it must hold

_CLASSES: dict[str, type[StepCache]] = {c.name: c for c in (FBCache, DBCache, TaylorSeer, MagCache, TeaCache)}


def register_cache(kind: type[StepCache]) -> None:
    """Make a step cache known by its `name`, to `cache=`, `--cache` and `kinetoscope ab`.

    Args:
        kind: a subclass of `StepCache`; its `settings` are what users may set, its constructor takes them by name.

    Raises:
        ConfigError: no such class, one without a name, or one with the name of a built-in cache.
    """
    if not (isinstance(kind, type) and issubclass(kind, StepCache)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"register_cache: {kind!r} is no subclass of StepCache")
    if kind.name in CACHES or not kind.name:
        raise ConfigError(f"register_cache: {kind.__name__}.name={kind.name!r} is empty or that of a built-in cache")
    if missing := sorted(kind.__abstractmethods__):
        raise ConfigError(f"register_cache: {kind.__name__} lacks {', '.join(missing)}")
    kind.conflicts = kind.conflicts | CACHES
    _CLASSES[kind.name] = kind


def open_cache(text: str, model: ModelDir) -> tuple[StepCache, str]:
    """The step cache that an option asks for, for one model.

    Args:
        text: name and settings: `fbcache`, `taylorseer:interval=4,order=2`, `magcache:calibration=FILE`, ...

    Returns:
        the cache, and the option as a replay record keeps it: with `sha256` of the calibration, which must be the same
        then.

    Raises:
        InputError: an unknown name or setting, or a value that does not fit.
        ConfigError: the model has no calibration, and needs one.
        ModelLoadError: the calibration is damaged, or of other weights.
        CompositionError: the model and the cache do not go together.
    """
    name, values = parse_spec(text, "cache")
    kind = _CLASSES[one_of(name, sorted(_CLASSES), "step cache")]
    settings = dict(kind.settings) | (dict.fromkeys((FILE, DIGEST), str) if name in CALIBRATED else {})
    given: dict[str, Any] = {}
    for key, value in values.items():
        wanted = settings[one_of(key, list(settings), f"setting of {name}")]
        try:
            given[key] = wanted(value)
        except ValueError as error:
            raise InputError(f"cache={text!r}: {key}={value} is not a {_NAMES[wanted]}") from error
    file, digest = given.pop(FILE, None), given.pop(DIGEST, None)
    if name not in CALIBRATED:
        cache = kind(**given)
        config = model.config("transformer")
        if "num_layers" in config:
            cache.check(config["num_layers"] + config.get("num_single_layers", 0))
        return cache, text
    if name == "magcache":
        key, known = "ratios", _ratios(model, file)
    else:
        key, known = "coefficients", _coefficients(model, file)
    found = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    if digest not in (None, found):
        raise ModelLoadError(f"{name}: the calibration of {model.name} has changed ({digest} then, {found} now)")
    kept = {k: v for k, v in values.items() if k != DIGEST} | {DIGEST: found}
    return kind(**{key: known}, **given), f"{name}:{','.join(f'{k}={v}' for k, v in kept.items())}"


def with_calibration(text: str, change: Callable[[str], str]) -> str:
    """Return the option of a step cache with another path of its calibration file, where it names one."""
    name, values = parse_spec(text, "cache")
    if FILE not in values:
        return text
    settings = {**values, FILE: change(values[FILE])}
    return f"{name}:{','.join(f'{k}={v}' for k, v in settings.items())}"


_NAMES: Mapping[type, str] = {int: "whole number", float: "number", str: "word"}


def _ratios(model: ModelDir, file: str | None) -> Mapping[str, list[float]]:
    """MagCache's ratios, of the model's own calibration."""
    found = read_calibration(model, "magcache", file)
    if found is None:
        raise ConfigError(f"magcache: {model.name} is not calibrated; `{_command(model, 'magcache')}` does it")
    return found["ratios"]


def _coefficients(model: ModelDir, file: str | None) -> list[float]:
    """TeaCache's polynomial: of the model's own calibration, else of the published model that it is."""
    if "transformer_2" in model.components():
        raise CompositionError(
            f"cache 'teacache' and the two experts of {model.name} do not go together: a polynomial is of one network. "
            "Use magcache, fbcache or taylorseer"
        )
    found = read_calibration(model, "teacache", file)
    if found is not None:
        return found["coefficients"]
    published = pipeline_class(model).teacache_coefficients(model)
    if published is None:
        raise ConfigError(
            f"teacache: no coefficients were published for {model.name}; `{_command(model, 'teacache')}` fits them"
        )
    return list(published)


def _command(model: ModelDir, cache: str) -> str:
    return f"kinetoscope calibrate {model.name} --cache {cache}"


def network_digest(model: ModelDir) -> str:
    """SHA-256 (hex) of the files of the denoising networks: what a calibration is of."""
    total = hashlib.sha256()
    for component in sorted(c for c in model.components() if c.startswith("transformer")):
        folder = model.folder(component)
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            total.update(f"{component}/{file.relative_to(folder).as_posix()}\0{file_digest(file)}\n".encode())
    return total.hexdigest()


def read_calibration(model: ModelDir, cache: str, file: str | Path | None = None) -> dict[str, Any] | None:
    """What was measured of a model for one cache; None where nothing was.

    Args:
        file: instead of the one beside the model; then it must exist.

    Raises:
        ModelLoadError: the file is missing, damaged, or of other weights.
    """
    path = model.path / CALIBRATION if file is None else Path(file)
    if file is None and not path.is_file():
        return None
    content = read_json(path)
    found = content.get(cache)
    if found is None and file is None:
        return None
    again = f"make it anew: `{_command(model, cache)}`"
    if content.get("format") != FORMAT or not isinstance(found, dict) or not _fits(cache, found):
        raise ModelLoadError(f"{path} holds no calibration of {cache} that this version reads; {again}")
    if content.get("network") != network_digest(model):
        raise ModelLoadError(f"{path} was measured on other weights than those of {model.name}; {again}")
    return found


def _fits(cache: str, found: Mapping[str, Any]) -> bool:
    """Whether an entry has numbers where the cache will look for them."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(v, int | float) for v in value)

    if cache == "teacache":
        return numbers(found.get("coefficients"))
    ratios = found.get("ratios")
    return isinstance(ratios, dict) and bool(ratios) and all(numbers(v) for v in ratios.values())


def write_calibration(model: ModelDir, cache: str, entry: Mapping[str, Any], file: str | Path | None = None) -> Path:
    """Write what was measured for one cache; what the file holds for another cache of the same weights stays.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = model.path / CALIBRATION if file is None else Path(file)
    content: dict[str, Any] = {"format": FORMAT, "network": network_digest(model)}
    if path_exists(path) and path.is_file():
        before = read_json(path)
        if all(before.get(k) == v for k, v in content.items()):
            content = before
    content[cache] = dict(entry)
    try:
        return write_text(path, json.dumps(content, indent=1) + "\n")
    except OutputError as error:
        raise ConfigError(f"{error}; give another file with --output") from error
