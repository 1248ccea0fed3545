"""A first-person maze: ray-cast views of seeded mazes, how keys and mouse move in them, and their judge."""

from kinetoscope.worlds.maze.judge import is_maze, maze_share, read_views
from kinetoscope.worlds.maze.motion import GAP, find_motion
from kinetoscope.worlds.maze.world import MazeGame, MazeSpec, MazeWorld

__all__ = ["GAP", "MazeGame", "MazeSpec", "MazeWorld", "find_motion", "is_maze", "maze_share", "read_views"]
