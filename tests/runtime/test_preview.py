"""Preview maps: the fit against the formula, their files, and previews among the events of a generator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinetoscope import VideoGenerator
from kinetoscope.cli import main
from kinetoscope.core.errors import InputError, ModelLoadError, OutputError
from kinetoscope.diffusion.noise import generator_for, randn
from kinetoscope.loading import resolve_model
from kinetoscope.media import write_video
from kinetoscope.media.preview import PreviewFile, strip
from kinetoscope.runtime.preview import FILE, fit_preview, load_preview_map, small_colours
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "fps": 8}
FLAGS = ["--size", "32x32", "--frames", "9", "--steps", "3", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a map beside it, fitted to its own videos."""
    path = make_tiny_wan(tmp_path_factory.mktemp("wan"))
    assert main(["fit-preview", str(path), "--prompt", "a red cat", "--prompt", "a blue circle", *FLAGS]) == 0
    return path


@pytest.fixture(scope="module")
def generator(tiny: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(tiny, device="cpu", dtype="float32")


# -- the fit ----------------------------------------------------------------------------------------------------------


def samples(count: int, channels: int = 5) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """Clips whose small colours are an affine function of their latents, but for rounding to eight bits."""
    weight, bias = 0.1 * randn((3, channels), generator_for(1)), torch.tensor([0.1, 0.0, -0.2])
    made: list[Any] = []
    for seed in range(count):
        latents = randn((channels, 3, 4, 6), generator_for(10 + seed))
        colours = torch.einsum("dc,cthw->dthw", weight, latents) + bias.view(3, 1, 1, 1)
        frames = colours.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 3, 0).repeat_interleave(8, 1)
        frames = frames.repeat_interleave(8, 2).to(torch.uint8).numpy()
        made.append((latents, np.concatenate([frames[:1], np.repeat(frames[1:], 4, 0)])))
    return made, weight, bias


def test_the_fit_finds_the_map_that_made_the_clips() -> None:
    made, weight, bias = samples(8)
    fit = fit_preview(made, temporal=4)
    torch.testing.assert_close(fit.preview_map.weight, weight, rtol=0, atol=2e-3)
    torch.testing.assert_close(fit.preview_map.bias, bias, rtol=0, atol=2e-3)
    assert fit.psnr > 50 and fit.clips == (6, 2)


def test_the_fit_is_the_least_squares_of_numpy() -> None:
    rng = np.random.default_rng(0)
    made = [
        (randn((4, 2, 3, 3), generator_for(i)), rng.integers(0, 256, (5, 12, 6, 3), dtype=np.uint8)) for i in range(5)
    ]
    fit = fit_preview(made, temporal=4)
    kept = [m for i, m in enumerate(made) if i % 4 != 1]
    x = np.concatenate([m[0].flatten(1).T.numpy() for m in kept])
    y = np.concatenate([small_colours(m[1], (2, 3, 3), 4).flatten(1).T.numpy() for m in kept])
    solution, *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)
    np.testing.assert_allclose(fit.preview_map.weight.numpy(), solution[:-1].T, atol=1e-5)
    np.testing.assert_allclose(fit.preview_map.bias.numpy(), solution[-1], atol=1e-5)


def test_channels_that_never_vary_do_no_harm() -> None:
    made, weight, _ = samples(6)
    more = [(torch.cat([z, torch.ones(2, *z.shape[1:])]), f) for z, f in made]
    fit = fit_preview(more, temporal=4)
    assert torch.isfinite(fit.preview_map.weight).all() and fit.psnr > 50
    torch.testing.assert_close(fit.preview_map.weight[:, :5], weight, rtol=0, atol=2e-3)


def test_small_colours_are_means_of_blocks() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    got = small_colours(frames, (2, 4, 3), 4)
    assert got.shape == (3, 2, 4, 3)
    assert got[1, 0, 2, 1] == pytest.approx(frames[0, 4:6, 2:4, 1].mean() / 127.5 - 1)
    assert got[2, 1, 3, 0] == pytest.approx(frames[1:5, 6:8, 0:2, 2].mean() / 127.5 - 1)
    for size in [(2, 3, 3), (2, 4, 4), (3, 4, 3)]:
        with pytest.raises(InputError, match="no whole blocks"):
            small_colours(frames, size, 4)


