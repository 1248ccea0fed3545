"""Step caches on tiny models: against diffusers' own, in every family, in streams, from options to replay."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.cli import main
from kinetoscope.core.errors import CompositionError, ConfigError, InputError, KinetoscopeError, ModelLoadError
from kinetoscope.engine.hooks.caches import DBCache, FBCache, MagCache, StepCache, TaylorSeer, TeaCache
from kinetoscope.engine.hooks.caches.teacache import time_signal
from kinetoscope.loading import resolve_model
from kinetoscope.models.wan import spec
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.nn.stack import BlockCall
from kinetoscope.pipelines.presets.fast_wan import FastWanTextToVideo
from kinetoscope.runtime.caches import CALIBRATION, network_digest, open_cache
from kinetoscope.runtime.calibrate import calibrate
from kinetoscope.runtime.replay import replay
from runtime.families import FAMILIES, make_causal, open_family
from tiny import make_tiny_wan

STEPS = 16
PROMPT, NEGATIVE = "a red cat", "blue"
FIELDS: dict[str, Any] = {
    "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 4.0
}  # fmt: skip
USUAL = ("wan", "wan-a14b", "causal", "hunyuan", "longcat")
RATIOS = [1.0, *(1 + 0.02 * np.random.default_rng(0).standard_normal(STEPS - 1))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"), layers=4)


@pytest.fixture(scope="module")
def ours(tiny: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(tiny, device="cpu")


def noise() -> Tensor:
    return torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def share(result: Any) -> float:
    """Fraction of rows that were skipped."""
    told = result.logging_info["step_cache"]
    return told["skipped"] / told["rows"]


# -- diffusers' own ---------------------------------------------------------------------------------------------------


def _fbcache(threshold: float) -> tuple[StepCache, Any]:
    from diffusers.hooks import FirstBlockCacheConfig

    return FBCache(threshold), FirstBlockCacheConfig(threshold=threshold)


def _magcache(threshold: float, limit: int, length: int) -> tuple[StepCache, Any]:
    from diffusers.hooks import MagCacheConfig

    ratios = [float(r) for r in np.interp(np.linspace(0, 1, length), np.linspace(0, 1, STEPS), RATIOS)]
    theirs = MagCacheConfig(threshold=threshold, max_skip_steps=limit, num_inference_steps=STEPS, mag_ratios=ratios)
    return MagCache({"cond": ratios, "uncond": ratios}, threshold, limit), theirs


def _taylorseer(interval: int, warmup: int, order: int, end: int | None) -> tuple[StepCache, Any]:
    """theirs is told to extrapolate the output of each block, of which the last one's is what ours extrapolates."""
    from diffusers.hooks import TaylorSeerCacheConfig

    theirs = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=warmup, max_order=order, disable_cache_after_step=end,
        taylor_factors_dtype=torch.float32, cache_identifiers=[r"blocks\.\d+"],
    )  # fmt: skip
    return TaylorSeer(interval, warmup, order, "output", end or 0), theirs


@pytest.mark.parametrize(
    "make",
    [
        lambda: _fbcache(0.15),
        lambda: _fbcache(0.17),
        lambda: _magcache(0.06, 3, STEPS),
        lambda: _magcache(0.2, 2, 23),
        lambda: _taylorseer(5, 3, 1, None),
        lambda: _taylorseer(3, 4, 2, 12),
    ],
    ids=["fbcache-0.15", "fbcache-0.17", "magcache", "magcache-interpolated", "taylorseer", "taylorseer-2"],
)
def test_equal_to_diffusers(tiny: Path, ours: VideoGenerator, make: Callable[[], tuple[StepCache, Any]]) -> None:
    from diffusers import WanPipeline

    cache, config = make()
    oracle = WanPipeline.from_pretrained(tiny)
    oracle.set_progress_bar_config(disable=True)
    oracle.transformer.enable_cache(config)
    expected = oracle(PROMPT, NEGATIVE, latents=noise()[None], output_type="latent", **FIELDS).frames[0]
    got = ours.generate_video(PROMPT, NEGATIVE, latents=noise(), hooks=[cache], **FIELDS)
    plain = ours.generate_video(PROMPT, NEGATIVE, latents=noise(), **FIELDS).latents
    assert 0.1 < share(got) < 0.9
    assert (got.latents - expected).abs().max() <= 1e-4 * expected.std()
    assert (got.latents - plain).abs().max() > 1e-2 * plain.std()


