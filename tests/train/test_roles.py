"""Roles: what methods ask of models, against forwards with explicit masks and against autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kinetoscope.core.errors import ConfigError, InputError, ModelLoadError
from kinetoscope.diffusion.noise import randn
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.nn import compile as module
from kinetoscope.train import roles
from kinetoscope.train.plugins import Opened, plugin_of
from kinetoscope.train.plugins.causal_wan import CausalWanModel
from kinetoscope.train.plugins.longcat import LongCatModel
from kinetoscope.train.plugins.wan import WanModel
from kinetoscope.train.roles import Text, TrainBatch
from models.tiny_causal_wan import TEXT, TINY, frame_mask, masked_forward, tiny_causal

SIZE = (4, 4, 6)  # channels, height, width of the latents


def draw(*shape: int, seed: int = 0) -> Tensor:
    return randn(shape, torch.Generator().manual_seed(seed))


def batch_of(rows: int = 2, frames: int = 6) -> TrainBatch:
    text = Text(draw(rows, TEXT, TINY["text_dim"], seed=1), torch.full((rows,), TEXT))
    return TrainBatch(draw(rows, SIZE[0], frames, *SIZE[1:]), text)


def causal(**options: Any) -> CausalWanModel:
    return CausalWanModel(tiny_causal(num_frames_per_block=2), **options)


def wan(**options: Any) -> WanModel:
    model = WanTransformer3DModel(tiny_causal().config)
    model.load_state_dict(tiny_causal().state_dict())
    return WanModel(model, **options)


def text_encoder(prompts: list[str]) -> Text:
    """A prompt is its length, all along."""
    states = torch.stack([torch.full((TEXT, TINY["text_dim"]), 0.1 + len(p)) for p in prompts])
    return Text(states, torch.full((len(prompts),), TEXT))


def test_streaming_is_the_block_causal_mask() -> None:
    role, batch = causal(), batch_of()
    x, s = batch.latents, torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = masked_forward(role.transformer, frame_mask([2, 2, 2]), x, 1000 * s, batch.text.states)
        whole = role.predict(x, s, batch)
        parts: list[Tensor] = []
        for start in (0, 2, 4):
            now = slice(start, start + 2)
            # a pass at another level first: it must leave nothing behind
            role.predict_noise_streaming(x[:, :, now] + 1, s[:, now], batch, cur_start_frame=start)
            noise = role.predict_noise_streaming(x[:, :, now], s[:, now], batch, cur_start_frame=start)
            x0 = role.predict_x0_streaming(x[:, :, now], s[:, now], batch, cur_start_frame=start)
            assert noise is not None and x0 is not None
            parts.append(noise - x0)  # the flow
            stored = role.predict_streaming(x[:, :, now], s[:, now], batch, cur_start_frame=start, store_kv=True)
            assert stored is None
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=0, atol=1e-5)
    assert (role.transformer(x, 1000 * s, batch.text.states) - expected).abs().max() > 1e-2, "the mask must matter"


@pytest.mark.parametrize("only", ["", "attn1.to_q"])
def test_gradients_go_through_the_block_at_hand(only: str) -> None:
    """As with the past in the clear (teacher forcing), also when the cache is written before the backward pass, and
    where keys themselves need no gradient."""
    role, batch = causal(trainable=True), batch_of()
    for name, parameter in role.transformer.named_parameters():
        parameter.requires_grad_(only in name)
    clean, noisy, s = batch.latents, draw(*batch.latents.shape, seed=7), torch.full((2, 2), 0.6)
    zero = torch.zeros(2, 2)
    past = clean[:, :, :2].clone().requires_grad_(not only)
    for start, block in ((0, past), (2, clean[:, :, 2:4])):
        role.predict_streaming(block, zero, batch, cur_start_frame=start, store_kv=True)
    now = noisy[:, :, 4:].clone().requires_grad_(not only)
    out = role.predict_streaming(now, s, batch, cur_start_frame=4)
    role.predict_streaming(clean[:, :, 4:], zero, batch, cur_start_frame=4, store_kv=True)
    assert out is not None
    out.square().sum().backward()
    assert past.grad is None
    got = {n: p.grad.clone() for n, p in role.transformer.named_parameters() if p.grad is not None}
    role.transformer.zero_grad()
    again = now.detach().clone().requires_grad_(not only)
    every = role.predict(
        torch.cat([noisy[:, :, :4], again], 2), torch.full((2, 6), 0.6), batch, clean=clean
    )[:, :, 4:]  # fmt: skip
    torch.testing.assert_close(out, every, rtol=0, atol=1e-5)
    every.square().sum().backward()
    if not only:
        assert now.grad is not None and now.grad.abs().max() > 0.1
        torch.testing.assert_close(now.grad, again.grad, rtol=1e-4, atol=1e-4)
    name = "blocks.1.attn1.to_q.weight"  # queries of the block alone, so the past's gradient is no part of it
    expected = dict(role.transformer.named_parameters())[name].grad
    assert expected is not None
    torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-4)


def test_blocks_with_a_past_are_recomputed_when_checkpointing_is_set() -> None:
    batch, zero, s = batch_of(), torch.zeros(2, 2), torch.full((2, 2), 0.6)
    grads: list[list[Tensor]] = []
    for checkpointing in (False, True):
        role, calls = causal(trainable=True, checkpointing=checkpointing), [0]
        role.transformer.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        role.predict_streaming(batch.latents[:, :, :2], zero, batch, cur_start_frame=0, store_kv=True)
        out = role.predict_streaming(batch.latents[:, :, 2:4], s, batch, cur_start_frame=2)
        role.predict_streaming(batch.latents[:, :, 2:4], zero, batch, cur_start_frame=2, store_kv=True)
        assert out is not None and calls == [3]
        out.square().sum().backward()
        assert calls == [3 + checkpointing]
        grads.append([p.grad for p in role.transformer.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_caches_have_tags_and_a_past() -> None:
    role, batch = causal(), batch_of()
    block, s = batch.latents[:, :, :2], torch.zeros(2, 2)
    role.init_preprocessors(text_encoder)
    options: Any = {"cur_start_frame": 2}
    with torch.no_grad(), pytest.raises(InputError, match="no past in cache 'a'"):
        role.predict_streaming(block, s, batch, cache_tag="a", **options)
    with torch.no_grad():
        for tag, scale in (("a", 1.0), ("b", 2.0)):
            role.predict_streaming(scale * block, s, batch, cur_start_frame=0, cache_tag=tag, store_kv=True)
        a, b, a2 = (role.predict_streaming(block, s, batch, cache_tag=t, **options) for t in "aba")
        assert a is not None and b is not None and a2 is not None
        assert torch.equal(a, a2) and not torch.allclose(a, b)
        with pytest.raises(InputError, match="no past"):  # the other branch has its own
            role.predict_streaming(block, s, batch, cache_tag="a", conditional=False, **options)
        role.clear_caches("a")
        assert role.predict_streaming(block, s, batch, cache_tag="b", **options) is not None
        with pytest.raises(InputError, match="no past"):
            role.predict_streaming(block, s, batch, cache_tag="a", **options)
        with pytest.raises(InputError, match="no past"):  # rebuilt for another number of rows
            role.predict_streaming(block[:1], s[:1], batch_of(1), cache_tag="b", **options)


def test_unconditional_branches() -> None:
    batch, x, s = batch_of(), draw(2, *SIZE[:1], 6, *SIZE[1:], seed=4), torch.tensor([0.3, 0.8])
    with pytest.raises(InputError, match="init_preprocessors"):
        wan().predict(x, s, batch, conditional=False)
    seen = {}
    for policy in ("negative", "empty", "zero"):
        role = wan(uncond=policy)
        role.init_preprocessors(text_encoder, "bad")
        seen[policy] = role.text_of(batch, False).states
        with torch.no_grad():
            guided = role.predict_x0(x, s, batch, guidance=3.0)
            c, u = (role.predict(x, s, batch, conditional=k) for k in (True, False))
        # guiding the output and then reading it is the same
        torch.testing.assert_close(guided, role.denoiser.to_x0(u + 3 * (c - u), x, s), rtol=0, atol=1e-4)
        assert (c - u).abs().max() > 1e-3
    assert [float(seen[p][0, 0, 0]) for p in seen] == pytest.approx([3.1, 0.1, 0.0])


@pytest.mark.parametrize("attention", ["dense", "vsa:sparsity=0.5,tile=2,2,2"])
def test_recomputed_blocks_have_the_same_gradients(attention: str) -> None:
    batch, s = batch_of(), torch.tensor([0.3, 0.8])
    grads: list[list[Tensor]] = []
    for checkpointing in (False, True):
        role = wan(trainable=True, attention=attention, checkpointing=checkpointing)
        role.backward(role.predict(batch.latents, s, batch).square().mean(), accumulate=2)
        grads.append([p.grad for p in role.transformer.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    if attention != "dense":
        dense = wan().predict(batch.latents, s, batch)
        assert (role.predict(batch.latents, s, batch) - dense).abs().max() > 1e-4, "it must be sparse"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled_blocks_have_the_same_gradients(
    checkpointing: bool, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all layers (and one for what is recomputed, where one context less is open), of whole videos alone;
    texts of other lengths need no other."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(module, "missing_compiler", lambda device: None)
    monkeypatch.setattr(roles, "compiled", partial(module.compiled, backend=graphs))
    batch, s = batch_of(), torch.tensor([0.3, 0.8])
    short = TrainBatch(batch.latents, Text(batch.text.states[:, :3], torch.full((2,), 3)))
    make = causal if is_causal else wan
    found: list[list[Tensor]] = []
    for compile in (False, True):
        role = make(trainable=True, checkpointing=checkpointing, compile=compile)
        for told in (batch, short):
            role.backward(role.predict(told.latents, s, told).square().mean())
        found.append([p.grad for p in role.transformer.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    assert graphs.frame_count == 1 + checkpointing
    if isinstance(role, CausalWanModel):
        role.predict_streaming(batch.latents[:, :, :2], s, batch, cur_start_frame=0, store_kv=True)
        assert graphs.frame_count == 1 + checkpointing
    torch._dynamo.reset()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "missing_compiler", lambda device: "torch needs a C++ compiler")
    with pytest.raises(ConfigError, match=r"compile: torch needs a C\+\+ compiler"):
        wan(trainable=True, compile=True)


def test_what_else_a_network_is_told_follows_the_rows() -> None:
    """Further states of prompts and further tensors of a batch: placed, expanded, dropped and given like the rest."""
    role, text = wan(), batch_of().text
    pooled, keys = draw(2, 3, seed=8), draw(2, 5, 4, seed=9).double()
    text = Text(text.states, text.lengths, {"pooled": pooled})
    made = role.prepare_batch(text, shape=(4, 6, 4, 6), extra={"keyboard": keys})
    assert made.extra["keyboard"].dtype == torch.float32 and torch.equal(made.extra["keyboard"], keys.float())
    with pytest.raises(InputError, match="1 rows of keyboard and 2 prompts"):
        role.prepare_batch(text, shape=(4, 6, 4, 6), extra={"keyboard": keys[:1]})
    assert torch.equal(role.conditioning(made, True)["pooled"], pooled)
    role.init_preprocessors(lambda prompts: Text(text.states[:1], text.lengths[:1], {"pooled": pooled[:1] + 1}))
    nothing = role.text_of(made, False)
    assert torch.equal(role.conditioning(made, False)["pooled"], (pooled[:1] + 1).expand(2, -1))
    mixed = made.text.replaced(torch.tensor([False, True]), nothing)
    assert torch.equal(mixed.extra["pooled"], torch.stack([pooled[0], pooled[0] + 1]))
    assert torch.equal(mixed.states, torch.stack([text.states[0], text.states[0]]))
    zero = wan(uncond="zero")
    zero.init_preprocessors(lambda prompts: Text(text.states[:1], text.lengths[:1], {"pooled": pooled[:1]}))
    assert not zero.conditioning(made, False)["pooled"].any()


def test_a_block_is_told_which_frames_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    role, batch, seen = causal(), batch_of(), []
    plain = CausalWanModel.conditioning

    def conditioning(self: CausalWanModel, batch: TrainBatch, conditional: bool, frames: Any = None) -> Any:
        seen.append(frames)
        return plain(self, batch, conditional, frames)

    monkeypatch.setattr(CausalWanModel, "conditioning", conditioning)
    with torch.no_grad():
        role.predict(batch.latents, torch.full((2,), 0.5), batch)
        for start in (0, 2):
            block = batch.latents[:, :, start : start + 2]
            role.predict_streaming(block, torch.zeros(2, 2), batch, cur_start_frame=start, store_kv=True)
    assert seen == [None, slice(0, 2), slice(2, 4)]


def test_batches_and_levels() -> None:
    role, text = wan(shift=5.0), batch_of().text
    made = role.prepare_batch(text, shape=(4, 6, 4, 6))
    assert made.latents.shape == (2, 4, 6, 4, 6) and not made.latents.any()
    mistakes: list[dict[str, Any]] = [
        {},
        {"latents": made.latents, "shape": (1, 1, 1, 1)},
        {"latents": made.latents[:1]},
    ]
    for wrong in mistakes:
        with pytest.raises(InputError):
            role.prepare_batch(text, **wrong)
    levels = role.shift_and_clamp_timestep(torch.tensor([0.0, 0.5, 1.0]), 0.02, 0.98)
    assert levels.tolist() == pytest.approx([0.02, 5 * 0.5 / (1 + 4 * 0.5), 0.98])


def test_plugins_by_class() -> None:
    assert plugin_of("WanTransformer3DModel") is WanModel
    assert plugin_of("LongCatVideoTransformer3DModel") is LongCatModel and LongCatModel.convention.sign == -1
    with pytest.raises(ConfigError, match="a UNet cannot be trained"):
        plugin_of("UNet")
    with pytest.raises(ConfigError, match="attends densely"):
        causal(attention="vsa")


def test_an_opened_model_and_another_transformer(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    opened = Opened("tiny-t2v")
    assert isinstance(opened.role(trainable=True), WanModel) and opened.latent_channels() == 12
    text = opened.encoder()(["a red circle"])
    assert text.states.shape[:2] == (1, 512) and not text.states[0, int(text.lengths[0]) :].any()
    weights = {k: v + 1 for k, v in opened.transformer.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = Opened("tiny-t2v", str(tmp_path / "other.safetensors"))
    assert all(torch.equal(v, weights[k]) for k, v in other.transformer.state_dict().items())
    weights.pop("proj_out.weight")
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ModelLoadError, match=r"less\.safetensors does not fit.*proj_out"):
        Opened("tiny-t2v", str(tmp_path / "less.safetensors"))
