"""The Python API: results, events, batches, cancel, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import (
    CompositionError,
    ConfigError,
    InputError,
    KinetoscopeError,
    ModelLoadError,
    OutputError,
)
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.protocols import Event
from kinetoscope.media import read_video
from kinetoscope.pipelines.composed import StageEvent
from kinetoscope.pipelines.stages.base import Stage
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "fps": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def generator(tiny: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(tiny, device="cpu")


def test_one_prompt_gives_one_result(generator: VideoGenerator, tmp_path: Path) -> None:
    result = generator.generate_video("a red cat", seed=4, output_path=tmp_path / "a.mp4", **SMALL)
    assert result.frames.shape == (5, 32, 32, 3) and result.frames.dtype == np.uint8
    assert result.latents.shape == (16, 2, 4, 4) and result.latents.dtype == torch.float32
    assert result.path == tmp_path / "a.mp4" and result.seed == 4
    assert {"validation", "text_encoding", "denoising", "decoding", "writing"} <= set(result.timings)
    frames, fps = read_video(result.path)
    assert frames.shape == result.frames.shape and fps == 8


def test_same_seed_same_bytes(generator: VideoGenerator, tmp_path: Path) -> None:
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    results = [generator.generate_video("a cat", seed=1, output_path=p, **SMALL) for p in paths]
    assert torch.equal(results[0].latents, results[1].latents)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    other = generator.generate_video("a cat", seed=2, **SMALL)
    assert not torch.allclose(other.latents, results[0].latents)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_alone_equals_in_a_batch(generator: VideoGenerator, guidance: float) -> None:
    prompts = ["a red cat", "a blue circle moving left on black", "a"]
    fields = SMALL | {"num_inference_steps": 8, "guidance_scale": guidance}
    together = generator.generate_video(prompts, seed=[1, 2, 3], batch_size=3, **fields)
    for prompt, seed, result in zip(prompts, [1, 2, 3], together, strict=True):
        alone = generator.generate_video(prompt, seed=seed, **fields)
        assert (alone.latents - result.latents).abs().max() <= 1e-4 * alone.latents.std()


def test_batches_of_any_size_give_the_same_list(generator: VideoGenerator, tmp_path: Path) -> None:
    prompts = ["a cat", "a circle", "a square"]
    two = generator.generate_video(prompts, batch_size=2, output_path=tmp_path, **SMALL)
    assert [r.path.name for r in two] == ["0-a-cat-0.mp4", "1-a-circle-0.mp4", "2-a-square-0.mp4"]
    one = generator.generate_video(prompts, batch_size=1, **SMALL)
    for a, b in zip(one, two, strict=True):
        assert (a.latents - b.latents).abs().max() <= 1e-4 * a.latents.std()


def test_events_arrive_in_order(generator: VideoGenerator) -> None:
    events: list[Any] = []
    generator.generate_video("a cat", on_event=events.append, **SMALL)
    stages = [e.stage for e in events if isinstance(e, StageEvent) and e.kind == "stage_end"]
    assert stages == ["validation", "text_encoding", "timesteps", "latents", "noised_video", "denoising", "decoding"]
    steps = [e.step.index for e in events if isinstance(e, Event) and e.kind == "step"]
    assert steps == [0, 1, 2]


def test_iterate_yields_results_at_the_end(generator: VideoGenerator) -> None:
    events = generator.iterate("a cat", seed=5, **SMALL)
    while True:
        try:
            next(events)
        except StopIteration as stop:
            results = stop.value
            break
    assert torch.equal(results[0].latents, generator.generate_video("a cat", seed=5, **SMALL).latents)


def test_closing_cancels_and_leaves_no_file(generator: VideoGenerator, tmp_path: Path) -> None:
    events = generator.iterate("a cat", output_path=tmp_path / "a.mp4", **SMALL)
    for event in events:
        if event.kind == "step":
            break
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_interleave(generator: VideoGenerator) -> None:
    alone = [generator.generate_video("a cat", seed=s, **SMALL).latents for s in (1, 2)]
    runs = [generator.iterate("a cat", seed=s, **SMALL) for s in (1, 2)]
    results: list[Any] = [None, None]
    while any(r is None for r in results):
        for i, run in enumerate(runs):
            if results[i] is None:
                try:
                    next(run)
                except StopIteration as stop:
                    results[i] = stop.value[0].latents
    assert all(torch.equal(a, b) for a, b in zip(alone, results, strict=True))


def test_no_grad_does_not_leak_out_of_a_paused_run(generator: VideoGenerator) -> None:
    events = generator.iterate("a cat", **SMALL)
    for event in events:
        assert torch.is_grad_enabled()
        if event.kind == "step":
            break
    events.close()


def test_perf_logging_and_trace(tiny: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", perf_logging=True)
    result = generator.generate_video("a cat", trace=True, guidance_scale=3.0, **SMALL)
    assert len(result.logging_info["denoising_perf"]["steps_ms"]) == 3
    assert [r["rows"] for r in result.logging_info["step_trace"]] == [[["uncond", "cond"]]] * 3
    assert result.logging_info["step_trace"][0]["sigma"] == pytest.approx(1.0, abs=1e-3)


def test_modules_are_shared_and_load_lazily(tiny: Path) -> None:
    first = VideoGenerator.from_pretrained(tiny, device="cpu")
    assert first.pipeline.loaded_modules() == {}
    first.generate_video("a cat", **SMALL)
    second = VideoGenerator.from_pretrained(tiny, device="cpu", modules=first.pipeline.loaded_modules())
    assert second.pipeline.get_module("vae") is first.pipeline.get_module("vae")


def test_scheduler_override_and_defaults(tiny: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", scheduler="euler")
    assert generator.defaults().scheduler == "euler"
    euler = generator.generate_video("a cat", **SMALL)
    unipc = generator.generate_video("a cat", scheduler="unipc", **SMALL)
    assert not torch.allclose(euler.latents, unipc.latents)
    assert (generator.defaults().height, generator.defaults().num_frames) == (480, 81)


def test_bfloat16_and_autocast_stay_near_float32(tiny: Path) -> None:
    exact = VideoGenerator.from_pretrained(tiny, device="cpu").generate_video("a cat", **SMALL).latents
    for settings in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "autocast": True}):
        got = VideoGenerator.from_pretrained(tiny, device="cpu", **settings).generate_video("a cat", **SMALL).latents
        assert not torch.equal(got, exact)
        assert (got - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"prompt": ""}, InputError, "empty"),
        ({"prompt": "   "}, InputError, "empty"),
        ({"prompt": "cat " * 10_000}, InputError, "512"),
        ({"prompt": []}, InputError, "empty"),
        ({"prompt": "a \udcff"}, InputError, "Unicode"),
        ({"negative_prompt": "a \ud800"}, InputError, "Unicode"),
        ({"height": 30}, InputError, r"nearest: 16 or 32"),
        ({"width": 0}, InputError, "width"),
        ({"height": 10**6}, InputError, "height"),
        ({"num_frames": 6}, InputError, r"nearest: 5 or 9"),
        ({"num_frames": 0}, InputError, "num_frames"),
        ({"num_inference_steps": 0}, InputError, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, InputError, "whole"),
        ({"guidance_scale": 0.0}, InputError, "1 switches guidance off"),
        ({"guidance_scale": float("nan")}, InputError, "guidance_scale"),
        ({"seed": -1}, InputError, "seed"),
        ({"seed": 2**63}, InputError, "seed"),
        ({"seed": 2**32 + 7}, InputError, "seed=7 starts from the same noise"),
        ({"seed": -(10**5000)}, InputError, "a whole number of 16610 bits is not a whole number in"),
        ({"seed": [1, 2]}, InputError, "1 prompts but 2"),
        ({"fps": 0}, InputError, "fps"),
        ({"scheduler": "ddim"}, InputError, "unipc"),
        ({"latents": torch.zeros(3, 2, 4, 4)}, InputError, "shape"),
        ({"latents": torch.full((16, 2, 4, 4), float("inf"))}, InputError, "finite"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"output_path": "a.xyz"}, KinetoscopeError, "xyz"),
        ({"output_path": "/proc/nowhere/a.mp4"}, OutputError, "nowhere"),
    ],
)
def test_bad_requests(generator: VideoGenerator, fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        generator.generate_video(**({"prompt": "a cat"} | SMALL | fields))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"device": "tpu"}, ConfigError),
        ({"device": "meta"}, ConfigError),
        ({"dtype": "int8"}, ConfigError),
        ({"scheduler": "ddim"}, InputError),
        ({"cfg": "sideways"}, ConfigError),
        ({"attention": "magic"}, ConfigError),
        ({"attention": {"sideways": "sdpa"}}, ConfigError),
        ({"threads": 0}, ConfigError),
    ],
)
def test_bad_settings(tiny: Path, settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        VideoGenerator.from_pretrained(tiny, **settings)


def test_a_missing_cuda_device_is_named(tiny: Path) -> None:
    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA devices"):
            VideoGenerator.from_pretrained(tiny, device="cuda:99")
    else:
        with pytest.raises(ConfigError, match="no CUDA device"):
            VideoGenerator.from_pretrained(tiny, device="cuda")


def test_unknown_model_names_the_known() -> None:
    with pytest.raises(ModelLoadError):
        VideoGenerator.from_pretrained("no-such-model")


def test_an_attention_backend_that_cannot_serve_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from kinetoscope.attention import capabilities
    from kinetoscope.runtime import opening as module

    def without_chunked(device: str, dtype: torch.dtype) -> Any:
        return replace(capabilities(device, dtype), refused={"chunked": "this test says so"})

    monkeypatch.setattr(module, "capabilities", without_chunked)
    with pytest.raises(CompositionError, match=r"chunked.*this test says so"):
        VideoGenerator.from_pretrained(tiny, device="cpu", attention="chunked")


def test_weights_that_overflow_are_reported(tiny: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    generator.pipeline.get_module("transformer").proj_out.weight.data.fill_(float("inf"))
    with pytest.raises(KinetoscopeError, match="not finite"):
        generator.generate_video("a cat", **SMALL)


def test_noise_of_the_run_is_the_seeds(generator: VideoGenerator) -> None:
    stage: Any = generator.pipeline.stages["latents"]
    from kinetoscope.core.types import ExecutionArgs, ForwardBatch

    batch = ForwardBatch(generator.defaults(), ["a"], [""], [9])
    drawn = stage.forward(batch, ExecutionArgs()).latents
    assert torch.equal(drawn, NoiseSource([9]).draw(drawn.shape[1:]))


class Brighten(Stage):
    """Doubles the light."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        batch.frames = [(f.astype("uint16") * 2).clip(0, 255).astype("uint8") for f in batch.frames]
        return batch


