"""Names of videos: readable in every script, short, and different for different prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinetoscope.core.errors import InputError, OutputError
from kinetoscope.runtime.output_names import file_stem, output_paths, slug


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red, circle!", "a-red-circle"),
        ("日本の海", "日本の海"),
        ("Ёлка и снег", "ёлка-и-снег"),
        ("नमस्ते दुनिया", "नमस्ते-दुनिया"),
        ("🎬🔥", "video"),
        ("../../etc/passwd", "etc-passwd"),
        ("snake_case", "snake-case"),
        ("x" * 60, "x" * 48),
        ("红" * 60, "红" * 32),
        ("a large red circle moving left on a navy background", "a-large-red-circle-moving-left-on-a-navy"),
    ],
)
def test_slug_keeps_the_words_of_every_script(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_file_stem_has_a_digest_where_the_slug_does_not_tell_the_prompt() -> None:
    assert file_stem("a red circle") == "a-red-circle" and file_stem("红色圆圈") == "红色圆圈"
    alike = ["a red circle!", "A red circle", "a red  circle", "a-red-circle", "a red circle\0", "\ud800", "🎬", "🎬🎬"]
    alike += ["a cinematic wide shot of an old lighthouse on a cliff at dusk, " + end for end in ("storm", "calm sea")]
    stems = [file_stem(prompt) for prompt in ["a red circle", *alike]]
    assert len(set(stems)) == len(stems) and all("_" in s and len(s) < 64 for s in stems[1:])


def test_videos_of_other_prompts_do_not_share_a_file(tmp_path: Path) -> None:
    prompts = [
        "红色圆圈向左移动",
        "蓝色方块向上移动",
        "красный круг",
        "синий квадрат",
        "🎬🔥",
        "🌊",
        "a cat 1",
        "a cat",
    ]
    paths = [output_paths(tmp_path, [p], [s], one=True)[0] for p in prompts for s in (0, 10)]
    assert len(set(paths)) == len(paths)


def test_a_given_name_is_kept_and_two_videos_need_two(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "a.mp4", ["a"], [0], one=True) == [tmp_path / "a.mp4"]
    (tmp_path / "v1.5").mkdir()
    assert output_paths(tmp_path / "v1.5", ["a"], [0], one=True) == [tmp_path / "v1.5" / "a-0.mp4"]
    for given in (["a.mp4", "a.mp4"], ["a.mp4", "./x/../a.mp4"], [str(Path.cwd() / "a.mp4"), "a.mp4"]):
        with pytest.raises(InputError, match="same file"):
            output_paths(given, ["a", "b"], [0, 0], one=False)


@pytest.mark.parametrize(
    "output",
    ["a\0b.mp4", "n" * 256 + ".mp4", "n" * 300, "a\0b", "\ud800.mp4", "d" * 300 + "/a.mp4", "a.avi", "a.mp4/"],
)  # fmt: skip
def test_names_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if output == "a.mp4/":
        (tmp_path / "a.mp4").mkdir()
    for one in (True, False):
        with pytest.raises((OutputError, InputError)):
            output_paths(output if one else [output], ["a"], [0], one=one)
    assert [p.name for p in tmp_path.iterdir()] == (["a.mp4"] if output == "a.mp4/" else [])
