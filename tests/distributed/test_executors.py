"""One API whatever carries out the requests: the same videos, events, records, streams and refusals."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distributed.forked import Forked
from distributed.ranks import run_ranks
from kinetoscope import VideoGenerator
from kinetoscope.core.config import read_launch
from kinetoscope.core.errors import (
    BatchError,
    CompositionError,
    ConfigError,
    InputError,
    ModelLoadError,
    RunCancelled,
    WorkerError,
)
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.engine.hooks import Hook
from kinetoscope.engine.strategies.standard import StandardStrategy
from kinetoscope.loading import resolve_model
from kinetoscope.parallel import Groups
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.runtime.executors import processes
from kinetoscope.runtime.executors.base import ExecutorSpec, replica_shares
from kinetoscope.runtime.executors.pool import Pool
from kinetoscope.runtime.executors.ranks import rank_generator
from kinetoscope.runtime.executors.torchrun import Torchrun
from kinetoscope.runtime.replay import replay
from kinetoscope.runtime.session import Session
from pipelines.test_causal_wan import make_directory
from tiny import make_tiny_wan

ASKED: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "fps": 8, "num_inference_steps": 3, "seed": 3}
RED, BLUE = "a red circle", "a blue square moving left"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("executors") / "wan")


@pytest.fixture(scope="module")
def here(wan: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(wan, device="cpu")


@pytest.fixture(scope="module")
def forking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "interpreter", Forked)
        yield


@pytest.fixture(scope="module")
def pool(wan: Path, forking: None) -> Iterator[VideoGenerator]:
    with VideoGenerator.from_pretrained(wan, device="cpu", executor="processes") as generator:
        yield generator


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-4 * expected.std())


def starts(generator: VideoGenerator) -> int:
    assert isinstance(generator.executor, Pool)
    return sum(g.starts for g in generator.executor.gangs)


# -- what a program changes -------------------------------------------------------------------------------------------


class Watching(Hook):
    name = "watching"


class Doubled(Stage):
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        return batch


def replace_strategy(pipeline: Any) -> None:
    pipeline.stages["denoising"].strategy_cls = type("Other", (StandardStrategy,), {})


def scale_weights(pipeline: Any) -> None:
    next(pipeline.get_module("transformer").parameters()).data.mul_(2)


CHANGES: dict[str, tuple[Any, str]] = {
    "stage added": (lambda p: p.add_stage("doubled", Doubled(), after="latents"), "stage 'doubled' \\(added\\)"),
    "stage replaced": (lambda p: p.add_stage("latents", Doubled()), "stage 'latents' \\(replaced\\)"),
    "stage set": (lambda p: p.stages.update(latents=Doubled()), "stage 'latents' \\(replaced\\)"),
    "stage removed": (lambda p: p.stages.pop("latents"), "stage 'latents' \\(removed\\)"),
    "stages in another order": (lambda p: setattr(p, "stages", dict(reversed(p.stages.items()))), "the order of"),
    "method of a stage": (lambda p: setattr(p.stages["latents"], "forward", print), "forward of stage 'latents'"),
    "strategy": (replace_strategy, "strategy_cls of stage 'denoising'"),
    "hooks": (lambda p: setattr(p, "hooks", (Watching(),)), "pipeline.hooks \\(watching\\)"),
    "arguments": (lambda p: setattr(p, "args", replace(p.args, cfg="batched")), "pipeline.args"),
    "listener": (lambda p: p.load_listeners.append(print), "pipeline.load_listeners"),
    "weights": (scale_weights, "weights of 'transformer'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_a_pipeline_is_refused_by_name_when_workers_run_it(
    wan: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes are not started: what this process refuses must not depend on them."""
    monkeypatch.setattr("kinetoscope.runtime.generator.open_pool", lambda *args: object.__new__(Pool))
    monkeypatch.setattr(Pool, "name", "processes", raising=False)
    generator = VideoGenerator.from_pretrained(wan, device="cpu", executor="processes")
    if name == "weights":
        generator.pipeline.get_module("transformer")  # to look is no change
        assert generator.pipeline.changes(weights=True) == []
    change, message = CHANGES[name]
    change(generator.pipeline)
    with pytest.raises(CompositionError, match=f"{message}.* and executor='processes' cannot be used together"):
        generator.generate_video(RED, **ASKED)