def test_each_expert_has_a_cache_of_its_own_as_in_diffusers(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    path = make_tiny_wan(tmp_path, kind="a14b", shift=1.0)
    cache, config = _fbcache(0.18)
    oracle = WanPipeline.from_pretrained(path, boundary_ratio=0.6)
    oracle.set_progress_bar_config(disable=True)
    for network in (oracle.transformer, oracle.transformer_2):
        network.enable_cache(config)
    expected = oracle(PROMPT, NEGATIVE, latents=noise()[None], output_type="latent", **FIELDS).frames[0]
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.6}))
    ours = VideoGenerator.from_pretrained(path, device="cpu")
    got = ours.generate_video(PROMPT, NEGATIVE, latents=noise(), hooks=[cache], trace=True, **FIELDS)
    steps = [r["cache"][0]["skipped"] for r in got.logging_info["step_trace"]]
    low = next(i for i, r in enumerate(got.logging_info["step_trace"]) if r["timestep"] < 600)
    assert any(steps[:low]) and any(steps[low:]) and not steps[low]
    assert (got.latents - expected).abs().max() <= 1e-4 * expected.std()


def test_two_streams_of_tokens_as_in_diffusers(tmp_path: Path) -> None:
    """HunyuanVideo: tokens of the video and of the text are cached together, through the join between its blocks."""
    from diffusers import HunyuanVideoPipeline

    ours = open_family("hunyuan", tmp_path / "hunyuan")
    cache, config = _fbcache(0.6)
    oracle = HunyuanVideoPipeline.from_pretrained(tmp_path / "hunyuan")
    oracle.set_progress_bar_config(disable=True)
    oracle.transformer.enable_cache(config)
    start = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    small = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS}
    expected = oracle(prompt=PROMPT, latents=start[None], output_type="latent", guidance_scale=6.0, **small).frames[0]
    got = ours.generate_video(PROMPT, latents=start, hooks=[cache], **small)
    assert 0.1 < share(got) < 0.95
    assert (got.latents - expected).abs().max() <= 1e-4 * expected.std()


# -- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_every_family(name: str, tmp_path: Path) -> None:
    """A cache that skips nothing changes no bit; one that does is the same in one forward and in one a branch."""
    family = FAMILIES[name]
    steps = {} if name == "causal" else {"num_inference_steps": 6}
    request = family.request(prompt="a red cat", guidance_scale=3.0, **steps)
    opened = open_family(name, tmp_path / name, cfg="batched")
    apart = open_family(name, tmp_path / name, cfg="sequential", modules=opened.pipeline.loaded_modules())
    plain = opened.generate_video(**request).latents
    assert torch.equal(opened.generate_video(**request, hooks=[FBCache(0.0)]).latents, plain)
    for make in (lambda: TaylorSeer(interval=2, warmup=2), lambda: FBCache(0.7)):
        got = opened.generate_video(**request, hooks=[make()])
        assert 0 < share(got) < 1 and not torch.equal(got.latents, plain)
        sequential = apart.generate_video(**request, hooks=[make()])
        assert sequential.logging_info["step_cache"] == got.logging_info["step_cache"]
        assert (sequential.latents - got.latents).abs().max() <= 1e-4 * plain.std()


@pytest.mark.parametrize(
    "make",
    [lambda: FBCache(0.12), lambda: DBCache(0.12, 2, 1, 2), lambda: MagCache({"cond": RATIOS, "uncond": RATIOS})],
)
def test_a_prompt_is_the_same_alone_and_in_a_batch(ours: VideoGenerator, make: Callable[[], StepCache]) -> None:
    prompts = ["a red cat", "a blue circle moving left on black", "a"]
    together = ours.generate_video(prompts, NEGATIVE, seed=[1, 2, 3], batch_size=3, hooks=[make()], **FIELDS)
    for prompt, seed, got in zip(prompts, [1, 2, 3], together, strict=True):
        alone = ours.generate_video(prompt, NEGATIVE, seed=seed, hooks=[make()], **FIELDS)
        assert (alone.latents - got.latents).abs().max() <= 1e-4 * alone.latents.std()
    assert 0 < share(together[0]) < 1


