"""Components of a model directory, each by the loader of its class."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kinetoscope.core.errors import KinetoscopeError, ModelLoadError
from kinetoscope.core.onednn import speed_up_convolutions
from kinetoscope.core.serial import serialize_calls
from kinetoscope.core.sharding import ShardPlan, Share
from kinetoscope.diffusion.scheduler import SCHEDULERS, SchedulerAdapter
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.lora import Target
from kinetoscope.loading.lora_keys import Rename
from kinetoscope.loading.weights import (
    KeyMap,
    check_headers,
    check_unquantized,
    load_weights,
    read_headers,
    rename_key,
    tensor_shapes,
    weight_files,
)

Loader = Callable[[ModelDir, str, torch.dtype, torch.device], Any]
Place = Callable[[nn.Module, ShardPlan], Share | None]
"""What shares a module out before its weights are read: (module on the meta device, its plan) -> what to read of it."""
TOKENIZER_CONFIG = "tokenizer_config.json"
ANY_CLASS = ("AutoTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of tokenizers that say nothing of their kind."""
_LOADERS: dict[str, Loader] = {}
_EMPTY: dict[str, Callable[[ModelDir, str], nn.Module]] = {}
_WITHOUT_WEIGHTS: set[str] = set()
"""Classes of tokenizers, processors and schedulers."""
_PLANS: dict[str, ShardPlan] = {}
"""Classes that can be shared out among devices; their loaders take a keyword `place`."""
_NAMES: dict[str, tuple[KeyMap, Rename]] = {}
"""Class of a transformer -> how weights are named that are stored otherwise, and how LoRA files name them."""


def register_component(class_name: str, loader: Loader, plan: ShardPlan | None = None, *, weights: bool = True) -> None:
    """Say how components of a class are loaded: (model, component name, dtype, device) -> component.

    Args:
        class_name: as published in model_index.json.
        loader: loads the component.
        plan: how devices can share its weights; the loader then takes `place`, a `Place`, by keyword.
        weights: whether such components have weights, whose files can be checked before they are loaded.
    """
    _LOADERS[class_name] = loader
    if not weights:
        _WITHOUT_WEIGHTS.add(class_name)
    if plan is not None:
        _PLANS[class_name] = plan


def shard_plan(class_name: str) -> ShardPlan | None:
    """How devices can share the weights of a component of this class; None: each has all of it."""
    return _PLANS.get(class_name)


def register_transformer(
    class_name: str,
    build: Callable[[Any], nn.Module],
    read_config: Callable[[Mapping[str, Any]], Any],
    optional: Mapping[str, str] | None = None,
    key_map: KeyMap | None = None,
    lora_names: Rename | None = None,
    plan: ShardPlan | None = None,
) -> None:
    """Register one of our own transformers.

    Args:
        class_name: as published in model_index.json.
        build: configuration -> module; its `keep_in_float32` names parts whose weights stay float32.
        read_config: parsed config.json -> configuration.
        optional: boolean field of the configuration -> part of a tensor's name, for parts that config.json does not
            tell of: the field is true where the weights hold such a tensor.
        key_map: as in `load_weights`, for families whose weights are also published under other names.
        lora_names: how LoRA files name its parameters, where that is not as `key_map` says.
        plan: how devices share its weights.
    """

    def empty(model: ModelDir, name: str) -> nn.Module:
        folder = model.folder(name)
        there = optional and any(folder.glob("*.safetensors*"))  # a directory of configurations alone tells nothing
        found = read_headers(weight_files(folder)) if there else {}
        present = {f: True for f, part in (optional or {}).items() if any(part in key.split(".") for key in found)}
        config = read_config({**model.config(name), **present})
        with torch.device("meta"):
            return build(config)

    def load(
        model: ModelDir, name: str, dtype: torch.dtype, device: torch.device, place: Place | None = None
    ) -> nn.Module:
        module = empty(model, name)
        policy = partial(parameter_dtype, module, dtype)
        share = place(module, plan) if place and plan else None
        return load_weights(module, model.folder(name), dtype=policy, device=device, key_map=key_map, share=share)

    register_component(class_name, load, plan)
    _EMPTY[class_name] = empty
    _NAMES[class_name] = (key_map or {}, lora_names or partial(rename_key, key_map=key_map or {}))


def parameter_dtype(transformer: nn.Module, dtype: torch.dtype, name: str) -> torch.dtype:
    """What a parameter is kept in when the transformer computes in `dtype`: its `keep_in_float32` names exceptions."""
    kept = set(getattr(transformer, "keep_in_float32", ()))
    return torch.float32 if kept & set(name.split(".")) else dtype


def empty_transformer(model: ModelDir, name: str) -> nn.Module | None:
    """One of our own transformers on the meta device, without its weights; None for components of other classes.

    Raises:
        ModelLoadError: its configuration or the headers of its files cannot be read.
    """
    make = _EMPTY.get(model.components().get(name, ""))
    return None if make is None else make(model, name)