def test_unchanged_pipeline_has_no_changes_after_a_run(here: VideoGenerator) -> None:
    result = here.generate_video(RED, **ASKED)
    assert here.pipeline.changes() == [] and result.record["changed"] == []


def test_video_of_a_changed_pipeline_is_not_replayed(wan: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(wan, device="cpu")
    generator.pipeline.add_stage("doubled", Doubled(), after="latents")
    generator.generate_video(RED, output_path=tmp_path / "a.mp4", **ASKED)
    with pytest.raises(InputError, match=r"a pipeline that a program had changed.*stage 'doubled'"):
        replay(tmp_path / "a.mp4")


# -- the same ---------------------------------------------------------------------------------------------------------


def test_a_worker_makes_the_same_video(here: VideoGenerator, pool: VideoGenerator, tmp_path: Path) -> None:
    heard: tuple[list[Any], list[Any]] = ([], [])
    paths = [tmp_path / "here.mp4", tmp_path / "there.mp4"]
    a, b = (g.generate_video(RED, output_path=p, on_event=h.append, trace=True, **ASKED)
            for g, p, h in zip((here, pool), paths, heard, strict=True))  # fmt: skip
    assert torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)
    assert a.record == b.record and a.params == b.params and b.path == paths[1]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [e["t"] if "t" in e else e.keys() for e in a.logging_info["step_trace"]] == [
        e["t"] if "t" in e else e.keys() for e in b.logging_info["step_trace"]
    ]
    assert a.timings.keys() == b.timings.keys()
    assert [e.kind for e in heard[0]] == [e.kind for e in heard[1]]
    steps = [(e, f) for e, f in zip(*heard, strict=True) if e.kind == "step"]
    assert len(steps) == 3
    for ours, theirs in steps:
        assert ours.step.index == theirs.step.index and theirs.latents is theirs.step.prediction is None
    b.frames[0] = 0  # it is the caller's own memory


def test_what_was_given_travels(here: VideoGenerator, pool: VideoGenerator) -> None:
    latents = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    asked = {**ASKED, "latents": latents, "guidance_scale": 1.0}
    a, b = (g.generate_video(RED, **asked) for g in (here, pool))
    assert torch.equal(a.latents, b.latents) and a.record == b.record


@pytest.mark.parametrize("layout", ["ulysses=2", pytest.param({"cfg": 2}, marks=pytest.mark.distributed)])
def test_two_ranks_make_it_within_rounding(here: VideoGenerator, wan: Path, forking: None, layout: Any) -> None:
    expected = here.generate_video(RED, **ASKED).latents
    with VideoGenerator.from_pretrained(wan, device="cpu", parallel=layout) as generator:
        made = [generator.generate_video(RED, **ASKED) for _ in range(2)]
        assert [h.rank for h in generator.health()] == [0, 1] and all(h.alive for h in generator.health())
    assert close(made[0].latents, expected) and torch.equal(made[0].latents, made[1].latents)
    assert made[0].record["options"]["parallel"] == ({"ulysses": 2} if isinstance(layout, str) else layout)
    assert not made[0].record["interceptors"]


def test_replicas_share_out_the_prompts(here: VideoGenerator, wan: Path, forking: None, tmp_path: Path) -> None:
    prompts, seeds = [RED, BLUE, RED], [1, 2, 3]
    asked = {**ASKED, "seed": seeds}
    expected = here.generate_video(prompts, **asked)
    with VideoGenerator.from_pretrained(wan, device="cpu", parallel="replicas=2") as generator:
        made = generator.generate_video(prompts, output_path=tmp_path, **asked)
        pids = {h.pid for h in generator.health()}
    assert len(pids) == 2 and [r.seed for r in made] == seeds and [r.prompt for r in made] == prompts
    assert all(close(a.latents, b.latents) for a, b in zip(made, expected, strict=True))
    assert sorted(tmp_path.iterdir()) == sorted(r.path for r in made if r.path)
    assert [(r.record["seed"], r.record["joined"]) for r in made] == [(1, 2), (2, 2), (3, 1)]
    assert made[0].record["options"]["parallel"] is None


