"""Forcing: losses and gradients of causal methods, against block-by-block passes, explicit masks and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.core import onednn
from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.noise import NoiseSource, randn
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.causal import CausalStrategy, LatentVideo
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.train.methods import make_method
from kinetoscope.train.methods.diffusion_forcing import DiffusionForcing, DiffusionForcingSettings, bell
from kinetoscope.train.methods.self_forcing import Exits, SelfForcing, SelfForcingSettings, roll_out
from kinetoscope.train.methods.teacher_forcing import TeacherForcing, TeacherForcingSettings
from kinetoscope.train.plugins.causal_wan import CausalWanModel
from kinetoscope.train.plugins.wan import WanModel
from kinetoscope.train.roles import Text, TrainBatch
from models.tiny_causal_wan import TEXT, TINY, frame_mask, masked_forward, tiny_causal
from train.toys import Scale, ToyModel

SIZE = (4, 4, 6)  # channels, height, width of the latents
BLOCKS, FRAMES = [2, 2, 2], 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return randn(shape, torch.Generator().manual_seed(seed))


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(rows: int = 2, frames: int = FRAMES) -> TrainBatch:
    text = Text(draw(rows, TEXT, TINY["text_dim"], seed=1), torch.full((rows,), TEXT))
    return TrainBatch(draw(rows, SIZE[0], frames, *SIZE[1:]), text)


def causal(seed: int = 0, *, trainable: bool = True, **config: Any) -> CausalWanModel:
    return CausalWanModel(tiny_causal(seed, num_frames_per_block=2, **config), trainable=trainable, shift=5.0)


def wan(seed: int = 0, **options: Any) -> WanModel:
    model = WanTransformer3DModel(tiny_causal().config)
    model.load_state_dict(tiny_causal(seed).state_dict())
    return WanModel(model, shift=5.0, **options)


# -- diffusion forcing and teacher forcing ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["none", "bell"])
def test_diffusion_forcing_in_closed_form(weighting: Any) -> None:
    """Chunks of two of five frames: a level each, and the gradient of a network of one number."""
    batch, student = batch_of(frames=5), ToyModel(Scale(), trainable=True, shift=3.0)
    settings = DiffusionForcingSettings(chunk=2, weighting=weighting, sampling="uniform", caption_dropout=0.0)
    method = make_method(settings, {"student": student})
    loss = method.losses("student", batch, 0, seeded())["total"]
    loss.backward()
    again = seeded()
    u = torch.rand(2, 3, generator=again)
    s = (3 * u / (1 + 2 * u))[:, [0, 0, 1, 1, 2]].view(2, 1, 5, 1, 1)
    noise = randn(batch.latents.shape, again)
    x = (1 - s) * batch.latents + s * noise
    error = 0.3 * x - (noise - batch.latents)
    weight = torch.ones_like(s)
    if weighting == "bell":
        middle = torch.exp(torch.tensor(-0.5))
        mean = torch.special.erf(torch.tensor(0.5**0.5)) * (torch.pi / 2) ** 0.5 - middle  # of the bell, by integration
        weight = (torch.exp(-2 * (s - 0.5) ** 2) - middle) / mean
    torch.testing.assert_close(loss.detach(), (weight * error.square()).mean(), rtol=1e-4, atol=1e-6)
    grad = student.transformer.w.grad
    assert isinstance(grad, Tensor)
    torch.testing.assert_close(grad, (2 * weight * error * x).mean(), rtol=1e-4, atol=1e-6)


def test_levels_and_text_of_samples() -> None:
    """Levels are those of fine-tuning, one a chunk; some samples read what the unconditional branch reads."""
    student, batch = wan(), batch_of(40)
    empty = Text(torch.full((1, TEXT, TINY["text_dim"]), 7.0), torch.tensor([3]))
    student.init_preprocessors(lambda prompts: empty)
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(x: Tensor, s: Tensor, batch: TrainBatch, **more: Any) -> Tensor:
        seen.append((s, batch.text.lengths))
        return x

    student.predict = predict  # pyright: ignore[reportAttributeAccessIssue]
    settings = DiffusionForcingSettings(logit_mean=0.5, caption_dropout=0.3)
    DiffusionForcing({"student": student}, settings).losses("student", batch, 0, seeded())
    s, lengths = seen[0]
    u = s / (5 - 4 * s)  # without the shift
    assert s.shape == (40, FRAMES) and len(s.unique()) == 40 * FRAMES
    assert abs(float(u.logit().mean()) - 0.5) < 0.2 and abs(float(u.logit().std()) - 1) < 0.15
    assert 5 < int((lengths == 3).sum()) < 20 and set(lengths.tolist()) == {3, TEXT}
    assert bell(torch.tensor([0.0, 1.0])).abs().max() < 1e-6 < bell(torch.tensor(0.5))


def test_a_past_that_is_not_exact() -> None:
    """Each sample's past has noise of a deviation of its own, and nothing else of the loss changes its terms."""
    student, batch = causal(), batch_of(6)
    seen: dict[float, Tensor] = {}
    for jitter in (0.0, 0.5):
        settings = TeacherForcingSettings(caption_dropout=0.0, jitter=jitter)

        def predict(x: Tensor, s: Tensor, batch: TrainBatch, *, clean: Tensor, jitter: float = jitter) -> Tensor:
            seen[jitter] = clean
            return x

        student.predict = predict  # pyright: ignore[reportAttributeAccessIssue]
        loss = make_method(settings, {"student": student}).losses("student", batch, 0, seeded())["total"]
        seen[10 + jitter] = loss
    assert torch.equal(seen[0.0], batch.latents) and torch.equal(seen[10.0], seen[10.5])
    deviations = (seen[0.5] - batch.latents).flatten(1).std(1)
    assert 0 < float(deviations.min()) < 0.6 * float(deviations.max()) < 0.6 * 0.52


