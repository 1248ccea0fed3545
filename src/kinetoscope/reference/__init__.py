"""The reference models shipped inside the package, in diffusers layout."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "models"


def embedded_models() -> dict[str, Path]:
    """Name -> directory of every embedded model."""
    return {f.parent.name: f.parent for f in sorted(FOLDER.glob("*/model_index.json"))}
