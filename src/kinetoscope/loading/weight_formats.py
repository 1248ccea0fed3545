"""What a file is that cannot be read as weights, and how to get one that can."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOWNLOAD = "download the model's .safetensors weights in diffusers layout"
NOTHING = "; download the model again (of a repository without safetensors nothing else is downloaded)"
_PICKLE = "pickled weights of PyTorch, which can run code when they are read"
_CONVERT = (
    'convert them: python -c "import pathlib, torch; from safetensors.torch import save_file; '
    "[save_file({{k: v.clone() for k, v in torch.load(f, weights_only=True).items()}}, f.with_suffix('.safetensors')) "
    'for f in pathlib.Path({folder!r}).glob({pattern!r})]"'
)
_FORMATS: dict[str, tuple[str, str]] = {
    ".bin": (_PICKLE, _CONVERT),
    ".pt": (_PICKLE, _CONVERT),
    ".pth": (_PICKLE, _CONVERT),
    ".ckpt": (_PICKLE, _CONVERT),
    ".gguf": ("quantized weights of llama.cpp and ComfyUI (GGUF)", DOWNLOAD),
    ".msgpack": ("weights of Flax", DOWNLOAD),
    ".h5": ("weights of TensorFlow", DOWNLOAD),
    ".onnx": ("a graph of ONNX", DOWNLOAD),
    ".npz": ("arrays of NumPy", DOWNLOAD),
    ".ot": ("weights of Rust's tch", DOWNLOAD),
    ".pkl": ("a pickle, which can run code when it is read", DOWNLOAD),
    ".engine": ("an engine of TensorRT", DOWNLOAD),
    ".distcp": (
        "a distributed checkpoint of PyTorch",
        "join its parts with torch.distributed.checkpoint.format_utils.dcp_to_torch_save, or export the training's "
        "model",
    ),
}
"""Suffix -> what such files are, and what to do."""
_TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|sampler|random_states|training_args|rng_state).*")
_LFS = b"version https://git-lfs.github.com/spec/"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"is a zip archive, as {_PICKLE}, are"),
    (b"\x80\x02", f"holds {_PICKLE}"),
    (b"GGUF", f"holds {_FORMATS['.gguf'][0]}"),
    (b"\x89HDF", f"holds {_FORMATS['.h5'][0]}"),
)
_READ = 1024
MAX_HEADER = 100_000_000
"""Bytes of a header that safetensors reads at most."""
_QUANTIZED: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale(_inv|_2)?|scale_input|input_scale|comfy_quant)$"),
        "scaled float8 weights",
    ),
    (
        re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|quant_state\..+)$"),
        "weights quantized by bitsandbytes",
    ),
    (re.compile(r"\._weight_(qdata|scale|zero_point)$|\.weight\.tensor_impl"), "weights quantized by torchao"),
    (re.compile(r"\.weight\._(data|scale|shift)$|\.(input|output)_scale$"), "weights quantized by quanto"),
    (re.compile(r"\.(qweight|qzeros|g_idx|wscales|wzeros)$"), "weights quantized by GPTQ, AWQ or SVDQuant"),
)
UNQUANTIZED = (
    "use the model's float32, bfloat16 or float16 weights; quantize= (--quantize) stores them in 8 bits while they load"
)


def describe_format(file: Path) -> str | None:
    """Return what files with this file's suffix are, or None."""
    return _FORMATS[file.suffix][0] if file.suffix in _FORMATS else None


def describe_other_file(file: Path) -> str:
    """Say what a file of another format holds, and what to do; the end of a message."""
    if file.suffix not in _FORMATS:
        return "; other formats may run code when they are read"
    what, remedy = _FORMATS[file.suffix]
    return f", but holds {what}; {remedy.format(folder=str(file.parent), pattern=file.name)}"


def describe_other_weights(folder: Path, otherwise: str = NOTHING) -> str:
    """Say what a folder without safetensors files holds instead, and what to do; the end of a message.

    Args:
        folder: the folder.
        otherwise: what to say where it holds nothing that is known.
    """
    found = [f for f in sorted(folder.iterdir()) if f.suffix in _FORMATS and not _TRAINING_STATE.fullmatch(f.name)]
    if not found:
        return otherwise
    suffix = min((f.suffix for f in found), key=list(_FORMATS).index)
    files = [f.name for f in found if f.suffix == suffix]
    what, remedy = _FORMATS[suffix]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f", but {files[0]}{more} ({what}); {remedy.format(folder=str(folder), pattern=f'*{suffix}')}"


def describe_damage(file: Path) -> str:
    """Say why a file is not safetensors: cut, another format, or not weights at all; a whole message.

    Only the beginning of the file is read.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(_READ)
        size = file.stat().st_size
    except FileNotFoundError:
        return f"{file} is a link to a file that is gone; download it again"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    if not head:
        return f"{file} is empty, not a safetensors file; download it again"
    if head.startswith(_LFS):
        return (
            f"{file} is a pointer of Git LFS, not the safetensors file itself; run `git lfs pull` in its repository, "
            "or download it again with `hf download`"
        )
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return (
            f"{file} is a web page, not a safetensors file (the site answered with an error or a login page); download "
            "it again, after `hf auth login` where the model asks for it"
        )
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return f"{file} {what}; it is not a safetensors file, whatever its name says; download it again"
    if text.startswith(b"{") and int.from_bytes(head[:8], "little") > MAX_HEADER:
        start = " ".join(head[:80].decode("utf-8", "replace").split())
        return f"{file} is text ({start}), not a safetensors file; download it again"
    return f"{file} {_describe_length(file, head, size)}; download it again"


def _describe_length(file: Path, head: bytes, size: int) -> str:
    header = int.from_bytes(head[:8], "little")
    if size < 8 or header > MAX_HEADER:
        return "is not a safetensors file: it does not begin with the length of a header"
    if 8 + header > size:
        return f"is truncated: its safetensors header has {header} bytes, the file {size}"
    try:
        with file.open("rb") as stream:
            stream.seek(8)
            tensors: dict[str, Any] = json.loads(stream.read(header))
        end = max((int(t["data_offsets"][1]) for k, t in tensors.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OSError):
        return "is not a safetensors file: its header is not a readable list of tensors"
    if 8 + header + end > size:
        return f"is truncated: it has {size} of the {8 + header + end} bytes that its safetensors header lists"
    return "is not a readable safetensors file: its header contradicts itself"


def quantization_of(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind of quantization that the names of tensors show, and the name that shows it; None: there is none.

    Args:
        keys: the stored tensors that the model has no parameter for.
    """
    for key in keys:
        for pattern, kind in _QUANTIZED:
            if pattern.search(key):
                return kind, key
    return None


def describe_layout(keys: Iterable[str]) -> str | None:
    """Return what the names of tensors that do not fit show about their file, with what to do; None: nothing known."""
    names = list(keys)
    if any(re.search(r"\.lora_(A|B|up|down)(\.|$)|\.lora\.(up|down)\.", name) for name in names):
        return "these are the keys of a LoRA, which changes a model; give the file as lora= (--lora)"
    if any(name.startswith(("model.diffusion_model.", "diffusion_model.", "net.")) for name in names):
        return (
            "these are the keys of a single-file checkpoint (of the model's authors, or for ComfyUI); diffusers' "
            "from_single_file and save_pretrained convert it"
        )
    if any(name.startswith(("module.", "_orig_mod.", "_fsdp_wrapped_module.")) for name in names):
        return "these are the keys of a wrapped module (DDP, FSDP, torch.compile); save the module inside it"
    return None
