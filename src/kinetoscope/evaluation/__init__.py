"""Measures of generated videos."""

from kinetoscope.evaluation.flicker import flicker
from kinetoscope.evaluation.prompt_following import (
    Report,
    Score,
    as_json,
    as_table,
    baselines,
    heldout_specs,
    prompt_following,
)

__all__ = ["Report", "Score", "as_json", "as_table", "baselines", "flicker", "heldout_specs", "prompt_following"]
