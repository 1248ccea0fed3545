"""Is a world that is played what is done in it, and does it last? Scored by the judge of the world that it shows.

Somebody plays, one block after the other, from a true first view. What each action did is read from the views alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.evaluation.drift import Drift, Scores, Span
from kinetoscope.evaluation.prompt_following import ALL, Report, Score

Array = np.ndarray[Any, Any]

VIEW = "view"
"""What is judged of a view by itself: whether it is one of the world."""


class Played(Protocol):
    """A game in progress."""

    @property
    def next_frames(self) -> int:
        """Frames of the next block."""
        ...

    def step(self, *, keyboard: Array, mouse: Array) -> Array:
        """The next block uint8 [T, H, W, 3], keyboard and mouse held."""
        ...


@dataclass(frozen=True, eq=False)
class Walk:
    """A game that was played.

    Attributes:
        frames: uint8 [T, H, W, 3].
        told: [N, ...] the motions that were asked for.
        seen: those that the judge reads from the frames.
        blocks: frames of each block.
    """

    frames: Array
    told: Array
    seen: Any
    blocks: list[int]


def play(world: Any, game: Played, first: Array, seed: int, frames: int) -> Walk:
    """Play `game` until there are `frames` frames; of the last block the rest is left out.

    Args:
        world: a `worlds.base.PlayedWorld`.
        first: view [H, W, 3] that the game begins with.
        seed: of the player.
    """
    player, view = world.player(seed), first
    blocks: list[Array] = []
    held: list[tuple[Array, Array]] = []
    while len(held) < frames:
        count = game.next_frames
        done = player.act(view, count)
        blocks.append(game.step(keyboard=done[0], mouse=done[1]))
        held += [done] * count
        view = blocks[-1][-1]
    shown = np.concatenate(blocks)[:frames]
    keyboard, mouse = (np.stack(part) for part in zip(*held[:frames], strict=True))
    motions = world.told_motions(keyboard, mouse), world.read_motions(shown)
    return Walk(shown, *motions, [len(block) for block in blocks])


class TrueGame:
    """A true game in the blocks of a model, as a perfect model would make it.

    Args:
        game: a `worlds.base.Game`.
        first: view [H, W, 3] that it begins with.
        blocks: frames of each block.
    """

    def __init__(self, game: Any, first: Array, blocks: Sequence[int]) -> None:
        self._game, self._first, self._blocks = game, first, list(blocks)
        self._last: tuple[Array, Array] | None = None

    @property
    def next_frames(self) -> int:
        """Frames of the next block."""
        return self._blocks[0]

    def step(self, *, keyboard: Array, mouse: Array) -> Array:
        """The next block; what is done in a frame is seen in the next one."""
        views: list[Array] = []
        for _ in range(self.next_frames):
            views.append(self._first if self._last is None else self._game.step(*self._last))
            self._last = keyboard, mouse
        del self._blocks[0]
        return np.stack(views)


def action_following(world: Any, walks: Sequence[Walk], told: Sequence[Array] | None = None) -> Report:
    """Share of motions that are as they were told, in each of the ways that the world tells apart and in all.

    Args:
        told: in place of what was asked for.

    Raises:
        InputError: walks too short for a motion.
    """
    hits = _hits(world, walks, told)
    found = {name: np.concatenate([h[name] for h in hits]) for name in hits[0]}
    if not len(found[ALL]):
        raise InputError("nothing was done that could be scored; play more frames")
    return {name: Score(int(h.sum()), len(h)) for name, h in found.items()}


def shuffled_actions(world: Any, walks: Sequence[Walk], seed: int = 0) -> Report | None:
    """Score the same motions beside actions that were done at some other time, which is chance; None where there is one
    action alone.

    Unlike captions, an action is often equal to one of another time: how often is a part of chance.
    """
    told = np.concatenate([w.told for w in walks])
    if len(told) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(told))
    if (same := np.flatnonzero(order == np.arange(len(told)))).size == 1:  # beside itself it would be right
        order[same[0]], order[same[0] - 1] = order[same[0] - 1], order[same[0]]
    elif same.size:
        order[same] = order[np.roll(same, 1)]
    return action_following(world, walks, np.split(told[order], np.cumsum([len(w.told) for w in walks])[:-1]))


def parts(world: Any, frames: int, size: int) -> list[Span]:
    """Walks of `frames` frames in parts of `size`, of which the last one has what is left over.

    Raises:
        InputError: no two parts, or parts too short for a few motions.
    """
    if size < 2 * world.gap or frames < 2 * size:
        raise InputError(
            f"{frames} frames (--frames) are no two parts of {size} frames (--drift-frames) with a few actions each; "
            f"parts need {2 * world.gap} frames or more"
        )
    spans = [(start, start + size) for start in range(0, frames - size + 1, size)]
    return [*spans[:-1], (spans[-1][0], frames)]


def lasting(world: Any, walks: Sequence[Walk], truth: Sequence[Walk], spans: Sequence[Span]) -> Drift:
    """In each of the `parts`: share of views that are of the world, and of motions that are as told."""
    return Drift(list(spans), _over_time(world, walks, spans), _over_time(world, truth, spans))


def _hits(world: Any, walks: Sequence[Walk], told: Sequence[Array] | None = None) -> list[dict[str, Array]]:
    found = [world.followed(w.seen, t) for w, t in zip(walks, told or [w.told for w in walks], strict=True)]
    return [h | {ALL: np.logical_and.reduce(list(h.values()))} for h in found]


def _over_time(world: Any, walks: Sequence[Walk], spans: Sequence[Span]) -> Scores:
    hits = _hits(world, walks)
    scores: Scores = {VIEW: [], **{name: [] for name in hits[0]}}
    views = [world.is_view(w.frames) for w in walks]
    for start, stop in spans:
        shown = np.concatenate([v[start:stop] for v in views])
        scores[VIEW].append(Score(int(shown.sum()), len(shown)))
        for name in hits[0]:
            done = np.concatenate([h[name][start // world.gap : stop // world.gap] for h in hits])
            scores[name].append(Score(int(done.sum()), len(done)))
    return scores
