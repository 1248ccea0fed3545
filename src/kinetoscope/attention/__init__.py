"""Softmax attention: one function for all layers, several backends behind it."""

from kinetoscope.attention.dispatch import attention
from kinetoscope.attention.table import (
    BACKENDS,
    AttentionChoice,
    AttentionTable,
    Capabilities,
    capabilities,
    register_backend,
    resolve_attention,
)

__all__ = [
    "BACKENDS",
    "AttentionChoice",
    "AttentionTable",
    "Capabilities",
    "attention",
    "capabilities",
    "register_backend",
    "resolve_attention",
]
