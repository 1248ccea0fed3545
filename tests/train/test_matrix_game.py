"""Matrix-Game in roles: what it is told, block by block as the engine plays it, and methods that train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.core import onednn
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.matrix_game import Actions, MatrixGameStrategy
from kinetoscope.train.methods import make_method
from kinetoscope.train.methods.diffusion_forcing import DiffusionForcingSettings
from kinetoscope.train.methods.self_forcing import Exits, SelfForcingSettings, roll_out
from kinetoscope.train.methods.teacher_forcing import TeacherForcingSettings
from kinetoscope.train.plugins import Opened, plugin_of
from kinetoscope.train.plugins.matrix_game import MatrixGameModel, MatrixGameVideoModel, first_view
from kinetoscope.train.roles import Text, TrainBatch
from models.tiny_matrix_game import tiny_model
from pipelines.test_matrix_game import make_world

SIZE = (16, 4, 6)  # channels, height, width of the latents
FRAMES, BLOCK = 9, 3
STEPS, SHIFT = (1000, 666, 333), 5.0
SEEDS = (5, 9)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(rows: int = 2, frames: int = FRAMES) -> TrainBatch:
    pixels = 4 * frames - 3
    extra = {
        "condition": draw(rows, 20, frames, *SIZE[1:], seed=1), "image_embeds": draw(rows, 5, 20, seed=2),
        "keyboard": draw(rows, pixels, 4, seed=3).clamp(0, 1), "mouse": 0.1 * draw(rows, pixels, 2, seed=4),
    }  # fmt: skip
    text = Text(torch.zeros(rows, 0, 1), torch.zeros(rows, dtype=torch.long))
    return TrainBatch(draw(rows, SIZE[0], frames, *SIZE[1:], seed=5), text, extra=extra)


def role(*, trainable: bool = False) -> MatrixGameModel:
    return MatrixGameModel(tiny_model("base"), trainable=trainable)


def sampled(batch: TrainBatch, model: MatrixGameModel) -> tuple[Tensor, list[tuple[int, float, Tensor, Tensor]]]:
    """The engine's own video of a batch, and of each step: block, time, the sample and the clean block it leads to."""
    seen: list[tuple[int, float, Tensor, Tensor]] = []

    class Watched(MatrixGameStrategy):
        def scheduler_step(self, state: Any, noise_pred: Tensor, t: float) -> Tensor:
            run, index = state.scheduler, state.active.index
            seen.append((state.active.block, t, state.latents, run.schedule.predict(index, state.latents, noise_pred)))
            return super().scheduler_step(state, noise_pred, t)

    extra = {"dmd_denoising_steps": list(STEPS), "warp_denoising_step": True, "context_noise": 0}
    params = SamplingParams(guidance_scale=1.0, flow_shift=SHIFT, extra=extra)
    run = ForwardBatch(params, [""] * batch.rows, [""] * batch.rows, list(SEEDS), noise=NoiseSource(SEEDS))
    run.condition, run.image_embeds = batch.extra["condition"], batch.extra["image_embeds"]
    run.family = Actions(batch.extra["keyboard"], batch.extra["mouse"])
    parts: Any = type("Parts", (), {"transformer": model.transformer})()
    with torch.no_grad():
        latents = DenoisingEngine(Watched(parts)).run_blocks(run, ExecutionArgs()).latents
    assert latents is not None
    return latents, seen


