"""The Matrix-Game 2 transformer against recordings of the published code."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.matrix_game import spec
from kinetoscope.models.matrix_game.config import MatrixGameConfig
from kinetoscope.models.matrix_game.transformer import MatrixGameTransformer3DModel
from kinetoscope.nn.action import action_windows, pad_actions
from models.family_contract import TransformerContract
from models.tiny_matrix_game import FIXTURES, VARIANTS, published_config, recorded, tiny_model, tiny_weights, windows

TOLERANCE = 1e-5
BLOCK = 3


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "the comparison needs outputs of some size"
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def bidirectional_model() -> MatrixGameTransformer3DModel:
    """Base with an action module in its second block too, as recorded: the first's with the sign turned."""
    config = published_config("base")
    config["action_config"]["blocks"] = [0, 1]
    config["local_attn_size"] = -1
    weights = tiny_weights("base")
    turned = {k.replace("blocks.0.", "blocks.1."): -v for k, v in weights.items() if "blocks.0.action_model" in k}
    model = MatrixGameTransformer3DModel(MatrixGameConfig.from_dict(config))
    model.load_state_dict(weights | turned)
    return model.eval().requires_grad_(False)


def bidirectional_inputs() -> tuple[dict[str, Any], Tensor]:
    given = recorded("base.bidirectional")
    names = ("timestep", "condition", "keyboard", "mouse", "image_embeds")
    return {"latents": given["noise"], **{n: given[n] for n in names}}, given["flow"]


def block_inputs(given: dict[str, Tensor], block: int) -> dict[str, Any]:
    start = BLOCK * block
    actions = {n: windows(given[n], start, BLOCK) for n in ("keyboard", "mouse") if n in given}
    condition = given["condition"][:, :, start : start + BLOCK]
    return {"condition": condition, "image_embeds": given["image_embeds"], "start_frame": start, **actions}


class TestMatrixGame(TransformerContract):
    """All frames at once."""

    SHAPES = ((1, 16, 5, 4, 6),)
    ROLES = ("self", "cross", "mouse", "keyboard") * 2
    KEPT = ("condition", "keyboard", "mouse")

    def make_model(self) -> nn.Module:
        return bidirectional_model()

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        given = {n: v for n, v in bidirectional_inputs()[0].items() if n != "timestep"}
        drawn = {n: torch.randn(shape[0], *v.shape[1:], generator=generator) for n, v in given.items()}
        return drawn | {"timestep": 1000 * torch.rand(shape[0], generator=generator)}

    def unused(self, name: str) -> bool:
        norms = ("img_attn_q_norm.weight", "img_attn_k_norm.weight", "key_attn_q_norm.weight", "key_attn_k_norm.weight")
        return name.endswith(norms)


class TestMatrixGameTimestepPerFrame(TestMatrixGame):
    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        return super().inputs(shape, generator) | {
            "timestep": 1000 * torch.rand(shape[0], shape[2], generator=generator)
        }


def test_bidirectional_forward() -> None:
    inputs, expected = bidirectional_inputs()
    assert_near(bidirectional_model()(**inputs), expected)


def test_forward_of_a_late_block_with_memory() -> None:
    """Every forward of the third block, whose window no longer holds the first: noisy steps and the clean pass."""
    given, model = recorded("base.rollout"), tiny_model("base")
    memory = model.new_memory(1, given["noise"].shape)
    for block in range(2):
        clean = given["result"][:, :, BLOCK * block : BLOCK * (block + 1)]
        model(clean, torch.zeros(1, BLOCK), memory=memory, **block_inputs(given, block))
    for x, t, flow in zip(given["input"], given["timestep"], given["flow"], strict=True):
        assert_near(model(x, t, memory=memory, **block_inputs(given, 2)), flow)


def test_parts_computed_ahead_change_no_bit_of_a_later_block() -> None:
    given, model = recorded("base.rollout"), tiny_model("base")
    x = given["input"][0]
    inputs = block_inputs(given, 1)
    expected = model(x, torch.full((1,), 937.5), memory=model.new_memory(1, x.shape), **inputs)
    prepared = model.prepare_conditioning(image_embeds=inputs.pop("image_embeds"))
    prepared |= model.prepare_timesteps(torch.tensor([937.5])) | model.prepare_shared(x.shape, BLOCK)
    got = model(x, torch.full((1,), 0.0), memory=model.new_memory(1, x.shape), **inputs, **prepared)
    assert torch.equal(got, expected)


def test_a_timestep_a_frame() -> None:
    model = bidirectional_model()
    inputs, expected = bidirectional_inputs()
    inputs["timestep"] = inputs["timestep"].expand(1, 5)
    assert_near(model(**inputs), expected)
    inputs["timestep"] = torch.tensor([[731.0, 731.0, 0.0, 731.0, 731.0]])
    assert (model(**inputs) - expected).abs().max() > 1e-3