def test_shares() -> None:
    assert replica_shares(5, 8, 1) == [slice(0, 5)]
    assert replica_shares(5, 2, 1) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert replica_shares(5, 8, 2) == [slice(0, 3), slice(3, 5)]
    assert replica_shares(1, 8, 4) == [slice(0, 1)]


def test_loras_follow(here: VideoGenerator, pool: VideoGenerator, wan: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    file = tmp_path / "style.safetensors"
    save_file({f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": torch.randn(shape, generator=draw)
               for side, shape in (("A", (2, 24)), ("B", (24, 2)))}, file)  # fmt: skip
    plain = pool.generate_video(RED, **ASKED).latents
    made: list[list[torch.Tensor]] = [[], []]
    for generator, latents in zip((here, pool), made, strict=True):
        generator.load_lora(file)
        latents.append(generator.generate_video(RED, **ASKED).latents)
        generator.set_lora({"style": 0.5})
        latents.append(generator.generate_video(RED, **ASKED).latents)
        generator.unload_lora("style")
        latents.append(generator.generate_video(RED, **ASKED).latents)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert torch.equal(made[1][2], plain) and not torch.equal(made[1][0], made[1][1])
    count = starts(pool)
    pool.load_lora(file)
    file.unlink()
    with pytest.raises(ModelLoadError, match="style"):  # the worker's own error, and the worker goes on
        pool.generate_video(RED, **ASKED)
    pool.unload_lora("style")
    assert torch.equal(pool.generate_video(RED, **ASKED).latents, plain) and starts(pool) == count


def test_streams(tmp_path: Path, forking: None) -> None:
    model = make_directory(tmp_path / "causal")
    asked: dict[str, Any] = {"height": 32, "width": 48, "seed": 3}
    expected = list(VideoGenerator.from_pretrained(model, device="cpu").stream(RED, blocks=2, **asked))
    events: list[str] = []
    with VideoGenerator.from_pretrained(model, device="cpu", executor="processes") as generator:
        made = list(generator.stream(RED, blocks=2, on_event=lambda e: events.append(e.kind), **asked))
        assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True)) and "step" in events
        with generator.start_session(RED, **asked) as session:
            assert session.next_frames == len(expected[0]) and session.seed == 3
            with pytest.raises(InputError, match="keyboard"):
                session.step(keyboard=1)
            assert np.array_equal(session.step(), expected[0]) and session.blocks == 1
            session.prompt(BLUE)
            assert not np.array_equal(session.step(), expected[1])
            assert session.record("0") is None
        with pytest.raises(InputError, match="closed after 2 blocks"):
            session.step()
        with generator.start_session(RED, trace=True, **asked) as session:
            session.step()
            live = session.logging_info["step_trace"]
            assert {r["block"] for r in live} == {0}
            session.step()
        assert [r["block"] for r in session.logging_info["step_trace"]] == [r["block"] for r in live] + [1] * len(live)
        with pytest.raises(CompositionError, match=r"hooks=.*processes"):
            generator.start_session(RED, hooks=[Hook()], **asked)


