"""Streams through the public API: a session is the offline video, alone or among others, and stays small."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kinetoscope import KinetoscopeError, VideoGenerator
from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.engine.hooks import Hook
from kinetoscope.media.actions import play
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage, FrameStream
from kinetoscope.pipelines.stages.images import split_patches
from pipelines.test_causal_wan import make_directory
from pipelines.test_matrix_game import make_world
from tiny import make_tiny_wan

HEIGHT, WIDTH = 32, 48
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
ROLLING: dict[str, Any] = SIZE | {"local_attn_size": 4, "sink_size": 1}
RED, BLUE = "a red circle moving left on black", "a blue square"
WALK = [{"keys": ["w"], "repeat": 9}, {"keys": ["w", "d"], "mouse": "right", "repeat": 24}]


def opened(path: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return opened(make_directory(tmp_path_factory.mktemp("causal")))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return opened(make_world(tmp_path_factory.mktemp("world"), "base"))


def picture() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


class Unchanged(Stage):
    """Changes nothing."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        return batch


class Ends(Hook):
    """Says how its runs went."""

    name = "ends"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_run_start(self, state: Any) -> None:
        self.seen.append("start")

    def on_run_end(self, state: Any, error: BaseException | None) -> None:
        self.seen.append(type(error).__name__)


def test_session_reports_what_its_hooks_say_while_it_goes_on(causal: VideoGenerator) -> None:
    timed = VideoGenerator.from_pretrained(
        causal.pipeline.model, device="cpu", perf_logging=True, modules=causal.pipeline.loaded_modules()
    )
    with timed.start_session(RED, seed=1, trace=True, **ROLLING) as session:
        for blocks in (1, 2):
            session.step()
            traced, perf = (session.logging_info[name] for name in ("step_trace", "denoising_perf"))
            assert {r["block"] for r in traced} == set(range(blocks))
            assert len(perf["steps_ms"]) == len(traced) > 0 and perf["total_ms"] >= sum(perf["steps_ms"])
    assert session.logging_info["step_trace"] == traced


# -- a stream is the offline video ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({}, [9, 12, 12]),
        ({"guidance_scale": 3.0, "negative_prompt": "a cat"}, [9, 12]),
        ({"image": picture()}, [1, 12, 12]),
        ({"local_attn_size": 4, "sink_size": 1}, [9, 12, 12]),
    ],
    ids=["text", "guided", "image", "rolling"],
)
def test_a_stream_is_the_offline_video(causal: VideoGenerator, fields: dict[str, Any], lengths: list[int]) -> None:
    chunks = list(causal.stream(RED, blocks=len(lengths), seed=3, **SIZE, **fields))
    assert [len(c) for c in chunks] == lengths
    whole = causal.generate_video(RED, seed=3, num_frames=sum(lengths), **SIZE, **fields)
    assert np.array_equal(np.concatenate(chunks), whole.frames)


def test_two_experts(tmp_path: Path) -> None:
    """Their first frame is a block of its own."""
    gen = opened(make_directory(tmp_path, "a14b", num_frames_per_block=2))
    chunks = list(gen.stream(RED, blocks=3, **SIZE))
    assert [len(c) for c in chunks] == [1, 8, 8]
    assert np.array_equal(np.concatenate(chunks), gen.generate_video(RED, num_frames=17, **SIZE).frames)


def test_a_played_world_takes_another_list_of_steps(world: VideoGenerator) -> None:
    """The number of steps is the list's, as for other few-step models."""
    made = world.generate_video("unread", image=picture(), num_frames=9, dmd_denoising_steps=[1000, 500], **SIZE)
    assert made.params.num_inference_steps == 2


def test_no_field_is_called_extra(world: VideoGenerator) -> None:
    with pytest.raises(InputError, match="unknown parameter 'extra'"):
        world.start_session(image=picture(), extra={}, **SIZE)


