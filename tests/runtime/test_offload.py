"""Weights that are away while they are not used: the same bits, in the order of moves that was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.loading.offload import HostMover, Offload, OffloadedBlocks, heavy_layers, slots
from kinetoscope.runtime import care
from runtime.families import FAMILIES, LONG, SHORT, open_family
from runtime.movers import Elsewhere

USUAL = ("wan", "wan-a14b", "cosmos")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Every generator of the test offloads to it."""
    mover = Elsewhere()
    monkeypatch.setattr(care, "Offload", lambda kind, device, _: Offload(kind, device, mover))
    return mover


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_the_same_bits(name: str, tmp_path: Path, elsewhere: Elsewhere) -> None:
    """Both kinds, twice, in every family: what is used while it is away would have no values."""
    request = FAMILIES[name].request
    expected = open_family(name, tmp_path / "model").generate_video(SHORT, **request())
    for kind in ("components", "blocks"):
        generator = open_family(name, tmp_path / "model", offload=kind)
        generator.generate_video(LONG, **request(seed=9))
        result = generator.generate_video(SHORT, **request())
        assert torch.equal(result.latents, expected.latents)
        assert (result.frames == expected.frames).all()
        for part in generator.pipeline.loaded_modules().values():
            if isinstance(part, nn.Module):
                assert all(p.is_meta for p in part.parameters()), "everything is away after a run"


def test_interleaved_runs(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """Two runs of one generator, a step each in turn: stages of one send away what the other needs again."""
    request = FAMILIES["wan"].request
    plain = open_family("wan", tmp_path / "model")
    expected = [plain.generate_video(SHORT, **request(seed=s)).latents for s in (1, 2)]
    generator = open_family("wan", tmp_path / "model", offload="blocks")
    runs = [generator.iterate(SHORT, **request(seed=s)) for s in (1, 2)]
    results: list[Any] = [None, None]
    while any(r is None for r in results):
        for i, run in enumerate(runs):
            if results[i] is None:
                try:
                    next(run)
                except StopIteration as stop:
                    results[i] = stop.value[0].latents
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_streams(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """A session turns between denoising and decoding: transformer and VAE take turns."""
    fields = {"height": 32, "width": 32, "seed": 3}
    plain, away = (open_family("causal", tmp_path / "model", offload=kind) for kind in (None, "components"))
    for a, b in zip(plain.stream(SHORT, blocks=3, **fields), away.stream(SHORT, blocks=3, **fields), strict=True):
        assert (a == b).all()


class Logged(HostMover):
    """A mover that tells what it did, weights being called by their first value."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self.log = log

    def bring(self, parked: Tensor) -> Tensor:
        self.log.append(f"bring {parked.flatten()[0]:.0f}")
        return parked.clone()

    def arrived(self, mark: Any, tensors: Any) -> None:
        self.log.append("wait " + ",".join(f"{t.flatten()[0]:.0f}" for t in tensors))


class Numbered(nn.Module):
    """A block with one weight, which is its number."""

    def __init__(self, number: int, log: list[str]) -> None:
        super().__init__()
        self.number, self.log = number, log
        self.layer = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.layer.weight.fill_(number)
        self.norm = nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(f"run {self.number}")
        return self.layer(x)


def test_the_next_block_comes_while_one_runs() -> None:
    log: list[str] = []
    blocks = [Numbered(n, log) for n in range(3)]
    parked = [b.layer.weight for b in blocks]
    offloaded = OffloadedBlocks(blocks, Logged(log))
    x = torch.ones(1, 2)
    for block in blocks:
        block(x)
    assert log == [
        "bring 0", "wait 0", "bring 1", "run 0",
        "wait 1", "bring 2", "run 1",
        "wait 2", "bring 0", "run 2",
    ]  # fmt: skip
    del log[:]
    blocks[2](x)  # a step cache leaves out blocks: what came for nothing goes
    assert log == ["bring 2", "wait 2", "bring 0", "run 2"]
    offloaded.clear()
    assert [b.layer.weight for b in blocks] == parked
    del log[:]
    assert torch.equal(blocks[1].layer(x), torch.full((1, 2), 2.0))  # a layer that is called outside its block
    assert log == ["bring 1"] and blocks[1].layer.weight is parked[1]


def test_an_error_in_a_block_leaves_no_weights_behind() -> None:
    log: list[str] = []
    blocks = [Numbered(n, log) for n in range(2)]
    parked = [b.layer.weight for b in blocks]
    offloaded = OffloadedBlocks(blocks, Logged(log))
    with pytest.raises(RuntimeError):
        blocks[0](torch.ones(1, 3))
    offloaded.clear()
    assert [b.layer.weight for b in blocks] == parked


def test_what_changed_in_place_stays_changed() -> None:
    """A LoRA merged into a weight that is on the device at the moment."""
    module = nn.Linear(2, 2).requires_grad_(False)
    offload = Offload("components", torch.device("cpu"), Logged([]))
    offload.add("transformer", module)
    offload.need("transformer")
    module.weight.mul_(2)
    expected = module.weight.clone()
    offload.release()
    assert torch.equal(module.weight, expected)
    offload.need("transformer")
    assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("how", ["one parameter", "one memory"])
def test_tied_weights_come_once(how: str) -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).requires_grad_(False)
    weight = module["a"].weight
    module["b"].weight = weight if how == "one parameter" else nn.Parameter(weight.detach(), requires_grad=False)
    log: list[str] = []
    offload = Offload("components", torch.device("cpu"), Logged(log))
    offload.add("text_encoder", module)
    for _ in range(2):
        assert module["a"].weight is module["b"].weight
        offload.need("text_encoder")
        assert module["a"].weight is module["b"].weight
        offload.release()
    assert sum(entry.startswith("bring") for entry in log) == 2 * 3


def test_what_moves_with_blocks(tmp_path: Path) -> None:
    """Blocks move nearly all of a transformer's weights; norms and tables, which are read elsewhere too, stay."""
    transformer = open_family("wan", tmp_path / "model").pipeline.get_module("transformer")
    heavy = [m for b in transformer.blocks for m in heavy_layers(b)]
    moved = sum(m.weight.numel() for m in heavy)
    inside = sum(p.numel() for b in transformer.blocks for p in b.parameters())
    resting = sum(s.value.numel() for s in slots(transformer, heavy))
    assert moved + resting == sum(p.numel() for p in transformer.parameters())
    assert moved > 0.9 * inside


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"offload": "disk"}, ConfigError, r"'disk'; known: components, blocks"),
        ({"offload": "blocks", "compile": "max-autotune"}, CompositionError, r"'blocks'.*'max-autotune'"),
        ({"offload": "components", "modules": {"vae": nn.Linear(1, 1)}}, CompositionError, r"'components'.*modules="),
    ],
)
def test_refused_at_start(tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    open_family("wan", tmp_path / "model")
    with pytest.raises(error, match=says):
        VideoGenerator.from_pretrained(tmp_path / "model", device="cpu", **options)
