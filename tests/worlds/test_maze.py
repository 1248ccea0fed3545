"""The maze is drawn and walked as its geometry says, and its judge reads views and motion back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kinetoscope.core.errors import InputError
from kinetoscope.worlds import get_world
from kinetoscope.worlds.maze import MazeGame, find_motion, is_maze, maze_share, read_views
from kinetoscope.worlds.maze.layout import COLOURS, PERIOD, ROOMS, SIDE, WIDTH, build_maze
from kinetoscope.worlds.maze.render import HALF_WALL, cast_rays, focal, render_views
from kinetoscope.worlds.maze.walk import RADIUS, STEP, restless, seen_motion, start, walk

WORLD = get_world("maze")


def stroll(number: int, frames: int = 33) -> tuple[Any, Any, Any]:
    """A maze, an agent's poses and its actions."""
    maze, rng = build_maze(number), np.random.default_rng(number)
    pose = start(maze, rng)
    actions = restless(maze, pose, frames, rng)
    return maze, walk(maze, pose, actions), actions


@pytest.mark.parametrize("number", [0, 1, 77])
def test_every_place_of_a_maze_is_reached(number: int) -> None:
    maze = build_maze(number)
    assert maze.walls[[0, -1]].all() and maze.walls[:, [0, -1]].all()
    places = {(int(r), int(c)) for r, c in maze.free}
    found, todo = set[tuple[int, int]](), [min(places)]
    while todo:
        r, c = todo.pop()
        if (r, c) in places - found:
            found.add((r, c))
            todo += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    assert found == places and len(places) > SIDE * SIDE / 3
    assert not np.array_equal(maze.walls, build_maze(number + 1).walls)


def test_each_side_of_a_room_has_one_colour() -> None:
    maze, colours = build_maze(5), set[int]()
    for room in np.ndindex(ROOMS, ROOMS):
        top, left = (PERIOD * r + 1 for r in room)
        left_wall = maze.faces[top : top + WIDTH, left - 1, 1]
        right_wall = maze.faces[top : top + WIDTH, left + WIDTH, 0]
        upper_wall = maze.faces[top - 1, left : left + WIDTH, 3]
        lower_wall = maze.faces[top + WIDTH, left : left + WIDTH, 2]
        for wall in (left_wall, right_wall, upper_wall, lower_wall):
            assert len(set(wall.tolist())) == 1
            colours.add(int(wall[0]))
    assert len(colours) == COLOURS


def test_rays_are_as_long_as_a_slow_march_says() -> None:
    maze, rng = build_maze(3), np.random.default_rng(0)
    places = maze.free[rng.integers(len(maze.free), size=40)]
    x, y = places[:, 1] + rng.uniform(0.1, 0.9, 40), places[:, 0] + rng.uniform(0.1, 0.9, 40)
    angle = rng.uniform(0, 2 * np.pi, 40)
    angle[:4] = np.arange(4) * np.pi / 2  # along the axes
    dx, dy = np.cos(angle), np.sin(angle)
    length, kind = cast_rays(maze, x, y, dx, dy)
    step = 1e-3
    for n in range(40):
        way = 0.0
        while not maze.walls[int(y[n] + way * dy[n]), int(x[n] + way * dx[n])]:
            way += step
        assert way - step - 1e-9 <= length[n] <= way + 1e-9
        row, column = int(y[n] + way * dy[n]), int(x[n] + way * dx[n])
        sides = [f for f, crossed in enumerate((dx[n] > 0, dx[n] <= 0, dy[n] > 0, dy[n] <= 0)) if crossed]
        assert (kind[n] % 16) // 2 in maze.faces[row, column, sides]


def test_a_wall_in_front_has_the_height_that_its_distance_says() -> None:
    """Straight before a wall all depths are equal, however far to the side a ray goes."""
    maze = build_maze(0)
    x, y = 1.0 + RADIUS, 2.0  # in the first room, the rim behind x = 1
    assert not maze.walls[1:3, 1].any()
    view = render_views(maze, np.array([[x, y, np.pi]]), 64, 64)
    half = HALF_WALL * focal(64) / RADIUS
    seen = read_views(view).half[0]
    assert np.abs(seen[20:44] - half).max() <= 0.5


def test_turning_all_around_shows_the_same_view() -> None:
    maze, poses, _ = stroll(5, 1)
    around = poses.repeat(91, 0)
    around[:, 2] += np.deg2rad(4 * np.arange(91))
    views = render_views(maze, around, 64, 64).astype(int)
    assert np.abs(views[-1] - views[0]).max() <= 1
    assert np.abs(views[45] - views[0]).mean() > 5


def test_nobody_walks_through_walls_and_ways_are_as_the_keys_say() -> None:
    free = 0
    for number in range(30):
        maze, poses, actions = stroll(number, 65)
        for dx in (-RADIUS, RADIUS):
            for dy in (-RADIUS, RADIUS):
                assert not maze.walls[(poses[:, 1] + dy).astype(int), (poses[:, 0] + dx).astype(int)].any()
        motion = seen_motion(poses)
        assert np.allclose(motion[:, 0], 40 * actions.mouse[:-1, 1])
        keys = actions.keyboard[:-1]
        wanted = STEP * np.stack([keys[:, 0] - keys[:, 1], keys[:, 3] - keys[:, 2]], 1)
        turn = np.deg2rad(motion[:, 0] / 2)  # ways go along the new heading
        along = np.stack(
            [wanted[:, 0] * np.cos(turn) - wanted[:, 1] * np.sin(turn),
             wanted[:, 0] * np.sin(turn) + wanted[:, 1] * np.cos(turn)], 1,
        )  # fmt: skip
        assert (np.hypot(*motion[:, 1:].T) <= np.hypot(*wanted.T) + 1e-5).all()  # a wall only takes away
        free += np.isclose(motion[:, 1:], along).all(1).sum()
    assert free > 0.7 * 30 * 64