def test_a_played_world_is_the_offline_video_of_its_script(world: VideoGenerator) -> None:
    """By the script; by what the script says, frame by frame; and by keys that are held."""
    common: dict[str, Any] = {"image": picture(), "seed": 4, **SIZE}
    whole = world.generate_video("unread", num_frames=33, actions=WALK, **common).frames
    assert np.array_equal(np.concatenate(list(world.stream(blocks=3, actions=WALK, **common))), whole)
    with world.start_session(**common) as session:
        assert session.next_frames == 9
        first = session.step(keyboard=["w"])
        assert session.next_frames == 12
        second = session.step(keyboard=torch.tensor([1.0, 0, 0, 1]), mouse=(0.0, 0.1))
        moves = play("universal", 12, ["w", "d"], "right")
        third = session.step(keyboard=moves.keyboard, mouse=moves.mouse)
    assert np.array_equal(np.concatenate([first, second, third]), whole)
    assert (session.blocks, session.frames, session.seed) == (3, 33, 4)
    one_step: dict[str, Any] = common | {"dmd_denoising_steps": [1000], "num_inference_steps": 1}
    still = world.generate_video("unread", num_frames=117, **one_step).frames
    stream = world.stream(trace=False, **one_step)  # longer than the image is felt in the condition
    assert np.array_equal(np.concatenate([next(stream) for _ in range(10)]), still)
    stream.close()


# -- decoding ---------------------------------------------------------------------------------------------------------


def make_vae(patch: int | None) -> Any:
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(0)  # noqa: TID251 - diffusers initialises from the global generator
    more = {} if patch is None else {"patch_size": patch, "in_channels": 12, "out_channels": 12, "is_residual": True}
    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    stats = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    return AutoencoderKLWan(**sizes, temperal_downsample=[False, True, True], **stats, **more).eval()


@torch.no_grad()
@pytest.mark.parametrize("patch", [None, 2])
def test_joined_chunks_are_the_whole_decode(patch: int | None) -> None:
    vae = make_vae(patch)
    latents = torch.randn((4, 9, 4, 6), generator=torch.Generator().manual_seed(2))
    whole = DecodingStage(vae).decode(latents)
    one, other = FrameStream(vae), FrameStream(vae)
    parts: list[Any] = []
    for start, stop in ((0, 3), (3, 4), (4, 6), (6, 9)):
        parts.append(one.decode(latents[:, start:stop]))
        other.decode(-latents[:, start:stop])  # another stream of the same VAE, in turns
        vae.encode(torch.zeros(1, 3, 5, 32, 48))  # and whatever else the VAE is used for
    assert [len(p) for p in parts] == [9, 4, 8, 12]
    assert np.array_equal(np.concatenate(parts), whole)


