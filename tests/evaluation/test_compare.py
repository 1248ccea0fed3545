"""Scores, summaries and verdicts of pairs of videos, their JSON and their HTML page."""

from __future__ import annotations

import io
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.evaluation.compare import Comparison, Pair, Thresholds, compare_videos
from kinetoscope.evaluation.metrics import judge, latent_difference, lpips_distance, named_attributes, psnr
from kinetoscope.evaluation.pictures import heat_map, side_by_side
from kinetoscope.evaluation.report import html_report
from kinetoscope.worlds import get_world

Array = np.ndarray[Any, Any]


def noise(seed: int, shape: tuple[int, ...] = (5, 24, 32, 3)) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def nudged(frames: Array, by: int = 3) -> Array:
    return np.clip(frames.astype(int) + by, 0, 255).astype(np.uint8)


def pair(name: str, a: Array, b: Array, **more: Any) -> Pair:
    return Pair(name, compare_videos(a, b), **more)


def test_psnr_is_the_formula() -> None:
    a, b = noise(0), noise(1)
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    scores = compare_videos(a, b)
    assert scores.error == pytest.approx(error, rel=1e-12)
    assert scores.psnr == pytest.approx(20 * math.log10(255) - 10 * math.log10(error))
    assert scores.largest == np.abs(a.astype(int) - b).max()
    assert psnr(0) == math.inf


def test_equal_videos_pass_everything_and_the_json_is_json() -> None:
    a = noise(2)
    runs = [({"denoising": 2.0}, {"denoising": 2.0})]
    one = pair("p", a, a, runs=runs, latents=(0.0, 0.0), peaks=(100, 100), judged=({"colour": True}, {"colour": True}))
    comparison = Comparison(("", "cfg=batched"), [one])
    tight = Thresholds(1, 1, 200, None, 0, 0, 0, 1, 1)
    assert comparison.failures(tight) == []
    text = json.dumps(comparison.as_json(tight), allow_nan=False)
    report = json.loads(text, parse_constant=lambda token: pytest.fail(token))
    assert report["verdict"] == "pass"
    assert report["measures"]["ssim"] == {"mean": 1.0, "worst": 1.0}
    assert report["measures"]["psnr"] == {"mean": None, "worst": None}
    assert report["pairs"][0]["identical"] is True and report["pairs"][0]["ssim"] == 1.0
    page = html_report(comparison, tight, {"p": side_by_side(a, a)})
    assert "equal, bit for bit" in page and "pass" in page and page.count("<img") == len(side_by_side(a, a).frames)


def test_one_equal_pair_does_not_hide_another() -> None:
    a = noise(3)
    comparison = Comparison(("", ""), [pair("same", a, a), pair("other", a, nudged(a, 40))])
    measures = comparison.measures()
    assert math.isfinite(measures["psnr"]["mean"])
    assert measures["psnr"]["worst"] == pytest.approx(comparison.pairs[1].scores.psnr)  # type: ignore[union-attr]
    assert measures["ssim"]["worst"] < measures["ssim"]["mean"] < 1
    assert comparison.failures(Thresholds(min_psnr=measures["psnr"]["worst"] + 0.1)) != []
    assert comparison.failures(Thresholds(min_psnr=measures["psnr"]["worst"] - 0.1)) == []


LIMITS: list[tuple[str, float, float]] = [  # limit, a value that passes, one that does not
    ("min_ssim", 0.5, 0.999999),
    ("min_ms_ssim", 0.5, 0.999999),
    ("min_psnr", 20, 60),
    ("max_latent_diff", 0.4, 0.2),
    ("max_flicker_rise", 30, -200),
    ("max_score_drop", 0.6, 0.4),
    ("max_slowdown", 1.6, 1.4),
    ("max_memory", 2.1, 1.9),
]


@pytest.mark.parametrize(("limit", "good", "bad"), LIMITS)
def test_every_limit_counts(limit: str, good: float, bad: float) -> None:
    a = noise(4)
    one = pair(
        "p", a, nudged(a), runs=[({"d": 2.0}, {"d": 3.0})], latents=(0.3, 0.1), peaks=(50, 100),
        judged=({"colour": True, "shape": True}, {"colour": True, "shape": False}),
    )  # fmt: skip
    comparison = Comparison(("", ""), [one])
    assert comparison.failures(Thresholds(**{limit: good})) == []
    assert len(comparison.failures(Thresholds(**{limit: bad}))) == 1


def test_ssim_is_asked_where_nothing_is_and_only_there() -> None:
    a = noise(5)
    comparison = Comparison(("", ""), [pair("p", a, noise(6))])
    assert "below 0.95" in comparison.failures(Thresholds())[0]
    assert comparison.failures(Thresholds(max_flicker_rise=1000)) == []
    with pytest.raises(ConfigError, match="max_slowdown"):
        Thresholds(max_slowdown=float("nan")).asked()


def test_a_limit_without_a_measure_fails() -> None:
    a = noise(7, (2, 8, 8, 3))
    comparison = Comparison(("", ""), [pair("p", a, a)])
    assert "smaller than its window of 11 pixels" in comparison.failures(Thresholds())[0]
    assert comparison.failures(Thresholds(min_psnr=30)) == []
    assert "nothing to measure" in comparison.failures(Thresholds(max_flicker_rise=1))[0]  # two frames have no flicker
    assert "nothing to measure" in comparison.failures(Thresholds(max_slowdown=2))[0]


