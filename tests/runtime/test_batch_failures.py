"""Lists of prompts of which some fail: each prompt has its result or its error, whatever stage fails."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import BatchError, InputError, KinetoscopeError, OutputError, RunCancelled
from kinetoscope.core.out_of_memory import is_out_of_memory
from kinetoscope.engine.hooks import Hook, Interceptor, ProgressHook
from kinetoscope.loading.offload import Offload
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.runtime import care, model_hash, running
from kinetoscope.runtime.results import ResultEvent
from runtime.movers import Elsewhere
from runtime.test_session import Ends
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8, "fps": 8}
PROMPTS = ["a red cat", "a blue square", "a"]
LONG = "a red cat " * 600


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_pretrained(make_tiny_wan(tmp_path_factory.mktemp("wan")), "cpu")


@pytest.fixture(scope="module")
def alone(generator: VideoGenerator) -> list[Any]:
    return [generator.generate_video(p, seed=i, **SMALL) for i, p in enumerate(PROMPTS)]


class FailsAt(Hook):
    """Raises in the run of one prompt."""

    name = "fails"

    def __init__(self, prompt: str, step: int = 2) -> None:
        self.prompt, self.step = prompt, step
        self.ended: list[bool] = []

    def on_step_start(self, state: Any, step: Any) -> None:
        if state.batch.prompts == [self.prompt] and step.index == self.step:
            raise ValueError("out of luck")

    def on_run_end(self, state: Any, error: BaseException | None) -> None:
        self.ended.append(error is None)


class InterceptsOnly(Interceptor):
    """Makes the samples of a batch one run, and fails in runs that have more than `limit` samples."""

    name = "intercepts"

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def around_forward(self, call: Any, state: Any, inputs: Any) -> torch.Tensor:
        if inputs.batch > self.limit:
            raise RuntimeError("out of memory")
        return call(state, inputs)


def near(got: Any, expected: Any) -> bool:
    return bool((got.latents - expected.latents).abs().max() <= 1e-4 * expected.latents.std())


def failures(generator: VideoGenerator, prompts: list[str], **fields: Any) -> BatchError:
    with pytest.raises(BatchError) as caught:
        generator.generate_video(prompts, seed=list(range(len(prompts))), batch_size=3, **{**SMALL, **fields})
    return caught.value


def test_run_that_fails_in_denoising_leaves_the_others(
    generator: VideoGenerator, alone: list[Any], tmp_path: Path
) -> None:
    hook = FailsAt(PROMPTS[1])
    error = failures(generator, PROMPTS, hooks=[hook], output_path=tmp_path)
    assert list(error.errors) == [1] and isinstance(error.errors[1], ValueError)
    assert "1 of 3 prompts failed" in str(error) and "prompt 1 ('a blue square'): ValueError: out of luck" in str(error)
    assert error.results[1] is None and near(error.results[0], alone[0]) and near(error.results[2], alone[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0-a-red-cat-0.mp4", "2-a-2.mp4"]
    assert sorted(hook.ended) == [False, True, True] and generator._loras.held == 0


def test_prompt_that_the_encoder_refuses_leaves_the_others(generator: VideoGenerator, alone: list[Any]) -> None:
    error = failures(generator, [PROMPTS[0], LONG, PROMPTS[2]])
    assert isinstance(error.errors[1], InputError) and near(error.results[0], alone[0])
    assert near(error.results[2], alone[2])


def test_video_that_cannot_be_decoded_leaves_the_others(
    generator: VideoGenerator, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = DecodingStage.decode
    calls: list[int] = []

    def second_fails(stage: DecodingStage, latents: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return decode(stage, latents)

    monkeypatch.setattr(DecodingStage, "decode", second_fails)
    error = failures(generator, PROMPTS)
    assert list(error.errors) == [1] and near(error.results[2], alone[2])


def test_file_that_cannot_be_written_leaves_its_video_and_the_others(
    generator: VideoGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = running.write_video

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Path:
        if path.name.startswith("1-"):
            raise OutputError(f"output {path}: the disk is full")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(running, "write_video", refuse)
    error = failures(generator, PROMPTS, output_path=tmp_path)
    assert isinstance(error.errors[1], OutputError)
    assert error.results[1] is not None and error.results[1].path is None, "the frames are not lost"
    assert len(list(tmp_path.iterdir())) == 2


def test_later_batches_go_on_after_one_that_failed(generator: VideoGenerator, alone: list[Any]) -> None:
    with pytest.raises(BatchError) as caught:
        generator.generate_video([LONG, *PROMPTS], seed=[9, 0, 1, 2], batch_size=1, **SMALL)
    assert list(caught.value.errors) == [0]
    assert all(torch.equal(r.latents, a.latents) for r, a in zip(caught.value.results[1:], alone, strict=True))


def test_batch_that_fails_as_one_run_is_made_one_by_one(
    generator: VideoGenerator, alone: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    results = generator.generate_video(PROMPTS, seed=[0, 1, 2], batch_size=3, hooks=[InterceptsOnly(1)], **SMALL)
    assert all(near(r, a) for r, a in zip(results, alone, strict=True))
    assert "a run of 3 videos failed" in caplog.text and "out of memory" in caplog.text
    error = failures(generator, [PROMPTS[0], LONG], hooks=[InterceptsOnly(9)])
    assert list(error.errors) == [1] and near(error.results[0], alone[0])


def test_error_of_all_prompts_alike_is_raised_itself(generator: VideoGenerator) -> None:
    with pytest.raises(InputError, match="at most"):
        generator.generate_video([LONG, LONG], **SMALL)
    with pytest.raises(ValueError, match="out of luck"):
        generator.generate_video("a", hooks=[FailsAt("a")], **SMALL)
    hook = ProgressHook()
    hook.cancel.set()
    with pytest.raises(RunCancelled):
        generator.generate_video(PROMPTS, hooks=[hook], **SMALL)


def test_events_say_whose_they_are(generator: VideoGenerator) -> None:
    prompts = [*PROMPTS, "a cat"]
    events: list[Any] = []
    with pytest.raises(BatchError):
        generator.generate_video(
            prompts, seed=[0, 1, 2, 3], batch_size=3, on_event=events.append, hooks=[FailsAt(PROMPTS[1])], **SMALL
        )
    steps = [e for e in events if e.kind == "step"]
    assert {v: sum(e.videos == (v,) for e in steps) for v in range(4)} == {0: 8, 1: 2, 2: 8, 3: 8}
    stages = {e.videos for e in events if e.kind == "stage_start" and e.stage in ("denoising", "decoding")}
    assert stages == {(0, 1, 2), (0, 2), (3,)}
    results = [e for e in events if isinstance(e, ResultEvent)]
    assert [e.index for e in results] == [0, 1, 2, 3] and [e.error is None for e in results] == [
        True,
        False,
        True,
        True,
    ]
    last_step = max(i for i, e in enumerate(events) if e.kind == "step")
    assert events.index(results[0]) < last_step, "a result is told when it is there, not at the end of the request"


class Shared(Exception):
    """What a forward of several runs fails of."""


@pytest.mark.parametrize("kind", [MemoryError, Shared])
def test_shared_forward_that_fails_is_logged_and_not_tried_again(
    generator: VideoGenerator,
    alone: list[Any],
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from kinetoscope.engine.engine import DenoisingEngine

    forward = DenoisingEngine.forward
    sizes: list[int] = []

    def small_only(engine: DenoisingEngine, state: Any, inputs: Any, step: Any = None) -> torch.Tensor:
        runs = len({branch.partition(":")[0] for branch in inputs.branches if ":" in branch}) or 1
        sizes.append(runs)
        if runs > 2:
            raise kind("no room for so many")
        return forward(engine, state, inputs, step)

    monkeypatch.setattr(DenoisingEngine, "forward", small_only)
    with caplog.at_level(logging.WARNING):
        prompts = [*PROMPTS, "a cat"]
        results = generator.generate_video(prompts, seed=[0, 1, 2, 3], batch_size=4, **SMALL)
    assert all(near(r, a) for r, a in zip(results, alone, strict=False))
    assert sizes.count(4) == 1, "once in 8 steps"
    assert sizes.count(2) == (7 * 2 if kind is MemoryError else 0), "half as many share a forward after it"
    assert f"shared by 4 runs failed ({kind.__name__}: no room for so many)" in caplog.text
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(Shared("room"))


@pytest.mark.parametrize("kind", ["stage_start", "step", "result"])
def test_run_ends_when_on_event_raises(generator: VideoGenerator, tmp_path: Path, kind: str) -> None:
    hook = Ends()

    def stop(event: Any) -> None:
        if event.kind == kind:
            raise KeyboardInterrupt

    caught: Any = None
    try:
        generator.generate_video(PROMPTS, hooks=[hook], on_event=stop, output_path=tmp_path, **SMALL)
    except KeyboardInterrupt as error:
        caught = error  # its traceback keeps the frames, and with them a generator that nobody closed
    assert caught is not None and generator._loras.held == 0
    starts = 0 if kind == "stage_start" else 3
    assert hook.seen.count("start") == starts == len(hook.seen) - starts, "every run that began has ended"


def test_offloaded_components_are_away_after_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tiny_wan(tmp_path / "wan")
    made: list[Offload] = []

    def offload(kind: str, device: torch.device, mover: Any) -> Offload:
        made.append(Offload(kind, device, Elsewhere()))
        return made[-1]

    monkeypatch.setattr(care, "Offload", offload)
    generator = VideoGenerator.from_pretrained(path, "cpu", offload="components")
    generator.generate_video(PROMPTS, batch_size=3, **SMALL)
    assert made[0].here is None
    with pytest.raises(KinetoscopeError):
        generator.generate_video(LONG, **SMALL)
    assert made[0].here is None
    events = generator.iterate(PROMPTS, batch_size=3, **SMALL)
    while next(events).kind != "step":
        pass
    events.close()
    assert made[0].here is None


def test_model_is_hashed_while_the_first_video_is_made(
    generator: VideoGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = generator.pipeline.model
    digest, begun, go_on = model.fingerprint(), threading.Event(), threading.Event()
    threads: list[str] = []

    def slow(self: Any) -> str:
        threads.append(threading.current_thread().name)
        begun.set()
        assert go_on.wait(60), "nobody waits for the hash"
        return digest

    monkeypatch.setattr(model_hash, "AHEAD", 0)
    monkeypatch.setattr(type(model), "fingerprint", slow)
    stages: list[str] = []
    for event in generator.iterate("a", **SMALL):
        if event.kind == "step" and event.step.index == 1:
            assert begun.wait(60), "it has not begun at the second step"
        if event.kind == "stage_start":
            stages.append(event.stage)
            if event.stage == model_hash.STAGE:
                go_on.set()
    assert stages[-1] == model_hash.STAGE and threads[0] == "kinetoscope-model-hash"