def test_patches() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    x = torch.randn((2, 3, 2, 4, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(split_patches(x, 2), patchify(x, 2)) and torch.equal(split_patches(x, 1), x)


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_interleaved_sessions_are_each_alone(causal: VideoGenerator, world: VideoGenerator) -> None:
    def starts() -> list[tuple[Any, list[dict[str, Any]]]]:
        image = picture()
        keys = [{"keyboard": k} for k in ("w", "a", "s")]
        return [
            (causal.start_session(RED, seed=1, **ROLLING), [{}] * 3),
            (causal.start_session(BLUE, seed=2, guidance_scale=2.0, **ROLLING), [{}] * 3),
            (causal.start_session(RED, seed=1, image=image, **SIZE), [{}] * 3),
            (world.start_session(image=image, seed=1, **SIZE), keys),
            (world.start_session(image=image, seed=2, **SIZE), keys[::-1]),
        ]

    alone: list[list[Any]] = []
    for session, inputs in starts():
        with session:
            alone.append([session.step(**i) for i in inputs])
    mixed: list[list[Any]] = [[] for _ in alone]
    together = starts()
    for which in (0, 3, 1, 1, 4, 2, 3, 0, 2, 4, 4, 0, 1, 3, 2):
        session, inputs = together[which]
        mixed[which].append(session.step(**inputs[len(mixed[which])]))
    for a, b in zip(alone, mixed, strict=True):
        assert np.array_equal(np.concatenate(a), np.concatenate(b))


def test_a_prompt_changes_at_the_next_block(causal: VideoGenerator) -> None:
    plain = list(causal.stream(RED, blocks=3, seed=5, **SIZE))
    other = list(causal.stream(BLUE, blocks=3, seed=5, **SIZE))
    running: list[Any] = []

    def in_the_middle(event: Any) -> None:
        if event.kind == "step" and event.block == 1 and event.step.index == 0:
            running[0].prompt(BLUE)

    with causal.start_session(RED, seed=5, on_event=in_the_middle, **SIZE) as session:
        running.append(session)
        changed = [session.step() for _ in range(3)]
        assert session.record("") is None, "no single request makes this video"
    assert np.array_equal(changed[0], plain[0]) and np.array_equal(changed[1], plain[1])
    assert not np.array_equal(changed[2], plain[2])
    assert not np.array_equal(changed[2], other[2]), "the past is still that of the old prompt"
    with causal.start_session(RED, seed=5, **SIZE) as session:
        session.prompt(BLUE)
        assert np.array_equal(session.step(), other[0]), "asked for before the first block"
        session.prompt(RED)
        session.prompt(BLUE)
        assert np.array_equal(session.step(), other[1]), "the last wish counts"


def held(session: Any) -> int:
    """Bytes of all tensors that a session keeps, and those of the decoder's memory."""
    seen: set[int] = set()
    sizes: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        if id(value) in seen or isinstance(value, (str, int, float, torch.nn.Module, Tensor, type, VideoGenerator)):
            return
        seen.add(id(value))
        if isinstance(value, dict):
            parts: Iterator[Any] = itertools.chain(value.keys(), value.values())
        elif isinstance(value, (list, tuple, set)):
            parts = iter(value)
        else:
            names = getattr(type(value), "__slots__", ()) or ()
            parts = itertools.chain(vars(value).values() if hasattr(value, "__dict__") else (),
                                    (getattr(value, n, None) for n in names if n != "__weakref__"))  # fmt: skip
        for part in parts:
            walk(part)

    for value in (session._stream.state, session._decoder, session._batch):
        walk(value)
    return sum(sizes.values())


@pytest.mark.parametrize("kind", ["causal", "world"])
def test_memory_is_flat(request: pytest.FixtureRequest, kind: str) -> None:
    gen: VideoGenerator = request.getfixturevalue(kind)
    text = kind == "causal"
    fields: dict[str, Any] = ROLLING if text else SIZE | {"image": picture()}
    with gen.start_session(RED if text else None, **fields) as session:
        sizes: list[int] = []
        for _ in range(15 if text else 27):
            session.step(**({} if text else {"keyboard": "w"}))
            if text:
                session.prompt(RED if session.blocks % 2 else BLUE)
            sizes.append(held(session))
        third = len(sizes) // 3
        assert len(set(sizes[third - 1 :])) == 1, sizes
        assert sizes[-1] > 10_000
        assert max(sizes) == sizes[-1]


# -- ends -------------------------------------------------------------------------------------------------------------


def test_closing_ends_the_hooks(causal: VideoGenerator) -> None:
    hook = Ends()
    stream = causal.stream(RED, hooks=[hook], **SIZE)
    assert hook.seen == [], "nothing runs before the first block is asked for"
    next(stream)
    assert hook.seen == ["start"]
    stream.close()
    assert hook.seen == ["start", "NoneType"]

    session = causal.start_session(RED, hooks=[hook := Ends()], **SIZE)
    session.step()
    session.close()
    session.close()
    assert session.closed and hook.seen == ["start", "NoneType"]
    for late in (session.step, lambda: session.prompt(BLUE)):
        with pytest.raises(InputError, match="closed after 1 blocks; start a new one"):
            late()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_block_ends_the_session(causal: VideoGenerator, error: type[BaseException]) -> None:
    """In the middle of a step's events, where the engine is not running."""

    def stop(event: Any) -> None:
        if event.kind == "step" and event.block == 1:
            raise error

    hook = Ends()
    stream = causal.stream(RED, hooks=[hook], on_event=stop, **SIZE)
    next(stream)
    with pytest.raises(error):
        next(stream)
    assert hook.seen == ["start", "GeneratorExit"]
    with pytest.raises(StopIteration):
        next(stream)


def test_a_model_without_a_window_ends_in_words(causal: VideoGenerator) -> None:
    with pytest.raises(InputError, match=r"blocks=8 are more than the 7 \(21 latent frames\).*local_attn_size"):
        causal.stream(RED, blocks=8, **SIZE)
    with pytest.raises(InputError, match="blocks=8 are more than the 7"):
        causal.start_session(RED, blocks=8, image=picture(), **SIZE)
    hook = Ends()
    made = 0
    with pytest.raises(InputError, match="latent frame 24 is beyond the 21"):
        for _ in causal.stream(RED, hooks=[hook], dmd_denoising_steps=[1000], **SIZE):
            made += 1
    assert made == 7 and hook.seen == ["start", "InputError"]


def test_broken_weights_are_told(tmp_path: Path) -> None:
    gen = opened(make_directory(tmp_path))
    gen.pipeline.get_module("transformer").proj_out.weight.data.fill_(float("nan"))
    hook = Ends()
    with pytest.raises(KinetoscopeError, match="not finite"):
        next(gen.stream(RED, hooks=[hook], **SIZE))
    assert hook.seen == ["start", "NoneType"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 21}, "num_frames is for whole videos"),
        ({"output_path": "x.mp4"}, "output_path is for whole videos"),
        ({"blocks": 0}, "blocks=0 is not a positive whole number"),
        ({"prompt": None}, "needs a prompt"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": [RED, BLUE]}, "one prompt"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": [1, 2]}, "1 prompts but 2 values for seed"),
        ({"width": 50}, "nearest: 48 or 64"),
        ({"video": "clip.mp4"}, "takes no video"),
        ({"actions": WALK}, "unknown parameter 'actions'"),
    ],
)
def test_refused_before_anything_loads(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    gen = opened(make_directory(tmp_path))
    for start in (gen.stream, gen.start_session):
        with pytest.raises(InputError, match=words):
            start(**{"prompt": RED, **SIZE, **fields})
    assert not gen.pipeline.loaded_modules()


def test_inputs_of_a_block(causal: VideoGenerator, world: VideoGenerator) -> None:
    with causal.start_session(RED, **SIZE) as session, pytest.raises(InputError, match="takes nothing; got keyboard"):
        session.step(keyboard="w")
    with world.start_session(image=picture(), seed=4, **SIZE) as session:
        for inputs, words in (
            ({"keyboard": np.zeros((12, 4))}, r"keyboard has shape \[12, 4\]; this block needs \[9, 4\], or \[4\]"),
            ({"keyboard": ["x"]}, "no key 'x'"),
            ({"keyboard": [2, 0, 0, 0]}, r"outside \[0, 1\]"),
            ({"keyboard": [1, "w", 0, 0]}, "no table of numbers"),
            ({"mouse": [0.0]}, r"mouse has shape \[1\]"),
            ({"mouse": "round"}, "no camera turn"),
            ({"wheel": 1}, "takes keyboard, mouse; got wheel"),
        ):
            with pytest.raises(InputError, match=words):
                session.step(**inputs)
        with pytest.raises(InputError, match="reads no prompt; it cannot change"):
            session.prompt(RED)
        assert len(session.step()) == 9, "what was refused has not ended the session"
    with pytest.raises(InputError, match="reads no prompt; leave it out"):
        world.start_session(RED, image=picture(), **SIZE)
    with pytest.raises(InputError, match="needs image="):
        world.stream(**SIZE)
    with pytest.raises(InputError, match="lasts 33 frames; this video needs 45"):
        world.stream(blocks=4, image=picture(), actions=WALK, **SIZE)


def test_models_that_do_not_stream(tmp_path: Path) -> None:
    gen = opened(make_tiny_wan(tmp_path / "wan"))
    with pytest.raises(CompositionError, match=r"does not stream.*use generate_video"):
        gen.stream(RED, **SIZE)
    path = make_directory(tmp_path / "causal")
    other = opened(path)
    other.pipeline.add_stage("brighten", Unchanged(), after="decoding")
    with pytest.raises(CompositionError, match="do not run in a stream: brighten"):
        other.start_session(RED, **SIZE)
    with pytest.raises(CompositionError, match="AutoencoderKLWan; this model has Linear"):
        FrameStream(torch.nn.Linear(1, 1))
    shutil.rmtree(path)
