"""The gate: planted faults are caught, no-ops pass, and what cannot be compared is said."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.attention import BACKENDS, register_backend
from kinetoscope.attention.backends import math_attention
from kinetoscope.core.errors import ConfigError, InputError, KinetoscopeError
from kinetoscope.engine.hooks import Interceptor
from kinetoscope.engine.hooks.caches.base import StepCache
from kinetoscope.engine.strategies.standard import StandardStrategy
from kinetoscope.evaluation.compare import Thresholds
from kinetoscope.media import write_video
from kinetoscope.runtime.ab import ABPlan, compare_configurations, compare_files, parse_pair, shareable
from kinetoscope.runtime.compare import compare
from kinetoscope.runtime.compared import Compared
from kinetoscope.runtime.settings import Configuration, parse_configuration
from models.tiny_ltx import make_tiny_ltx
from tiny import make_tiny_wan

EXACT = Thresholds(min_ssim=0.9999, max_latent_diff=1e-3)
"""For options that change nothing beyond rounding."""
SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "fps": 8}
EMBEDDED: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 6}
PROMPTS = ["a small red circle moving left on a black background", "a large cyan star moving up on a white background"]
HERE = {"device": "cpu", "dtype": "float32"}

Fault = Callable[[VideoGenerator], None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


def plan(a: str, b: str, model: Any = "tiny-t2v", **more: Any) -> ABPlan:
    first, second = parse_pair(a, b, str(model))
    given = {"options": HERE, "fields": EMBEDDED, "prompts": PROMPTS[:1], "warmup": 0} | more
    return ABPlan(first, second, str(model), **given)


# -- planted faults ---------------------------------------------------------------------------------------------------


def wrong_sign(generator: VideoGenerator) -> None:
    """u - w (c - u) instead of u + w (c - u)."""
    stage: Any = generator.pipeline.stages["denoising"]
    make = stage.strategy_cls

    def strategy(parts: Any) -> Any:
        made = make(parts)
        combine = made.cfg_combine

        def wrong(state: Any, noise_pred: Tensor) -> Tensor:
            uncond = state.active.by_branch().get("uncond")
            return combine(state, noise_pred) if uncond is None else 2 * uncond.float() - combine(state, noise_pred)

        made.cfg_combine = wrong
        return made

    stage.strategy_cls = strategy


def one_memory(generator: VideoGenerator) -> None:
    """A step cache whose branches share one memory."""
    stage: Any = generator.pipeline.stages["denoising"]
    for cache in (h for h in stage.hooks if isinstance(h, StepCache)):

        def rows(run: Any, keys: Any, step: Any, calls: Any, cache: Any = cache) -> list[Any]:
            return [run.rows.setdefault(("any", sample), cache.row()) for _, sample in keys]

        cache._rows = rows  # type: ignore[method-assign]


def dropped_mask(generator: VideoGenerator) -> None:
    """Padding is encoded as if it were text, and kept."""
    stage: Any = generator.pipeline.stages["text_encoding"]

    def encode(prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = (generator.pipeline.get_module(n) for n in ("tokenizer", "text_encoder"))
        ids = tokenizer(prompts, padding="max_length", max_length=stage.max_length, return_tensors="pt").input_ids
        with torch.no_grad():
            embeds = encoder(ids, torch.ones_like(ids)).last_hidden_state
        return embeds, torch.full((len(prompts),), stage.max_length)

    stage.encode = encode


def shifted_seed(generator: VideoGenerator) -> None:
    stage: Any = generator.pipeline.stages["latents"]
    forward = stage.forward

    def shifted(batch: Any, args: Any) -> Any:
        batch.seeds = [s + 1 for s in batch.seeds]
        return forward(batch, args)

    stage.forward = shifted


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """Plants a fault in every generator that is opened with cfg="sequential"."""

    def plant(fault: Fault) -> None:
        opened = VideoGenerator.from_pretrained

        @functools.wraps(opened)  # settings are read from its signature
        def from_pretrained(*args: Any, **options: Any) -> VideoGenerator:
            generator = opened(*args, **options)
            if options.get("cfg") == "sequential":
                fault(generator)
            return generator

        monkeypatch.setattr(VideoGenerator, "from_pretrained", staticmethod(from_pretrained))

    return plant


FAULTS: dict[str, Fault] = {"sign of guidance": wrong_sign, "mask of the text": dropped_mask, "seed": shifted_seed}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_caught(fault: str | None, planted: Any) -> None:
    """The embedded model: without a fault the two plans are the same; with one even the default limit says so."""
    if fault:
        planted(FAULTS[fault])
    out = compare_configurations(plan("cfg=batched", "cfg=sequential")).comparison
    assert bool(out.failures(EXACT)) is bool(fault)
    assert bool(out.failures(Thresholds())) is bool(fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_on_random_weights(fault: str, tiny: Path, planted: Any) -> None:
    """Where any video looks like any other, the latents still tell."""
    planted(FAULTS[fault])
    out = compare_configurations(plan("cfg=batched", "cfg=sequential", tiny, fields=SMALL)).comparison
    assert out.failures(Thresholds(max_latent_diff=1e-3)) and out.failures(Thresholds(min_ssim=0.999))


@pytest.mark.parametrize("fault", [None, one_memory])
def test_a_cache_with_wrong_branch_state_is_caught(fault: Fault | None, tiny: Path, planted: Any) -> None:
    """A lossy option must be the same video in every plan; one memory for two branches is not."""
    if fault:
        planted(fault)
    fields = SMALL | {"num_inference_steps": 8}
    cache = "cache=fbcache:threshold=0.3"
    made = plan(f"{cache},cfg=batched", f"{cache},cfg=sequential", tiny, fields=fields)
    assert bool(compare_configurations(made).comparison.failures(EXACT)) is bool(fault)


def forgetful(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """A backend that ignores masks."""
    return math_attention(q, k, v)


@pytest.mark.parametrize("backend", ["math", "forgetful"])
def test_an_attention_backend_that_drops_masks_is_caught(backend: str, tmp_path: Path) -> None:
    """LTX masks its padded text."""
    model = make_tiny_ltx(tmp_path / "ltx")
    register_backend("forgetful", forgetful)
    try:
        made = plan("attention=sdpa", f"attention={backend}", model, fields=SMALL, prompts=["a red cat"])
        out = compare_configurations(made).comparison
    finally:
        del BACKENDS["forgetful"]
    assert bool(out.failures(EXACT)) is (backend == "forgetful")


# -- no-ops, order, sharing -------------------------------------------------------------------------------------------


def test_a_no_op_is_equal_bit_for_bit(tiny: Path) -> None:
    out = compare_configurations(plan("", "cfg=auto,scheduler=unipc", tiny, fields=SMALL, seeds=[3], prompts=PROMPTS))
    measures = out.comparison.measures()
    assert measures["ssim"] == {"mean": 1.0, "worst": 1.0} and measures["psnr"]["worst"] == float("inf")
    assert measures["latent_difference"]["worst"] == 0 and out.comparison.failures(EXACT) == []
    assert [p.name for p in out.comparison.pairs] == [f"{p}, seed 3" for p in PROMPTS]
    assert set(out.pictures) == {p.name for p in out.comparison.pairs}


def test_pairs_run_in_turns_after_the_warm_up(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    make = VideoGenerator.generate_video

    def generate(self: VideoGenerator, prompt: Any, *args: Any, **fields: Any) -> Any:
        order.append((self.options["cfg"][0], fields["seed"]))
        return make(self, prompt, *args, **fields)

    monkeypatch.setattr(VideoGenerator, "generate_video", generate)
    more: Any = {"fields": SMALL | {"num_inference_steps": 1}, "prompts": ["a cat"], "warmup": 1, "seeds": [5, 6]}
    told: list[Any] = []
    made = plan("cfg=batched", "cfg=sequential", tiny, repeats=2, **more)
    out = compare_configurations(made, on_pair=lambda *t: told.append(t)).comparison
    assert "".join(side for side, _ in order) == "bs" + "bssb" + "sbbs"
    assert [seed for _, seed in order] == [5] * 6 + [6] * 4
    assert [len(p.runs) for p in out.pairs] == [2, 2] and told == [("pairs", 1, 2), ("pairs", 2, 2)]
    assert out.time()["total"]["a"] > 0 and all(p.peaks and min(p.peaks) > 2**20 for p in out.pairs)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ({}, {}, ["transformer", "transformer_2", "vae"]),
        ({"cfg": "batched"}, {"attention": "math", "threads": 1}, ["transformer", "transformer_2", "vae"]),
        ({"dtype": "float32"}, {"dtype": "float32"}, ["transformer", "transformer_2", "vae"]),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, []),
        ({"model": "x"}, {"model": "y"}, []),
        ({}, {"compile": True}, ["vae"]),
        ({"compile": True}, {"compile": True}, ["vae"]),
        ({}, {"compile": False}, ["transformer", "transformer_2", "vae"]),
        ({}, {"quantize": "int8"}, ["vae"]),
    ],
)  # fmt: skip
def test_what_is_shared(a: dict[str, Any], b: dict[str, Any], shared: list[str]) -> None:
    assert shareable(a, b, ["transformer", "transformer_2", "vae"]) == shared


def test_an_option_that_is_not_known_to_be_harmless_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(model: str, *, cfg: str = "auto", brand_new: str | None = None) -> None: ...

    monkeypatch.setattr(VideoGenerator, "from_pretrained", staticmethod(from_pretrained))
    assert shareable({}, {"cfg": "batched"}, ["vae"]) == ["vae"]
    assert shareable({}, {"brand_new": "x"}, ["vae"]) == []
    assert parse_configuration("brand_new=a,b:2,cfg=batched").options == {"brand_new": "a,b:2", "cfg": "batched"}


def test_components_are_shared_and_threads_are_put_back(tiny: Path) -> None:
    made = plan("", "threads=2,num_inference_steps=1", tiny, fields=SMALL | {"num_inference_steps": 1}, prompts=["a"])
    out = compare_configurations(made).comparison
    assert {"transformer", "vae", "text_encoder"} <= set(out.facts["shared_components"])
    assert out.facts["threads"] == [1, 2] and torch.get_num_threads() == 1


def test_other_sizes_are_a_problem_of_their_pair(tiny: Path) -> None:
    made = plan("", "height=48", tiny, fields=SMALL | {"num_inference_steps": 1}, prompts=["a"])
    out = compare_configurations(made)
    assert out.comparison.failures(EXACT)[0] == "a, seed 0: sizes differ: 32x32 against 48x32"
    assert out.comparison.pairs[0].latents is None and out.pictures == {}


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"seeds": []}, InputError, "seeds"),
        ({"seeds": [1, 1]}, InputError, "seeds"),
        ({"prompts": []}, InputError, "prompts"),
        ({"prompts": ["a", "a"]}, InputError, "different"),
        ({"prompts": None}, InputError, "--prompt"),
        ({"repeats": 0}, InputError, "repeats"),
        ({"warmup": -1}, InputError, "warmup"),
        ({"options": {"cfg": "sideways"}}, ConfigError, "sideways"),
        ({"fields": {"height": 31}}, InputError, "height"),
    ],
)
def test_bad_plans(tiny: Path, more: dict[str, Any], error: type[KinetoscopeError], says: str) -> None:
    with pytest.raises(error, match=says):
        compare_configurations(plan("", "", tiny, **({"prompts": ["a"]} | more)))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_typed_by_what_exists() -> None:
    text = "cfg=batched, compile=true,num_inference_steps=20,guidance_scale=3,flow_shift=none,attention=sdpa"
    found = parse_configuration(text, {"num_cond_frames": 13})
    assert found.options == {"cfg": "batched", "compile": True, "attention": "sdpa"}
    assert found.fields == {"num_inference_steps": 20, "guidance_scale": 3.0, "flow_shift": None}
    own = parse_configuration(
        "num_cond_frames=9,dmd_denoising_steps=[1000, 757,522]", {"num_cond_frames": 13, "dmd_denoising_steps": None}
    )
    assert own.fields == {"num_cond_frames": 9, "dmd_denoising_steps": [1000, 757, 522]}
    nested = parse_configuration(
        "cache=fbcache:threshold=0.05,warmup=3,cfg=batched,attention=self=vsa:sparsity=0.8;cross=sdpa"
    )
    assert nested.options == {
        "cache": "fbcache:threshold=0.05,warmup=3", "cfg": "batched", "attention": "self=vsa:sparsity=0.8;cross=sdpa",
    }  # fmt: skip
    assert parse_configuration("lora=a:1").options == {"lora": "a:1"}
    assert parse_configuration("lora=a:1,lora=b,lora=c:2").options == {"lora": ["a:1", "b", "c:2"]}
    assert parse_configuration("") == Configuration() and parse_configuration("  ") == Configuration()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cgf=batched", "did you mean 'cfg'"),
        ("steps=3", "did you mean 'num_inference_steps'"),
        ("compile", "NAME=VALUE"),
        ("compile=maybe,threads=two", "int"),
        ("cfg=batched,cfg=auto", "twice"),
        ("seed=3", "common to both"),
        ("cache=fbcache:0.05,seed=3", "common to both"),
        ("cache=fbcache,threshold=3", "unknown setting 'threshold'"),
        ("hooks=3", "common to both"),
        ("num_inference_steps=2.5", "num_inference_steps='2.5'"),
    ],
)
def test_bad_settings(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_configuration(text)


# -- existing videos --------------------------------------------------------------------------------------------------


def clip(seed: int, frames: int = 4, height: int = 32) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return np.repeat(np.repeat(rng.integers(0, 256, (frames, height // 8, 4, 3), dtype=np.uint8), 8, 1), 8, 2)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in "ab":
        for index in range(2):
            write_video(tmp_path / name / f"{index}.mp4", clip(index), 8)
    return tmp_path / "a", tmp_path / "b"


def test_equal_folders_pass(folders: tuple[Path, Path]) -> None:
    out = compare_files(*folders)
    assert out.comparison.measures()["ssim"] == {"mean": 1.0, "worst": 1.0}
    assert out.comparison.failures(Thresholds(min_ssim=1)) == [] and len(out.pictures) == 2
    (folders[0] / "notes.txt").touch()
    (folders[0] / ".part.mp4").touch()
    assert len(compare_files(*folders).comparison.pairs) == 2


def test_each_problem_of_a_folder_is_told_and_the_rest_compared(folders: tuple[Path, Path]) -> None:
    a, b = folders
    write_video(a / "missing.mp4", clip(5), 8)
    write_video(a / "longer.mp4", clip(6), 8)
    write_video(b / "longer.mp4", clip(6, frames=6), 8)
    write_video(a / "size.mp4", clip(7), 8)
    write_video(b / "size.mp4", clip(7, height=48), 8)
    (a / "garbage.mp4").write_bytes(b"no video")
    (b / "garbage.mp4").write_bytes(b"")
    whole = (a / "0.mp4").read_bytes()
    (a / "cut.mp4").write_bytes(whole)
    (b / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    out = compare_files(a, b).comparison
    problems = {p.name: p.problem for p in out.pairs if p.problem}
    assert problems.keys() == {"missing.mp4", "longer.mp4", "size.mp4", "garbage.mp4", "cut.mp4"}
    assert problems["missing.mp4"] == f"only in {a}" and "4 frames against 6" in problems["longer.mp4"]
    assert "32x32 against 48x32" in problems["size.mp4"] and "garbage.mp4 is not a readable" in problems["garbage.mp4"]
    assert out.measures()["ssim"]["worst"] == 1 and len(out.failures(Thresholds(min_ssim=0))) == 5


def test_two_files(folders: tuple[Path, Path]) -> None:
    a, b = folders
    (pair,) = compare_files(a / "0.mp4", b / "1.mp4").comparison.pairs
    assert pair.name == "0.mp4 against 1.mp4" and pair.scores and pair.scores.mean_ssim is not None
    assert pair.scores.mean_ssim < 0.5


def test_what_is_no_pair_of_sets_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    (tmp_path / "empty").mkdir()
    for first, second, says in (
        (a, tmp_path / "empty", "no file name in common"),
        (a, tmp_path / "nowhere", "nowhere does not exist"),
        (a, b / "0.mp4", "two files or two folders"),
    ):
        with pytest.raises(InputError, match=says):
            compare_files(first, second)


def test_prompts_of_records_are_judged(tmp_path: Path) -> None:
    """Videos that the embedded model made say what they should show."""
    from kinetoscope.worlds import get_world

    world = get_world("shapes")
    spec = world.captions("heldout")[0]
    for name in "ab":
        frames = world.render(spec, 1, num_frames=9) if name == "a" else np.zeros((9, 64, 64, 3), np.uint8)
        write_video(tmp_path / name / "0.mp4", frames, 8, metadata={"model": "tiny-t2v", "prompt": spec.caption()})
    following = compare_files(tmp_path / "a", tmp_path / "b").comparison.following()
    assert following is not None and following[0].total == 5
    assert following[0].value == 1 and following[1].value < 0.5


# -- from Python ------------------------------------------------------------------------------------------------------


class Louder(Interceptor):
    """Multiplies what the network answers."""

    name = "louder"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def around_forward(self, call: Any, state: Any, inputs: Any) -> Tensor:
        return self.factor * call(state, inputs)


class OppositeStrategy(StandardStrategy):
    """Guides away from the prompt."""

    def cfg_combine(self, state: Any, noise_pred: Tensor) -> Tensor:
        return -super().cfg_combine(state, noise_pred)


def test_compare_takes_hooks_strategies_and_generators(tiny: Path, tmp_path: Path) -> None:
    def against(b: Any, a: Any = "") -> Compared:
        return compare(a, b, PROMPTS[0], model=tiny, options=HERE, warmup=0, thresholds=EXACT, seeds=[0, 1], **SMALL)

    assert against({"cfg": "batched", "hooks": [Louder(1.0)]}).passed
    loud = against({"hooks": [Louder(3.0)], "num_inference_steps": 4})
    assert not loud.passed and loud.comparison.labels == ("", "hooks=louder,num_inference_steps=4")
    assert not against({"strategy": OppositeStrategy}).passed
    assert against({"strategy": StandardStrategy}, a={"strategy": StandardStrategy}).passed
    own = VideoGenerator.from_pretrained(tiny, **HERE)
    assert against(own).passed
    own.pipeline.stages["denoising"].strategy_cls = OppositeStrategy  # type: ignore[attr-defined]
    found = against({"generator": own, "hooks": [Louder(1.0)]})
    assert not found.passed and found.as_json()["verdict"] == "fail"
    page = found.write(tmp_path)
    assert page.read_text().startswith("<!") and (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("b", "says"),
    [
        ({"cgf": "batched"}, "unknown setting 'cgf'; did you mean cfg"),
        ({"seed": 1}, "unknown setting 'seed'"),
        ({"generator": "self", "cfg": "batched"}, "generator= and cfg cannot be used together"),
        ({"generator": "self", "strategy": StandardStrategy}, "generator= and strategy cannot be used together"),
    ],
)
def test_compare_refuses_by_name(tiny: Path, b: dict[str, Any], says: str) -> None:
    if "generator" in b:
        b = b | {"generator": VideoGenerator.from_pretrained(tiny, **HERE)}
    with pytest.raises(KinetoscopeError, match=says):
        compare("", b, "a cat", model=tiny)
    with pytest.raises(ConfigError, match="model=None"):
        compare("", "cfg=batched")
