"""Weights shared out by tensor parallel, against the model on one device."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.sharded import FAMILIES, Case, errors, held_bytes, make_case, shared_out
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import ConfigError, ModelLoadError
from kinetoscope.core.sharding import Cut, take
from kinetoscope.loading import weights
from kinetoscope.nn.compile import compile_blocks
from kinetoscope.parallel import Groups
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.placement import average_gradients, place_module
from kinetoscope.parallel.sequence import SequenceShard
from kinetoscope.parallel.tensor import STYLES, misfit
from kinetoscope.parallel.tensor.plan import Style
from lora_files import factors, tensors, write
from runtime.families import FAMILIES as PIPELINES
from tiny import make_tiny_wan

TOLERANCE = 1e-5  # of a forward, float32
QUICK = ("wan", "ltx-frames", "hunyuan", "longcat-vc", "matrix-game")


def own_parts(groups: Groups, cases: list[Case]) -> dict[str, Any]:
    return errors(groups, cases)


def check(names: tuple[str, ...], parallel: str, most: float) -> None:
    cases = [make_case(name) for name in names]
    for rank in run_ranks(parallel, own_parts, cases):
        for case in cases:
            whole, found = held_bytes(case.model), rank[case.name]
            assert found["error"] <= TOLERANCE, (case.name, found)
            assert case.expected.std() > 0.1, case.name
            assert found["held"] == found["after"] < most * whole or case.name == "wan-camera", (case.name, found)


def test_forwards_of_two_devices_equal_one() -> None:
    check(QUICK, "tp=2", 0.7)


@pytest.mark.distributed
def test_forwards_of_two_devices_equal_one_in_every_family() -> None:
    check(tuple(FAMILIES), "tp=2", 0.7)


@pytest.mark.distributed
def test_four_devices() -> None:
    """Every family whose heads and columns four devices can share."""
    divide = [n for n in FAMILIES if misfit((case := make_case(n)).model, case.plan.styles, 4) is None]
    assert {"wan", "ltx"} <= set(divide)
    check(tuple(divide), "tp=4", 0.6)


# -- what would run and be wrong -------------------------------------------------------------------------------------


def wan_without_norm_style(groups: Groups, case: Case) -> float:
    styles = dict(case.plan.styles)
    for name in ("blocks.*.norm_q", "blocks.*.norm_k"):
        styles[name] = "own_norm"

    class OwnNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            weight: Any = self.weight
            return nn.functional.rms_norm(x, x.shape[-1:], weight.to_local(), self.eps)

    STYLES["own_norm"] = Style((nn.RMSNorm,), {"weight": 0}, OwnNorm, "each device's own mean square")
    model = shared_out(groups, case, styles)
    return max((out - case.expected).abs().max().item() for out in case.outputs(model))


def test_the_norm_over_all_heads_needs_all_devices() -> None:
    """The mean square of a device's own heads gives an output that is plainly wrong, which the tolerance finds."""
    assert run_ranks("tp=2", wan_without_norm_style, make_case("wan"))[0] > 100 * TOLERANCE


def test_a_plan_is_laid_over_a_model_strictly() -> None:
    case = make_case("wan")
    styles = dict(case.plan.styles)

    def refused(change: dict[str, str | None], message: str) -> None:
        changed = {k: v for k, v in {**styles, **change}.items() if v is not None}
        with pytest.raises(ConfigError) as error:
            misfit(case.model, changed, 2)
        assert message in str(error.value)

    refused({"blocks.*.to_kk": "colwise"}, "nothing is called 'blocks.*.to_kk'")
    refused({"blocks.*.to_k": None}, "blocks.0.attn1.to_k.weight is under no entry")
    refused({"blocks.*.attn1.to_q": "colwise"}, "blocks.0.attn1.to_q.weight is under several entries")
    refused({"blocks.*.to_q": "columnwise"}, "unknown style 'columnwise'")
    refused({"blocks.*.norm_q": "colwise"}, "blocks.0.attn1.norm_q is a RMSNorm, not a Linear")
    assert misfit(case.model, styles, 4) is None
    assert misfit(case.model, styles, 8) == "blocks.0.attn1.to_q has 4 heads of 16, which tp=8 does not divide"