def test_a_branch_that_guidance_stops_is_not_asked_for(tiny: Path, ours: VideoGenerator) -> None:
    apart = VideoGenerator.from_pretrained(tiny, device="cpu", cfg="sequential", modules=ours.pipeline.loaded_modules())
    fields = FIELDS | {"guidance": "cfg:reuse=0.5", "seed": 1, "trace": True}
    got, expected = (g.generate_video(PROMPT, NEGATIVE, hooks=[TaylorSeer(3)], **fields) for g in (ours, apart))
    asked = [[row["branch"] for row in step["cache"]] for step in got.logging_info["step_trace"]]
    assert asked == [["uncond", "cond"]] * 8 + [["cond"]] * 8
    assert (got.latents - expected.latents).abs().max() <= 1e-4 * got.latents.std()


# -- blocks and streams -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    path = tmp_path_factory.mktemp("causal")
    make_causal(path)
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", cache="fbcache:threshold=0.5")


def test_a_stream_with_a_cache_is_the_offline_video(causal: VideoGenerator) -> None:
    """Two sessions take turns, so what is cached is a run's own."""
    size: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 3.0}
    whole = [causal.generate_video("a red cat", num_frames=9, seed=s, **size) for s in (3, 4)]
    assert all(0 < share(w) < 1 for w in whole)
    with causal.start_session("a red cat", seed=3, **size) as a, causal.start_session("a red cat", seed=4, **size) as b:
        chunks = [(a.step(), b.step()) for _ in range(3)]
    for made, expected in zip(zip(*chunks, strict=True), whole, strict=True):
        assert np.array_equal(np.concatenate(made), expected.frames)


def test_rows_that_skip_among_rows_that_write_keys(causal: VideoGenerator) -> None:
    """Branches that part ways in one forward that owns a K/V cache: as when each has a forward of its own."""
    request: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 3.0, "num_frames": 9, "seed": 3}
    plain = VideoGenerator.from_pretrained(
        causal.pipeline.model, device="cpu", dtype="float32", cfg="sequential", modules=causal.pipeline.loaded_modules()
    )
    opened = VideoGenerator.from_pretrained(
        causal.pipeline.model, device="cpu", dtype="float32", cfg="batched", modules=plain.pipeline.loaded_modules()
    )

    def cache() -> StepCache:
        return MagCache({"uncond": [1.0] * 4, "cond": [1.0, 1.0, 2.0, 1.0]}, retention=0.0)

    got = opened.generate_video("a red cat", hooks=[cache()], trace=True, **request)
    expected = plain.generate_video("a red cat", hooks=[cache()], **request)
    skips = [tuple(r["skipped"] for r in step["cache"]) for step in got.logging_info["step_trace"]]
    assert skips == 3 * [(False, False), (True, True), (True, False), (True, True)]
    assert (got.latents - expected.latents).abs().max() <= 1e-4 * expected.latents.std()


# -- options ----------------------------------------------------------------------------------------------------------


def test_an_option_is_its_hook_and_is_replayed(tiny: Path, ours: VideoGenerator, tmp_path: Path) -> None:
    opened = VideoGenerator.from_pretrained(tiny, device="cpu", cache="fbcache:threshold=0.2,limit=2")
    result = opened.generate_video(PROMPT, output_path=tmp_path / "a.mp4", trace=True, fps=8, **FIELDS)
    same = ours.generate_video(PROMPT, hooks=[FBCache(0.2, limit=2)], **FIELDS)
    assert torch.equal(result.latents, same.latents) and share(result) > 0.1
    assert opened.options["cache"] == "fbcache:threshold=0.2,limit=2"
    first, second = (result.logging_info["step_trace"][i]["cache"] for i in (0, 1))
    assert first[0] == {"branch": "uncond", "sample": 0, "skipped": False, "score": None}
    assert second[1]["skipped"] is (second[1]["score"] <= 0.2)
    assert replay(tmp_path / "a.mp4", model=str(tiny)).identical


