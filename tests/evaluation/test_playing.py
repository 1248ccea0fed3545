"""Played worlds: players and games whose every motion is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinetoscope.core.errors import InputError
from kinetoscope.evaluation.drift import draw_drift, drift_json, drift_table
from kinetoscope.evaluation.playing import TrueGame, Walk, action_following, lasting, parts, play, shuffled_actions
from kinetoscope.worlds import get_world
from kinetoscope.worlds.maze.play import Motions, _inside, _moved, _unmoved
from kinetoscope.worlds.maze.walk import MOUSE, pressed

WORLD = get_world("maze")
BLOCKS = [1] + [4] * 100
FRAMES, GAMES = 61, 3


class Deaf(TrueGame):
    """A true game in which something else is done."""

    def __init__(self, game: Any, first: np.ndarray, blocks: list[int], seed: int) -> None:
        super().__init__(game, first, blocks)
        self._player, self._view = WORLD.player(seed), first

    def step(self, *, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        keys, turn = self._player.act(self._view, self.next_frames)
        made = super().step(keyboard=keys, mouse=turn)
        self._view = made[-1]
        return made


class Fading(TrueGame):
    """A true game whose views are grey from a frame on."""

    made = 0

    def step(self, *, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        views = super().step(keyboard=keyboard, mouse=mouse)
        self.made += len(views)
        return np.full_like(views, 128) if self.made > 33 else views


def walked(kind: Any, seed: int, frames: int = FRAMES, *more: Any) -> Walk:
    game = WORLD.game(64, 64)
    first = game.reset(seed)
    return play(WORLD, kind(game, first, BLOCKS, *more), first, seed, frames)


@pytest.fixture(scope="module")
def truth() -> list[Walk]:
    return [walked(TrueGame, seed) for seed in range(GAMES)]


def test_a_true_game_is_as_it_is_played(truth: list[Walk]) -> None:
    """Nearly every motion, walls in the way included; and by other actions than those done, few."""
    report = action_following(WORLD, truth)
    assert list(report) == ["turn", "way", "all correct"]
    assert {s.total for s in report.values()} == {GAMES * ((FRAMES - 2) // 4)}
    assert report["turn"].value == 1 and report["all correct"].value > 0.95
    chance = shuffled_actions(WORLD, truth)
    assert chance is not None
    assert chance["all correct"].value < 0.35 and chance["turn"].value < 0.7
    turns = np.concatenate([w.told for w in truth])[:, 0]
    ways = np.abs(np.concatenate([w.told for w in truth])[:, 1:]).max(1)
    assert 0.2 < (turns != 0).mean() < 0.9 and (ways > 0.3).mean() > 0.5, "the player does all sorts of things"


def test_a_game_that_does_not_listen_is_chance() -> None:
    walks = [walked(Deaf, seed, FRAMES, 100 + seed) for seed in range(GAMES)]
    report, chance = action_following(WORLD, walks), shuffled_actions(WORLD, walks)
    assert chance is not None
    assert report["all correct"].value < 0.4 and abs(report["all correct"].value - chance["all correct"].value) < 0.25


def test_a_game_that_fades(truth: list[Walk], tmp_path: Path) -> None:
    """Views and motions part by part: right until frame 32, wrong after it."""
    grey = walked(Fading, 1)
    drift = lasting(WORLD, [grey], [truth[1]], parts(WORLD, FRAMES, 10))
    assert drift.spans == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 61)]
    assert [s.correct for s in drift.model["view"]] == [10, 10, 10, 3, 0, 0]
    assert drift.model["turn"][0].value == 1 and min(s.value for s in drift.truth["view"]) == 1
    assert sum(s.total for s in drift.model["turn"]) == len(grey.told)
    facts = json.loads(json.dumps(drift_json(drift)))
    assert facts["model"]["view"] == pytest.approx([1, 1, 1, 0.3, 0, 0])
    assert "| view | 1.000 | 0.000 | 0.000 | 1.000 |" in drift_table(drift)
    draw_drift(drift, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    for frames, size in ((61, 40), (61, 7)):
        with pytest.raises(InputError, match=f"no two parts of {size}"):
            parts(WORLD, frames, size)


def test_what_actions_tell() -> None:
    """Every four frames from the second one on; and nothing where there are not as many."""
    keys, turn = pressed("forward right"), np.array([0, -MOUSE], np.float32)
    told = WORLD.told_motions(np.tile(keys, (10, 1)), np.tile(turn, (10, 1)))
    assert told.shape == (2, 3)
    # the agent turns and then moves, so its ways are half a frame's turn ahead of the middle heading
    assert told[0, 0] == pytest.approx(-16) and np.hypot(*told[0, 1:]) == pytest.approx(0.4 * 2**0.5, rel=0.01)
    with pytest.raises(InputError, match="play more frames"):
        action_following(WORLD, [walked(TrueGame, 0, 3)])


def test_walls_excuse_only_what_they_leave_of_a_way() -> None:
    """With a wall ahead: standing and sliding are right, going another way is not; without it standing is wrong."""
    wall = np.stack([np.full(9, 0.6), np.linspace(-0.6, 0.6, 9)], axis=1)
    nowhere = np.zeros((0, 2))
    ahead = np.array([[0.0, 0.4, 0.0]])

    def right(found: list[float], walls: np.ndarray) -> tuple[bool, bool]:
        done = WORLD.followed(Motions(np.array([found]), [walls]), ahead)
        return bool(done["turn"][0]), bool(done["way"][0])

    assert right([0, 0.4, 0], nowhere) == (True, True) == right([7, 0.25, 0.1], nowhere)
    assert right([0, 0, 0], nowhere) == (True, False) and right([0, 0, 0], wall) == (True, True)
    assert right([0, 0.2, 0.2], wall) == (True, True) and right([9, 0.4, 0], wall) == (False, True)
    for found in ([0, -0.3, 0], [0, 0.1, 0.5], [0, 0.9, 0]):
        assert right(found, wall) == (True, False)
    assert right([0, 0, 0], wall - np.array([1.2, 0])) == (True, False), "a wall behind is in nobody's way"


def test_readings_lie_on_a_grid_and_actions_do_not() -> None:
    """A mouse in float32 turns by 16.0000002 degrees: to read 8 is 8 off, which is right, and 7.5 is wrong."""
    told = WORLD.told_motions(np.zeros((6, 4), np.float32), np.tile(np.array([0, MOUSE], np.float32), (6, 1)))
    for degrees, right in ((8.0, True), (24.0, True), (7.5, False), (24.5, False)):
        seen = Motions(np.array([[degrees, 0.0, 0.0]]), [np.zeros((0, 2))])
        assert bool(WORLD.followed(seen, told)["turn"][0]) is right


def test_places_are_carried_along() -> None:
    """Moving and moving back; a turn to the right takes what is ahead to the left; and what is inside of a view."""
    rng = np.random.default_rng(0)
    points, motion = rng.normal(size=(20, 2)), np.array([16.0, 0.3, -0.2])
    assert np.allclose(_unmoved(_moved(points, motion), motion), points)
    assert np.allclose(_moved(np.array([[1.0, 0.0]]), np.array([90.0, 0, 0])), [[0.0, -1.0]])
    assert np.allclose(_moved(np.array([[1.0, 0.0]]), np.array([0.0, 0.4, 0.1])), [[0.6, -0.1]])
    view = np.array([[0.0, 0.0], [1.0, -0.8], [1.0, 0.8]])
    inside = [_inside(view, np.array(p)) for p in ([0.5, 0.1], [0.9, -0.6], [0.5, 0.6], [-0.1, 0.0], [1.1, 0.0])]
    assert inside == [True, True, False, False, False]
