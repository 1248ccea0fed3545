"""What is done to components between loading and use, in this order: quantize, place, compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kinetoscope.core.errors import CompositionError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading.quantize import check_quantization, quantize_blocks
from kinetoscope.runtime.compile import check_compile, compile_blocks, compile_mode


class Care:
    """Quantizes, places and compiles components as they load; a pipeline calls it (`pipelines.composed`).

    Args:
        args: device and dtype.
        compile: False, True or a mode of `runtime.compile.MODES`.
        quantize: a kind of `loading.quantize.QUANTIZATIONS`, or None.
        modules: components that are given ready-made, which nothing is done to.

    Raises:
        ConfigError: an unknown value, or something that is not installed.
        CompositionError: two settings, or a setting and the device, that do not work together.
    """

    def __init__(
        self,
        args: ExecutionArgs,
        *,
        compile: bool | str = False,
        quantize: str | None = None,
        modules: Mapping[str, Any] | None = None,
    ) -> None:
        self.args = args
        self.mode = compile_mode(compile)
        self.quantize = quantize
        if self.mode is not None:
            check_compile(self.mode, args.device)
        if quantize is not None:
            check_quantization(quantize, args.device, args.dtype)
            if args.autocast:
                raise CompositionError(
                    f"quantize={quantize!r} and autocast cannot be used together: autocast keeps weights in float32"
                )
            if given := [n for n in modules or {} if is_transformer(n)]:
                raise CompositionError(
                    f"quantize={quantize!r} and modules= cannot be used together for {', '.join(given)}: what is given "
                    "is used as it is"
                )

    def home(self, name: str) -> torch.device:
        """The device, or the CPU for weights that change before they go there."""
        return torch.device("cpu") if self.quantize and is_transformer(name) else self.args.device

    def loaded(self, name: str, module: Any) -> None:
        """All that the settings ask for."""
        if not isinstance(module, nn.Module):
            return
        if is_transformer(name) and self.quantize:
            quantize_blocks(module, self.quantize, self.args.device)
            module.to(self.args.device)
        if is_transformer(name) and self.mode:
            compile_blocks(module, self.mode)

    def need(self, name: str) -> None:
        """Nothing: everything is where it is used."""

    def stage_ended(self) -> None:
        """Nothing."""


def is_transformer(name: str) -> bool:
    """Whether a component of this name denoises."""
    return name.startswith("transformer")