@pytest.mark.parametrize("window", [-1, 4])
def test_a_past_that_the_student_makes(window: int) -> None:
    """Block after block under the explicit mask, each from the data noised to the sample's level, with no gradient;
    what comes next is the data's, and nothing else of the loss changes its terms."""
    student, batch = causal(local_attn_size=window), batch_of()
    method = make_method(TeacherForcingSettings(caption_dropout=0.0, resample=0.8), {"student": student})
    assert isinstance(method, TeacherForcing)
    made = method.past(batch, seeded())["clean"]
    again = seeded()
    level = 0.8 * torch.rand(2, 1, generator=again)
    noisy = student.add_noise(batch.latents, randn(batch.latents.shape, again), level.expand(-1, FRAMES))
    in_passes = {}
    for passes in (1, 2, 3):
        settings = TeacherForcingSettings(caption_dropout=0.0, resample=0.8, resample_passes=passes)
        in_passes[passes] = TeacherForcing({"student": student}, settings).past(batch, seeded())["clean"]
    expected = torch.empty_like(made)
    for start in (0, 2, 4):
        now = slice(start, start + 2)
        joined = torch.cat([expected[:, :, :start], noisy[:, :, now]], 2)
        times = torch.cat([torch.zeros(2, start), level.expand(-1, 2)], 1)
        mask = frame_mask(BLOCKS[: start // 2 + 1], window)
        with torch.no_grad():
            v = masked_forward(student.transformer, mask, joined, 1000 * times, batch.text.states)[:, :, start:]
        expected[:, :, now] = noisy[:, :, now] - level.view(2, 1, 1, 1, 1) * v
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert not made.requires_grad and (made - batch.latents).abs().max() > 0.1
    for passes, found in in_passes.items():  # each makes one more block exact
        assert not found.requires_grad
        torch.testing.assert_close(found[:, :, : 2 * passes], expected[:, :, : 2 * passes], rtol=1e-4, atol=1e-5)
        assert passes == 3 or (found - expected)[:, :, 2 * passes :].abs().max() > 1e-3
    plain = make_method(TeacherForcingSettings(caption_dropout=0.0), {"student": student})
    seen: list[Tensor] = []

    def predict(x: Tensor, s: Tensor, batch: TrainBatch, *, clean: Tensor) -> Tensor:
        seen.append(clean)
        return x

    student.predict = predict  # pyright: ignore[reportAttributeAccessIssue]
    losses = [m.losses("student", batch, 0, seeded())["total"] for m in (method, plain)]
    assert torch.equal(*losses) and not torch.equal(*seen)


@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("method", ["diffusion", "teacher", "teacher after noise"])
def test_forcing_is_sampling_block_by_block(method: str, window: int) -> None:
    """The loss of one forward under the mask is that of blocks one after another with a cache, which is how they are
    sampled: after noisy frames, after clean ones, after almost clean ones. Its gradient is that of blocks one by one,
    each forwarded with its past under an explicit mask."""
    student, batch = causal(local_attn_size=window), batch_of()
    level = 0.06 if method == "teacher after noise" else 0.0
    settings: Any = (
        DiffusionForcingSettings(sampling="uniform", caption_dropout=0.0)
        if method == "diffusion"
        else TeacherForcingSettings(sampling="uniform", caption_dropout=0.0, context_noise=int(1000 * level))
    )
    loss = make_method(settings, {"student": student}).losses("student", batch, 0, seeded())["total"]
    again = seeded()
    u = torch.rand(2, 3, generator=again)
    s = (5 * u / (1 + 4 * u)).repeat_interleave(2, 1)
    noise = randn(batch.latents.shape, again)
    x = student.add_noise(batch.latents, noise, s)
    past, past_s = (x, s) if method == "diffusion" else (batch.latents, torch.zeros(2, FRAMES))
    torch.rand(2, generator=again)  # which samples lose their text
    if level:
        past_s = torch.full((2, FRAMES), level)
        past = student.add_noise(batch.latents, randn(batch.latents.shape, again), past_s)
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in (0, 2, 4):
            now = slice(start, start + 2)
            out = student.predict_streaming(x[:, :, now], s[:, now], batch, cur_start_frame=start)
            assert out is not None
            parts.append(out)
            student.predict_streaming(
                past[:, :, now], past_s[:, now], batch, cur_start_frame=start, store_kv=True
            )  # fmt: skip
    expected = (torch.cat(parts, 2) - (noise - batch.latents)).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    errors: list[Tensor] = []
    for start in (0, 2, 4):
        now = slice(start, start + 2)
        joined, levels = (
            torch.cat([a[:, :, :start], b[:, :, now]], 2) for a, b in ((past, x), (past_s[:, None], s[:, None]))
        )
        mask = frame_mask(BLOCKS[: start // 2 + 1], window)
        out = masked_forward(student.transformer, mask, joined, 1000 * levels[:, 0], batch.text.states)[:, :, start:]
        errors.append(out - (noise - batch.latents)[:, :, now])
    check_same_gradients(student, loss, torch.cat(errors, 2).square().mean())


def check_same_gradients(student: CausalWanModel, loss: Tensor, expected: Tensor) -> None:
    names, parameters = zip(*student.transformer.named_parameters(), strict=True)
    for name, a, b in zip(names, *(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        scale = float(b.abs().max())
        assert scale > 0 and (a - b).abs().max() < 1e-3 * scale, name


# -- self-forcing -----------------------------------------------------------------------------------------------------

STEPS = (1000, 750, 400)
SEEDS = [11, 12]


def settings_of(**values: Any) -> SelfForcingSettings:
    return SelfForcingSettings.model_validate({"steps": STEPS, **values})


SETTINGS = settings_of()


def sampled(student: CausalWanModel, batch: TrainBatch) -> Tensor:
    """A video by the engine as a pipeline runs it."""
    extra = {"dmd_denoising_steps": list(STEPS), "warp_denoising_step": True, "context_noise": 0}
    run = ForwardBatch(
        SamplingParams(guidance_scale=1.0, flow_shift=5.0, extra=extra), ["", ""], ["", ""], SEEDS,
        noise=NoiseSource(SEEDS), prompt_embeds=batch.text.states, prompt_lengths=batch.text.lengths,
        family=LatentVideo(SIZE[0], SIZE[1], SIZE[2], FRAMES),
    )  # fmt: skip
    parts: Any = SimpleNamespace(transformer=student.transformer, transformer_2=None, boundary=0.0)
    with torch.no_grad():
        latents = DenoisingEngine(CausalStrategy(parts)).run_blocks(run, ExecutionArgs()).latents
    assert latents is not None
    return latents


@pytest.mark.parametrize("window", [-1, 4])
def test_training_makes_the_videos_that_sampling_makes(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(onednn, "_DTYPES", ())  # kernels for inference alone would round differently
    student, batch = causal(local_attn_size=window), batch_of()
    expected = sampled(student, batch)
    made = roll_out(student, batch, SETTINGS, Exits([2, 2, 2]), SEEDS)
    assert made.requires_grad and torch.equal(made.detach(), expected)
    early = roll_out(student, batch, SETTINGS, Exits([2, 0, 2]), SEEDS)
    assert torch.equal(early[:, :, :2].detach(), expected[:, :, :2]), "a block depends on no later one"
    assert not torch.allclose(early[:, :, 2:].detach(), expected[:, :, 2:], atol=1e-3)


def uncached(student: CausalWanModel, batch: TrainBatch, exits: Exits, window: int) -> Tensor:
    """A rollout without a cache: every step forwards the whole past again under an explicit mask, with gradients on
    everywhere, and only what self-forcing declares constant is detached: the past's latents, keys and values, the
    samples that a block's last step starts from, blocks before the gradient's start."""
    schedule = FewStepSchedule.make(STEPS, 5.0, warp=True)
    past, past_s, made = torch.empty(2, SIZE[0], 0, *SIZE[1:]), torch.empty(2, 0), list[Tensor]()
    for index, exit_step in enumerate(exits.steps):
        source = NoiseSource(SEEDS).fork(index)
        shape = (SIZE[0], 2, *SIZE[1:])
        x = source.draw(shape)
        start = past.shape[2]
        for i in range(exit_step + 1):
            s = torch.full((2, 2), schedule.times[i] / 1000)
            joined, levels = torch.cat([past, x.detach()], 2), torch.cat([past_s, s], 1)
            mask = frame_mask([2] * (joined.shape[2] // 2), window)
            v = masked_forward(student.transformer, mask, joined, 1000 * levels, batch.text.states, start)
            v = v[:, :, start:]
            x0 = x.detach() - schedule.sigmas[i] * v
            if i < exit_step and exits.ode:
                x = x - (schedule.sigmas[i] - schedule.sigmas[i + 1]) * v
            elif i < exit_step:
                x = (1 - schedule.sigmas[i + 1]) * x0 + schedule.sigmas[i + 1] * source.draw(shape)
            else:
                x = x0
        made.append(x if start >= exits.gradient_start else x.detach())
        level = exits.context_noise / 1000
        seen = x.detach()
        if level:
            seen = (1 - level) * seen + level * NoiseSource(SEEDS).fork(index, 1).draw(shape)
        past, past_s = torch.cat([past, seen], 2), torch.cat([past_s, torch.full((2, 2), level)], 1)
    return torch.cat(made, 2)


@dataclass(frozen=True)
class Case:
    exits: Exits
    window: int = -1


CASES = {
    "first steps": Case(Exits([0, 0, 0])),
    "random steps": Case(Exits([1, 0, 2])),
    "window of gradients": Case(Exits([1, 1, 0], gradient_start=2)),
    "context noise": Case(Exits([0, 2, 1], context_noise=60)),
    "ode": Case(Exits([2, 1, 2], ode=True)),
    "rolling past": Case(Exits([1, 0, 1]), window=4),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_full_backpropagation(name: str) -> None:
    case = CASES[name]
    student, batch = causal(local_attn_size=case.window), batch_of()
    weight = draw(*batch.latents.shape, seed=9)
    grads: list[dict[str, Tensor]] = []
    videos: list[Tensor] = []
    for make in (
        lambda: roll_out(student, batch, SETTINGS, case.exits, SEEDS),
        lambda: uncached(student, batch, case.exits, case.window),
    ):
        student.transformer.zero_grad()
        made = make()
        (made * weight).sum().backward()
        videos.append(made.detach())
        grads.append({n: p.grad.clone() for n, p in student.transformer.named_parameters() if p.grad is not None})
    torch.testing.assert_close(videos[0], videos[1], rtol=1e-4, atol=1e-4)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for parameter, expected in grads[1].items():
        scale = float(expected.abs().max()) or 1.0
        assert (grads[0][parameter] - expected).abs().max() < 1e-3 * scale, parameter
    if case.exits.gradient_start:
        student.transformer.zero_grad()
        (roll_out(student, batch, SETTINGS, Exits(case.exits.steps), SEEDS) * weight).sum().backward()
        every = student.transformer.get_parameter("proj_out.weight").grad
        assert every is not None and (every - grads[0]["proj_out.weight"]).abs().max() > 1e-2, "it must leave out some"


@pytest.mark.parametrize("name", ["random steps", "window of gradients", "rolling past"])
def test_rollouts_recompute_blocks_when_checkpointing_is_set(name: str) -> None:
    """Gradients are equal; each block of a pass with a gradient is computed once more, in the backward pass."""
    case, weight = CASES[name], draw(2, SIZE[0], FRAMES, *SIZE[1:], seed=9)
    grads: list[dict[str, Tensor]] = []
    computed: list[list[int]] = []
    for checkpointing in (False, True):
        student, calls, counts = causal(local_attn_size=case.window), [0], list[int]()
        student.checkpointing = checkpointing
        for block in student.transformer.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        made = roll_out(student, batch_of(), SETTINGS, case.exits, SEEDS)
        counts.append(calls[0])
        (made * weight).sum().backward()
        computed.append([*counts, calls[0] - counts[0]])
        grads.append({n: p.grad for n, p in student.transformer.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    layers, with_gradient = len(student.transformer.blocks), 3 - case.exits.gradient_start // 2
    assert computed == [[computed[0][0], 0], [computed[0][0], layers * with_gradient]]


def test_losses_of_self_forcing() -> None:
    """Gradients stay in the role that is updated; exits are drawn as asked."""
    roles = {"student": causal(), "critic": wan(2, trainable=True), "teacher": wan(1)}
    empty = Text(torch.zeros(1, TEXT, TINY["text_dim"]), torch.tensor([1]))
    for role in roles.values():
        role.init_preprocessors(lambda prompts: empty)
    settings = settings_of(student_every=2)
    method: Any = make_method(settings, roles)
    assert isinstance(method, SelfForcing) and [list(method.updates(i)) for i in (0, 1)] == [
        ["critic", "student"],
        ["critic"],
    ]
    for updated in ("critic", "student"):
        method.losses(updated, batch_of(), 0, seeded())["total"].backward()
        for name, role in roles.items():
            with_gradient = any(p.grad is not None and p.grad.any() for p in role.transformer.parameters())
            assert with_gradient is (name == updated), (updated, name)
            role.transformer.zero_grad()
    for exits, kinds in (("block", 10), ("video", 3), ("last", 1)):
        drawn: set[tuple[int, ...]] = set()
        method = make_method(settings.model_copy(update={"exits": exits}), roles)
        for seed in range(40):
            drawn.add(tuple(exits_of(method, seed)))
        assert len(drawn) >= kinds
        assert exits == "block" or (len(drawn) == kinds and all(len(set(d)) == 1 for d in drawn))


@pytest.mark.parametrize("name", ["self_forcing", "teacher_forcing"])
def test_forward_passes_in_bfloat16(name: str) -> None:
    """`loop.precision` reaches what has no gradient too, rollouts included, and leaves every gradient in its place."""
    student, batch = causal(), batch_of()
    weight = draw(*batch.latents.shape, seed=9)

    def made() -> Tensor:
        if name == "self_forcing":
            return roll_out(student, batch, settings_of(), Exits([3, 1, 2]), [3, 4])
        method = TeacherForcing({"student": student}, TeacherForcingSettings(resample=0.5))
        return method.losses("student", batch, 0, seeded())["total"]

    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for low in (False, True):
        student.transformer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            value = made()
        (value * weight).sum().backward() if value.ndim else value.backward()
        grads = {k: p.grad.clone() for k, p in student.transformer.named_parameters() if p.grad is not None}
        found.append((value.detach(), grads))
    (exact, wanted), (coarse, got) = found
    torch.testing.assert_close(coarse.float(), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(coarse.float(), exact) and wanted.keys() == got.keys()
    whole = [torch.cat([g.flatten() for g in grads.values()]) for grads in (wanted, got)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.99


def exits_of(method: SelfForcing, seed: int) -> list[int]:
    return list(method.draw_exits(FRAMES, seeded(seed)).steps)


def test_what_does_not_fit() -> None:
    others = {"critic": wan(trainable=True), "teacher": wan()}
    with pytest.raises(ConfigError, match="self_forcing is of causal"):
        SelfForcing({"student": wan(trainable=True), **others}, settings_of())
    with pytest.raises(ConfigError, match="rollout=data_latent is of dmd2"):
        SelfForcing({"student": causal(), **others}, settings_of(rollout="data_latent"))
    with pytest.raises(ConfigError, match="teacher_forcing is of causal"):
        make_method(TeacherForcingSettings(), {"student": wan(trainable=True)})
    with pytest.raises(ValueError, match="resample=0 that it makes none"):
        TeacherForcingSettings(resample_passes=1)
    with pytest.raises(ConfigError, match=r"chunk=2: the chunks of a causal student are its blocks"):
        make_method(DiffusionForcingSettings(chunk=2), {"student": causal()})
    with pytest.raises(ConfigError, match="gradient_frames=1: no whole block"):
        exits_of(SelfForcing({"student": causal(), **others}, settings_of(gradient_frames=1)), 0)