@pytest.mark.parametrize(
    ("cache", "error", "says"),
    [
        ("fbcach", InputError, "did you mean fbcache"),
        ("fbcache:treshold=0.1", InputError, r"fbcache.*did you mean threshold"),
        ("fbcache:threshold=much", InputError, "threshold=much is not a number"),
        ("taylorseer:interval=2.5", InputError, "interval=2.5 is not a whole number"),
        ("taylorseer:order", InputError, "key=value"),
        ("fbcache:first=0", InputError, "at least 1"),
        ("magcache", ConfigError, "kinetoscope calibrate .* --cache magcache"),
        ("teacache", ConfigError, "kinetoscope calibrate .* --cache teacache"),
        ("magcache:calibration=/nowhere.json", ModelLoadError, "nowhere.json is missing"),
    ],
)
def test_options_that_cannot_be(tiny: Path, cache: str, error: type[KinetoscopeError], says: str) -> None:
    with pytest.raises(error, match=says):
        VideoGenerator.from_pretrained(tiny, device="cpu", cache=cache)


def test_refused_with_both_names_when_the_model_is_opened(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"fbcache.*taylorseer|taylorseer.*fbcache"):
        VideoGenerator.from_pretrained(tiny, device="cpu", cache="fbcache", hooks=[TaylorSeer()])
    with pytest.raises(CompositionError, match="dbcache: first=8 and last=0 leave none of the 4 blocks"):
        VideoGenerator.from_pretrained(tiny, device="cpu", cache="dbcache")
    experts = make_tiny_wan(tmp_path, kind="a14b")
    with pytest.raises(CompositionError, match="'teacache' and the two experts"):
        VideoGenerator.from_pretrained(experts, device="cpu", cache="teacache")


# -- what TeaCache knows of published models --------------------------------------------------------------------------


