"""Step caches: steps of a run that keep what blocks added before (docs/caches.md)."""

from kinetoscope.engine.hooks.caches.base import CACHES, StepCache
from kinetoscope.engine.hooks.caches.calibration import CacheCalibration, fit_coefficients, magnitude_ratios
from kinetoscope.engine.hooks.caches.fbcache import DBCache, FBCache
from kinetoscope.engine.hooks.caches.magcache import MagCache
from kinetoscope.engine.hooks.caches.taylorseer import TaylorSeer
from kinetoscope.engine.hooks.caches.teacache import TeaCache

__all__ = [
    "CACHES",
    "CacheCalibration",
    "DBCache",
    "FBCache",
    "MagCache",
    "StepCache",
    "TaylorSeer",
    "TeaCache",
    "fit_coefficients",
    "magnitude_ratios",
]