@pytest.fixture
def closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the sessions that workers, started from now on, have closed."""
    file = tmp_path / "closed"
    close_session = Session.close

    def close_and_tell(session: Session) -> None:
        was_open = session._decoder is not None
        close_session(session)
        if was_open:
            with file.open("a") as told:
                told.write("x")

    monkeypatch.setattr(Session, "close", close_and_tell)
    return lambda: len(file.read_text()) if file.is_file() else 0


def wait_until(holds: Callable[[], bool], what: str, limit: float = 120.0) -> None:
    until = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < until, f"after {limit:.0f} s still not: {what}"
        time.sleep(0.02)


def test_remote_session_ends_in_its_worker_whatever_ends_the_caller(
    tmp_path: Path, forking: None, closes: Callable[[], int]
) -> None:
    path = make_directory(tmp_path / "causal")
    asked: dict[str, Any] = {"height": 32, "width": 48, "seed": 5, "local_attn_size": 4, "sink_size": 1}

    def interrupt(event: Any) -> None:
        raise KeyboardInterrupt

    with VideoGenerator.from_pretrained(path, device="cpu", executor="processes") as generator:
        with pytest.raises(KeyboardInterrupt):
            generator.start_session(RED, on_event=interrupt, **asked)
        wait_until(lambda: closes() == 1, "the session of a start that on_event ended is closed")
        session = generator.start_session(RED, **asked)
        session._on_event = interrupt  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(KeyboardInterrupt):
            session.step()
        assert session.closed
        wait_until(lambda: closes() == 2, "the session of an interrupted step is closed")
        session = generator.start_session(RED, **asked)
        session.step()
        del session
        gc.collect()
        wait_until(lambda: closes() == 3, "the session that nobody holds any more is closed")
        with generator.start_session(RED, **asked) as session:
            session.step()
            with pytest.raises(InputError, match="text"):
                session.prompt(3)  # pyright: ignore[reportArgumentType]
            session.step()
            assert session.blocks == 2, "a refused prompt leaves the session as it was"
        assert closes() == 4 and starts(generator) == 1


def test_error_that_closes_a_remote_session_is_not_called_a_restart(
    tmp_path: Path, forking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_directory(tmp_path / "causal")
    step = Session.step

    def second_fails(session: Session, **inputs: Any) -> Any:
        if session.blocks == 1:
            session.close()
            raise InputError("seconds=-1: a block lasts some time; give a number above 0")
        return step(session, **inputs)

    monkeypatch.setattr(Session, "step", second_fails)
    with VideoGenerator.from_pretrained(path, device="cpu", executor="processes") as generator:
        session = generator.start_session(RED, height=32, width=48, seed=5)
        session.step()
        with pytest.raises(InputError, match="seconds=-1"):
            session.step()
        assert session.closed
        with pytest.raises(InputError, match="closed after 1 blocks"):
            session.step()
        assert starts(generator) == 1


@pytest.mark.parametrize("layout", [None, {"replicas": 2}])
def test_prompt_that_fails_in_a_worker_leaves_the_others(
    here: VideoGenerator, wan: Path, forking: None, tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that the package raises, and one that it does not know; no process is started again."""
    decode = DecodingStage.decode

    def no_memory(stage: DecodingStage, latents: torch.Tensor) -> Any:
        if abs(float(latents.flatten()[0]) - broken) < 1e-4:
            raise MemoryError("no room")
        return decode(stage, latents)

    expected = [here.generate_video(p, **{**ASKED, "seed": i}) for i, p in enumerate([RED, BLUE, RED])]
    broken = float(here.generate_video("a", **{**ASKED, "seed": 9}).latents.flatten()[0])
    monkeypatch.setattr(DecodingStage, "decode", no_memory)
    prompts = [RED, "a red cat " * 600, BLUE, RED, "a"]
    with VideoGenerator.from_pretrained(wan, device="cpu", executor="processes", parallel=layout) as generator:
        with pytest.raises(BatchError) as caught:
            generator.generate_video(prompts, output_path=tmp_path, batch_size=5, **{**ASKED, "seed": [0, 0, 1, 2, 9]})
        assert starts(generator) == generator.executor.config.replicas
    errors, results = caught.value.errors, caught.value.results
    assert isinstance(errors[1], InputError)
    assert isinstance(errors[4], WorkerError) and errors[4].cause == "memory" and "went on" in str(errors[4])
    made = [r for r in results if r is not None]
    assert all(close(r.latents, e.latents) for r, e in zip(made, expected, strict=True))
    assert len(list(tmp_path.glob("*.mp4"))) == 3


# -- cancelled and refused --------------------------------------------------------------------------------------------


def test_closing_the_events_cancels_on_all_ranks(here: VideoGenerator, wan: Path, forking: None) -> None:
    expected = here.generate_video(RED, **ASKED).latents
    with VideoGenerator.from_pretrained(wan, device="cpu", parallel="ulysses=2") as generator:
        events = generator.iterate(RED, **{**ASKED, "num_inference_steps": 900})
        while next(events).kind != "step":
            pass
        events.close()
        assert close(generator.generate_video(RED, **ASKED).latents, expected)
        assert starts(generator) == 1
        events = generator.iterate(RED, **{**ASKED, "num_inference_steps": 900})
        while next(events).kind == "notice":  # the first event of the executor says that the request has begun
            pass
        generator.close()
        with pytest.raises(RunCancelled):
            list(events)
        with pytest.raises(ConfigError, match="closed"):
            generator.generate_video(RED, **ASKED)


