"""Notices about runs that will disappoint: when they are given, once, and to whom."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kinetoscope import VideoGenerator
from kinetoscope.cli import main
from kinetoscope.core.types import SamplingParams
from kinetoscope.parallel import ParallelConfig
from kinetoscope.pipelines.catalogue import known_models
from kinetoscope.reference import embedded_models
from kinetoscope.runtime import notices as module
from kinetoscope.runtime.notices import NoticeEvent, notices, unknown_words
from kinetoscope.runtime.paper import PAPER, paper_pipeline
from kinetoscope.worlds import get_world
from pipelines.test_causal_wan import make_directory
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 1}
KNOWN = "a large red circle moving left on a navy background"


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> Iterator[None]:
    module._logged.clear()  # pyright: ignore[reportPrivateUsage]
    yield
    module._logged.clear()  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(scope="module")
def shapes() -> VideoGenerator:
    return VideoGenerator.from_pretrained("tiny-t2v", device="cpu")


def about(generator: VideoGenerator, prompt: str = KNOWN, **params: Any) -> dict[str, str]:
    """topic -> text of the notices."""
    asked = SamplingParams(**params).over(generator.defaults())
    return {n.topic: n.text for n in notices(generator.pipeline, asked, [prompt], ParallelConfig())}


def test_words_of_its_captions_are_known_to_an_embedded_model(shapes: VideoGenerator) -> None:
    captions = [spec.caption() for split in ("train", "heldout") for spec in get_world("shapes").captions(split)[::97]]
    captions += [get_world("shapes").sample(seed).caption for seed in range(50)]
    assert unknown_words(shapes.pipeline, captions) == []


def test_unknown_words_are_named_with_the_nearest_known_one(shapes: VideoGenerator) -> None:
    text = about(shapes, "a Red dragon, a sqare and a (large) circle moving left.")["words"]
    assert text == (
        "tiny-t2v does not know 'Red' (red?), 'dragon', 'sqare' (square?); "
        "it was trained on the captions of the world 'shapes' alone"
    )
    assert "and 4 more" in about(shapes, "one two three four five six seven eight nine ten")["words"]


@pytest.mark.parametrize(
    ("params", "topic", "says"),
    [
        ({"height": 128, "width": 128}, "size", "128x128 pixels: tiny-t2v was trained at 64x64"),
        ({"height": 32, "width": 64}, "size", "32x64 pixels"),
        ({"num_frames": 81}, "length", "81 frames: tiny-t2v was trained at 33"),
        ({"height": 96, "width": 96, "num_frames": 81}, "size", "96x96 pixels and 81 frames"),
        ({"num_inference_steps": 201}, "steps", "201 steps: .*default of tiny-t2v is 30"),
    ],
)
def test_request_far_from_training_is_told_with_what_it_costs(
    shapes: VideoGenerator, params: dict[str, Any], topic: str, says: str
) -> None:
    found = about(shapes, **params)
    assert list(found) == [topic] and re.match(says, found[topic])
    if topic != "steps":
        assert " s, " in found[topic].partition(". Estimate: ")[2] and found[topic].endswith(" MiB")


@pytest.mark.parametrize("params", [{}, {"num_frames": 17}, {"height": 64, "width": 80}, {"num_inference_steps": 200}])
def test_usual_request_gets_no_notice(shapes: VideoGenerator, params: dict[str, Any]) -> None:
    assert about(shapes, **params) == {}


@pytest.mark.parametrize("name", [n for n in PAPER if n.startswith("Wan-AI/")])
def test_published_models_are_far_only_from_sizes_they_were_not_trained_at(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_cost", lambda *args: "")  # shown by another test; it takes a second
    with paper_pipeline(name) as pipeline:
        sizes = {(480, 832): False, (704, 1280): False, (96, 160): True}
        for (height, width), far in sizes.items():
            asked = SamplingParams(height=height, width=width).over(pipeline.defaults())
            found = notices(pipeline, asked, ["any words"], ParallelConfig())
            assert [n.topic for n in found] == (["size"] if far else []), (name, height)


def test_estimate_of_a_large_model_is_in_minutes() -> None:
    with paper_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") as pipeline:
        asked = SamplingParams(num_frames=241).over(pipeline.defaults())
        (notice,) = notices(pipeline, asked, [], ParallelConfig())
    assert notice.topic == "length" and " minutes, " in notice.text and notice.text.endswith(" GiB")


def test_models_that_go_on_have_no_length(tmp_path: Path) -> None:
    path = make_directory(tmp_path / "causal")
    defaults = {"height": 32, "width": 48, "num_frames": 9}
    (path / "kinetoscope.json").write_text(json.dumps({"defaults": defaults}))
    generator = VideoGenerator.from_pretrained(path, device="cpu")
    assert about(generator, height=32, width=48, num_frames=105) == {}
    assert list(about(generator, height=128, width=128, num_frames=9)) == ["size"]


def test_model_of_unknown_training_gets_no_notice_of_size(tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(make_tiny_wan(tmp_path / "wan"), device="cpu")
    assert about(generator, "a dragon", height=32, width=32, num_frames=105) == {}


def test_notice_is_an_event_of_every_run_and_logged_once(
    shapes: VideoGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Any] = []
    with caplog.at_level(logging.INFO, "kinetoscope.notices"):
        for seed in (0, 1):
            shapes.generate_video("a red dragon", seed=seed, on_event=events.append, **SMALL)
    told = [e for e in events if isinstance(e, NoticeEvent)]
    assert [e.topic for e in told] == ["words", "words"] and events[0] is told[0]
    assert [r.getMessage() for r in caplog.records if r.name == "kinetoscope.notices"] == [f"note: {told[0].text}"]


def test_run_closed_at_its_notice_leaves_nothing(shapes: VideoGenerator, tmp_path: Path) -> None:
    run = shapes.iterate("a red dragon", output_path=tmp_path / "a.mp4", **SMALL)
    assert next(run).kind == "notice"
    run.close()
    assert not list(tmp_path.iterdir())


def test_command_logs_a_note_once_and_none_when_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts").write_text("a red dragon\na blue dragon\n")
    argv = ["generate", "--prompts-file", str(tmp_path / "prompts"), "-o", str(tmp_path / "out"), "--steps", "1"]
    argv += ["--frames", "5", "--size", "64x64", "--device", "cpu"]
    assert main(argv) == 0
    assert [r.getMessage() for r in caplog.records] == [
        "note: tiny-t2v does not know 'dragon'; it was trained on the captions of the world 'shapes' alone"
    ]
    module._logged.clear()  # pyright: ignore[reportPrivateUsage]
    caplog.clear()
    assert main([*argv, "--quiet"]) == 0
    assert capsys.readouterr().err == "" and not caplog.records


def test_defaults_of_every_model_get_no_notice() -> None:
    embedded = embedded_models()
    for model in known_models():
        if model.name in embedded:
            generator = VideoGenerator.from_pretrained(model.name, device="cpu")
            assert about(generator, KNOWN if "t2v" in model.tasks else "(none)") == {}, model.name
