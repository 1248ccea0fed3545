"""A world that is played, from nothing: its recipe in miniature, and what it draws without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.basis import fit_basis
from kinetoscope.train.data import SourceContext, make_source
from kinetoscope.train.data.played import PlayedData, PlayedSource
from kinetoscope.train.data.worlds import MEASURED_SEED
from kinetoscope.train.loop import step_generator
from kinetoscope.train.played import MOUSE, draw_image_encoder, draw_transformer
from kinetoscope.train.plugins import Opened
from kinetoscope.train.plugins.matrix_game import first_view
from kinetoscope.train.recipe import PlayedRecipe, WorldSection, load_recipe
from kinetoscope.train.run import run_recipe
from kinetoscope.train.vae import Clips, to_video
from kinetoscope.worlds import get_world

RECIPES = Path(__file__).parents[2] / "recipes"
START, PLAY, FEW, LONG, FRESH = (
    RECIPES / f"tiny_world{part}.yaml" for part in ("", "_play", "_few", "_long", "_fresh")
)
MINIATURE: dict[str, Any] = {
    "world.num_frames": 5, "world.height": 32, "world.width": 32,
    "vae.config.base_dim": 4, "vae.config.decoder_base_dim": 4, "vae.config.dim_mult": [1, 1, 1], "vae.config.z_dim": 4,
    "vae.basis_clips": 2,
    "vae.encoder.optimizer.steps": 2, "vae.encoder.batches": [{"frames": 5, "batch": 1}],
    "vae.decoder.optimizer.steps": 2, "vae.decoder.batches": [{"frames": 5, "batch": 1}],
    "transformer.config.num_layers": 2, "transformer.config.num_attention_heads": 1,
    "transformer.config.in_channels": 12, "transformer.config.out_channels": 4, "transformer.config.ffn_dim": 16,
    "transformer.config.patch_size": [1, 4, 1], "transformer.config.local_attn_size": 2,
    "transformer.config.action_config.img_hidden_size": 32, "transformer.config.action_config.blocks": [0],
    "defaults.height": 32, "defaults.width": 32, "defaults.num_frames": 5,
}  # fmt: skip


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{k}={yaml.safe_dump(v, default_flow_style=True).strip()}".replace("\n...", "") for k, v in values.items()]


def played(**changes: Any) -> PlayedRecipe:
    recipe = load_recipe(START, overrides({**MINIATURE, **changes}))
    assert isinstance(recipe, PlayedRecipe)
    return recipe


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(START, overrides({**MINIATURE, "output": str(tmp_path_factory.mktemp("start"))}))


def played_by(folder: Path, output: Path, **changes: Any) -> list[str]:
    """A later part in miniature, of the model of the part before in `folder`."""
    values = {
        "output": str(output), "models.student.init_from": str(folder), "loop.steps": 2, "data.clips": 3,
        "data.batch": 2, "data.basis_clips": 2, "data.world.height": 32, "data.world.width": 32,
        "data.world.num_frames": 13, "data.cache": str(output / "cache"),
    }  # fmt: skip
    return overrides({**values, **changes})


def test_from_nothing_to_a_world_that_is_played(start: Path, tmp_path: Path) -> None:
    """The five recipes end to end; the result is opened and played, and what is done changes what is seen."""
    from kinetoscope import VideoGenerator
    from kinetoscope.train.post import load_post_recipe
    from kinetoscope.train.post_run import run_post_recipe

    card = (start / "README.md").read_text()
    assert "Matrix-Game 2" in card and "PSNR" in card and "encoder" in card
    assert (start / "loss.png").read_bytes().startswith(b"\x89PNG")
    taught = run_post_recipe(PLAY, played_by(start, tmp_path / "play"))
    lasting = run_post_recipe(FEW, played_by(taught, tmp_path / "few"))
    assert "resample=0.7" in (lasting / "README.md").read_text()
    plain = {"models.student.compile": "false"}
    longer = run_post_recipe(LONG, played_by(lasting, tmp_path / "long", **plain))
    model = run_post_recipe(FRESH, played_by(longer, tmp_path / "fresh", **plain))
    sidecar = json.loads((model / "kinetoscope.json").read_text())
    assert sidecar["world"] == "maze" and sidecar["defaults"]["fps"] == 16.0
    steps = load_post_recipe(FRESH).method.model_dump()["steps"]  # of training, and of sampling
    assert sidecar["defaults"]["extra"]["dmd_denoising_steps"] == list(steps)
    assert "resample_passes=1" in (model / "README.md").read_text()
    view = get_world("maze").sample(0, "heldout", height=32, width=32, num_frames=1).frames[0]
    generator = VideoGenerator.from_pretrained(model, device="cpu")
    seen: list[np.ndarray] = []
    for keys in (["w"], ["s"]):
        with generator.start_session(image=view, seed=0, height=32, width=32) as session:
            blocks = [session.step(keyboard=keys, mouse="right") for _ in range(3)]
        assert [len(b) for b in blocks] == [1, 4, 4]
        seen.append(np.concatenate(blocks))
    assert not np.array_equal(seen[0][5:], seen[1][5:])


def test_parts_of_a_played_recipe(tmp_path: Path) -> None:
    settings = overrides({**MINIATURE, "output": str(tmp_path)})
    assert run_recipe(START, settings, parts=["encoder"]) == tmp_path
    assert [f.stem for f in (tmp_path / "checkpoints").glob("*.pt")] == ["encoder"]
    with pytest.raises(ConfigError, match="unknown part transformer; use some of: encoder, decoder"):
        run_recipe(START, settings, parts=["transformer"])


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    config = played().transformer.config
    one, again, other = (draw_transformer(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one)
    same = {k for k in one if torch.equal(one[k], other[k])}
    constant = {k for k in same if len(one[k].unique()) == 1}
    assert same == constant and "proj_out.weight" in same and "blocks.0.attn1.to_q.weight" not in same
    turns = one["blocks.0.action_model.mouse_mlp.0.weight"]  # Xavier over d + 24 inputs, those of turns times ten
    bound = (6 / sum(turns.shape)) ** 0.5
    assert 0.9 * bound < float(turns[:, :32].abs().max()) <= bound
    assert 0.9 * bound / MOUSE < float(turns[:, 32:].abs().max()) <= bound / MOUSE


def test_the_image_encoder_is_blind() -> None:
    encoder = draw_image_encoder(played().image_encoder.config, 0)
    images = torch.empty(2, 3, 32, 32).normal_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(images, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(features[0], features[1]) and float(features.std()) > 0.1


WORLD = WorldSection(name="maze", height=32, width=32, num_frames=13, fps=16)


def source(opened: Opened, folder: Path, **settings: Any) -> PlayedSource:
    section = {"world": WORLD, "batch": 3, "clips": 5, "basis_clips": 2, "cache": str(folder), "latents": "basis"}
    section |= settings
    if section["latents"] != "basis":
        del section["basis_clips"]
    made = make_source(PlayedData(source="played", **section), SourceContext(opened, folder))
    assert isinstance(made, PlayedSource)
    return made


def test_batches_are_walks_with_what_was_done(start: Path, tmp_path: Path) -> None:
    opened, clips = Opened(str(start)), Clips(WORLD)
    ours = source(opened, tmp_path, whitening=0.5, settled=4, basis_frames=5)
    batch = ours.batch(0, step_generator(0, 0))
    picked = torch.randint(0, 5, (3,), generator=step_generator(0, 0)).tolist()
    measured = Clips(WORLD.model_copy(update={"num_frames": 5}))
    basis = fit_basis(measured.whole, 2, 4, 8, 4, MEASURED_SEED, 0.5)
    for row, number in enumerate(picked):
        clip = clips.world.sample(number, height=32, width=32, num_frames=13)
        assert clip.actions is not None
        assert np.array_equal(batch.extra["keyboard"][row].numpy(), clip.actions.keyboard)
        assert np.array_equal(batch.extra["mouse"][row].numpy(), clip.actions.mouse)
        video = to_video([clip.frames])
        told = first_view(opened.pipeline, video[:, :, 0], 13)
        for name, expected in {**told, "latents": basis.latents(video)}.items():
            given = batch.latents if name == "latents" else batch.extra[name]
            torch.testing.assert_close(given[row], expected[0], rtol=2e-3, atol=2e-3)  # they are kept in float16
    again = ours.batch(0, step_generator(0, 0))
    assert torch.equal(again.latents, batch.latents) and batch.latents.shape == (3, 4, 4, 4, 4)
    files = list(tmp_path.glob("*.npz"))
    source(opened, tmp_path, whitening=0.5, settled=4, basis_frames=5)
    assert list(tmp_path.glob("*.npz")) == files and len(files) == 1


def test_a_condition_that_has_settled_is_repeated(start: Path, tmp_path: Path) -> None:
    """Of shorter clips too: actions and latents are cut to the frames that are trained on."""
    ours = source(Opened(str(start)), tmp_path, settled=2, frames=9)
    batch = ours.batch(0, step_generator(0, 0))
    condition = batch.extra["condition"]
    assert batch.latents.shape[2] == condition.shape[2] == 3 and batch.extra["keyboard"].shape[1] == 9
    assert torch.equal(condition[:, :, 1], condition[:, :, 2]) and not torch.equal(
        condition[:, :, 0], condition[:, :, 1]
    )


def test_what_is_no_played_clip(start: Path, tmp_path: Path) -> None:
    opened = Opened(str(start))
    with pytest.raises(ConfigError, match="nothing is done in clips of shapes"):
        source(opened, tmp_path, world=WORLD.model_copy(update={"name": "shapes"}))
    with pytest.raises(ConfigError, match="latents=none"):
        source(opened, tmp_path, latents="none")
    with pytest.raises(ConfigError, match="1 \\+ a multiple of 4"):
        source(opened, tmp_path, frames=8)
    assert not list(tmp_path.iterdir())
