"""The causal Wan transformer: Wan where masks coincide, an explicit mask elsewhere, and the same with a cache."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import WanTransformer3DModel as Oracle
from safetensors.torch import load_file
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.engine.protocols import take_rows
from kinetoscope.models.wan.causal import CausalWanConfig, CausalWanTransformer3DModel
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.nn.block_causal import teacher_forcing_rows
from models.family_contract import FamilyContract
from models.tiny_causal_wan import (
    FIXTURES,
    TEXT,
    TINY,
    fixture_model,
    frame_mask,
    masked_forward,
    prompt_embeds,
    tiny_causal,
)

TOLERANCE = 1e-5


class TestCausalWan(FamilyContract):
    """All frames as one block: the family's contract against diffusers' Wan, one timestep a frame."""

    MODEL, CONFIG, ORACLE, TINY = CausalWanTransformer3DModel, CausalWanConfig, Oracle, TINY
    PUBLISHED: ClassVar[dict[str, Any]] = {
        "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "14B": {},
    }
    SHAPES = ((2, 4, 2, 8, 8), (1, 4, 1, 4, 6), (1, 4, 5, 10, 4))
    ROLES = ("self", "cross") * TINY["num_layers"]
    KEPT = ("blocks",)

    def make_ours(self, oracle: nn.Module) -> nn.Module:
        return CausalWanTransformer3DModel(CausalWanConfig.from_dict(TINY))

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        rows, _, frames = shape[:3]
        return {
            "latents": torch.randn(shape, generator=generator),
            "timestep": 1000 * torch.rand(rows, frames, generator=generator),
            "encoder_hidden_states": torch.randn(rows, TEXT, TINY["text_dim"], generator=generator),
            "blocks": [frames],
        }

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        frame_tokens = inputs["latents"][0, 0, 0].numel() // 4
        timestep = inputs["timestep"].repeat_interleave(frame_tokens, dim=1)
        return oracle(inputs["latents"], timestep, inputs["encoder_hidden_states"], return_dict=False)[0]


WINDOWS = [(-1, 0), (4, 0), (4, 1), (5, 2), (3, 0)]  # window, sink


def with_windows(*plans: list[int]) -> list[tuple[list[int], int, int]]:
    """Each plan of blocks with every window that has room for its largest block beside the sink."""
    return [(plan, w, s) for plan in plans for w, s in WINDOWS if w == -1 or w >= s + max(plan)]


def inputs(rows: int = 2, frames: int = 6, seed: int = 5, size: tuple[int, int] = (4, 6)) -> tuple[torch.Tensor, ...]:
    """Latents, one timestep a frame, text."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 4, frames, *size, generator=generator),
        1000 * torch.rand(rows, frames, generator=generator),
        torch.randn(rows, TEXT, 8, generator=generator),
    )


