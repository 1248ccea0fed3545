"""Cameras: rays in closed form, moves and files as published, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kinetoscope.core.errors import InputError
from kinetoscope.media.camera import INTRINSICS, MOVES, load_camera, pluecker_rays
from models import tiny_wan_fun as tiny

EYE = [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def at(x: float = 0, y: float = 0, z: float = 0) -> list[float]:
    """World-to-camera matrix of a camera at a place, that looks along z."""
    return [1, 0, 0, -x, 0, 1, 0, -y, 0, 0, 1, -z]


def about_y(angle: float) -> list[float]:
    """World-to-camera matrix of a camera turned about y, the view going from z towards x."""
    c, s = math.cos(angle), math.sin(angle)
    return [c, 0, -s, 0, 0, 1, 0, 0, s, 0, c, 0]


def test_rays_of_a_camera_at_the_origin() -> None:
    """Of length 1 through the middles of pixels: d ~ ((x + 1/2 - cx) / fx, (y + 1/2 - cy) / fy, 1); no moment."""
    path = load_camera({"poses": [EYE], "intrinsics": [0.5, 1.0, 0.5, 0.5], "size": [4, 8]}, 1)
    rays = pluecker_rays(path, 4, 8)
    assert rays.shape == (1, 6, 4, 8) and rays.dtype == np.float32
    assert not rays[:, :3].any()
    for x, y in ((0, 0), (7, 3), (2, 1)):
        d = np.array([(x + 0.5 - 4) / 4, (y + 0.5 - 2) / 4, 1])
        np.testing.assert_allclose(rays[0, 3:, y, x], d / np.linalg.norm(d), atol=1e-7)


def test_a_moved_camera_has_the_same_directions_and_the_moment_of_its_place() -> None:
    place = np.array([0.3, -0.2, 0.7])
    rays = pluecker_rays(load_camera({"poses": [EYE, at(*place)]}, 2), 8, 8)
    np.testing.assert_array_equal(rays[1, 3:], rays[0, 3:])
    np.testing.assert_allclose(rays[1, :3], np.cross(place, rays[0, 3:], axisb=0, axisc=0), atol=1e-6)


def test_a_turned_camera_looks_elsewhere_from_the_same_place() -> None:
    """Turned by a, the middle of the picture looks at (sin a, 0, cos a)."""
    path = load_camera({"poses": [EYE, about_y(0.4)], "size": [9, 9]}, 2)
    rays = pluecker_rays(path, 9, 9)
    assert np.abs(rays[1, :3]).max() == 0
    np.testing.assert_allclose(rays[1, 3:, 4, 4], [math.sin(0.4), 0, math.cos(0.4)], atol=1e-6)


def test_places_count_from_the_first() -> None:
    """Where the world's origin lies does not matter: turn and move the whole path, and the rays are the same."""
    poses = np.array([EYE, at(0.2, 0.1, -0.3), about_y(0.3)], float).reshape(3, 3, 4)
    square = np.tile(np.eye(4), (3, 1, 1))
    square[:, :3] = poses
    world = np.eye(4)
    world[:3] = np.array(about_y(0.9)).reshape(3, 4)
    world[:3, 3] = [5, -2, 1]
    moved = (square @ world)[:, :3].tolist()
    ours, theirs = (pluecker_rays(load_camera({"poses": p}, 3), 8, 16) for p in (poses.tolist(), moved))
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 32), (32, 8), (9, 16)])
def test_pictures_cover_the_video(height: int, width: int) -> None:
    """A path made for 16:9 keeps the shape of what it sees: angles per pixel are alike in both directions."""
    path = load_camera({"poses": [EYE], "intrinsics": [0.9, 1.6, 0.5, 0.5], "size": [9, 16]}, 1)
    d = pluecker_rays(path, height, width)[0, 3:]
    slope_x, slope_y = (d[i] / d[2] for i in (0, 1))
    np.testing.assert_allclose(np.diff(slope_x, axis=1), np.diff(slope_y, axis=0)[0, 0], rtol=1e-4)
    focal = 1 / np.diff(slope_x, axis=1)[0, 0]
    assert focal == pytest.approx(max(0.9 * width, 1.6 * height), rel=1e-4)


def test_rays_as_published() -> None:
    """VideoX-Fun's reader of pose files, recorded."""
    told = {"poses": tiny.POSES, "intrinsics": tiny.INTRINSICS}
    rays = pluecker_rays(load_camera(told, tiny.SIZE[0]), *tiny.SIZE[1:])
    recorded = load_file(tiny.FIXTURES / "fixtures.safetensors")["rays"]
    np.testing.assert_allclose(rays[::4, :, ::2, ::2].transpose(1, 0, 2, 3), recorded, atol=1e-6)


