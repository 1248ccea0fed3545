"""Where a camera is and looks, frame by frame, and the rays of its pixels.

A camera is told as

- the name of a move (`MOVES`): "pan-left", "zoom-in", "turn-clockwise", ...;
- an object with a move and its speed, {"move": "pan-left", "speed": 0.5}, or with several moves done at once,
  {"moves": ["pan-left", "zoom-in"], "speed": 1};
- an object with poses, {"poses": [[...], ...], "intrinsics": [fx, fy, cx, cy], "size": [height, width]}: one pose a
  frame, the 3 x 4 matrix from world to camera (x right, y down, z forward), row by row, as 12 numbers or as three rows
  of four. Intrinsics are in units of the width (fx, cx) and height (fy, cy) of pictures of `size`, one for all frames
  or one a frame; left out they are those of published demonstrations;
- a path: of a JSON file with such an object, or of a pose file as CameraCtrl and RealEstate10K have them (".txt": a
  heading, then a line a frame with a time, fx fy cx cy, two values that are not read, and the matrix).

Poses count from the first: it is the origin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.core.files import read_text

Array = np.ndarray[Any, Any]

INTRINSICS = (0.532139961, 0.946026558, 0.5, 0.5)
"""fx, fy, cx, cy of the pose files published with Wan2.1-Fun (aigc-apps/VideoX-Fun, asset/)."""
POSE_SIZE = (720, 1280)
"""Height and width that the published reader takes pose files to be about (videox_fun/data/utils.py)."""
REACH = 1.5
"""Translation of a move over a whole video, as published (comfyui/camera_utils.py, as are `ANGLE` and `MOVES`)."""
ANGLE = math.pi / 3
MOVES: dict[str, tuple[tuple[float, float, float], float]] = {
    # translation of the world before the camera (x, y, z), and turn about z; in units of REACH and ANGLE
    "still": ((0, 0, 0), 0),
    "pan-up": ((0, 1, 0), 0),
    "pan-down": ((0, -1, 0), 0),
    "pan-left": ((1, 0, 0), 0),
    "pan-right": ((-1, 0, 0), 0),
    "zoom-in": ((0, 0, -2), 0),
    "zoom-out": ((0, 0, 2), 0),
    "turn-counterclockwise": ((0, 0, 0), 1),
    "turn-clockwise": ((0, 0, 0), -1),
}
MAX_SPEED = 100.0
FIELDS = {"move", "moves", "speed", "poses", "intrinsics", "size"}


@dataclass(frozen=True, slots=True, eq=False)
class CameraPath:
    """A camera over the frames of a video.

    Attributes:
        poses: float64 [T, 4, 4], from world to camera.
        intrinsics: float64 [T, 4]: fx, fy, cx, cy in units of the width and height of pictures of `size`.
        size: (height, width).
    """

    poses: Array
    intrinsics: Array
    size: tuple[float, float] = POSE_SIZE

    def __len__(self) -> int:
        return len(self.poses)

    def to_json(self) -> dict[str, Any]:
        """What `load_camera` reads this path from, exactly."""
        flat: list[list[float]] = self.poses[:, :3].reshape(-1, 12).tolist()
        return {"poses": flat, "intrinsics": self.intrinsics.tolist(), "size": list(self.size)}


def load_camera(source: Any, frames: int) -> CameraPath:
    """The camera of a video of `frames` frames; see the head of this file for what it may be told as.

    A path that is longer is cut; a move lasts the whole video.

    Raises:
        InputError: it cannot be read, is of the wrong form, or is shorter than the video.
    """
    path = _parse(source, frames)
    if len(path) < frames:
        raise InputError(f"the camera has {len(path)} poses and num_frames={frames} are asked for")
    return CameraPath(path.poses[:frames], path.intrinsics[:frames], path.size)


def move(names: Sequence[str], speed: float, frames: int) -> CameraPath:
    """Published moves at once: at frame i of n, i / n of the way.

    Raises:
        InputError: no such move, or a speed that is no number in [0, `MAX_SPEED`].
    """
    if not names:
        raise InputError(f"camera: moves is empty; there are {', '.join(MOVES)}")
    for name in names:
        if name not in list(MOVES):
            raise InputError(f"camera: there is no move {name!r}; there are {', '.join(MOVES)}")
    if not _is_number(speed) or not 0 <= speed <= MAX_SPEED:
        raise InputError(f"camera: speed={speed!r} should be a number in [0, {MAX_SPEED:g}]")
    way = np.arange(frames) / frames * speed  # [T]
    shift = np.sum([MOVES[n][0] for n in names], axis=0, dtype=np.float64)
    turn = way * ANGLE * sum(MOVES[n][1] for n in names)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 0] = poses[:, 1, 1] = np.cos(turn)
    poses[:, 1, 0] = np.sin(turn)
    poses[:, 0, 1] = -poses[:, 1, 0]
    poses[:, :3, 3] = way[:, None] * REACH * shift
    return CameraPath(poses, np.tile(INTRINSICS, (frames, 1)))


def pluecker_rays(path: CameraPath, height: int, width: int) -> Array:
    """Pluecker coordinates of the rays through the middles of pixels, seen from the first camera.

    A ray from o in direction d (of length 1) is (o x d, d). Pictures of the path's own size are laid over the video so
    that they cover it and their middles meet.

    Returns:
        float32 [T, 6, height, width].
    """
    ours, own = width / height, path.size[1] / path.size[0]
    scale = np.array([width * max(own / ours, 1), height * max(ours / own, 1), width, height])
    fx, fy, cx, cy = (path.intrinsics * scale).T[:, :, None, None]  # [T, 1, 1] each, in pixels
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    relative = path.poses[0] @ np.linalg.inv(path.poses)  # [T, 4, 4] from each camera to the first
    rays = np.empty((len(path), 6, height, width), np.float32)
    for i, pose in enumerate(relative):
        seen = np.stack(np.broadcast_arrays((x - cx[i]) / fx[i], (y - cy[i]) / fy[i], 1.0))  # [3, H, W]
        d = np.einsum("jk,khw->jhw", pose[:3, :3], seen / np.linalg.norm(seen, axis=0))
        rays[i, :3] = np.cross(pose[:3, 3], d, axisb=0, axisc=0)
        rays[i, 3:] = d
    return rays


# -- reading -----------------------------------------------------------------------------------------------------------


def _parse(source: Any, frames: int) -> CameraPath:
    if isinstance(source, str) and source in MOVES:
        return move([source], 1.0, frames)
    if isinstance(source, (str, Path)):
        return _read(Path(source), frames)
    if not isinstance(source, Mapping):
        raise InputError(
            f"camera={source!r} should be a move ({', '.join(MOVES)}), a path of a .json or .txt file, or an object "
            "with move, moves or poses"
        )
    given = cast(Mapping[str, Any], source)
    if unknown := sorted(map(str, given.keys() - FIELDS)):
        raise InputError(f"camera: unknown {', '.join(unknown)}; there are {', '.join(sorted(FIELDS))}")
    if [name in given for name in ("move", "moves", "poses")].count(True) != 1:
        raise InputError("camera: one of move, moves and poses should be given")
    if "poses" in given:
        if "speed" in given:
            raise InputError("camera: speed is of moves; poses say where the camera is in every frame")
        return _from_poses(given)
    if unread := [name for name in ("intrinsics", "size") if name in given]:
        raise InputError(f"camera: {' and '.join(unread)} are of poses; moves have their own")
    names = [given["move"]] if "move" in given else given["moves"]
    if not isinstance(names, (list, tuple)):
        raise InputError(f"camera: moves={names!r} should be a list of names")
    return move(cast(Sequence[str], names), given.get("speed", 1.0), frames)


def _read(path: Path, frames: int) -> CameraPath:
    if path.suffix not in (".json", ".txt"):
        raise InputError(f"camera={str(path)!r} is neither a move ({', '.join(MOVES)}) nor a .json or .txt file")
    text = read_text(path, what="camera file")
    if path.suffix == ".txt":
        return _from_lines(text.splitlines()[1:])
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"camera file {path} cannot be read: {error}") from error
    if isinstance(told, str) and told not in MOVES:
        raise InputError(f"camera file {path}: there is no move {told!r}; there are {', '.join(MOVES)}")
    return _parse(told, frames)


def _from_lines(lines: list[str]) -> CameraPath:
    """Of a pose file, without its heading."""
    rows = [line.split() for line in lines if line.strip()]
    for number, row in enumerate(rows, 2):
        if len(row) != 19:
            raise InputError(f"camera file, line {number}: {len(row)} values, not 19 (time, fx fy cx cy, 0 0, matrix)")
    values = _numbers([row[1:5] + row[7:] for row in rows], (None, 16), "lines of the camera file")
    return _checked(values[:, 4:], values[:, :4], POSE_SIZE)


def _from_poses(given: Mapping[str, Any]) -> CameraPath:
    poses: Array
    try:
        poses = np.asarray(given["poses"], np.float64)
    except (TypeError, ValueError):
        poses = np.empty(0)
    if poses.ndim == 3 and poses.shape[1:] == (3, 4):
        poses = poses.reshape(-1, 12)
    poses = _numbers(poses if poses.size else None, (None, 12), "poses")
    told: Any = given.get("intrinsics", INTRINSICS)
    flat = isinstance(told, (list, tuple)) and bool(told) and all(map(_is_number, cast(Sequence[Any], told)))
    intrinsics = _numbers([told] * len(poses) if flat else told, (len(poses), 4), "intrinsics")
    height, width = _numbers([given.get("size", POSE_SIZE)], (1, 2), "size")[0]
    return _checked(poses, intrinsics, (float(height), float(width)))


def _checked(poses: Array, intrinsics: Array, size: tuple[float, float]) -> CameraPath:
    """From flat matrices [T, 12] and intrinsics [T, 4]."""
    if (intrinsics[:, :2] <= 0).any() or min(size) <= 0:
        raise InputError("camera: fx, fy and size should be positive")
    square = np.tile(np.eye(4), (len(poses), 1, 1))
    square[:, :3] = poses.reshape(-1, 3, 4)
    turns = square[:, :3, :3]
    off = np.abs(turns @ turns.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    wrong = np.flatnonzero((off > 0.01) | (np.linalg.det(turns) < 0))
    if len(wrong):
        raise InputError(f"camera: the first three columns of pose {wrong[0]} are no rotation")
    return CameraPath(square, intrinsics, size)


def _numbers(value: Any, shape: tuple[int | None, int], what: str) -> Array:
    """`value` as finite numbers [shape]; None: any count but zero."""
    array: Array
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    fits = array.ndim == 2 and array.shape[1] == shape[1] and len(array) == (shape[0] or len(array)) and len(array)
    if not fits or not np.isfinite(array).all():
        count = "one or more" if shape[0] is None else str(shape[0])
        raise InputError(f"camera: {what} should be {count} rows of {shape[1]} finite numbers")
    return array


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
