"""Kinetoscope: one engine for video diffusion models.

from kinetoscope import VideoGenerator
VideoGenerator.from_pretrained("tiny-t2v").generate_video("a red circle moving left", output_path="out.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.core.version import __version__

if TYPE_CHECKING:
    from kinetoscope.runtime.compare import compare
    from kinetoscope.runtime.generator import GenerationResult, VideoGenerator


__all__ = ["GenerationResult", "KinetoscopeError", "VideoGenerator", "__version__", "compare"]


def __getattr__(name: str) -> Any:
    """Import the generator (and torch with it) only when it is asked for, so that `kinetoscope --help` is quick."""
    if name in ("GenerationResult", "VideoGenerator"):
        from kinetoscope.runtime import generator

        return getattr(generator, name)
    if name == "compare":
        from kinetoscope.runtime.compare import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