PUBLISHED = {  # the last line of the pose files published with Wan2.1-Fun (81 frames): the entries not of the identity
    "pan-down": {(1, 3): -1.4814814814814814},
    "pan-left": {(0, 3): 1.4814814814814814},
    "zoom-in": {(2, 3): -2.962962962962963},
    "zoom-out": {(2, 3): 2.962962962962963},
    "turn-counterclockwise": {
        (0, 0): 0.5111541954058733, (0, 1): -0.8594890275733451, (1, 0): 0.8594890275733451, (1, 1): 0.5111541954058733,
    },
    "turn-clockwise": {
        (0, 0): 0.5111541954058733, (0, 1): 0.8594890275733451, (1, 0): -0.8594890275733451, (1, 1): 0.5111541954058733,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_moves_as_published(name: str) -> None:
    path = load_camera(name, 81)
    expected = np.eye(4)
    for place, value in PUBLISHED[name].items():
        expected[place] = value
    np.testing.assert_allclose(path.poses[-1], expected, atol=1e-12)
    np.testing.assert_array_equal(path.poses[0], np.eye(4))
    np.testing.assert_array_equal(path.intrinsics, np.tile(INTRINSICS, (81, 1)))


def test_moves_together_and_speed() -> None:
    both = load_camera({"moves": ["pan-left", "zoom-in"], "speed": 0.5}, 10).poses
    np.testing.assert_allclose(both[5, :3, 3], [0.5 * 0.5 * 1.5, 0, -2 * 0.5 * 0.5 * 1.5])
    still = load_camera("still", 4).poses
    np.testing.assert_array_equal(still, np.tile(np.eye(4), (4, 1, 1)))


def test_files(tmp_path: Path) -> None:
    lines, told = tmp_path / "a.txt", tmp_path / "a.json"
    lines.write_text("\n".join(tiny.pose_lines(tiny.POSES)) + "\n\n")
    told.write_text(json.dumps({"poses": tiny.POSES, "intrinsics": tiny.INTRINSICS}))
    one, two = load_camera(str(lines), 9), load_camera(told, 9)
    np.testing.assert_array_equal(one.poses, two.poses)
    np.testing.assert_array_equal(one.intrinsics, two.intrinsics)
    again = load_camera(json.loads(json.dumps(one.to_json())), 9)
    np.testing.assert_array_equal(again.poses, one.poses)
    assert again.size == one.size
    assert len(load_camera(str(lines), 5)) == 5
    told.write_text('"zoom-in"')
    np.testing.assert_array_equal(load_camera(told, 9).poses, load_camera("zoom-in", 9).poses)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (3, "camera=3 should be a move"),
        ("pan-sideways", "neither a move"),
        ("missing.json", r"missing\.json cannot be read"),
        ({}, "one of move, moves and poses"),
        ({"move": "pan-left", "poses": [EYE]}, "one of move, moves and poses"),
        ({"move": "fly"}, "no move 'fly'"),
        ({"move": ["pan-left"]}, "no move"),
        ({"moves": []}, "moves is empty"),
        ({"moves": "pan-left"}, "should be a list"),
        ({"move": "pan-left", "speed": -1}, "speed=-1"),
        ({"move": "pan-left", "speed": float("nan")}, "speed=nan"),
        ({"move": "pan-left", "speed": True}, "speed=True"),
        ({"move": "pan-left", "size": [2, 2]}, "size are of poses"),
        ({"poses": [EYE], "speed": 1}, "speed is of moves"),
        ({"poses": [EYE], "fov": 1}, "unknown fov"),
        ({"poses": []}, "poses should be one or more rows of 12"),
        ({"poses": [EYE[:11]]}, "poses should be"),
        ({"poses": [EYE, EYE[:11]]}, "poses should be"),
        ({"poses": "abc"}, "poses should be"),
        ({"poses": [[float("inf"), *EYE[1:]]]}, "finite"),
        ({"poses": [[2.0, *EYE[1:]]]}, "pose 0 are no rotation"),
        ({"poses": [[-1.0, *EYE[1:]]]}, "pose 0 are no rotation"),
        ({"poses": [EYE], "intrinsics": [1, 1, 0.5]}, "intrinsics should be 1 rows of 4"),
        ({"poses": [EYE], "intrinsics": [0, 1, 0.5, 0.5]}, "fx, fy and size should be positive"),
        ({"poses": [EYE], "size": [0, 4]}, "fx, fy and size should be positive"),
        ({"poses": [EYE], "size": 4}, "size should be 1 rows of 2"),
    ],
)
def test_refused(told: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_camera(told, 1)


def test_files_refused(tmp_path: Path) -> None:
    for name, text, words in (
        ("a.txt", "heading\n1 2 3", "line 2: 3 values, not 19"),
        ("b.txt", "heading\n" + " ".join(["x"] * 19), "finite numbers"),
        ("c.txt", "heading", "one or more rows"),
        ("d.json", "{", "cannot be read"),
        ("e.json", '"f.json"', "no move"),
        ("g.json", "[1]", "should be a move"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            load_camera(tmp_path / name, 1)
    with pytest.raises(InputError, match="has 1 poses and num_frames=2"):
        load_camera({"poses": [EYE]}, 2)


def test_every_move_has_rays() -> None:
    for name in MOVES:
        assert np.isfinite(pluecker_rays(load_camera(name, 3), 4, 4)).all()
