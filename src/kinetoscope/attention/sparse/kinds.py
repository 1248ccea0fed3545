"""The sparse kinds by name."""

from __future__ import annotations

from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.base import SparseAttention
from kinetoscope.attention.sparse.sla import SparseLinearAttention
from kinetoscope.attention.sparse.sta import SlidingTileAttention
from kinetoscope.attention.sparse.vmoba import VideoMixtureOfBlocks
from kinetoscope.attention.sparse.vsa import VideoSparseAttention
from kinetoscope.core.errors import ConfigError

SPARSE: dict[str, type[SparseAttention]] = {
    made.kind: made
    for made in (SlidingTileAttention, VideoSparseAttention, VideoMixtureOfBlocks, SparseLinearAttention)
}


def make_sparse(spec: str) -> SparseAttention:
    """A sparse kind from its settings in words, such as "vsa:sparsity=0.8,dense_steps=2".

    Raises:
        ConfigError: the kind is unknown, or a parameter is unknown or out of range.
    """
    kind = spec.partition(":")[0]
    if kind not in SPARSE:
        raise ConfigError(f"attention {spec!r}: unknown sparse kind {kind!r}; known are {', '.join(SPARSE)}")
    return SPARSE[kind](Parameters(spec))
