"""Trajectories of a teacher, against its own sampling, and the regression on them, against a closed form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import NoiseSource, randn
from kinetoscope.train.data import SourceContext, ode_pairs
from kinetoscope.train.data.ode_pairs import OdeBatch, OdePairs, OdePairsData, prepare, prompts_of
from kinetoscope.train.methods import method_class
from kinetoscope.train.methods.ode_distill import OdeDistill, OdeDistillSettings, take_levels
from kinetoscope.train.plugins import Opened
from kinetoscope.train.plugins.causal_wan import CausalWanModel
from kinetoscope.train.roles import Text, TrainBatch
from models.tiny_causal_wan import TEXT, TINY, tiny_causal
from train.toys import Scale, ToyModel

SAMPLING = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 8, "scheduler": "euler"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return randn(shape, torch.Generator().manual_seed(seed))


def section_of(folder: Path, **more: Any) -> OdePairsData:
    values = {"folder": str(folder), "teacher": "tiny-t2v", "prompts": "shapes", "count": 4, "batch": 3, "seed": 5}
    return OdePairsData.model_validate({**values, "sampling": SAMPLING, **more})


@pytest.fixture(scope="module")
def teacher() -> Opened:
    return Opened("tiny-t2v")


def test_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Opened) -> None:
    monkeypatch.setattr(ode_pairs, "SHARD", 2)
    section, made = section_of(tmp_path), list[tuple[int, int]]()
    levels = prepare(section, teacher, lambda *counts: made.append(counts))
    assert made == [(2, 4), (4, 4)]
    assert levels == pytest.approx(section.schedule.sigmas, abs=0.05), "nearest steps of the teacher"
    states = torch.cat([load_file(f)["states"].float() for f in sorted(tmp_path.glob("*.safetensors"))])
    shape, prompts = states.shape[2:], prompts_of(section)(range(4))
    assert states.shape[:2] == (4, 5) and len(set(prompts)) == 4
    torch.testing.assert_close(states[:, 0], NoiseSource([5, 6, 7, 8]).draw(shape), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        ends = teacher.sample(prompts, [5, 6, 7, 8], **SAMPLING).latents
    assert ends is not None
    torch.testing.assert_close(states[:, -1], ends, rtol=1e-3, atol=2e-3)
    # Euler has no memory: the steps between two recorded levels, by hand
    role = teacher.role()
    role.init_preprocessors(teacher.encoder(), teacher.negative_prompt)
    batch = role.prepare_batch(teacher.encoder()(prompts), states[:, -1])
    grid = teacher.pipeline.get_module("scheduler").override("euler").start(8).sigmas
    between = grid[grid.index(levels[1]) + 1 : grid.index(levels[2]) + 1]
    assert between
    with torch.no_grad():
        x, s = states[:, 1], levels[1]
        for t in between:
            level = torch.full((4,), s)
            x0 = role.predict_x0(x, level, batch, guidance=teacher.pipeline.defaults().guidance_scale)
            x, s = x + (t - s) * (x - x0) / s, t
    torch.testing.assert_close(x, states[:, 2], rtol=1e-2, atol=1e-2)


def test_a_preparation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Opened) -> None:
    monkeypatch.setattr(ode_pairs, "SHARD", 2)
    prepare(section_of(tmp_path, count=2), teacher)
    assert ode_pairs.is_prepared(section_of(tmp_path, count=2)) and not ode_pairs.is_prepared(section_of(tmp_path))
    first = (tmp_path / "00000.safetensors").read_bytes()
    calls: list[range] = []
    make = ode_pairs._make
    monkeypatch.setattr(ode_pairs, "_make", lambda *a: (calls.append(a[-1]), make(*a))[1])
    monkeypatch.setattr(ode_pairs, "Opened", lambda name: teacher)
    counts: list[tuple[int, int]] = []
    context = SourceContext(teacher, tmp_path, lambda *c: counts.append(c))
    OdePairs(section_of(tmp_path), context)
    assert counts == [(2, 4), (4, 4)]
    assert calls == [range(2, 4)] and (tmp_path / "00000.safetensors").read_bytes() == first
    (tmp_path / "00000.safetensors").unlink()
    prepare(section_of(tmp_path), teacher)
    assert (tmp_path / "00000.safetensors").read_bytes() == first
    with pytest.raises(ConfigError, match="another shift"):
        OdePairs(section_of(tmp_path, shift=3.0), context)
    source = OdePairs(section_of(tmp_path), context)
    one, again, other = (source.batch(7, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.captions == again.captions and torch.equal(one.path, again.path)
    assert one.captions != other.captions and one.path.shape[:2] == (3, 4)
    known = prompts_of(source.section)(range(4))
    states = torch.cat([load_file(f)["states"].float() for f in sorted(tmp_path.glob("*.safetensors"))])
    for i, caption in enumerate(one.captions):
        assert torch.equal(one.latents[i], states[known.index(caption), -1])


def test_levels_must_differ(tmp_path: Path, teacher: Opened) -> None:
    few = section_of(tmp_path, sampling={**SAMPLING, "num_inference_steps": 3})
    with pytest.raises(ConfigError, match="3 steps are too few"):
        prepare(few, teacher)


def test_levels_are_those_of_a_flow() -> None:
    """A sampler of EDM's levels adds noise to what is not scaled: its samples are no flow's."""
    state: Any = SimpleNamespace(
        scheduler=SimpleNamespace(sigmas=[80.0, 1.0, 0.5, 0.0], starts=[0, 1, 2]), times=[3.0, 2.0, 1.0]
    )
    with pytest.raises(ConfigError, match="these begin at 80"):
        ode_pairs.PathRecorder((1.0, 0.5)).on_run_start(state)


# -- the method -------------------------------------------------------------------------------------------------------


def batch_of(frames: int = 3) -> OdeBatch:
    text = Text(draw(2, TEXT, TINY["text_dim"], seed=1), torch.full((2,), TEXT))
    path = draw(2, 3, 4, frames, 4, 6, seed=2)
    return OdeBatch(draw(2, 4, frames, 4, 6, seed=3), text, path=path, levels=(1.0, 0.9, 0.6))


def test_the_gradient_in_closed_form() -> None:
    batch, student = batch_of(), ToyModel(Scale(), trainable=True)
    method = OdeDistill({"student": student}, OdeDistillSettings())
    assert method_class("ode_distill") is OdeDistill and list(method.updates(3)) == ["student"]
    generator = torch.Generator().manual_seed(4)
    loss = method.losses("student", batch, 0, generator)["total"]
    picked = torch.randint(0, 3, (2, 1), generator=torch.Generator().manual_seed(4))[:, 0]
    s = torch.tensor(batch.levels)[picked].view(2, 1, 1, 1, 1)
    x = torch.stack([batch.path[i, k] for i, k in enumerate(picked)])
    error = (1 - 0.3 * s) * x - batch.latents  # x0 = x - s w x
    loss.backward()
    grad = student.transformer.w.grad
    assert isinstance(grad, Tensor)
    torch.testing.assert_close(loss.detach(), error.square().mean())
    torch.testing.assert_close(grad, (2 * error * -s * x).mean())


@pytest.mark.parametrize("past", ["noisy", "clean"])
def test_blocks_of_a_causal_student_have_levels_of_their_own(past: Any) -> None:
    student = CausalWanModel(tiny_causal(num_frames_per_block=2), trainable=True)
    batch = batch_of(6)
    method = OdeDistill({"student": student}, OdeDistillSettings(past=past))
    loss = method.losses("student", batch, 0, torch.Generator().manual_seed(4))["total"]
    path, levels = batch.path, batch.levels
    if past == "noisy":  # a block may also be the end itself, which later ones will see in sampling
        path, levels = torch.cat([path, batch.latents[:, None]], 1), (*levels, 0.0)
    picked = torch.randint(0, len(levels), (2, 3), generator=torch.Generator().manual_seed(4))
    assert len(set(picked.flatten().tolist())) > 1
    errors: list[Tensor] = []
    with torch.no_grad():
        for row in range(2):  # one sample at a time, block after block with a cache
            one = TrainBatch(batch.latents[[row]], Text(batch.text.states[[row]], batch.text.lengths[[row]]))
            for b in range(3):
                now = slice(2 * b, 2 * b + 2)
                k = picked[row, b]
                x, s = path[row, k][None, :, now], torch.full((1, 2), levels[int(k)])
                x0 = student.predict_x0_streaming(x, s, one, cur_start_frame=2 * b)
                assert x0 is not None
                errors.append((x0 - one.latents[:, :, now]).square().mean())
                seen = (one.latents[:, :, now], torch.zeros(1, 2)) if past == "clean" else (x, s)
                student.predict_streaming(*seen, one, cur_start_frame=2 * b, store_kv=True)
            student.clear_caches()
    torch.testing.assert_close(loss.detach(), torch.stack(errors).mean(), rtol=1e-5, atol=1e-5)


def test_levels_are_taken_frame_by_frame() -> None:
    path = draw(2, 3, 4, 5, 1, 1)
    picked = torch.tensor([[0, 0, 1, 1, 2], [2, 1, 0, 1, 2]])
    got = take_levels(path, picked)
    for row in range(2):
        for frame in range(5):
            assert torch.equal(got[row, :, frame], path[row, picked[row, frame], :, frame])


def test_what_does_not_fit() -> None:
    toy = {"student": ToyModel(Scale(), trainable=True)}
    with pytest.raises(ConfigError, match="past=clean is of causal"):
        OdeDistill(toy, OdeDistillSettings(past="clean"))
    plain = TrainBatch(batch_of().latents, batch_of().text)
    with pytest.raises(ConfigError, match=r"data\.source=ode_pairs"):
        OdeDistill(toy, OdeDistillSettings()).losses("student", plain, 0, torch.Generator())
