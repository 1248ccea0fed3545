"""The cost model: closed forms worked out by hand, what grows with what, what is refused, and what the command says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kinetoscope.cli import main
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime import paper
from kinetoscope.runtime.accelerators import ACCELERATORS, Accelerator, find_accelerator
from kinetoscope.runtime.layouts import (
    CALL,
    COMPUTE,
    FILL,
    NETWORK,
    bytes_a_step,
    choose,
    estimate,
    layouts,
    refusal,
    weight_bytes,
)
from kinetoscope.runtime.paper import PAPER, paper_pipeline
from kinetoscope.runtime.workload import Weights, Workload, workload
from tiny import make_tiny_wan

# 2 blocks of 4 heads x 8 channels, 10 tokens, 2 rows, 4 bytes a number
SMALL = Workload(
    model="small", params=SamplingParams(), tokens=10, text=3, joint=False, branches=2, steps=5, batched=False, dim=32,
    hidden=64, heads=4, blocks=2, wide_blocks=0, across_heads=False, itemsize=4, flops=1000.0, attention_flops=400.0,
    latent=40, latent_size=(1, 4, 10), modulation=0, refined=0, gathers=1, transformer=Weights(4000, 100, 40, 360),
    transformers=Weights(4000, 100, 40, 360), encoders=Weights(0, 0, 0, 70), largest_block=3000, vae_bytes=30,
    activation_bytes=800, kept_bytes=60, vae="AutoencoderKLWan", vae_shared=True, vae_flops=100.0,
    vae_activation_bytes=600, vae_fixed_bytes=100,
)  # fmt: skip
PAPERY = Accelerator("paper", 1e-12 / COMPUTE, 1e-6, 1e-9 / NETWORK, 0.5e-9 / NETWORK, 4, "none")
"""One operation a second, 1000 bytes, one byte a second within nodes of four and half a byte between."""


@pytest.mark.parametrize(
    ("parallel", "sent"),
    [
        ("tp=1", {}),
        # 2 blocks x 4 tensors x 2 rows x 5 tokens x 32 channels x 4 bytes, of which half leaves; 5 tokens joined
        ("ulysses=2", {"ulysses": 2 * 4 * 2 * 5 * 32 * 4 // 2, "sequence": 2 * 5 * 32 * 4}),
        # 3 passes of keys and values of 3 tokens (10 in 4 parts, padded)
        ("ring=4", {"ring": 2 * 2 * 2 * 3 * 32 * 4 * 3, "sequence": 2 * 3 * 32 * 4 * 3}),
        # both: the 3 tokens of a rank make 6 of half the heads
        ("ring=2,ulysses=2", {
            "ulysses": 2 * 4 * 2 * 3 * 32 * 4 // 2, "ring": 2 * 2 * 2 * 3 * 32 * 4, "sequence": 2 * 3 * 32 * 4 * 3,
        }),
        # 4 heads on 3 devices are padded to 6: 48 channels; 10 tokens to 12
        ("ulysses=3", {"ulysses": 2 * 4 * 2 * 4 * 48 * 4 * 2 // 3, "sequence": 2 * 4 * 32 * 4 * 2}),
        # 3 sums a block of 2 rows x 10 tokens x 32 channels; a ring sends each number twice, but for one part
        ("tp=2", {"tp": 2 * 2 * 3 * 2 * 10 * 32 * 4 // 2}),
        ("tp=4", {"tp": 2 * 2 * 3 * 2 * 10 * 32 * 4 * 3 // 4}),
        ("cfg=2", {"cfg": 1 * 40 * 4}),
        ("cfg=2,fsdp=true", {"cfg": 160, "fsdp": 4100 // 2}),
        ("cfg=2,tp=2,fsdp=true", {"cfg": 160, "tp": 2 * 2 * 3 * 10 * 32 * 4 // 2, "fsdp": 2100 // 2}),
    ],
)  # fmt: skip
def test_bytes_by_hand(parallel: str, sent: dict[str, int]) -> None:
    assert bytes_a_step(ParallelConfig.of(parallel), SMALL) == sent


def test_bytes_of_joint_attention() -> None:
    """Sums run over the text too; blocks of two streams have two, those of one stream one."""
    joint = replace(SMALL, joint=True, wide_blocks=1, refined=4)
    assert bytes_a_step(ParallelConfig(tp=2), joint) == {"tp": 2 * 2 * (3 * 13 + 4 * 3) * 32 * 4 // 2}
    video, text = bytes_a_step(ParallelConfig(ring=2), SMALL)["ring"], 2 * 2 * 3 * (32 + 4) * 4
    assert bytes_a_step(ParallelConfig(ring=2), joint)["ring"] == video + text
    video, text = bytes_a_step(ParallelConfig(ulysses=2), SMALL)["ulysses"], 2 * 2 * 3 * 16 * 4
    assert bytes_a_step(ParallelConfig(ulysses=2), joint)["ulysses"] == video + text


def test_bytes_of_norms_modulation_and_gathering_twice() -> None:
    """Three norms a block of 2 rows x 10 tokens, summed in float32; 48 numbers for all rows, of which each has half."""
    twice = replace(SMALL, gathers=2)
    assert bytes_a_step(ParallelConfig(cfg=2, fsdp=True), twice)["fsdp"] == 4100
    plain = bytes_a_step(ParallelConfig(tp=2), SMALL)["tp"]
    more = replace(SMALL, across_heads=True, modulation=48)
    assert bytes_a_step(ParallelConfig(tp=2), more)["tp"] == plain + 2 * 3 * 2 * 10 * 4 + 24 * 4


def test_seconds_by_hand() -> None:
    """10 tokens in 2 parts; ulysses waits, inside the node or between nodes."""
    found = estimate(ParallelConfig(ulysses=2, vae=2), SMALL, PAPERY)
    sent = {"ulysses": 5120, "sequence": 1280}
    assert found.sent == sent and found.compute == pytest.approx(1000)
    assert found.waiting == pytest.approx(5120 + 1280 + 18 * CALL)
    assert found.step == pytest.approx(found.compute + found.waiting)
    assert found.decode == pytest.approx(100 / 2 / 0.5 + 25)  # half of the operations at half the rate; 25 bytes
    assert found.seconds == pytest.approx(5 * found.step + found.decode)
    assert found.videos == pytest.approx(3600 / found.seconds)
    far = estimate(ParallelConfig(ulysses=2, vae=2), SMALL, replace(PAPERY, node=1))
    assert far.waits["ulysses"] == pytest.approx(2 * 5120 + 16 * CALL)


def test_ring_and_fsdp_hide_behind_arithmetic() -> None:
    slow = replace(PAPERY, inside_gbps=1.0, between_gbps=1.0)
    found = estimate(ParallelConfig(ring=2, fsdp=True), SMALL, slow)
    assert found.sent["ring"] and found.sent["fsdp"] and found.waits["ring"] == found.waits["fsdp"] == 0
    assert found.waits["sequence"] > 0


def test_memory_by_hand() -> None:
    assert weight_bytes(ParallelConfig(), SMALL) == 4500 + 100
    assert weight_bytes(ParallelConfig(tp=2), SMALL) == 2100 + 20 + 360 + 100
    assert weight_bytes(ParallelConfig(cfg=2, fsdp=True), SMALL) == 2050 + 400 + 100
    assert weight_bytes(ParallelConfig(cfg=2, tp=2, fsdp=True), SMALL) == 1050 + 20 + 360 + 100
    one = estimate(ParallelConfig(), SMALL, PAPERY)
    assert one.peak == 4600 + max(800 + 2 * 60, 600 + 100) and not one.fits
    shared = estimate(ParallelConfig(cfg=2, fsdp=True, vae=2), SMALL, PAPERY)
    assert shared.peak == 2550 + 800 + 60 + 4 * 3000  # four blocks are whole at a time
    batched = estimate(ParallelConfig(), replace(SMALL, batched=True), PAPERY)
    assert batched.activations == 1600
    assert estimate(ParallelConfig(), SMALL, replace(PAPERY, memory_gb=5520.5 / FILL / 1e9)).fits
    assert not estimate(ParallelConfig(), SMALL, replace(PAPERY, memory_gb=5519 / FILL / 1e9)).fits


def test_what_grows_with_what() -> None:
    """More devices: less arithmetic and memory, more bytes; more tokens: more of all."""
    device = ACCELERATORS["h100"]
    longer = replace(SMALL, tokens=20, flops=3000.0, attention_flops=1600.0, activation_bytes=1600)
    for name in ("ulysses", "ring", "tp"):
        one, two, four = (estimate(ParallelConfig.of({name: n}), SMALL, device) for n in (1, 2, 4))
        assert one.compute > two.compute > four.compute
        assert one.activations + one.weights > two.activations + two.weights > four.activations + four.weights
        assert 0 == sum(one.sent.values()) < sum(two.sent.values())
        more = estimate(ParallelConfig.of({name: 2}), longer, device)
        assert more.compute > two.compute and sum(more.sent.values()) > sum(two.sent.values())
        assert more.peak > two.peak
    assert estimate(ParallelConfig(replicas=3), SMALL, device).videos == pytest.approx(
        3 * estimate(ParallelConfig(), SMALL, device).videos
    )


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        ("tp=3", "tp=3 does not divide the 4 attention heads of small"),
        ("ulysses=8", "ulysses=8 with tp=1 share 4 attention heads of small"),
        ("ulysses=2,tp=4", "ulysses=2 with tp=4 share 4 attention heads"),
        ("cfg=3", "cfg=3 is more than the 2 rows of a step of small"),
        ("ring=16", "ulysses x ring = 16 is more than the 10 tokens"),
        ("tp=2,fsdp=true", "fsdp shares weights among the devices of cfg, ulysses and ring, and there is one"),
        ("ring=8,vae=8", "vae=8 is more than the 4 rows of latents"),
    ],
)
def test_what_cannot_be_is_named(parallel: str, why: str) -> None:
    assert why in str(refusal(ParallelConfig.of(parallel), SMALL))
    assert refusal(ParallelConfig.of("cfg=2,ulysses=2"), SMALL) is None


def test_what_is_left_out_is_said() -> None:
    """A decode that cannot be counted is no decode for nothing."""
    said = [choose(1, replace(SMALL, vae_flops=n), replace(PAPERY, memory_gb=1)).assumptions() for n in (100.0, 0.0)]
    counted, left_out = ("\n".join(lines) for lines in said)
    assert "the VAE, in float32, reaches" in counted and "decoding" not in counted
    assert "decoding is left out of the time: what AutoencoderKLWan computes cannot be counted" in left_out


def test_choosing() -> None:
    """The fastest that fits: rows first, which hardly talk; what does not fit comes last; replicas only if asked."""
    device = replace(ACCELERATORS["h100"], tflops=1e-9)
    choice = choose(2, SMALL, device)
    assert choice.best.config == ParallelConfig(cfg=2)
    seconds = [e.seconds for e in choice.compared]
    assert seconds == sorted(seconds) and {e.config.world for e in choice.compared} == {2}
    assert ": as long: " in choice.explain()[1]  # arithmetic takes nearly all of it, however it is shared
    assert " times as long: " in choose(2, SMALL, ACCELERATORS["h100"]).explain()[1]
    assert all(e.config.replicas == 2 for e in choose(4, SMALL, device, replicas=2).compared)
    # 4600 bytes of weights do not fit 4300, with FSDP they do: 2550 and four whole blocks would not, so tp
    tight = replace(device, memory_gb=4300 / FILL / 1e9)
    assert choose(2, SMALL, tight).best.config == ParallelConfig(tp=2)
    with pytest.raises(ConfigError, match=r"small at this size fits no layout .* the least is"):
        choose(2, SMALL, PAPERY).best  # noqa: B018
    with pytest.raises(ConfigError, match="replicas=3 does not divide 4 devices"):
        choose(4, SMALL, device, replicas=3)
    with pytest.raises(ConfigError, match="0 devices: give a positive whole number"):
        list(layouts(0, SMALL))


def test_every_layout_uses_all_devices() -> None:
    found = list(layouts(12, SMALL))
    assert {c.world for c in found} == {12} and len(found) == len(set(found)) == 2 * 75 - 6


def test_devices() -> None:
    assert find_accelerator("H200").memory_gb == 141
    with pytest.raises(InputError, match=r"unknown device 'h10'; did you mean h100\?"):
        find_accelerator("h10")
    with pytest.raises(ConfigError, match="device h100: node=0 is outside"):
        replace(ACCELERATORS["h100"], node=0)


def test_a_workload_of_a_published_model() -> None:
    """Wan 2.1 1.3B at 480p: 32,760 tokens, 1.42 G parameters, 0.28 PFLOP a row of which 71 % attention (model card)."""
    with paper_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") as pipeline:
        work = workload(pipeline, SamplingParams())
    assert (work.tokens, work.text, work.branches, work.blocks, work.heads) == (32760, 512, 2, 30, 12)
    assert work.transformers.total / 4 == pytest.approx(1.419e9, rel=1e-3)
    assert work.flops == pytest.approx(0.283e15, rel=0.01)
    assert work.attention_flops / work.flops == pytest.approx(0.70, abs=0.01)
    assert work.encoders.total / 4 == pytest.approx(5.68e9, rel=0.01)
    assert work.vae_bytes / 4 == pytest.approx(127e6, rel=0.01)
    assert work.vae_flops == pytest.approx(0.275e15, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_published_models_on_paper(name: str) -> None:
    sizes = {"1.3B": 1.42e9, "A14B": 28.6e9, "I2V-14B": 16.4e9, "14B": 14.3e9, "5B": 5.0e9, "Hunyuan": 12.8e9}
    size = next((n for part, n in sizes.items() if part in name), 1.92e9)
    with paper_pipeline(name) as pipeline:
        work = workload(pipeline, SamplingParams())
    assert work.transformers.total / 4 == pytest.approx(size, rel=0.02)


def test_the_command_on_configurations_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tiny_wan(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    ask = ["plan", str(path), "--gpus", "4", "--size", "32x48", "--frames", "9", "--steps", "3"]
    assert main([*ask, "--device", "cpu", "--memory-gb", "8"]) == 0
    text = capsys.readouterr().out
    assert "32x48, 9 frames, 3 steps" in text and "on 4 x cpu; 20 layouts, fastest first" in text
    assert "given: memory_gb" in text and "cfg=4 is more than the 2 rows of a step" in text
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 3 * 2 * 3 and found["layouts"][0]["fits"]
    assert ParallelConfig.of(found["layouts"][0]["parallel"]).world == 4
    assert main([*ask, "--memory-gb", "1e-6"]) == 1
    assert "fits no layout" in capsys.readouterr().err
    for wrong, says in (("0", "--gpus=0 is outside"), ("-1", "--gpus=-1 is outside")):
        assert main(["plan", str(path), "--gpus", wrong]) == 1
        assert says in capsys.readouterr().err


def test_models_that_are_not_here_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "settings", lambda: SimpleNamespace(offline=True))
    assert main(["plan", "nobody/has-this", "--gpus", "2"]) == 1
    assert "Wan-AI/Wan2.1-T2V-14B-Diffusers" in capsys.readouterr().err
