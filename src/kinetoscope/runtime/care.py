"""What is done to components between loading and use, in this order: quantize, place, compile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn

from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.spec import unknown
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading.components import Place
from kinetoscope.loading.offload import OFFLOADS, Mover, Offload
from kinetoscope.loading.quantize import check_quantization, quantize_blocks
from kinetoscope.nn.compile import check_compile, compile_blocks, compile_mode
from kinetoscope.parallel import Groups
from kinetoscope.parallel.placement import is_placed, placing
from kinetoscope.parallel.vae import check_shared, share_vae
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.decoding import VAE_MODES, DecodingStage
from kinetoscope.runtime.composition import check_pairs

CPU = torch.device("cpu")
VAE = "vae"


class Care:
    """Quantizes, places and compiles components as they load; a pipeline calls it (`pipelines.composed`).

    Args:
        args: device and dtype.
        compile: False, True or a mode of `nn.compile.MODES`.
        quantize: a kind of `loading.quantize.QUANTIZATIONS`, or None.
        offload: a kind of `loading.offload.OFFLOADS`, or None.
        vae: of `pipelines.stages.decoding.VAE_MODES`.
        modules: components that are given ready-made, which nothing is done to.
        mover: how offloaded weights move; None: between the host and the device.
        groups: this process's place in a layout, for weights that are shared out as they load.

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
        offload: str | None = None,
        vae: str = "whole",
        modules: Mapping[str, Any] | None = None,
        mover: Mover | None = None,
        groups: Groups | None = None,
    ) -> None:
        self.args = args
        self.groups = groups
        self.mode = compile_mode(compile)
        self.quantize = quantize
        if self.mode is not None:
            check_compile(self.mode, args.device)
        if quantize is not None:
            check_quantization(quantize, args.device, args.dtype)
        if offload is not None and offload not in OFFLOADS:
            raise ConfigError(unknown("offload", offload, OFFLOADS))
        if vae not in VAE_MODES:
            raise ConfigError(unknown("vae mode", vae, VAE_MODES))
        self.vae = vae
        check_pairs({
            "quantize": quantize, "autocast": args.autocast, "offload": offload, "vae": vae, "compile": compile,
            "modules": [n for n, m in (modules or {}).items() if isinstance(m, nn.Module)],
        })  # fmt: skip
        self.offload = None if offload is None else Offload(offload, args.device, mover)

    def attach(self, pipeline: ComposedPipeline) -> None:
        """Let the pipeline decode as asked.

        Raises:
            CompositionError: its VAE cannot; the message names both.
        """
        kind = pipeline.model.components().get(VAE)
        if self._shares_vae:
            if VAE in pipeline.given:
                raise CompositionError("parallel vae and modules= (vae) cannot be used together: it would be changed")
            check_shared(str(kind), pipeline.model.config(VAE))
        if self.vae == "tiled" and not hasattr(getattr(diffusers, str(kind), None), "enable_tiling"):
            raise CompositionError(f"vae='tiled' and {kind} cannot be used together: it has no tiles")
        if self.vae != "streaming":
            return
        stage = pipeline.stages.get("decoding")
        if not isinstance(stage, DecodingStage) or type(stage).decode is not DecodingStage.decode:
            raise CompositionError(
                f"vae='streaming' and {type(stage).__name__} cannot be used together: it needs all frames at once"
            )
        if kind != "AutoencoderKLWan":
            raise CompositionError(f"vae='streaming' and {kind} cannot be used together: it may look ahead in time")
        stage.streaming = True

    @property
    def _shares_vae(self) -> bool:
        return self.groups is not None and self.groups.vae.size > 1

    def home(self, name: str) -> torch.device:
        """The device, or the CPU for weights that change or wait before they go there."""
        changes = self.quantize and is_transformer(name)
        return CPU if self.offload or changes else self.args.device

    def place(self, name: str) -> Place | None:
        """What shares the component's weights out among the devices of the layout, and compiles it on the way."""
        mode = self.mode if is_transformer(name) else None
        return placing(self.groups, compiled=None if mode is None else partial(compile_blocks, mode=mode))

    def loaded(self, name: str, module: Any) -> None:
        """All that the settings ask for."""
        if not isinstance(module, nn.Module) or is_placed(module):
            return
        if is_transformer(name) and not list(getattr(module, "blocks", ())):
            self._refuse_without_blocks(module)
        if self.quantize and is_transformer(name):
            quantize_blocks(module, self.quantize, self.args.device)
        if self.vae == "tiled" and name == VAE:
            any_vae: Any = module
            any_vae.enable_tiling()
        if self._shares_vae and name == VAE:
            assert self.groups is not None
            share_vae(module, self.groups.vae)
        if self.offload:
            self.offload.add(name, module)
        else:
            module.to(self.args.device)
        if self.mode and is_transformer(name):
            compile_blocks(module, self.mode)

    def _refuse_without_blocks(self, module: nn.Module) -> None:
        """Refuse the settings that act on `blocks` of a transformer that has none.

        Raises:
            CompositionError: names the setting and the transformer's class.
        """
        offload = self.offload.kind if self.offload and self.offload.kind == "blocks" else None
        for option, value in (("quantize", self.quantize), ("compile", self.mode), ("offload", offload)):
            if value is not None:
                raise CompositionError(
                    f"{option}={value!r} and {type(module).__name__} cannot be used together: it works on the "
                    "transformer's `blocks`, and this one has none"
                )

    def need(self, name: str) -> None:
        """Bring the component, and send the one before it away."""
        if self.offload:
            self.offload.need(name)

    def stage_ended(self) -> None:
        """Send the component that the stage used away."""
        if self.offload:
            self.offload.release()


def is_transformer(name: str) -> bool:
    """Whether a component of this name denoises."""
    return name.startswith("transformer")
