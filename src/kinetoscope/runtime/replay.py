"""Make a video again from the record inside it, and say whether it is the same."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError, ModelLoadError
from kinetoscope.core.extensions import load_extensions, missing_extensions
from kinetoscope.loading.directory import file_digest
from kinetoscope.loading.resolve import HUB_ID
from kinetoscope.media import check_output, read_metadata, read_video, write_video
from kinetoscope.reference import embedded_models
from kinetoscope.runtime.caches import with_calibration
from kinetoscope.runtime.generator import GenerationResult, RunEvent, VideoGenerator
from kinetoscope.runtime.record import FILE, READ, frames_digest, versions

SLACK = 1.0
"""Decibels that a video to rounding may be further from the file's frames than its own encoding is."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay found.

    Attributes:
        identical: the frames are the recorded ones, bit for bit.
        differences: what differs between then and now (software versions), one line each.
        result: the video made now.
        joined: videos that were computed together with the recorded one, itself included.
        psnr: of the new frames against those decoded from the file, in dB; None where it was not needed.
        to_rounding: the new frames are as near to the file's as their own encoding is.
    """

    identical: bool
    differences: tuple[str, ...]
    result: GenerationResult
    joined: int = 1
    psnr: float | None = None
    to_rounding: bool = False

    @property
    def same(self) -> bool:
        """Return whether the video is the recorded one: bit for bit, or to rounding if others were made with it."""
        return self.identical or (self.joined > 1 and self.to_rounding)


def check_repeatable(path: str | Path, record: Mapping[str, Any]) -> None:
    """Refuse a record that does not hold all of its request.

    Raises:
        InputError: another format; or something was given by a program: pictures, hooks, a changed pipeline;
            or an extension that this process has not loaded.
    """
    if record.get("format") not in READ:
        known = " and ".join(map(str, READ))
        raise InputError(f"{path}: its replay record has format {record.get('format')!r}; this version reads {known}")
    extra = record["params"].get("extra") or {}
    digests = [n for n, v in extra.items() if str(v).lstrip("['").startswith("sha256:")]
    if outside := [*record["given"], *digests]:
        names = ", ".join(outside)
        raise InputError(
            f"{path} was made with {names} of the request, which the file does not hold; so it cannot "
            "be replayed: make it again as it was made, and give the same"
        )
    load_extensions()
    if missing := missing_extensions(record.get("extensions", [])):
        modules = " ".join(f"--import {name.partition(' ')[0]}" for name in missing)
        raise InputError(
            f"{path} was made with {', '.join(missing)}, which this process has not loaded; install the package, and "
            f"name it: kinetoscope {modules} replay FILE (in Python: load_extensions)"
        )
    if changed := record.get("changed"):
        raise InputError(
            f"{path} was made with a pipeline that a program had changed, and the file does not hold how: "
            f"{', '.join(changed)}"
        )
    if record["interceptors"]:
        names = ", ".join(record["interceptors"])
        raise InputError(f"{path} was made with hooks of a program, which the file does not hold: {names}")


def replay(
    path: str | Path,
    output_path: str | Path | None = None,
    *,
    model: str | None = None,
    files: str | Path | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
) -> ReplayReport:
    """Make the video of `path` again, with its settings and thread count.

    A record names files (LoRAs, calibrations of caches, a model's folder) without their folder. They are looked for in
    `files`, then beside the video, in the current folder and in the model's.

    Args:
        path: an mp4 written by this package.
        output_path: where to write the new one; None writes nothing.
        model: where the model is now, when it is not where the record says.
        files: a folder that holds the files which the record names.
        on_event: as for `generate_video`.

    Raises:
        InputError: the file has no record, or one that cannot be repeated (something was given by a program).
        ModelLoadError: the model or a file is not found, or has changed.
    """
    if output_path is not None:
        check_output(output_path)
    record = read_metadata(path)
    check_repeatable(path, record)
    places = [*([Path(files)] if files is not None else []), Path(path).resolve().parent, Path.cwd()]
    name = model or _model_of(record, places)
    if Path(name).is_dir():
        places.append(Path(name))
    generator = VideoGenerator.from_pretrained(
        name,
        device=record["device"],
        dtype=record["dtype"],
        threads=record["threads"],
        **_found_options(record["options"], places),
    )
    with generator:
        found, recorded = generator.pipeline.model.fingerprint(), record["model_hash"]
        if found != recorded:
            raise ModelLoadError(
                f"{path}: the files of model {record['model']} have changed since (hash {recorded[:12]} then, "
                f"{found[:12]} now); give the old ones with --model"
            )
        result = _made_again(generator, record, places, on_event)
    if output_path is not None:
        assert result.params.fps is not None
        write_video(output_path, result.frames, result.params.fps, metadata=result.record)
    now: dict[str, str | None] = {**versions(), **{e.module: e.version for e in load_extensions()}}
    before = {**record["versions"], **{e["module"]: e["version"] for e in record.get("extensions", [])}}
    differences = tuple(
        f"{name}: {then} then, {now.get(name)} now" for name, then in before.items() if now.get(name) != then
    )
    joined = int(record.get("joined", 1))
    if frames_digest(result.frames) == record["frames_sha256"]:
        return ReplayReport(True, differences, result, joined)
    psnr, near = _compare(Path(path), result)
    return ReplayReport(False, differences, result, joined, psnr, near)


def _made_again(
    generator: VideoGenerator,
    record: Mapping[str, Any],
    places: Sequence[Path],
    on_event: Callable[[RunEvent], None] | None,
) -> GenerationResult:
    params: dict[str, Any] = {k: v for k, v in record["params"].items() if k != "negative_prompt"}
    for name, value in (params.pop("extra", None) or {}).items():
        is_file = isinstance(value, Mapping) and set(value) == {FILE, "sha256"}
        params[name] = _found(value[FILE], name, value["sha256"], places) if is_file else value
    if record["format"] == 2:  # it holds its whole batch
        group = record["batch"]
        results = generator.generate_video(
            group["prompts"],
            group["negative_prompts"],
            seed=group["seeds"],
            batch_size=len(group["prompts"]),
            on_event=on_event,
            **params,
        )
        return results[group["index"]]
    negative = negative_of(record)
    return generator.generate_video(record["prompt"], negative, seed=record["seed"], on_event=on_event, **params)


def negative_of(record: Mapping[str, Any]) -> str:
    """Return the negative prompt of a recorded video."""
    if record["format"] == 2:
        return record["batch"]["negative_prompts"][record["batch"]["index"]]
    return record["negative_prompt"]


def _model_of(record: Mapping[str, Any], places: Sequence[Path]) -> str:
    """Return what opens the recorded model: its folder in one of the places, or its embedded name or hub id.

    Raises:
        ModelLoadError: the record names a folder that is in none of the places.
    """
    name: str = record["model"]
    if found := next((place / name for place in places if (place / name).is_dir()), None):
        return str(found)
    if name not in embedded_models() and not HUB_ID.fullmatch(name) and not Path(name).is_absolute():
        raise ModelLoadError(
            f"model {name!r} (hash {record['model_hash'][:12]}) is in none of {_listed(places)}; a record "
            "holds no path, so give the model's folder with --model"
        )
    return name


def _found_options(options: Mapping[str, Any], places: Sequence[Path]) -> dict[str, Any]:
    """Return the recorded options with the paths at which the files are now.

    Raises:
        ModelLoadError: a file is in none of the places.
    """
    kept = dict(options)
    kept["lora"] = [
        {**lora, "path": _found(lora["path"], f"LoRA {lora['name']}", lora.get("sha256"), places)}
        for lora in options.get("lora") or ()
    ]
    if options.get("cache"):
        kept["cache"] = with_calibration(
            options["cache"], lambda file: _found(file, "the calibration of the step cache", None, places)
        )
    return kept


def _found(name: str, what: str, sha256: str | None, places: Sequence[Path]) -> str:
    """Return the path of a recorded file.

    Raises:
        ModelLoadError: it is in none of the places, or has changed.
    """
    candidates = [Path(name)] if Path(name).is_absolute() else [place / name for place in places]
    there = [path for path in candidates if path.exists()]
    fitting = [path for path in there if sha256 is None or not path.is_file() or file_digest(path) == sha256]
    if fitting:
        return str(fitting[0])
    if there:
        found = file_digest(there[0])
        raise ModelLoadError(f"{what}: {there[0]} has changed since (hash {sha256!s:.12} then, {found[:12]} now)")
    digest = f" (SHA-256 {sha256[:12]})" if sha256 else ""
    raise ModelLoadError(f"{what}: no file {name!r}{digest} in {_listed(places)}; give its folder with --files")


def _listed(places: Sequence[Path]) -> str:
    """Return the folders that were searched, each once."""
    return ", ".join(dict.fromkeys(str(place.resolve()) for place in places))


def _compare(path: Path, result: GenerationResult) -> tuple[float | None, bool]:
    """Return the PSNR of new frames against those decoded from the file, and whether rounding explains it.

    The file's frames are encoded with losses. So the new frames are encoded and decoded too: a video that is the same
    to rounding is as far from the file's frames as from those.
    """
    then, _ = read_video(path)
    if then.shape != result.frames.shape:
        return None, False
    assert result.params.fps is not None
    with tempfile.TemporaryDirectory() as folder:
        encoded, _ = read_video(write_video(Path(folder) / "new.mp4", result.frames, result.params.fps))
    found = _psnr(result.frames, then)
    return found, found >= _psnr(result.frames, encoded) - SLACK


def _psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the PSNR of uint8 arrays in dB."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
