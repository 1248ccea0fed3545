"""Strategies shared by families."""

from kinetoscope.engine.strategies.standard import StandardStrategy

__all__ = ["StandardStrategy"]