def test_rows_are_independent_with_memory() -> None:
    given, model = recorded("base.rollout"), tiny_model("base")
    generator = torch.Generator().manual_seed(3)
    rows = {n: torch.cat([v, v + 0.3 * torch.randn(v.shape, generator=generator)]) for n, v in given.items()}

    def run(rows: dict[str, Tensor]) -> Tensor:
        memory = model.new_memory(len(rows["noise"]), rows["noise"].shape)
        outs = []
        for block in range(3):
            part = rows["noise"][:, :, BLOCK * block : BLOCK * (block + 1)]
            time = torch.full((len(part),), 500.0)
            outs.append(model(part, time, memory=memory, **block_inputs(rows, block)))
        return torch.cat(outs, 2)

    names = ("noise", "condition", "image_embeds", "keyboard", "mouse")
    alone = [run({n: rows[n][i : i + 1] for n in names}) for i in range(2)]
    torch.testing.assert_close(run({n: rows[n] for n in names}), torch.cat(alone), rtol=0, atol=TOLERANCE)


def test_memory_that_holds_all_equals_one_long_window() -> None:
    """Block by block with room for every frame, against the masked formula written as one growing forward."""
    given = recorded("base.rollout")
    config = replace(tiny_model("base").config, local_attn_size=-1)
    model = MatrixGameTransformer3DModel(config)
    model.load_state_dict(tiny_weights("base"))
    model.requires_grad_(False)
    time, memory = torch.full((1,), 300.0), model.new_memory(1, given["noise"].shape)
    first = model(given["noise"][:, :, :3], time, memory=memory, **block_inputs(given, 0))
    inputs = {k: v for k, v in block_inputs(given, 0).items() if k != "start_frame"}
    torch.testing.assert_close(model(given["noise"][:, :, :3], time, **inputs), first, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["keyboard", "mouse"])
def test_actions_reach_the_frames_that_read_them(name: str) -> None:
    """Pixel frame p is read by latent frames i with 4 i - 12 <= p < 4 i, and by all before through the held start."""
    model = bidirectional_model()
    inputs, _ = bidirectional_inputs()
    base = model(**inputs)
    changed = inputs[name].clone()
    changed[:, -1] += 1  # the last pixel frame belongs to no window yet
    assert torch.equal(model(**{**inputs, name: changed}), base)
    changed[:, -2] += 1
    assert not torch.equal(model(**{**inputs, name: changed}), base)


def test_windows_are_those_written_out() -> None:
    frames = torch.arange(33.0).view(1, 33, 1)
    got = action_windows(pad_actions(frames, 12), 4, 12)
    assert torch.equal(got, windows(frames, 0, 9))


def test_published_names_and_shapes() -> None:
    published = json.loads((FIXTURES / "published.json").read_text())
    assert set(published) == {*VARIANTS, "foundation"}
    for entry in published.values():
        config = MatrixGameConfig.from_dict(entry["config"])
        assert config.in_channels == 36
        assert config.condition_channels == 4 + 16
        with torch.device("meta"):
            ours = {k: list(v.shape) for k, v in MatrixGameTransformer3DModel(config).state_dict().items()}
        assert len(ours) == entry["parameters"]
        expected = {spec.rename(k): v for k, v in entry["shapes"].items()}
        assert len(expected) == len(entry["shapes"])
        assert {k: ours.get(k) for k in expected} == expected
        assert all(spec.rename(k) == k for k in ours), "a converted directory's names are ours"
    assert spec.rename("patch_embedding.proj.weight") == "patch_embedding.weight", "as some directories have it"


def test_converted_configuration_is_read_alike() -> None:
    original = published_config("base")
    converted = {
        "_class_name": "CausalMatrixGame2WanModel",
        "action_config": original["action_config"],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 36,
        "out_channels": 16,
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "text_dim": 0,
        "patch_size": [1, 2, 2],
        **{n: original[n] for n in ("eps", "ffn_dim", "freq_dim", "local_attn_size", "num_layers", "image_dim")},
    }
    assert MatrixGameConfig.from_dict(converted) == MatrixGameConfig.from_dict(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_dim": 16}, "in_channels=16"),
        ({"dim": 25}, "dim=25"),
        ({"local_attn_size": 2}, "room for"),
        ({"number": 1}, "unknown fields"),
        ({"ffn_dim": 0}, "ffn_dim=0"),
        ({"action_config": {}}, "action_config"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"freq_dim": 31}, "freq_dim"),
    ],
)
def test_refuses_other_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MatrixGameConfig.from_dict(published_config("base") | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [7]}, "blocks up to 7"),
        ({"blocks": "all"}, "blocks='all'"),
        ({"blocks": [0, 0]}, "different block numbers"),
        ({"heads_num": 3}, "keyboard_hidden_dim=16"),
        ({"windows_size": 0}, "windows_size"),
        ({"img_hidden_size": 32}, "img_hidden_size=32"),
        ({"enable_keyboard": False}, "enable_keyboard"),
    ],
)
def test_refuses_other_action_modules(change: dict[str, Any], message: str) -> None:
    config = published_config("base")
    config["action_config"] |= change
    with pytest.raises(ConfigError, match=message):
        MatrixGameConfig.from_dict(config)


