"""Encoders and processors of transformers, used as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading.components import check_class, load_tokenizer, register_component
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.weight_files import weight_files, weight_variant
from kinetoscope.loading.weights import SHOWN, check_unquantized, read_headers


def register_transformers_model(class_name: str) -> None:
    """Say that components of `class_name` are transformers' class of that name, loaded by its own loader.

    For models that keep tables outside their weights (rotary frequencies, positions), which a module built on the meta
    device would miss.
    """

    def load(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # the command line shows its own
        folder = model.folder(name)
        model.config(name)  # refuses a directory of another class
        headers = read_headers(weight_files(folder))  # transformers would load pickles without a word
        module, report = getattr(transformers, class_name).from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            use_safetensors=True, variant=weight_variant(folder, "model"),
        )  # fmt: skip
        check_unquantized(folder, headers, report["unexpected_keys"])
        # transformers would fill the first two with random numbers
        if missing := sorted(report["missing_keys"]):
            raise ModelLoadError(f"{folder} does not fit {class_name}: missing {', '.join(missing[:SHOWN])}")
        if wrong := sorted(f"{key} is {tuple(a)}, needs {tuple(b)}" for key, a, b in report["mismatched_keys"]):
            raise ModelLoadError(f"{folder} does not fit {class_name}: wrong shape: {', '.join(wrong[:SHOWN])}")
        if broken := [n for n, p in module.named_parameters() if not torch.isfinite(p).all()]:
            raise ModelLoadError(f"{folder} does not fit {class_name}: not finite: {', '.join(broken[:SHOWN])}")
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # tensors mapped from a file are not 64-byte aligned
        return module.requires_grad_(False).eval().to(device)

    register_component(class_name, load)


def register_tokenizer(class_name: str) -> None:
    """Say that components of `class_name` are tokenizers."""
    register_component(class_name, load_tokenizer, weights=False)


def register_image_processor(class_name: str) -> None:
    """Say that components of `class_name` prepare images for an encoder."""

    def load(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> Any:
        import transformers

        check_class(model, name, "preprocessor_config.json", "image_processor_type")
        return getattr(transformers, class_name).from_pretrained(model.folder(name), local_files_only=True)

    register_component(class_name, load, weights=False)