def compiled(groups: Groups, case: Case) -> float:
    model = shared_out(groups, case)
    compile_blocks(model, "default", backend="eager")
    return max((out - case.expected).abs().max().item() for out in case.outputs(model))


@pytest.mark.distributed
def test_compiled_blocks() -> None:
    """Graphs break where devices talk, and compute the same."""
    assert max(run_ranks("cfg=2,tp=2,fsdp=true", compiled, make_case("wan"), seconds=400)) <= TOLERANCE


# -- bytes, gradients, weights that are read -------------------------------------------------------------------------


def sent_in_a_forward(groups: Groups, case: Case) -> int:
    model = shared_out(groups, case)
    with torch.no_grad():
        ready = {**model.prepare_conditioning(encoder_hidden_states=case.inputs["encoder_hidden_states"])}  # pyright: ignore
        ready |= model.prepare_timesteps(case.inputs["timestep"])  # pyright: ignore
        SENT.clear()
        model(case.inputs["latents"], case.inputs["timestep"], **ready)
    return SENT["tp"]


def test_bytes_sent_are_those_of_the_formula() -> None:
    """A block sums three outputs [R, N, d], and the mean squares [R, N] of two queries and one key."""
    case = make_case("wan")
    rows, _, frames, height, width = case.inputs["latents"].shape
    tokens, layers = rows * frames * height * width // 4, len(case.model.blocks)  # pyright: ignore
    summed = 4 * tokens * layers * (3 * 64 + 3)
    assert run_ranks("tp=2", sent_in_a_forward, case) == [summed] * 2  # 2 (P - 1) / P = 1


def gradients(groups: Groups | None, case: Case) -> dict[str, Tensor]:
    model = copy.deepcopy(case.model).requires_grad_(True)
    if groups is not None:
        place_module(model, case.plan, groups)
    shard = SequenceShard.of(groups) if groups is not None and groups.sequence.size > 1 else None
    with forward_context(ForwardContext(shard=shard)):
        model(**case.inputs).square().mean().backward()
    if groups is not None:
        average_gradients(model, groups)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad.to_local() if isinstance(grad, DTensor) else grad
    return found


@pytest.mark.parametrize(
    "parallel", ["tp=2", *(pytest.param(p, marks=pytest.mark.distributed) for p in ("cfg=2,tp=2", "ring=2,tp=2"))]
)
def test_gradients_are_parts_of_the_whole_models(parallel: str) -> None:
    """The share of tensor parallel is by the last digit of the rank, and all others have equal weights."""
    case = make_case("wan")
    expected = gradients(None, case)
    for index, rank in enumerate(run_ranks(parallel, gradients, case)):
        for name, grad in rank.items():
            dims = [d for d, (a, b) in enumerate(zip(grad.shape, expected[name].shape, strict=True)) if a != b]
            own = take(expected[name], expected[name].shape, [Cut(d, index % 2, 2) for d in dims])
            torch.testing.assert_close(torch.as_tensor(grad), own, rtol=1e-3, atol=1e-6, msg=name)


def test_cuts() -> None:
    x = torch.arange(24).view(12, 2)
    assert take(x, x.shape, [Cut(0, 1, 2)]).equal(x[6:])
    assert take(x, x.shape, [Cut(0, 1, 2, parts=3)]).equal(x[[2, 3, 6, 7, 10, 11]])
    assert take(x, x.shape, [Cut(0, 1, 2, parts=3), Cut(0, 1, 2)]).equal(x[[7, 10, 11]])
    assert take(x, x.shape, [Cut(1, 0, 2), Cut(0, 2, 5)]).equal(x[6:9, :1])
    assert take(x[:4], (4, 2), [Cut(0, 2, 3)]).shape == (0, 2)