def test_a_restless_agent_does_all_that_can_be_done() -> None:
    done: list[Any] = []
    hindered: list[bool] = []
    for number in range(120):
        _, poses, actions = stroll(number)
        ahead, aside = actions.keyboard[:, 0] - actions.keyboard[:, 1], actions.keyboard[:, 3] - actions.keyboard[:, 2]
        done += zip(ahead[1:-1:4], aside[1:-1:4], np.sign(actions.mouse[1:-1:4, 1]), strict=True)
        way = np.hypot(*np.diff(poses[:, :2], axis=0).T)
        hindered += list(way < 0.6 * STEP * np.hypot(ahead, aside)[:-1])
    shares = [(np.array(done)[:, :2] == way).all(1).mean() for way in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
    assert min(shares) > 0.05, "what a player may do is not seen in training"
    assert all((np.array(done)[:, 2] == turn).mean() > 0.1 for turn in (-1, 0, 1))
    assert np.mean(hindered) < 0.15


def test_clips_repeat_by_seed_and_tell_their_actions() -> None:
    a, b, c = (WORLD.sample(s, num_frames=9) for s in (3, 3, 4))
    assert a.frames.shape == (9, 64, 64, 3) and a.frames.dtype == np.uint8 and "maze" in a.caption
    assert a.actions and b.actions and a.actions.keyboard.shape == (9, 4) and a.actions.mouse.shape == (9, 2)
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.actions.keyboard, b.actions.keyboard)
    assert not np.array_equal(a.frames, c.frames)
    heldout, train = WORLD.captions("heldout"), WORLD.captions("train")
    assert not set(heldout) & set(train) and WORLD.sample(3, "heldout").spec in heldout
    assert np.array_equal(WORLD.render(a.spec, 3, num_frames=9), a.frames)
    assert WORLD.judge(a.frames) == a.spec.attributes()
    assert WORLD.render(a.spec, 3, height=48, width=96, num_frames=2).shape == (2, 48, 96, 3)


def test_a_game_shows_what_a_walk_does() -> None:
    game = MazeGame()
    views = [game.reset(7)]
    first = np.array([game.pose])
    maze, rng = game.maze, np.random.default_rng(0)
    actions = restless(maze, game.pose, 20, rng)
    views += [game.step(k, m) for k, m in zip(actions.keyboard, actions.mouse, strict=True)][:-1]
    poses = walk(maze, tuple(first[0]), actions)
    assert np.array_equal(np.stack(views), render_views(maze, poses, 64, 64))
    assert np.array_equal(game.reset(7), views[0]) and not np.array_equal(game.reset(8), views[0])


def test_motion_is_read_from_views() -> None:
    """Within half of what an action of four frames does, on walks; and chance on other walks' actions."""
    errors, strangers, before = [], [], None
    for number in range(200, 212):
        maze, poses, _ = stroll(number)
        truth = seen_motion(poses[1::4])
        found = find_motion(read_views(render_views(maze, poses[1:], 64, 64)))
        errors.append(np.abs(found - truth))
        strangers.append(np.abs(found - (truth[::-1] if before is None else before)))
        before = truth
    half = (8, 2 * STEP, 2 * STEP)
    assert (np.concatenate(errors) < half).all(1).mean() >= 0.99
    assert (np.concatenate(strangers) < half).all(1).mean() < 0.3


def test_views_of_mazes_are_told_from_others() -> None:
    rng = np.random.default_rng(0)
    true = np.concatenate([WORLD.sample(s, num_frames=9).frames[::4] for s in range(40)])
    assert is_maze(true).mean() >= 0.99
    slightly = np.clip(true + rng.normal(0, 4, true.shape), 0, 255).astype(np.uint8)
    assert is_maze(slightly).mean() >= 0.99
    mush = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(6))) for f in true])
    shapes = np.concatenate([get_world("shapes").sample(s, num_frames=2).frames for s in range(40)])
    others = {
        "noise": rng.integers(0, 256, true.shape).astype(np.uint8),
        "grey": np.stack([np.full((64, 64, 3), g, np.uint8) for g in range(0, 256, 5)]),
        "shapes": shapes,
        "mush": mush,
        "torn": true[:, :, rng.permutation(64)],
        "sideways": true.transpose(0, 2, 1, 3),
    }
    told = {name: float(is_maze(np.ascontiguousarray(f)).mean()) for name, f in others.items()}
    # Straight before a wall all columns are alike, in any order.
    assert all(share <= (0.2 if name == "torn" else 0.02) for name, share in told.items()), told
    assert maze_share(read_views(true)).mean() > 0.95


def test_mistakes_are_explained() -> None:
    game = MazeGame()
    for call, words in (
        (lambda: WORLD.sample(-1), "negative"),
        (lambda: WORLD.captions("test"), "heldout"),
        (lambda: WORLD.sample(0, height=16), "sides"),
        (lambda: WORLD.sample(0, num_frames=0), "frames"),
        (lambda: game.step([1, 0]), "four numbers"),
        (lambda: game.step([0, 0, 0, 0], [2, 0]), "up, right"),
        (lambda: game.reset(-1), "negative"),
        (lambda: read_views(np.zeros((2, 64, 64))), "uint8"),
    ):
        with pytest.raises(InputError, match=words):
            call()