def test_removed_stage_no_longer_acts(tiny: Path) -> None:
    own = VideoGenerator.from_pretrained(tiny, device="cpu")
    plain = own.generate_video("a cat", **SMALL).frames
    stage = Brighten()
    own.pipeline.add_stage("brighten", stage)
    assert not np.array_equal(own.generate_video("a cat", **SMALL).frames, plain)
    assert own.pipeline.remove_stage("brighten") is stage
    own.pipeline.remove_stage("validation")
    assert np.array_equal(own.generate_video("a cat", **SMALL).frames, plain)


def test_stage_that_the_model_needs_is_not_removed(tiny: Path) -> None:
    pipeline = VideoGenerator.from_pretrained(tiny, device="cpu").pipeline
    before = list(pipeline.stages)
    with pytest.raises(ConfigError, match=r"stage 'latents' .*cannot be removed.*Removable: validation"):
        pipeline.remove_stage("latents")
    pipeline.add_stage("decoding", Brighten())  # in place of the model's own: there is still nothing to run without
    with pytest.raises(ConfigError, match=r"stage 'decoding' .*cannot be removed"):
        pipeline.remove_stage("decoding")
    with pytest.raises(ConfigError, match=r"no stage 'brighten' to remove; stages: validation, "):
        pipeline.remove_stage("brighten")
    assert list(pipeline.stages) == before