def video(groups: Groups | None, folder: Path, family: str, lora: Path | None = None, **options: Any) -> dict[str, Any]:
    """Latents of a whole pipeline, and the bytes that each component holds."""
    generator = open_among(groups, folder / family, **options)
    if lora is not None:  # set, changed while the weights are there, and taken away by nobody
        generator.load_lora(lora)
        generator.generate_video("a red circle", **PIPELINES[family].request())
        generator.set_lora(dict.fromkeys(generator.loras, 0.7))
    result = generator.generate_video("a red circle", **PIPELINES[family].request())
    modules = generator.pipeline.loaded_modules()
    held = {name: held_bytes(module) for name, module in modules.items() if isinstance(module, nn.Module)}
    return {"latents": result.latents, "held": held}


def check_videos(folder: Path, family: str, parallel: str, most: float, **options: Any) -> None:
    (folder / family).mkdir(exist_ok=True)
    PIPELINES[family].make(folder / family)
    expected = video(None, folder, family, **options)
    ranks = run_ranks(parallel, partial(video, **options), folder, family)
    for rank in ranks:
        wrong = (torch.as_tensor(rank["latents"]) - expected["latents"]).abs().max()
        assert wrong <= 1e-4 * expected["latents"].std(), (family, wrong)
        assert torch.as_tensor(rank["latents"]).equal(torch.as_tensor(ranks[0]["latents"])), "ranks differ"
        assert rank["held"]["transformer"] < most * expected["held"]["transformer"], rank["held"]


def test_videos_of_two_devices_equal_one(tmp_path: Path) -> None:
    """From the files, of which each device reads its part: text encoder, transformer, and all that surrounds them."""
    check_videos(tmp_path, "wan", "tp=2", 0.75)
    whole, own = (read_own(devices, tmp_path / "wan") for devices in (1, 2))
    assert own["text_encoder"] < 0.6 * whole["text_encoder"] and own["transformer"] < 0.75 * whole["transformer"]


@pytest.mark.parametrize("parallel", ["tp=2", pytest.param("cfg=2,tp=2,fsdp=true", marks=pytest.mark.distributed)])
def test_lora_changes_each_devices_part(tmp_path: Path, parallel: str) -> None:
    lora = write(tmp_path / "lora.safetensors", tensors("diffusers", factors()))
    check_videos(tmp_path, "wan", parallel, 0.75, lora=lora)
    plain, changed = (video(None, tmp_path, "wan", lora=file)["latents"] for file in (None, lora))
    assert (plain - changed).abs().max() > 1e-2 * plain.std(), "the LoRA does nothing"


def read_own(devices: int, path: Path) -> dict[str, int]:
    """Bytes that one of the devices takes out of the files."""
    return run_ranks(f"tp={devices}", count_read, path)[0]


def count_read(groups: Groups, path: Path) -> dict[str, int]:
    read: Counter[str] = Counter()
    original = weights.read_tensors

    def counted(files: list[Path], *args: Any) -> Any:
        for stored in original(files, *args):
            read[stored.file.parent.name] += stored.tensor.nbytes
            yield stored

    weights.read_tensors = counted
    try:
        pipeline = open_among(groups, path).pipeline
        for name in ("text_encoder", "transformer"):
            pipeline.get_module(name)
    finally:
        weights.read_tensors = original
    return dict(read)


@pytest.mark.distributed
@pytest.mark.parametrize("family", [f for f in PIPELINES if f != "wan"])
def test_videos_of_two_devices_equal_one_in_every_family(tmp_path: Path, family: str) -> None:
    check_videos(tmp_path, family, "tp=2", 0.8)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """As on one device."""
    path = make_tiny_wan(tmp_path / "wan") / "transformer"
    file = next(path.glob("*.safetensors"))
    content = load_file(file)
    content["blocks.0.attn1.to_q.weight"] = content["blocks.0.attn1.to_q.weight"][:, :-2].contiguous()
    del content["blocks.1.ffn.net.2.weight"]
    save_file(content, file)

    def load(groups: Groups) -> str:
        with pytest.raises(ModelLoadError) as error:
            open_among(groups, path.parent).pipeline.get_module("transformer")
        return str(error.value)

    for message in run_ranks("tp=2", load):
        assert "missing: blocks.1.ffn.net.2.weight" in message
        assert "wrong shape: blocks.0.attn1.to_q.weight in" in message and "is (24, 22), needs (24, 24)" in message
