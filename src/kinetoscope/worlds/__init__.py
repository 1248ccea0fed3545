"""Worlds: procedural sources of captioned clips, each with a judge that reads the attributes back from pixels."""

from __future__ import annotations

from functools import cache
from typing import Any

from kinetoscope.core.errors import InputError
from kinetoscope.core.spec import unknown
from kinetoscope.worlds.base import Actions, Clip, Spec, World
from kinetoscope.worlds.maze import MazeWorld
from kinetoscope.worlds.shapes import ShapesWorld

__all__ = ["WORLDS", "Actions", "Clip", "Spec", "World", "get_world"]

WORLDS = {"maze": MazeWorld, "shapes": ShapesWorld}


@cache
def get_world(name: str) -> World[Any]:
    """The world called `name`. Raises InputError, naming the known worlds, when there is none."""
    if name not in WORLDS:
        raise InputError(unknown("world", name, sorted(WORLDS)))
    return WORLDS[name]()
