"""From a name to a model directory, and from its files to modules."""

import kinetoscope.loading.t5  # noqa: F401 - registers text encoders
from kinetoscope.loading.components import load_component, register_component, register_transformer
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.resolve import resolve_model
from kinetoscope.loading.weights import load_weights

__all__ = [
    "ModelDir",
    "load_component",
    "load_weights",
    "register_component",
    "register_transformer",
    "resolve_model",
]
