"""Compiled blocks: `torch.compile` of each block of a transformer, where it stands.

All blocks of a kind share one graph, since their weights are inputs of it; so a model of 40 blocks compiles as fast as
one of 2. What stays around the blocks (embeddings, the last norm, guidance, scheduler) is small and runs as it is, and
so do hooks and step caches, which stand between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import CompositionError, ConfigError

MODES: dict[str, str] = {
    "default": "fused kernels",
    "reduce-overhead": "and CUDA graphs, which replay the kernels of a block in one call (CUDA)",
    "max-autotune": "and matrix kernels chosen by trying them, which takes minutes",
}
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that replay recorded addresses on CUDA: weights must stay where they are."""


def compile_mode(compile: bool | str) -> str | None:
    """The mode for the option: None, or one of `MODES`.

    Raises:
        ConfigError: an unknown mode.
    """
    if isinstance(compile, bool):
        return "default" if compile else None
    if compile not in MODES:
        raise ConfigError(f"unknown compile mode {compile!r}; known: {', '.join(MODES)}")
    return compile


def check_compile(mode: str, device: torch.device) -> None:
    """Refuse, before anything is loaded, what this machine cannot compile.

    Raises:
        CompositionError: CUDA graphs without CUDA.
        ConfigError: there is no compiler.
    """
    if mode == "reduce-overhead" and device.type != "cuda":
        raise CompositionError(
            f"compile='reduce-overhead' means CUDA graphs, which device {device.type!r} does not have; "
            "use compile='default'"
        )
    if reason := missing_compiler(device):
        raise ConfigError(f"compile={mode!r}: {reason}")


def missing_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for the device here, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch needs Triton to compile for CUDA; install triton, or leave compile off"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch needs a C++ compiler and finds none; install g++ or clang, or leave compile off"
    return None


def compile_blocks(transformer: nn.Module, mode: str, backend: str = "inductor") -> int:
    """Compile the blocks of a transformer; returns how many there are. The first forward of each kind takes seconds.

    Args:
        transformer: its `blocks` are compiled.
        mode: of `MODES`.
        backend: of `torch.compile`; "eager" traces without generating code, for tests.
    """
    blocks: list[nn.Module] = list(getattr(transformer, "blocks", ()))
    options: dict[str, Any] = {"backend": backend}
    if backend == "inductor" and mode != "default":
        options["mode"] = mode
    for block in blocks:
        # Not `block.compile()`: that would trace hooks of the block too, which load its weights when they are away.
        block.forward = compiled(block, block.forward, **options)
    if mode in CUDA_GRAPHS:
        transformer.register_forward_pre_hook(_new_replay)
    return len(blocks)


def compiled(block: nn.Module, forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`forward`, of a block or the block itself, compiled for any length of text; `options` are `torch.compile`'s."""
    return _lengths_may_change(torch.compile(forward, **options), bool(getattr(block, "joins_text", False)))


def _lengths_may_change(forward: Callable[..., Any], joined: bool) -> Callable[..., Any]:
    """`forward` which is told that axis 1 of its arguments may have another size next time.

    That is the axis of text tokens, and prompts differ in length: torch would compile once for the first and again
    for the second. Where the axis is something else, the block's own arithmetic fixes its size again. The first
    argument is the video, whose size is worth a graph of its own. Where text is `joined` to it, it changes too, and so
    do the tables that go with it, whose axis 0 it is.
    """

    @wraps(forward)
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*([x] if joined else []), *args, *kwargs.values()):
            _mark(value, range(0 if joined else 1, 2))
        return forward(x, *args, **kwargs)

    return call


def _mark(value: Any, axes: Iterable[int]) -> None:
    if isinstance(value, Tensor):
        for axis in axes:
            if value.ndim > axis and value.shape[axis] > 1:
                torch._dynamo.maybe_mark_dynamic(value, axis)
    elif isinstance(value, Mapping):
        for part in value.values():
            _mark(part, axes)
    elif isinstance(value, tuple | list):
        for part in value:
            _mark(part, axes)


def _new_replay(module: nn.Module, args: Any) -> None:
    """Tell CUDA graphs that outputs of the last forward are no longer needed."""
    torch.compiler.cudagraph_mark_step_begin()