def lora_target(model: ModelDir, name: str, module: nn.Module | None = None) -> Target:
    """What a LoRA can change of a transformer, from the headers of its files, or of a module that was given instead.

    Raises:
        ModelLoadError: the files are missing or damaged.
    """
    class_name = model.components().get(name) or type(module).__name__
    key_map, rename = _NAMES.get(class_name, ({}, str))
    if module is not None:
        return Target({key: tuple(value.shape) for key, value in module.named_parameters()}, rename)
    stored = tensor_shapes(weight_files(model.folder(name)))
    return Target({rename_key(key, key_map): shape for key, shape in stored.items()}, rename)


def load_component(
    model: ModelDir, name: str, *, dtype: torch.dtype, device: torch.device, place: Place | None = None
) -> Any:
    """Load one component, ready for inference; all but our own transformers serve one thread at a time.

    Args:
        name: as in model_index.json.
        dtype: compute dtype of transformers and text encoders; VAEs stay float32.
        place: shares out a component that has a plan, so that only the own part of its weights is read.

    Raises:
        ModelLoadError: the class is unknown, or its files are missing, damaged or do not fit.
    """
    class_name = model.components().get(name)
    if class_name not in _LOADERS:
        raise ModelLoadError(
            f"{model.path}/model_index.json: component {name!r} has class {class_name!r}, which is not supported; "
            f"supported: {', '.join(sorted(_LOADERS))}"
        )
    try:
        loader: Callable[..., Any] = _LOADERS[class_name]
        placed = {"place": place} if place and class_name in _PLANS else {}
        component = loader(model, name, dtype, device, **placed)
    except KinetoscopeError:
        raise
    except Exception as error:  # libraries raise many kinds for a damaged directory
        message = " ".join(str(error).split())
        raise ModelLoadError(f"{model.path / name} cannot be loaded as {class_name}: {message}") from error
    return component if class_name in _EMPTY else serialize_calls(component)


def check_files(model: ModelDir, name: str) -> None:
    """Refuse a component whose files cannot be loaded, as far as their headers say; no weights are read.

    Of our own transformers the names, shapes and types of all tensors are checked, of other components that there are
    files, that they are whole, and that they are not quantized.

    Raises:
        ModelLoadError: see `weight_files`, `read_headers` and `check_headers`.
        ConfigError: the configuration cannot be read.
    """
    class_name = model.components().get(name, "")
    if class_name not in _LOADERS or class_name in _WITHOUT_WEIGHTS:
        return
    model.config(name)
    folder = model.folder(name)
    headers = read_headers(weight_files(folder))
    if (module := empty_transformer(model, name)) is None:
        check_unquantized(folder, headers, headers)
    else:
        check_headers(module, folder, headers, partial(rename_key, key_map=_NAMES[class_name][0]))


def _load_vae(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

    config = {k: v for k, v in model.config(name).items() if not k.startswith("_")}
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**config)
    return speed_up_convolutions(load_weights(vae, model.folder(name), dtype=lambda _: torch.float32, device=device))


def load_tokenizer(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A tokenizer of transformers.

    Raises:
        ModelLoadError: its folder is empty, or does not say which tokenizer it holds, or says another one.
    """
    from transformers import AutoTokenizer

    folder = model.folder(name)
    if not any(folder.iterdir()):
        raise ModelLoadError(f"{folder} is empty; download the model again")
    if not (folder / TOKENIZER_CONFIG).is_file():  # transformers would guess, and leave out special tokens
        raise ModelLoadError(f"{folder} has no {TOKENIZER_CONFIG}; download the model again")
    check_class(model, name, TOKENIZER_CONFIG, "tokenizer_class")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_class(model: ModelDir, name: str, file: str, field: str) -> None:
    """Refuse a component whose own file says that it is of another kind than model_index.json.

    Raises:
        ModelLoadError: they name different classes; fast and slow ones of a kind are the same.
    """
    declared, path = model.components()[name], model.folder(name) / file
    held = json.loads(path.read_text(encoding="utf-8")).get(field) if path.is_file() else None
    kinds = {str(kind).removesuffix("Fast").removesuffix("Pil") for kind in (declared, held or declared)}
    if len(kinds) > 1 and not kinds & set(ANY_CLASS):
        raise ModelLoadError(
            f"{path} is of a {held}, model_index.json says {name} is a {declared}; download the model again"
        )


def _load_scheduler(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> SchedulerAdapter:
    config = {k: v for k, v in model.config(name).items() if not k.startswith("_")}
    adapter = SchedulerAdapter(model.components()[name], config)
    nothing = torch.zeros(1, 1)
    run = adapter.start(2, mu=0.0 if adapter.dynamic else None)
    run.step(nothing, 0, nothing)  # a configuration that cannot step is refused here
    return adapter


register_component("AutoencoderKLWan", _load_vae)
for _tokenizer in ("T5Tokenizer", "T5TokenizerFast", "AutoTokenizer"):
    register_component(_tokenizer, load_tokenizer, weights=False)
for _scheduler in SCHEDULERS.values():
    register_component(_scheduler, _load_scheduler, weights=False)