def test_one_clip_is_too_few() -> None:
    with pytest.raises(InputError, match="at least two clips"):
        fit_preview(samples(1)[0], temporal=4)


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_command_writes_beside_the_model_or_elsewhere(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((tiny / FILE).read_text())
    assert np.shape(record["weight"]) == (3, 16) and record["clips"] == {"fitted": 1, "scored": 1}
    for index in range(2):
        frames = np.random.default_rng(index).integers(0, 256, (7, 40, 48, 3), dtype=np.uint8)
        write_video(tmp_path / "clips" / f"{index}.mp4", frames, 8)
    other = tmp_path / "deep" / "map.json"
    assert main(["fit-preview", str(tiny), "--videos", str(tmp_path / "clips"), "-o", str(other), *FLAGS]) == 0
    assert capsys.readouterr().out.startswith(f"{other}  ")
    found = load_preview_map(resolve_model(str(tiny)), other)
    assert found.channels == 16
    assert not torch.equal(found.weight, load_preview_map(resolve_model(str(tiny))).weight)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "names no world"),
        (["--videos", "/nowhere"], "holds no .mp4"),
        (["--prompt", "a", "--videos", "x"], "one of"),
        (["--prompt", "a"], "at least two"),
        (["-o", "map.txt", "--prompt", "a"], "map.txt"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    tiny: Path, argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = (tiny / FILE).read_text()
    assert main(["fit-preview", str(tiny), *argv, *FLAGS]) == 1
    assert says in capsys.readouterr().err and (tiny / FILE).read_text() == before


def test_a_map_that_is_missing_broken_or_of_another_vae_is_refused(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    model = resolve_model(str(copy))
    record = json.loads((copy / FILE).read_text())
    for text, says in (
        ("{", "not valid JSON"),
        ("[]", "no preview map"),
        (json.dumps(record | {"format": 99}), "no preview map"),
        (json.dumps(record | {"weight": [[1.0]]}), "no preview map"),
        (json.dumps(record | {"vae_sha256": "0"}), "another VAE"),
    ):
        (copy / FILE).write_text(text)
        with pytest.raises(ModelLoadError, match=says):
            load_preview_map(model)
    (copy / FILE).unlink()
    with pytest.raises(ModelLoadError, match="kinetoscope fit-preview"):
        load_preview_map(model)


def test_the_embedded_model_ships_its_map() -> None:
    """If this fails after the model was replaced: `kinetoscope fit-preview tiny-t2v --clips 64`."""
    model = resolve_model("tiny-t2v")
    assert load_preview_map(model).channels == model.config("vae")["z_dim"]


def test_preview_files(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
    assert strip(frames).size == (3 * 120 + 4, 96) and strip(np.repeat(frames, 9, 0)).size == (8 * 120 + 14, 96)
    latest = PreviewFile(tmp_path / "new" / "a.png")
    latest.add(frames)
    assert Image.open(tmp_path / "new" / "a.png").size == (364, 96)
    moving = PreviewFile(tmp_path / "a.gif")
    moving.add(frames)
    moving.add(frames[:2] // 2)
    assert not (tmp_path / "a.gif").exists()
    moving.finish()
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 2 and image.size == (364, 96)  # type: ignore[attr-defined]
    PreviewFile(tmp_path / "b.gif").finish()
    assert {p.name for p in tmp_path.iterdir()} == {"new", "a.gif"}
    with pytest.raises(OutputError, match=r"\.png or \.gif"):
        PreviewFile(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match="cannot be written"):
        PreviewFile(Path("/proc/nowhere/a.png")).add(frames)


# -- among the events -------------------------------------------------------------------------------------------------


def previews(generator: VideoGenerator, prompt: Any, **more: Any) -> tuple[Any, list[Any], list[str]]:
    events: list[Any] = []
    result = generator.generate_video(prompt, on_event=events.append, **(SMALL | {"preview": True} | more))
    return result, [e for e in events if e.kind == "preview"], [e.kind for e in events]


def test_a_preview_follows_each_step_and_changes_nothing(generator: VideoGenerator) -> None:
    result, found, kinds = previews(generator, "a red cat", seed=3)
    assert [e.preview.step for e in found] == [0, 1, 2] and all(e.preview.clean and e.first == 0 for e in found)
    assert all(kinds[i - 1] == "step" for i, kind in enumerate(kinds) if kind == "preview")
    assert found[0].preview.frames.shape == (1, 3, 4, 4, 3)
    plain = generator.generate_video("a red cat", seed=3, **SMALL)
    assert torch.equal(plain.latents, result.latents)
    last = load_preview_map(generator.pipeline.model).frames(result.latents.unsqueeze(0))
    difference = np.abs(found[-1].preview.frames.astype(int) - last).max()
    assert difference <= 1  # the last step goes to its clean estimate


def test_previews_of_several_videos_know_theirs(generator: VideoGenerator) -> None:
    prompts = ["a red cat", "a blue circle", "a small square"]
    alone = [previews(generator, p, seed=i)[1] for i, p in enumerate(prompts)]
    for size in (1, 2, 3):
        _, found, _ = previews(generator, prompts, seed=[0, 1, 2], batch_size=size)
        shown: dict[int, list[Any]] = {0: [], 1: [], 2: []}
        for event in found:
            for offset, frames in enumerate(event.preview.frames):
                shown[event.first + offset].append(frames)
        for index, expected in enumerate(alone):
            assert len(shown[index]) == len(expected)
            for got, want in zip(shown[index], expected, strict=True):
                assert np.abs(got.astype(int) - want.preview.frames[0]).max() <= 1


def test_closing_a_run_with_previews_ends_it(generator: VideoGenerator) -> None:
    events = generator.iterate("a cat", preview=True, **SMALL)
    for event in events:
        if event.kind == "preview":
            break
    events.close()
    assert previews(generator, "a cat")[1]


def test_previews_need_a_map(tmp_path: Path, tiny: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / FILE).unlink()
    bare = VideoGenerator.from_pretrained(copy, device="cpu")
    with pytest.raises(ModelLoadError, match="fit-preview"):
        bare.generate_video("a cat", preview=True, **SMALL)
    found = previews(bare, "a cat", preview=tiny / FILE)[1]
    assert len(found) == 3


def test_generate_writes_previews(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(tiny), "-o", str(tmp_path / "out"), *FLAGS, "--preview", str(tmp_path / "p.gif")]
    assert main([*argv, "a cat"]) == 0
    with Image.open(tmp_path / "p.gif") as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert str(tmp_path / "p.gif") in capsys.readouterr().out
    assert main([*argv[:-1], str(tmp_path / "q.png"), "a cat", "--num-videos", "2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "p.gif", "q-0.png", "q-1.png"}
    assert main([*argv[:-1], str(tmp_path / "q.mp4"), "a cat"]) == 1
    assert "q.mp4" in capsys.readouterr().err
