"""Clips and captions as the transformer takes them: latents and text states of the model's own encoders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading import ModelDir
from kinetoscope.loading.directory import file_digest
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.train.plugins import plugin_of


@dataclass(frozen=True, slots=True)
class Identity:
    """Which encoders made the rows.

    Attributes:
        model: the name of the model.
        vae: SHA-256 over the files of its VAE.
        text: SHA-256 over the files of its text encoder and tokenizer.
    """

    model: str
    vae: str
    text: str

    @classmethod
    def of(cls, model: ModelDir) -> Identity:
        """That of a model's encoders.

        Raises:
            ModelLoadError: a component is missing.
        """
        return cls(model.name, _digest(model, "vae"), _digest(model, "text_encoder", "tokenizer"))

    def refusal(self, model: ModelDir) -> str:
        """Why rows of this identity cannot train a model; empty if they can. The transformer may be another."""
        own = Identity.of(model)
        wrong = [n for n, a, b in (("VAE", self.vae, own.vae), ("text encoder", self.text, own.text)) if a != b]
        return f"made with another {' and '.join(wrong)} (of {self.model}) than that of {model.name}" if wrong else ""


def _digest(model: ModelDir, *components: str) -> str:
    """SHA-256 (hex) over names and contents of the files of components."""
    total = hashlib.sha256()
    for component in components:
        folder = model.folder(component)
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            total.update(f"{component}/{file.relative_to(folder).as_posix()}\0{file_digest(file)}\n".encode())
    return total.hexdigest()


def open_encoders(model: ModelDir, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ComposedPipeline:
    """The model's pipeline, of which nothing has been loaded yet.

    Raises:
        ConfigError: it is of a family that cannot be trained, or whose text is more than the states of one T5 encoder,
            which is what rows hold (Wan, causal Wan, LongCat, Cosmos Predict 1 and 2).
    """
    pipeline = build_pipeline(model, ExecutionArgs(device=torch.device(device), dtype=dtype))
    plugin_of(model.components()["transformer"])
    if not isinstance(pipeline.stages.get("text_encoding"), TextEncodingStage):
        raise ConfigError(
            f"{model.name}: captions cannot be encoded for this family; it should have one T5 text encoder, as Wan has"
        )
    return pipeline


class Encoder:
    """Encodes clips and captions.

    Args:
        pipeline: of `open_encoders`.
    """

    def __init__(self, pipeline: ComposedPipeline) -> None:
        stage = pipeline.stages["text_encoding"]
        assert isinstance(stage, TextEncodingStage)
        self._pipeline, self._text = pipeline, stage
        self._plugin = plugin_of(pipeline.model.components()["transformer"])

    @torch.no_grad()
    def latents(self, frames: np.ndarray[Any, Any]) -> Tensor:
        """[C, t, h, w] float32 on the CPU, normalised, of frames uint8 [T, H, W, 3]: as the pipeline's own stages
        encode a given video."""
        video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1  # [3, T, H, W]
        device = self._pipeline.args.device
        return self._plugin.encode_video(self._pipeline, video.unsqueeze(0).to(device))[0].cpu()

    def text(self, caption: str) -> Tensor:
        """[n, D] states of the n true tokens, on the CPU.

        Raises:
            InputError: the caption has more tokens than the model reads.
        """
        states, lengths = self._text.encode([caption], self._pipeline.args.device)
        return states[0, : int(lengths[0])].float().cpu()