def test_block_by_block_it_computes_what_the_engine_plays() -> None:
    """`predict_x0_streaming` at every step of every block, with clean blocks stored; the past is longer than the
    window."""
    model, batch = role(), batch_of()
    latents, steps = sampled(batch, model)
    assert [block for block, *_ in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    sigmas = FewStepSchedule.make(STEPS, SHIFT, warp=True).sigmas
    with torch.no_grad():
        for block in range(FRAMES // BLOCK):
            start = BLOCK * block
            for index in range(len(STEPS)):
                _, time, x, expected = steps[3 * block + index]
                level = torch.full((2,), time / 1000)
                assert float(level[0]) == pytest.approx(sigmas[index], abs=1e-3)
                got = model.predict_x0_streaming(x, level, batch, cur_start_frame=start)
                assert got is not None
                # the engine's jump is from the table's entry, the role's from the time itself
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-2 * float(expected.std()))
                flow = model.predict_streaming(x, level, batch, cur_start_frame=start)
                assert flow is not None
                torch.testing.assert_close((x - expected) / sigmas[index], flow, rtol=0, atol=1e-5)
            clean = latents[:, :, start : start + BLOCK]
            model.predict_streaming(clean, torch.zeros(2), batch, cur_start_frame=start, store_kv=True)


def test_whole_videos_and_their_blocks_agree() -> None:
    model, batch, s = role(), batch_of(), torch.rand(2, FRAMES, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        whole = model.predict(batch.latents, s, batch)
        parts: list[Tensor] = []
        for start in range(0, FRAMES, BLOCK):
            now = slice(start, start + BLOCK)
            part = model.predict_streaming(batch.latents[:, :, now], s[:, now], batch, cur_start_frame=start)
            assert part is not None
            parts.append(part)
            model.predict_streaming(batch.latents[:, :, now], s[:, now], batch, cur_start_frame=start, store_kv=True)
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)
        everything = MatrixGameVideoModel(tiny_model("base")).predict(batch.latents, s, batch)
    assert (everything - whole).abs().max() > 1e-3, "the foundation model sees the future"


def test_rollouts_have_the_same_gradients_when_blocks_are_recomputed() -> None:
    """Also where a block remembers actions: the second computation writes the same values to the same places."""
    batch, grads, recomputed = batch_of(), list[dict[str, Tensor]](), list[int]()
    for checkpointing in (False, True):
        model = role(trainable=True)
        model.checkpointing = checkpointing
        made = roll_out(model, batch, SelfForcingSettings(steps=STEPS, warp=True), Exits([1, 0, 2]), SEEDS)
        for block in model.transformer.blocks:
            block.register_forward_pre_hook(lambda *_: recomputed.append(1))
        made.square().sum().backward()
        grads.append({n: p.grad for n, p in model.transformer.named_parameters() if p.grad is not None})
    assert len(recomputed) == len(model.transformer.blocks) * FRAMES // BLOCK
    assert grads[0].keys() == grads[1].keys() and any("action" in name for name in grads[0])
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_rollouts_are_the_engines_own_and_have_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last step of every block: the very latents of sampling. Stopped early: in closed form the gradient of what
    is added to the flow of each exit step."""
    monkeypatch.setattr(onednn, "_DTYPES", ())  # kernels for inference alone would round differently
    model, batch = role(trainable=True), batch_of()
    settings = SelfForcingSettings(steps=STEPS, warp=True)
    expected, _ = sampled(batch, model)
    made = roll_out(model, batch, settings, Exits([2, 2, 2]), SEEDS)
    assert torch.equal(made.detach(), expected)
    weight, exits = draw(*expected.shape, seed=8), Exits([1, 0, 0])

    def value() -> Tensor:
        return (roll_out(model, batch, settings, exits, SEEDS).double() * weight).sum()

    value().backward()
    parameters = dict(model.transformer.named_parameters())
    p = parameters["proj_out.bias"]
    assert p.grad is not None
    early = roll_out(model, batch, settings, exits, SEEDS)
    assert not torch.allclose(early.detach(), expected)
    # what earlier steps and the past make of it has no gradient
    sigmas = FewStepSchedule.make(STEPS, SHIFT, warp=True).sigmas
    per_frame = torch.tensor([sigmas[e] for e in exits.steps]).repeat_interleave(BLOCK).view(1, 1, -1, 1, 1)
    slope = -(weight * per_frame).sum((0, 2)).unflatten(1, (2, 2)).unflatten(3, (3, 2)).sum((1, 3))  # [C, 2, 2]
    torch.testing.assert_close(p.grad, slope.permute(1, 2, 0).flatten(), rtol=1e-4, atol=1e-4)
    assert all(
        q.grad is not None and torch.isfinite(q.grad).all() for n, q in parameters.items() if "_norm.weight" not in n
    )


@pytest.mark.parametrize(
    "settings",
    [
        DiffusionForcingSettings(caption_dropout=0.0),
        TeacherForcingSettings(caption_dropout=0.0),
        TeacherForcingSettings(caption_dropout=0.0, context_noise=50),
    ],
)
def test_forcing_learns(settings: Any) -> None:
    """The loss over fixed noise falls under a few steps of its own gradient."""
    model, batch = role(trainable=True), batch_of()
    method = make_method(settings, {"student": model})
    optimizer = torch.optim.SGD(list(model.transformer.parameters()), lr=0.02)
    losses: list[float] = []
    for _ in range(6):
        loss = method.losses("student", batch, 0, torch.Generator().manual_seed(1))["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0] and losses == sorted(losses, reverse=True)


def test_self_forcing_by_distribution_matching() -> None:
    roles = {"student": role(trainable=True), "teacher": role(), "critic": role(trainable=True)}
    batch = batch_of()
    method = make_method(SelfForcingSettings(steps=STEPS, guidance=1.0), roles)
    for name in ("critic", "student"):
        method.losses(name, batch, 0, torch.Generator().manual_seed(3))["total"].backward()
        used = [p.grad for n, p in roles[name].transformer.named_parameters() if "_norm.weight" not in n]
        assert all(g is not None and torch.isfinite(g).all() for g in used)
    with pytest.raises(ConfigError, match=r"method\.guidance=1"):
        make_method(SelfForcingSettings(steps=STEPS), roles).losses("student", batch, 0, torch.Generator())
    with pytest.raises(ConfigError, match=r"method\.caption_dropout=0"):
        drop = make_method(DiffusionForcingSettings(caption_dropout=0.99), {"student": roles["student"]})
        drop.losses("student", batch, 0, torch.Generator())


def test_what_it_is_told_in_training_is_what_a_played_world_is_told(tmp_path: Path) -> None:
    """Image features and condition by the stages of the pipeline; the weights that are trained are those that play."""
    opened = Opened(str(make_world(tmp_path / "w", "base")))
    model = opened.role(trainable=True)
    assert isinstance(model, MatrixGameModel)
    image, walk = draw(1, 3, 32, 48, seed=1).clamp(-1, 1), [{"keys": ["w"], "mouse": "right", "repeat": 21}]

    def played() -> ForwardBatch:
        params = SamplingParams(height=32, width=48, num_frames=21, extra={"actions": walk})
        run = ForwardBatch(params.over(opened.pipeline.defaults()), [""], [""], [3])
        run.image = image
        return opened.pipeline.run(run)

    with torch.no_grad():
        before = played()
    told = first_view(opened.pipeline, image, 21)
    assert before.condition is not None and before.image_embeds is not None and before.latents is not None
    assert torch.equal(told["condition"], before.condition) and torch.equal(told["image_embeds"], before.image_embeds)
    family: Any = before.family
    model.init_preprocessors(opened.encoder())
    text = opened.encoder()([""])
    batch = model.prepare_batch(
        text, before.latents, extra={**told, "keyboard": family.keyboard, "mouse": family.mouse}
    )
    with torch.no_grad():
        settings = SelfForcingSettings(steps=STEPS, warp=True)
        again = roll_out(model, batch, settings, Exits([2, 2]), [3])
    assert torch.equal(again, before.latents)

    optimizer = torch.optim.SGD(model.transformer.parameters(), lr=0.1)
    method = make_method(DiffusionForcingSettings(caption_dropout=0.0), {"student": model})
    method.losses("student", batch, 0, torch.Generator().manual_seed(1))["total"].backward()
    optimizer.step()
    with torch.no_grad():
        after, again = played().latents, roll_out(model, batch, settings, Exits([2, 2]), [3])
    assert after is not None
    assert torch.equal(again, after) and not torch.equal(after, before.latents)


def test_names_and_refusals() -> None:
    assert plugin_of("CausalMatrixGame2WanModel") is MatrixGameModel
    assert plugin_of("MatrixGame2WanModel") is MatrixGameVideoModel
    batch = batch_of()
    bare = TrainBatch(batch.latents, batch.text, extra={"keyboard": batch.extra["keyboard"]})
    with pytest.raises(InputError, match="no condition, image_embeds, mouse"):
        role().predict(batch.latents, torch.zeros(2), bare)
    with pytest.raises(InputError, match="7 latent frames are no whole number of blocks of 3"):
        role().blocks(7)
    for kind in (MatrixGameModel, MatrixGameVideoModel):
        with pytest.raises(ConfigError, match="attention=dense"):
            kind(tiny_model("base"), attention="vsa:sparsity=0.5")