def test_a_bad_request_is_refused_before_it_travels(pool: VideoGenerator) -> None:
    with pytest.raises(InputError, match="height=33"):
        pool.generate_video(RED, **{**ASKED, "height": 33})
    with pytest.raises(CompositionError, match=r"hooks=.*processes"):
        pool.generate_video(RED, hooks=[Hook()], **ASKED)
    with pytest.raises(ModelLoadError, match="preview map"):
        pool.generate_video(RED, preview=True, **ASKED)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"executor": "proceses"}, InputError, "did you mean processes?"),
        ({"executor": "processes:stal=3"}, InputError, "did you mean stall?"),
        ({"executor": "processes:stall=0"}, ConfigError, "stall should be a number of seconds above 0"),
        ({"executor": "in-process", "parallel": "cfg=2"}, ConfigError, "one process has one device"),
        ({"executor": "torchrun"}, ConfigError, "not started by torchrun"),
        ({"executor": "processes", "hooks": [Hook()]}, CompositionError, "hooks= and executor='processes'"),
        ({"executor": "processes", "modules": {"vae": 1}}, CompositionError, "modules= and executor='processes'"),
        ({"parallel": "tp=3"}, ConfigError, "tp=3 does not divide the 2 attention heads"),
        ({"parallel": "cfg=4"}, ConfigError, "at most 3 branches"),
        ({"parallel": "tp=2", "offload": "blocks"}, CompositionError, "tp=2 and offload='blocks'"),
    ],
)
def test_refused_before_anything_starts(
    wan: Path, monkeypatch: pytest.MonkeyPatch, options: Any, kind: Any, message: str
) -> None:
    monkeypatch.setattr(processes, "interpreter", lambda descriptor: pytest.fail("a process was started"))
    with pytest.raises(kind, match=re.escape(message)):
        VideoGenerator.from_pretrained(wan, device="cpu", **options)


def test_settings_of_an_executor() -> None:
    assert ExecutorSpec.of("processes:stall=3,timeout=20,start=9") == ExecutorSpec("processes", 3, 20, 9)
    assert ExecutorSpec.of("ray:address=auto").address == "auto"


# -- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun_rank(groups: Groups, path: Path, output: Path) -> Any:
    generator = rank_generator(resolve_model(str(path)), groups, "float32")
    generator.executor = Torchrun(generator.pipeline, generator._loras, groups)
    made = generator.generate_video([RED, BLUE], output_path=output, **{**ASKED, "seed": [1, 2]})
    alone = generator.generate_video(RED, output_path=output / "alone.mp4", **ASKED)
    return [r.latents for r in made], [r.path is not None for r in made], alone.path is not None


@pytest.mark.parametrize("layout", [pytest.param("ulysses=2", marks=pytest.mark.distributed), "replicas=2"])
def test_torchrun(here: VideoGenerator, wan: Path, tmp_path: Path, layout: str) -> None:
    expected = here.generate_video([RED, BLUE], **{**ASKED, "seed": [1, 2]})
    ranks = run_ranks(layout, torchrun_rank, wan, tmp_path)
    for latents, _, _ in ranks:
        assert all(close(torch.from_numpy(a), b.latents) for a, b in zip(latents, expected, strict=True))
    assert len(list(tmp_path.glob("*.mp4"))) == 3
    written = [paths for _, paths, _ in ranks]
    assert written == ([[True, True], [False, False]] if "ulysses" in layout else [[True, True], [True, True]])
    assert [alone for _, _, alone in ranks] == ([True, False] if "ulysses" in layout else [True, True])


def test_what_torchrun_says() -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    launch = read_launch(said)
    assert launch is not None and (launch.rank, launch.world, launch.local) == (3, 4, 1)
    assert read_launch({**said} | {"RANK": "3"}) and read_launch({"RANK": "3"}) is None
    with pytest.raises(ConfigError, match="not numbers"):
        read_launch({**said, "RANK": "first"})