def test_published_polynomials_are_of_the_published_networks() -> None:
    small = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    assert spec.teacache_coefficients("/some/where", small) == spec.TEACACHE["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    large = spec.teacache_coefficients("/some/where", WanConfig())
    assert large == spec.TEACACHE["Wan-AI/Wan2.1-T2V-14B-Diffusers"]
    image = WanConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    assert spec.teacache_coefficients("/some/where", image) is None  # 480P and 720P have the same sizes
    named = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert spec.teacache_coefficients(named, image) == spec.TEACACHE[named]
    assert spec.teacache_coefficients("/some/where", WanConfig(num_layers=6)) is None
    # the value of the published code at one change, computed by hand from its coefficients
    told = TeaCache(spec.TEACACHE["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]).foretold(0.02)
    assert told == pytest.approx(-0.0083497990 + 0.0738433123 - 0.2113103792 + 0.2739752320 - 0.0499875664, abs=1e-9)


def test_a_distilled_model_of_the_same_sizes_has_none(tiny: Path) -> None:
    assert FastWanTextToVideo.teacache_coefficients(resolve_model(str(tiny))) is None


def test_teacache_measures_the_projected_time_embedding() -> None:
    """As published: not the block's modulation, which has a table and ones added."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16}
    model = WanTransformer3DModel(WanConfig.from_dict(config | {"text_dim": 8}))
    model.init_weights(torch.Generator().manual_seed(0))
    timestep = torch.tensor([[700.0]])
    with torch.no_grad():
        table = model.prepare_timesteps(timestep[0])["modulation"].blocks[:, :, 0]
        signal = time_signal([BlockCall(model.blocks[0], {"modulation": table, "keys": None})])
        _, projected = model.condition_embedder.embed_time(timestep)
    assert torch.allclose(signal, projected.float(), atol=1e-6)
    assert not torch.allclose(table, projected.float(), atol=1e-2)


# -- calibration ------------------------------------------------------------------------------------------------------


def test_ratios_are_those_that_diffusers_measures(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    from diffusers import WanPipeline
    from diffusers.hooks import MagCacheConfig

    ours = VideoGenerator.from_pretrained(tiny, device="cpu", cfg="sequential")
    fields = FIELDS | {"guidance_scale": 1.0}
    file = tmp_path / "own.json"
    _, entry = calibrate(ours, "magcache", [PROMPT], output=file, latents=noise(), **fields)
    oracle = WanPipeline.from_pretrained(tiny)
    oracle.set_progress_bar_config(disable=True)
    oracle.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    capsys.readouterr()
    oracle(PROMPT, latents=noise()[None], output_type="latent", **fields)
    printed = re.findall(r"\[[-0-9., e]+\]", capsys.readouterr().out)
    assert np.allclose(entry["ratios"]["cond"], json.loads(printed[-1]), atol=1e-4)
    cache, option = open_cache(f"magcache:calibration={file}", ours.pipeline.model)
    assert isinstance(cache, MagCache) and list(cache.ratios) == ["cond"]
    assert re.fullmatch(rf"magcache:calibration={file},sha256=[0-9a-f]{{16}}", option)


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_the_command_writes_beside_the_model_and_the_caches_read_it(copied: Path, tmp_path: Path, capsys: Any) -> None:
    size = ["--size", "32x32", "--frames", "5", "--steps", "10", "--device", "cpu", "--n", "2"]
    assert main(["calibrate", str(copied), "--cache", "teacache", *size]) == 0
    assert main(["calibrate", str(copied), "--cache", "magcache", *size]) == 0
    assert f"written: {copied / CALIBRATION}" in capsys.readouterr().out
    content = json.loads((copied / CALIBRATION).read_text())
    assert content["network"] == network_digest(resolve_model(str(copied)))
    assert len(content["teacache"]["coefficients"]) == 5
    assert {b: len(v) for b, v in content["magcache"]["ratios"].items()} == {"uncond": 10, "cond": 10}
    for cache in ("magcache:threshold=0.5", "teacache:threshold=0.5,warmup=2"):
        video = tmp_path / f"{cache[:3]}.mp4"
        run = ["generate", PROMPT, "--model", str(copied), "--cache", cache, "-o", str(video), *size[:-2]]
        assert main(run) == 0
        assert replay(video, model=str(copied)).identical
    content["magcache"]["ratios"]["cond"][4] += 0.5
    (copied / CALIBRATION).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=r"calibration .* has changed"):
        replay(tmp_path / "mag.mp4", model=str(copied))


def test_a_calibration_of_other_weights_is_refused(copied: Path) -> None:
    ours = VideoGenerator.from_pretrained(copied, device="cpu")
    calibrate(ours, "magcache", [PROMPT], **FIELDS)
    open_cache("magcache", ours.pipeline.model)
    shutil.rmtree(copied / "transformer")
    shutil.copytree(make_tiny_wan(copied.parent / "other", seed=5, layers=4) / "transformer", copied / "transformer")
    with pytest.raises(ModelLoadError, match=r"other weights .* make it anew"):
        open_cache("magcache", resolve_model(str(copied)))


@pytest.mark.parametrize("entry", [{}, {"ratios": {}}, {"ratios": {"cond": ["a"]}}, [1.0]])
def test_a_damaged_calibration_is_refused(copied: Path, entry: Any) -> None:
    model = resolve_model(str(copied))
    content = {"format": 1, "network": network_digest(model), "magcache": entry}
    (copied / CALIBRATION).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=f"{CALIBRATION} holds no calibration"):
        open_cache("magcache", model)


def test_what_cannot_be_calibrated(tiny: Path, ours: VideoGenerator, capsys: Any) -> None:
    with pytest.raises(InputError, match="cache that needs calibration"):
        calibrate(ours, "fbcache", [PROMPT])
    with pytest.raises(InputError, match="at least one prompt"):
        calibrate(ours, "magcache", [])
    with pytest.raises(InputError, match="polynomial"):
        calibrate(ours, "teacache", [PROMPT], **FIELDS | {"num_inference_steps": 3})
    assert main(["calibrate", str(tiny)]) == 1 and "--cache magcache or" in capsys.readouterr().err
    assert not (tiny / CALIBRATION).exists()