def test_refuses_inputs_that_do_not_fit() -> None:
    model = bidirectional_model()
    inputs, _ = bidirectional_inputs()
    with pytest.raises(InputError, match="with a mouse"):
        model(**{**inputs, "mouse": None})
    with pytest.raises(InputError, match="keyboard actions"):
        model(**{**inputs, "keyboard": inputs["keyboard"][:, :9]})
    with pytest.raises(InputError, match="image_embeds"):
        model(**{**inputs, "image_embeds": None})
    with pytest.raises(InputError, match="latent H=3"):
        model.new_memory(1, (1, 16, 3, 3, 6))


# -- whole videos as they are made block by block ---------------------------------------------------------------------


def video_inputs(frames: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Latents and a timestep a frame, and what the transformer is told of a video of two rows."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pixels = 4 * frames - 3
    told = {
        "condition": draw(2, 20, frames, 4, 6), "image_embeds": draw(2, 5, 20),
        "keyboard": draw(2, pixels, 4), "mouse": draw(2, pixels, 2),
    }  # fmt: skip
    return draw(2, 16, frames, 4, 6), 1000 * torch.rand(2, frames, generator=generator), told


def told_of_block(told: dict[str, Any], start: int, count: int) -> dict[str, Any]:
    actions = {n: windows(told[n], start, count) for n in ("keyboard", "mouse")}
    condition = told["condition"][:, :, start : start + count]
    return {"image_embeds": told["image_embeds"], "condition": condition, "start_frame": start, **actions}


@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (4, 0), (5, 2)])
@pytest.mark.parametrize("blocks", [[2, 2, 2, 2], [1] * 8])
def test_a_masked_video_is_its_blocks_with_memory(window: int, sink: int, blocks: list[int]) -> None:
    """The forward of training equals, with memory, what is played; with actions in both blocks of the network."""
    config = replace(bidirectional_model().config, local_attn_size=window, sink_size=sink, num_frames_per_block=1)
    model = MatrixGameTransformer3DModel(config)
    model.load_state_dict(bidirectional_model().state_dict())
    latents, timestep, told = video_inputs(8)
    with torch.no_grad():
        whole = model(latents, timestep, blocks=blocks, **told)
        memory, parts, start = model.new_memory(2, latents.shape), [], 0
        for size in blocks:
            now = slice(start, start + size)
            part = told_of_block(told, start, size)
            model(latents[:, :, now] + 1, timestep[:, now], memory=memory, **part)  # written over by the next line
            parts.append(model(latents[:, :, now], timestep[:, now], memory=memory, **part))
            start += size
        assert_near(torch.cat(parts, 2), whole)
        assert (model(latents, timestep, **told) - whole).abs().max() > 1e-3, "the mask must matter"


def test_a_noisy_video_after_its_clean_past() -> None:
    """Teacher forcing: each block of one forward is that block after a memory of clean frames."""
    model = tiny_model("base")  # a window of six frames
    assert model.config.local_attn_size == 6 and model.config.sink_size == 0
    noisy, timestep, told = video_inputs(9)
    clean = video_inputs(9)[0].flip(2)
    with torch.no_grad():
        got = model(noisy, timestep, blocks=[3, 3, 3], clean=clean, **told)
        memory = model.new_memory(2, noisy.shape)
        for start in (0, 3, 6):
            now, part = slice(start, start + 3), told_of_block(told, start, 3)
            assert_near(got[:, :, now], model(noisy[:, :, now], timestep[:, now], memory=memory, **part))
            model(clean[:, :, now], torch.zeros(2, 3), memory=memory, **part)


def test_gradients_of_a_masked_video_are_those_of_an_explicit_mask() -> None:
    """Through the past too: against attention with a mask of all keys, in place of parts of the keys."""
    model = bidirectional_model().requires_grad_(True)
    latents, timestep, told = video_inputs(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = mask[1::2].repeat_interleave(2, 0)  # blocks of two: a frame sees what the last of its block does

    def masked(q: Tensor, k: Tensor, v: Tensor, **unused: Any) -> Tensor:
        each, other = q.shape[1] // 6, k.shape[1] // 6
        seen = mask.repeat_interleave(each, 0).repeat_interleave(other, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    found: list[list[Tensor]] = []
    for blocks, context in (([2, 2, 2], {}), (None, dict.fromkeys(("self", "keyboard", "mouse"), masked))):
        with forward_context(ForwardContext(attention=context)):
            out = model(latents, timestep, blocks=blocks, **told)
        model.zero_grad()
        (out.square().sum() / out.numel()).backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 40
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_refuses_blocks_that_do_not_fit() -> None:
    model = tiny_model("base")
    latents, timestep, told = video_inputs(6)
    with pytest.raises(InputError, match="not the 6 latent frames"):
        model(latents, timestep, blocks=[3, 2], **told)
    with pytest.raises(InputError, match="one block"):
        model(latents, timestep, blocks=[3, 3], memory=model.new_memory(2, latents.shape), **told)
