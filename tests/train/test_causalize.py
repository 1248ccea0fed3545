"""A causal directory with the weights of one that sees whole videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kinetoscope.core.errors import ConfigError, KinetoscopeError
from kinetoscope.train.causalize import CausalSection, make_causal
from kinetoscope.train.data.ode_pairs import OdePairsData
from kinetoscope.train.methods.self_forcing import SelfForcingSettings
from kinetoscope.train.plugins import Opened
from kinetoscope.train.plugins.causal_wan import CausalWanModel
from kinetoscope.train.post import load_post_recipe


def test_a_causal_start(tmp_path: Path) -> None:
    section = CausalSection(num_frames_per_block=2, local_attn_size=4, steps=(1000, 500))
    folder = make_causal("tiny-t2v", section, tmp_path / "causal")
    (folder / "mark").touch()
    assert make_causal("tiny-t2v", section, folder) == folder and (folder / "mark").exists(), "kept as it is"
    assert not (folder / "README.md").exists() and not (folder / "step_caches.json").exists()
    causal, whole = Opened(str(folder)), Opened("tiny-t2v")
    role = causal.role()
    assert isinstance(role, CausalWanModel) and role.blocks(6) == (2, 2, 2)
    theirs = whole.transformer.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in causal.transformer.state_dict().items())
    made = causal.sample(["a red circle moving left"], [3], height=32, width=32, num_frames=45)
    assert made.latents is not None and made.latents.shape[2] == 12 and made.params.num_inference_steps == 2
    sidecar = json.loads((folder / "kinetoscope.json").read_text())
    assert sidecar["world"] == "shapes" and sidecar["defaults"]["extra"]["dmd_denoising_steps"] == [1000, 500]


def test_what_cannot_be_causal(tmp_path: Path) -> None:
    start = make_causal("tiny-t2v", CausalSection(), tmp_path / "causal")
    with pytest.raises(ConfigError, match="cannot be made causal"):
        make_causal(str(start), CausalSection(), tmp_path / "again")
    with pytest.raises(KinetoscopeError, match="local_attn_size=2"):
        make_causal("tiny-t2v", CausalSection(local_attn_size=2), tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()


def test_both_parts_of_the_recipe_fit_each_other() -> None:
    """The few steps that trajectories are recorded at, those of self-forcing, and those of sampling are the same."""
    recipes = Path(__file__).parents[2] / "recipes"
    first, second = (load_post_recipe(recipes / f"tiny_causal{part}.yaml") for part in ("_ode", ""))
    start = first.models["student"].causal
    pairs, forcing = first.data, second.method
    assert start and isinstance(pairs, OdePairsData) and isinstance(forcing, SelfForcingSettings)
    assert start.steps == pairs.steps == forcing.steps and start.warp == pairs.warp == forcing.warp
    assert start.shift == pairs.shift == second.models["student"].shift
    assert start.context_noise == forcing.context_noise
    assert second.models["student"].init_from == f"{first.output}/model"
