"""What `info` says of memory, against what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from kinetoscope import VideoGenerator
from kinetoscope.cli import main
from kinetoscope.core.types import SamplingParams
from kinetoscope.loading.offload import HostMover, Offload
from kinetoscope.runtime import care
from kinetoscope.runtime.footprint import DENOISING, decode_peak
from kinetoscope.runtime.memory import PeakMemory
from kinetoscope.runtime.plan import plan_run
from runtime.families import FAMILIES, LONG, SHORT, open_family
from tiny import make_tiny_wan

USUAL = ("wan", "longcat")
SIZE: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 17}


def real_bytes(value: Tensor) -> int:
    """Of a tensor, or of what a quantized one is made of."""
    if not hasattr(value, "__tensor_flatten__"):
        return value.numel() * value.element_size()
    return sum(real_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])


def usual(names: Any) -> list[Any]:
    return [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", usual(FAMILIES))
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights(name: str, quantize: str | None, tmp_path: Path) -> None:
    generator = open_family(name, tmp_path / "model", quantize=quantize)
    planned = plan_run(generator, SamplingParams(height=32, width=32, num_frames=9)).memory.weights
    assert any(n.startswith("transformer") for n in planned) and "vae" in planned
    for part, size in planned.items():
        module = generator.pipeline.get_module(part)
        once = {(p.data_ptr() or id(p)): p for p in module.parameters()}  # tied embeddings have two names
        assert size == pytest.approx(sum(map(real_bytes, once.values())), rel=0.01), part


@pytest.mark.parametrize("name", usual(n for n in FAMILIES if n not in ("causal", "ltx", "wan-a14b")))
def test_activations(name: str, tmp_path: Path, record_property: Any) -> None:
    """Within a factor of 2 of the peak of a forward, with text of a few tokens."""
    generator = open_family(name, tmp_path / "model", cfg="sequential", attention="sdpa")  # without chunks of scores
    transformer = generator.pipeline.get_module("transformer")
    peaks: list[int] = []
    forward = transformer.forward

    def measured(*args: Any, **kwargs: Any) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        with PeakMemory([*transformer.parameters(), *transformer.buffers(), *given]) as memory:
            result = forward(*args, **kwargs)
        peaks.append(memory.peak)
        return result

    transformer.forward = measured
    generator.generate_video(SHORT, **FAMILIES[name].request(**SIZE, num_inference_steps=1))
    planned = plan_run(generator, SamplingParams(**SIZE)).activation_bytes
    record_property("planned_over_measured", planned / max(peaks))
    assert 0.5 < planned / max(peaks) < 2


@pytest.mark.parametrize("mode", ["whole", "streaming", "tiled"])
def test_decoding(tmp_path: Path, mode: str, record_property: Any) -> None:
    generator = VideoGenerator.from_pretrained(make_tiny_wan(tmp_path), device="cpu", vae=mode)
    vae: Any = generator.pipeline.get_module("vae")
    stage: Any = generator.pipeline.stages["decoding"]
    latents = torch.zeros(16, *generator.pipeline.geometry.latent_size(33, 64, 64))
    with torch.no_grad(), PeakMemory([*vae.parameters(), *vae.buffers(), latents]) as memory:
        stage.decode(latents)
    planned = decode_peak("AutoencoderKLWan", generator.pipeline.model.config("vae"), tuple(latents.shape[1:]), mode)
    assert planned is not None
    record_property("planned_over_measured", planned / memory.peak)
    assert planned == pytest.approx(memory.peak, rel=0.15)


def test_streaming_needs_less_than_whole_for_long_videos() -> None:
    config = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    whole, streaming = (decode_peak("AutoencoderKLWan", config, (81, 8, 8), mode) for mode in ("whole", "streaming"))
    assert whole is not None and streaming is not None and streaming < 0.6 * whole


class Weighed(HostMover):
    """A mover that knows how many bytes it brought and are still here."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def bring(self, parked: Tensor) -> Tensor:
        brought = parked.detach().clone()
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        self.alive.append((StorageWeakRef(brought.untyped_storage()), real_bytes(brought)))
        self.most = max(self.most, sum(size for _, size in self.alive))
        return brought


@pytest.mark.parametrize("kind", ["components", "blocks"])
def test_offloaded_weights(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the device at once while a transformer runs is what the plan says."""
    mover = Weighed()
    monkeypatch.setattr(care, "Offload", lambda kind, device, _: Offload(kind, device, mover))
    path = make_tiny_wan(tmp_path, layers=5)
    generator = VideoGenerator.from_pretrained(path, device="cpu", offload=kind)
    memory = plan_run(generator, SamplingParams(height=32, width=32, num_frames=9)).memory
    stage = generator.pipeline.stages["denoising"]
    original = stage.iterate

    def watched(*args: Any) -> Any:
        mover.most = 0
        result = yield from original(*args)
        watched.most = mover.most  # pyright: ignore
        return result

    stage.iterate = watched  # pyright: ignore
    generator.generate_video(LONG, **FAMILIES["wan"].request())
    assert watched.most == pytest.approx(memory.peaks[DENOISING] - memory.activations, rel=0.01)  # pyright: ignore
    whole = memory.weights["transformer"]
    if kind == "components":
        assert watched.most == pytest.approx(whole, rel=0.01)  # pyright: ignore
    else:
        assert watched.most < 0.8 * whole  # pyright: ignore
    assert memory.host == sum(memory.weights.values())


def test_info_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tiny_wan(tmp_path)
    more = ["--size", "64x64", "--frames", "33", "--offload", "blocks"]
    assert main(["info", str(path), "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["offload"] == "blocks" and found["tokens"] == 9 * 4 * 4
    assert found["memory"]["peak"] == max(found["memory"]["peaks"].values())
    assert main(["info", str(path), *more]) == 0
    assert "resting on the host" in capsys.readouterr().out


def test_what_is_gone_is_not_counted() -> None:
    x = torch.ones(1000)
    with PeakMemory([x]) as memory:
        for _ in range(5):
            y = x + 1  # 4000 bytes, and the one before while it is made
            x.add_(1)
            y[10:].add_(1)  # a view
    assert memory.peak == 8000
    with PeakMemory() as memory:
        nn.Linear(10, 10, device="meta")(torch.empty(5, 10, device="meta"))
    assert memory.peak >= 4 * (110 + 50 + 50)