def test_a_problem_fails_whatever_the_scores() -> None:
    a = noise(8)
    comparison = Comparison(("", ""), [pair("fine", a, a), Pair("broken", problem="not a video")])
    assert comparison.failures(Thresholds(min_ssim=0)) == ["broken: not a video"]
    page = html_report(comparison, Thresholds(min_ssim=0), {"fine": side_by_side(a, a)})
    assert "not a video" in page


def test_times_are_medians_over_pairs() -> None:
    a = noise(9)
    runs = [({"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 1.0}), ({"x": 1.0, "y": 1.0}, {"x": 9.0, "y": 1.0})]
    runs += [({"x": 10.0, "y": 1.0}, {"x": 11.0})]
    time = Comparison(("", ""), [pair("p", a, a, runs=runs)]).time()
    assert time["x"] == {"a": 1.0, "b": 9.0, "ratio": 2.0}
    assert time["y"] == {"a": 1.0, "b": 1.0, "ratio": 1.0}
    assert time["total"] == {"a": 2.0, "b": 10.0, "ratio": 1.5}


def test_latents_in_their_own_spread() -> None:
    a = torch.tensor([[1.0, 3.0]])
    assert latent_difference(a, a + torch.tensor([[0.0, 2.0]])) == pytest.approx((2**0.5, 1.0))
    flat = torch.ones(4)
    assert latent_difference(flat, flat) == (0.0, 0.0)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("A Red circle, moving left.", {"colour": "red", "shape": "circle", "motion": "moving left"}),
        ("a star circling counterclockwise on a white background",
         {"shape": "star", "motion": "circling counterclockwise", "background": "white"}),
        ("a circle beside a square", {}),
        ("moving upwards", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_named_attributes(prompt: str, named: dict[str, str]) -> None:
    assert named_attributes(get_world("shapes"), prompt) == named


def test_judge_reads_what_was_named() -> None:
    world = get_world("shapes")
    spec = world.captions("heldout")[5]
    frames = world.render(spec, 3)
    assert all(judge(world, spec.caption(), frames).values()) and len(judge(world, spec.caption(), frames)) == 5
    other = "red" if spec.colour != "red" else "blue"
    assert judge(world, f"a {other} {spec.shape}", frames) == {"colour": False, "shape": True}
    assert judge(world, "something else", frames) == {}


# -- LPIPS ------------------------------------------------------------------------------------------------------------


def test_lpips_needs_its_package_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which is not a dependency."""
    network = SimpleNamespace(eval=lambda: lambda x, y: (x - y).abs().mean((1, 2, 3), keepdim=True))
    module = ModuleType("lpips")
    module.__spec__ = SimpleNamespace(name="lpips")  # type: ignore[assignment]
    module.LPIPS = lambda **settings: network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert lpips_distance(tmp_path) == (None, "the package lpips is not installed")
    monkeypatch.setitem(sys.modules, "lpips", module)
    distance, why = lpips_distance(tmp_path)
    assert distance is None and "weights are not on this machine" in why
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    distance, _ = lpips_distance(tmp_path)
    assert distance is not None
    a = noise(10, (11, 4, 4, 3))  # more frames than one batch
    assert distance(a, a) == 0
    assert distance(a, 255 - a) == pytest.approx(np.abs(2 * a.astype(float) - 255).mean() / 127.5, rel=1e-5)
    scores = compare_videos(noise(11), noise(12), distance)
    assert scores.lpips is not None and Comparison(("", ""), [Pair("p", scores)]).failures(Thresholds(max_lpips=0.01))


# -- pictures and page ------------------------------------------------------------------------------------------------


def test_heat_rises_in_lightness_and_clips() -> None:
    light = heat_map(np.linspace(-0.5, 1.5, 41)).astype(int).sum(-1)
    assert (np.diff(light) >= 0).all() and light[0] == light[10] < light[30] == light[-1]


def test_pictures_show_the_worst_frame() -> None:
    a = noise(13, (30, 16, 400, 3))
    b = a.copy()
    b[17] = 255 - b[17]
    shown = side_by_side(a, b)
    assert 17 in shown.frames and len(shown.frames) == len(shown.a) == len(shown.heat) == 6
    assert shown.size == (10, 256) and shown.brightest > 100
    assert shown.moving is not None
    with Image.open(io.BytesIO(shown.moving)) as moving:
        assert moving.size == (3 * 256 + 8, 10)
        stacked = np.asarray(moving.convert("RGB")).astype(int)
        assert np.abs(stacked[:, :256] - stacked[:, 260:516]).mean() < 10  # A beside B, alike at first
    single = side_by_side(a[:1], b[:1])
    assert single.frames == (0,) and single.moving is None


class _Page(HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    a = noise(14)
    pairs = [pair(f"<b>{i}</b>", a, noise(i), latents=(1.0, 0.5), runs=[({"d": 1.0}, {"d": 0.5})]) for i in range(14)]
    comparison = Comparison(("", 'x="<script>"'), pairs, {"device": "cpu", "versions": {"torch": "2"}}, ["LPIPS: none"])
    page = html_report(comparison, Thresholds(), {p.name: side_by_side(a, nudged(a)) for p in pairs})
    parser = _Page()
    parser.feed(page)
    assert parser.open == [] and len(parser.sources) == 12 * (3 * 5 + 1)  # pictures of twelve pairs
    assert all(s.startswith("data:image/") for s in parser.sources)
    assert "<script" not in page and "<b>0</b>" not in page and "http" not in page
    assert "2 more without pictures" in page and "2.00x as fast" in page


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="5 frames against 4"):
        compare_videos(noise(0), noise(0)[:4])