@pytest.mark.parametrize("blocks", [None, [6]])
def test_one_block_is_wan(blocks: list[int] | None) -> None:
    model = tiny_causal()
    wan = WanTransformer3DModel(WanConfig.from_dict(TINY))
    wan.load_state_dict(model.state_dict())
    latents, timestep, text = inputs()
    with torch.no_grad():
        expected = wan(latents, timestep, text)
        torch.testing.assert_close(model(latents, timestep, text, blocks=blocks), expected, rtol=0, atol=1e-6)
        cache = model.new_cache(2, latents.shape, 6)
        torch.testing.assert_close(model(latents, timestep, text, cache=cache), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.1


@pytest.mark.parametrize(("blocks", "window", "sink"), with_windows([3, 3], [1, 2, 2, 1], [1] * 6))
def test_blocks_are_an_explicit_mask(blocks: list[int], window: int, sink: int) -> None:
    model = tiny_causal(local_attn_size=window, sink_size=sink, num_frames_per_block=max(blocks))
    latents, timestep, text = inputs()
    with torch.no_grad():
        expected = masked_forward(model, frame_mask(blocks, window, sink), latents, timestep, text)
        got = model(latents, timestep, text, blocks=blocks)
        bidirectional = model(latents, timestep, text)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (bidirectional - expected).abs().max() > 1e-2, "the mask must matter"


@pytest.mark.parametrize(("blocks", "window", "sink"), with_windows([3] * 4, [1, 2, 2, 1, 3, 3], [1] * 12))
def test_a_cache_is_the_mask(blocks: list[int], window: int, sink: int) -> None:
    """Block after block with a cache, each run twice (noisy, then as it is), against one forward of everything."""
    model = tiny_causal(local_attn_size=window, sink_size=sink, num_frames_per_block=max(blocks))
    latents, timestep, text = inputs(frames=12)
    with torch.no_grad():
        expected = masked_forward(model, frame_mask(blocks, window, sink), latents, timestep, text)
        cache = model.new_cache(2, latents.shape, 12)
        parts: list[torch.Tensor] = []
        start = 0
        for size in blocks:
            block = slice(start, start + size)
            now = {"cache": cache, "start_frame": start}
            model(latents[:, :, block] + 1, timestep[:, block], text, **now)  # written over by the next line
            parts.append(model(latents[:, :, block], timestep[:, block], text, **now))
            start += size
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=0, atol=TOLERANCE)


def test_rows_of_a_cache_are_branches() -> None:
    """A forward of one row writes that row's part alone, and equals the forward of all rows."""
    model = tiny_causal(local_attn_size=4, num_frames_per_block=2)
    latents, timestep, text = inputs(rows=3, frames=8)
    together, apart = (model.new_cache(3, latents.shape) for _ in range(2))
    with torch.no_grad():
        for start in range(0, 8, 2):
            block = slice(start, start + 2)
            expected = model(latents[:, :, block], timestep[:, block], text, cache=together, start_frame=start)
            for row in (2, 0, 1):
                one = slice(row, row + 1)
                got = model(
                    latents[one, :, block], timestep[one, block], text[one], start_frame=start,
                    cache=take_rows(apart, one),
                )  # fmt: skip
                torch.testing.assert_close(got, expected[one], rtol=0, atol=TOLERANCE)


def test_memory_of_a_stream_is_flat() -> None:
    model = tiny_causal(local_attn_size=4, sink_size=1)
    latents, timestep, text = inputs(rows=1, frames=3)
    cache = model.new_cache(1, latents.shape)
    where = [k.data_ptr() for k in cache.keys]
    with torch.no_grad():
        for start in range(0, 300, 3):
            model(latents, timestep, text, cache=cache, start_frame=start)
    assert [k.data_ptr() for k in cache.keys] == where
    assert all(k.shape == (1, 4, 6, 2, 12) for k in cache.keys)


@pytest.mark.parametrize("blocks", [[2, 2, 2], [1, 3, 2]])
def test_teacher_forcing(blocks: list[int]) -> None:
    """[clean | noisy] in one forward equals, for each block, clean past and noisy block behind a block-causal mask."""
    model = tiny_causal()
    noisy, timestep, text = inputs()
    clean = inputs(seed=9)[0]
    with torch.no_grad():
        got = model(noisy, timestep, text, blocks=blocks, clean=clean)
        start = 0
        for index, size in enumerate(blocks):
            stop = start + size
            both = torch.cat([clean[:, :, :start], noisy[:, :, start:stop]], 2)
            times = torch.cat([torch.zeros(2, start), timestep[:, start:stop]], 1)
            expected = model(both, times, text, blocks=blocks[: index + 1])[:, :, start:]
            torch.testing.assert_close(got[:, :, start:stop], expected, rtol=0, atol=TOLERANCE)
            start = stop
    assert teacher_forcing_rows([2, 1])[2:] == (((3, 5), ((3, 5),)), ((5, 6), ((0, 2), (5, 6))))
    rolling = teacher_forcing_rows([2, 2, 2], window=4, sink=1)  # the last block sees frame 0, one before it, itself
    assert rolling[2] == ((4, 6), ((0, 1), (3, 6))) and rolling[5] == ((10, 12), ((0, 1), (3, 4), (10, 12)))


