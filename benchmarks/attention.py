"""Attention backends and sparse kinds against the default dense backend: `python -m benchmarks.attention`.

Self-attention over the tokens of a video, and attention to text with a key bias. Times are of one thread or as many as
`--threads`, in pairs with the default backend; `ratio` is default / other, above 1 where the other is faster. `density`
is the share of query-key pairs that a sparse kind computes, so 1 / density is what it could gain at most. Tokens are
random: differences of outputs say nothing about videos, which `kinetoscope ab` compares.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import environment, pairs, report, seconds
from kinetoscope.attention import BACKENDS, capabilities, make_sparse
from kinetoscope.attention.default import default_attention, preferred_backend
from kinetoscope.attention.sparse.context import attention_context
from kinetoscope.diffusion.noise import generator_for, randn

SPARSE = (
    "sta:window=3,3,3,tile=3,4,4",
    "sta:window=1,3,3,tile=3,4,4",
    "vsa:sparsity=0.8",
    "vsa:sparsity=0.9",
    "vmoba:sparsity=0.8",
    "sla:sparsity=0.8",
    "sla:sparsity=0.9",
)
TEXT = 64


def measure(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], count: int, **given: Any) -> dict[str, Any]:
    """Pairs of the default backend (first) and `call` (second)."""
    common = {k: v for k, v in given.items() if k == "key_bias"}
    return pairs(
        lambda: seconds(lambda: default_attention(*inputs, **common)),
        lambda: seconds(lambda: call(*inputs, **given)),
        count,
    )


def density(spec: str, grid: tuple[int, int, int], q: Tensor, k: Tensor) -> float:
    """Share of pairs that a kind computes, from its own mask; averaged over three layers, since VMoBA alternates."""
    kind = make_sparse(spec)
    found: list[float] = []
    for layer in range(3 if kind.kind == "vmoba" else 1):
        context = attention_context(grid, kind.tile(grid, layer), math.prod(grid), kind.schedule, q.device)
        found.append(kind.mask(context, q[:, :, :1], k[:, :, :1]).float().mean().item())
    return sum(found) / len(found)


@torch.no_grad()
def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Attention backends and sparse kinds, in pairs with the default")
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--grid", default="9,16,16", help="tokens along time, height, width")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    t, h, w = (int(n) for n in args.grid.split(","))
    grid = (t, h, w)
    served = capabilities(args.device, dtype)

    def tokens(count: int, seed: int) -> Tensor:
        return randn((1, count, args.heads, args.channels), generator_for(seed)).to(args.device, dtype)

    video = (tokens(math.prod(grid), 0), tokens(math.prod(grid), 1), tokens(math.prod(grid), 2))
    text = (video[0], tokens(TEXT, 3), tokens(TEXT, 4))
    bias = torch.zeros(1, TEXT, device=args.device)
    bias[:, -1] = math.log(512 - TEXT)
    result: dict[str, Any] = {
        "environment": environment(),
        "tokens": math.prod(grid),
        "grid": list(grid),
        "heads": args.heads,
        "channels": args.channels,
        "dtype": args.dtype,
        "default": preferred_backend(args.device, dtype)[0],
        "self": {},
        "cross with a key bias": {},
        "sparse": {},
    }
    for name, backend in BACKENDS.items():
        if name in served.refused or name == result["default"]:
            continue
        result["self"][name] = measure(backend.function, video, args.pairs)
        if name not in served.without_bias:
            result["cross with a key bias"][name] = measure(backend.function, text, args.pairs, key_bias=bias)
    for spec in SPARSE:
        kind = make_sparse(spec)
        found = measure(kind.over_grid, video, args.pairs, grid=grid)
        result["sparse"][spec] = {**found, "density": density(spec, grid, *video[:2])}
    report(result, "attention", args.json_out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