class Measured(list[float]):
    """A number for each sample of a batch."""

    def rows(self, start: int, stop: int) -> Measured:
        return Measured(self[start:stop])

    def joined(self, others: Sequence[Measured]) -> Measured:
        return Measured([x for part in (self, *others) for x in part])


class Measure(Stage):
    """Puts the loudness of each sample's noise into the batch."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        assert batch.latents is not None
        batch.data.put(Measured([float(x.std()) for x in batch.latents]))
        return batch


class Report(Stage):
    """Tells what an earlier stage put into the batch."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        batch.logging_info["loudness"] = list(batch.data.get(Measured))
        return batch


def test_stages_hand_on_their_own_data_also_in_joined_runs(tiny: Path) -> None:
    own = VideoGenerator.from_pretrained(tiny, device="cpu")
    own.pipeline.add_stage("measure", Measure(), after="latents")
    own.pipeline.add_stage("report", Report())
    prompts, seeds = ["a red cat", "a blue circle"], [1, 2]
    runs = [own.generate_video(p, seed=s, **SMALL) for p, s in zip(prompts, seeds, strict=True)]
    alone = [r.logging_info["loudness"] for r in runs]
    assert [len(found) for found in alone] == [1, 1] and alone[0] != alone[1]
    together = own.generate_video(prompts, seed=seeds, batch_size=2, **SMALL)
    assert [r.logging_info["loudness"] for r in together] == alone