def test_gradients_flow_through_the_own_block_alone() -> None:
    model = tiny_causal(local_attn_size=4, sink_size=1, num_frames_per_block=2)
    latents, timestep, text = inputs(rows=1, frames=6)
    with torch.no_grad():
        cache, other = model.new_cache(1, latents.shape), model.new_cache(1, latents.shape)
        for c in (cache, other):
            for start in (0, 2):
                block = slice(start, start + 2)
                model(latents[:, :, block], timestep[:, block], text, cache=c, start_frame=start)
        expected = model(latents[:, :, 4:], timestep[:, 4:], text, cache=other, start_frame=4)
    model.requires_grad_(True)
    last = latents[:, :, 4:].clone().requires_grad_()
    out = model(last, timestep[:, 4:], text, cache=cache, start_frame=4)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        model(latents[:, :, 4:], timestep[:, 4:], text, cache=cache, start_frame=4)  # the cache may be written on
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not any(k.requires_grad for k in cache.keys)
    step = 1e-2
    moved = [model(last.detach() + sign * step, timestep[:, 4:], text, cache=cache, start_frame=4) for sign in (1, -1)]
    slope = (moved[0].square().sum() - moved[1].square().sum()) / (2 * step)
    torch.testing.assert_close(last.grad.sum(), slope.detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_frames_per_block": 0}, "num_frames_per_block"),
        ({"num_frames_per_block": "3"}, "num_frames_per_block"),
        ({"local_attn_size": 3, "sink_size": 1}, "local_attn_size"),
        ({"local_attn_size": 0}, "local_attn_size"),
        ({"sink_size": -1}, "sink_size"),
        ({"sliding_window_num_frames": 2}, "sliding_window"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"rope_cache_policy": "relativistic"}, "rope_cache_policy"),
        ({"ffn_dim": 0}, "ffn_dim"),
        ({"heads": 1}, "unknown"),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CausalWanConfig.from_dict({**TINY, **change})


def test_refusals() -> None:
    model = tiny_causal()
    latents, timestep, text = inputs()
    with pytest.raises(InputError, match="not the 6 latent frames"):
        model(latents, timestep, text, blocks=[3, 2])
    cache = model.new_cache(2, latents.shape, 6)
    with pytest.raises(InputError, match="one block"):
        model(latents, timestep, text, blocks=[3, 3], cache=cache)
    with pytest.raises(InputError, match="22 latent frames"):
        model.new_cache(1, latents.shape, 22)
    with pytest.raises(InputError, match="patch size"):
        model.new_cache(1, (5, 4), 3)
    with pytest.raises(ConfigError, match="sink_size=2"):
        model.new_cache(1, latents.shape, window=4, sink=2)


# -- the published code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "blocks"),
    [
        ("blocks", {}, [3, 3]),
        ("window", {"local_attn_size": 3, "num_frames_per_block": 2}, [2, 2, 2]),
        ("first_frame", {"independent_first_frame": True, "num_frames_per_block": 2}, [1, 2, 2]),
        ("teacher_forcing", {"num_frames_per_block": 2}, [2, 2, 2]),
    ],
)
def test_equals_self_forcing(name: str, config: dict[str, Any], blocks: list[int]) -> None:
    """Training forwards of the published transformer, recorded."""
    recorded = load_file(FIXTURES / "forward.safetensors")
    model = fixture_model("high", **config)
    frames = sum(blocks)
    clean = {"clean": recorded["clean"]} if name == "teacher_forcing" else {}
    with torch.no_grad():
        got = model(recorded["noisy"][:, :, :frames], recorded["timestep"][:, :frames], prompt_embeds(), blocks=blocks,
                    **clean)  # fmt: skip
    torch.testing.assert_close(got, recorded[name], rtol=0, atol=TOLERANCE)
    assert recorded[name].std() > 0.1
