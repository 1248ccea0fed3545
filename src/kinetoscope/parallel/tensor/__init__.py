"""Tensor parallel: plans as data, and the layers that hold a part of their weights."""

from kinetoscope.parallel.tensor.plan import STYLES, apply_plan, misfit

__all__ = ["STYLES", "apply_plan", "misfit"]
