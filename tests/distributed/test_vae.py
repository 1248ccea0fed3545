"""Decoding and encoding that devices share: what one device makes, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.opened import open_among
from distributed.ranks import run_ranks
from kinetoscope.core.errors import CompositionError
from kinetoscope.loading.components import load_component
from kinetoscope.loading.directory import ModelDir
from kinetoscope.parallel import Groups
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.vae import check_shared, share_vae
from kinetoscope.pipelines.stages.decoding import FrameStream
from runtime.families import FAMILIES
from tiny import make_tiny_wan

ROWS = 7
"""Of latents: no number of devices here divides them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directory of a family, made once."""
    root = tmp_path_factory.mktemp("vae")

    def make(name: str) -> Path:
        path = root / name
        if not path.exists():
            path.mkdir()
            if name == "wan22":
                make_wan22(path)
            else:
                FAMILIES[name].make(path)
        return path

    return make


def make_wan22(path: Path) -> None:
    """A VAE like Wan 2.2's, whose pixels are folded and whose blocks have shortcuts."""
    import json

    from diffusers import AutoencoderKLWan

    generator = torch.Generator().manual_seed(5)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    for parameter in vae.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    vae.save_pretrained(path / "vae")
    (path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKLWan"]}))


def load(path: Path) -> Any:
    return load_component(ModelDir(path, "m"), "vae", dtype=torch.float32, device=torch.device("cpu"))


def cut(vae: Any, ratio: int) -> None:
    """Small tiles that overlap: 4 rows and columns of latents, 3 from one to the next."""
    vae.enable_tiling()
    vae.tile_sample_min_height = vae.tile_sample_min_width = 4 * ratio
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 3 * ratio
    if hasattr(vae, "tile_latent_min_height"):
        vae.tile_latent_min_height = vae.tile_latent_min_width = 4
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4  # Hunyuan: two latent frames, and one


@torch.no_grad()
def both_ways(groups: Groups | None, path: Path, mode: str) -> dict[str, Any]:
    """A video from latents, latents from a video, and what was sent."""
    vae = load(path)
    config = vae.config
    names = ("scale_factor_spatial", "spatial_compression_ratio")
    ratio = next((int(config[n]) for n in names if config.get(n)), None) or int(vae.spatial_compression_ratio)
    channels = int(config.get("z_dim") or config.get("latent_channels"))
    if mode == "tiled":
        cut(vae, ratio)
    if groups is not None:
        share_vae(vae, groups.vae)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, channels, 3, ROWS, 5, generator=generator)
    frames = 1 + 2 * int(config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or 4)
    pixels = torch.rand(1, 3, frames, ROWS * ratio, 5 * ratio, generator=generator) * 2 - 1
    SENT.clear()
    if mode == "streaming":
        stream = FrameStream(vae)
        return {"video": torch.from_numpy(np.concatenate([stream.decode(f) for f in z[0].split(1, 1)]))}
    extra = [torch.tensor([0.05])] if config.get("timestep_conditioning") else []
    video = vae.decode(z, *extra, return_dict=False)[0]
    return {"video": video, "latents": vae.encode(pixels).latent_dist.mode(), "sent": SENT["vae"]}


QUICK = [("wan", "whole", 2), ("wan", "whole", 4), ("wan", "tiled", 2), ("ltx", "tiled", 2)]
REST = [
    ("wan", "streaming", 2), ("wan", "tiled", 4), ("wan22", "whole", 2), ("wan22", "tiled", 2), ("hunyuan", "whole", 2),
    ("hunyuan", "tiled", 2), ("hunyuan", "tiled", 4), ("hunyuan15", "whole", 2), ("hunyuan15", "tiled", 2),
    ("ltx", "whole", 2), ("ltx", "whole", 4), ("cosmos", "whole", 2), ("cosmos", "whole", 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode", "ranks"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.distributed) for c in REST)]
)
def test_as_one_device(models: Any, name: str, mode: str, ranks: int) -> None:
    """Tiles bit for bit; strips to 1e-5 of what they hold, since sums over other shapes are ordered otherwise."""
    path = models(name)
    alone = by_one_thread(both_ways, None, path, mode)
    for shared in run_ranks(f"ulysses={ranks},vae={ranks}", both_ways, path, mode):
        assert mode == "streaming" or shared["sent"] > 0
        for what in alone.keys() - {"sent"}:
            one = alone[what].numpy()
            assert one.std() > 0.01 and shared[what].shape == one.shape
            difference = np.abs(shared[what].astype(float) - one).max()
            allowed = {"tiled": 0, "streaming": 1}.get(mode, 1e-5 * max(1.0, np.abs(one).max()))
            assert difference <= allowed, (what, difference)


def by_one_thread(work: Any, *arguments: Any) -> Any:
    """As the processes of a comparison compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(*arguments)
    finally:
        torch.set_num_threads(threads)


def videos(groups: Groups | None, path: Path, image: Any, mode: str) -> dict[str, Any]:
    """Frames and latents from an image, through a generator."""
    generator = open_among(groups, path, vae=mode)
    height, width = image.shape[:2]
    result = generator.generate_video(
        "a cat", image=image, seed=3, height=height, width=width, num_frames=5, num_inference_steps=1
    )
    return {"frames": torch.from_numpy(result.frames), "latents": result.latents}


def test_through_a_generator(tmp_path: Path) -> None:
    """The image is encoded together, the video decoded together; a layout of more devices than decode."""
    path = make_tiny_wan(tmp_path, kind="ti2v", layers=1)
    image = np.random.default_rng(1).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    alone = by_one_thread(videos, None, path, image, "whole")
    for shared in run_ranks("ulysses=2,vae=2", videos, path, image, "whole"):
        scale = alone["latents"].std().item()
        assert np.abs(shared["latents"] - alone["latents"].numpy()).max() <= 1e-4 * scale
        assert np.abs(shared["frames"].astype(int) - alone["frames"].numpy()).max() <= 1
        assert alone["frames"].numpy().std() > 5


def too_low(groups: Groups, path: Path) -> Any:
    """One row of latents and two devices: each decodes it."""
    vae = load(path)
    z = torch.randn(1, 16, 1, 1, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        alone = vae.decode(z, return_dict=False)[0]
        share_vae(vae, groups.vae)
        SENT.clear()
        return bool(torch.equal(vae.decode(z, return_dict=False)[0], alone)), dict(SENT)


def test_fewer_rows_than_devices(models: Any) -> None:
    assert run_ranks("ulysses=2,vae=2", too_low, models("wan")) == [(True, {}), (True, {})]


@pytest.mark.parametrize(
    ("class_name", "config", "says"),
    [
        ("AutoencoderKLMochi", {}, "parallel vae and AutoencoderKLMochi cannot be used together"),
        ("AutoencoderKLLTXVideo", {"decoder_inject_noise": [False, True]}, "it draws noise as it decodes"),
    ],
)
def test_what_cannot_be_shared_is_named(class_name: str, config: dict[str, Any], says: str) -> None:
    with pytest.raises(CompositionError, match=says):
        check_shared(class_name, config)


def refused(groups: Groups, path: Path) -> str:
    """What opening with a VAE that was given says."""
    with pytest.raises(CompositionError) as error:
        open_among(groups, path, modules={"vae": torch.nn.Linear(1, 1)})
    return str(error.value)


def test_a_vae_of_others_is_not_changed(models: Any) -> None:
    assert "parallel vae and modules= (vae)" in run_ranks("ulysses=2,vae=2", refused, models("wan"))[0]
