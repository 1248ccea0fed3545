"""Kinds of devices on paper: what each computes, holds and sends, as their makers publish it."""

from __future__ import annotations

from dataclasses import dataclass

from kinetoscope.core.errors import ConfigError, shown
from kinetoscope.core.spec import one_of

MAX_FIGURE = 1e9
"""Beyond every figure of a device, and a bound for those that are given."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of device in the machines that it is sold in.

    Attributes:
        name: as `kinetoscope plan --device` takes it.
        tflops: dense peak in bfloat16 (on the CPU in float32), 1e12 operations a second, a multiply-add counted as two.
        memory_gb: 1e9 bytes.
        inside_gbps: 1e9 bytes a second that a device sends to others of its node, one way.
        between_gbps: the same to other nodes.
        node: devices of a node.
        source: of the numbers.
    """

    name: str
    tflops: float
    memory_gb: float
    inside_gbps: float
    between_gbps: float
    node: int
    source: str

    def __post_init__(self) -> None:
        for field in ("tflops", "memory_gb", "inside_gbps", "between_gbps", "node"):
            value = getattr(self, field)
            if not 0 < value <= MAX_FIGURE:
                raise ConfigError(f"device {self.name}: {field}={shown(value)} is outside (0, {MAX_FIGURE:g}]")


ACCELERATORS: dict[str, Accelerator] = {
    a.name: a
    for a in (
        Accelerator("a100", 312, 80, 300, 25, 8, "A100 80GB SXM data sheet: NVLink 600 GB/s both ways; 200 Gb/s a GPU"),
        Accelerator("h100", 989, 80, 450, 50, 8, "H100 SXM data sheet: NVLink 900 GB/s both ways; 400 Gb/s a GPU"),
        Accelerator("h200", 989, 141, 450, 50, 8, "H200 SXM data sheet: NVLink 900 GB/s both ways; 400 Gb/s a GPU"),
        Accelerator("b200", 2250, 180, 900, 50, 8, "DGX B200 data sheet: NVLink 1.8 TB/s both ways; 400 Gb/s a GPU"),
        Accelerator("cpu", 0.1, 16, 5, 1, 2, "measured: a core of a server with AVX2, float32, processes over gloo"),
    )
}


def find_accelerator(name: str) -> Accelerator:
    """The kind of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    return ACCELERATORS[one_of(name.lower(), ACCELERATORS, "device")]
