"""Softmax attention: one function for all layers, several backends and sparse kinds behind it."""

from kinetoscope.attention.dispatch import attention
from kinetoscope.attention.roles import Role
from kinetoscope.attention.sparse.kinds import SPARSE, make_sparse
from kinetoscope.attention.table import (
    BACKENDS,
    AttentionChoice,
    AttentionTable,
    Backend,
    Capabilities,
    approximates,
    capabilities,
    named_backends,
    register_backend,
    resolve_attention,
)

__all__ = [
    "BACKENDS",
    "SPARSE",
    "AttentionChoice",
    "AttentionTable",
    "Backend",
    "Capabilities",
    "Role",
    "approximates",
    "attention",
    "capabilities",
    "make_sparse",
    "named_backends",
    "register_backend",
    "resolve_attention",
]
