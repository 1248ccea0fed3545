"""Hooks that come with the engine."""

from kinetoscope.engine.hooks.base import Hook, Interceptor
from kinetoscope.engine.hooks.perf import PerfLoggingHook
from kinetoscope.engine.hooks.progress import ProgressHook
from kinetoscope.engine.hooks.trace import StepTraceHook

__all__ = ["Hook", "Interceptor", "PerfLoggingHook", "ProgressHook", "StepTraceHook"]
