"""Make a video again from the record inside it, and say whether it is the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import InputError, ModelLoadError
from kinetoscope.media import check_output, read_metadata, write_video
from kinetoscope.runtime.generator import GenerationResult, RunEvent, VideoGenerator
from kinetoscope.runtime.record import FORMAT, frames_digest, versions


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay found.

    Attributes:
        identical: the frames are the recorded ones, bit for bit.
        differences: what differs between then and now (software versions), one line each.
        result: the video made now.
    """

    identical: bool
    differences: tuple[str, ...]
    result: GenerationResult


def check_repeatable(path: str | Path, record: Mapping[str, Any]) -> None:
    """Refuse a record that does not hold all of its request.

    Raises:
        InputError: another format; or something was given by a program: pictures, hooks, a changed pipeline.
    """
    if record.get("format") != FORMAT:
        raise InputError(f"{path}: its replay record has format {record.get('format')!r}; this version reads {FORMAT}")
    digests = [n for n, v in record["params"].get("extra", {}).items() if str(v).lstrip("['").startswith("sha256:")]
    if outside := [*record["given"], *digests]:
        names = ", ".join(outside)
        raise InputError(f"{path} was made with {names} of the request, which the file does not hold")
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
    on_event: Callable[[RunEvent], None] | None = None,
) -> ReplayReport:
    """Make the video of `path` again, with its settings and thread count.

    Args:
        path: an mp4 written by this package.
        output_path: where to write the new one; None writes nothing.
        model: where the model is now, when it is no longer where the record says.
        on_event: as for `generate_video`.

    Raises:
        InputError: the file has no record, or one that cannot be repeated (something was given by a program).
        ModelLoadError: the model is gone or its weights have changed.
    """
    if output_path is not None:
        check_output(output_path)
    record = read_metadata(path)
    check_repeatable(path, record)
    generator = VideoGenerator.from_pretrained(
        model or record["model"],
        device=record["device"],
        dtype=record["dtype"],
        threads=record["threads"],
        **record["options"],
    )
    found, recorded = generator.pipeline.model.fingerprint(), record["model_hash"]
    if found != recorded:
        raise ModelLoadError(
            f"{path}: the files of model {record['model']} have changed since (hash {recorded[:12]} then, {found[:12]} "
            "now); give the old ones with --model"
        )
    params: dict[str, Any] = {k: v for k, v in record["params"].items() if k != "negative_prompt"}
    params |= params.pop("extra", {})
    group = record["batch"]
    count = len(group["prompts"])
    results = generator.generate_video(
        group["prompts"],
        group["negative_prompts"],
        seed=group["seeds"],
        batch_size=count,
        on_event=on_event,
        **params,
    )
    result = results[group["index"]]
    if output_path is not None:
        assert result.params.fps is not None
        write_video(output_path, result.frames, result.params.fps, metadata=result.record)
    now = versions()
    differences = tuple(
        f"{name}: {then} then, {now.get(name)} now"
        for name, then in record["versions"].items()
        if now.get(name) != then
    )
    return ReplayReport(frames_digest(result.frames) == record["frames_sha256"], differences, result)
