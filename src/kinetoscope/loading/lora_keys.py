"""The ways in which LoRA files name the weights they change.

A key is a prefix (which program wrote the file, and sometimes which of two transformers is meant), the path of a layer
in the names of the model's authors or of diffusers, and a suffix that says what the tensor is. What the known programs
write (see diffusers' lora_conversion_utils; github kohya-ss/musubi-tuner, comfyanonymous/ComfyUI, ModelTC/LightX2V):

    diffusers, PEFT   transformer.blocks.0.attn1.to_q.lora_A.weight, base_model.model.blocks.0...
    ComfyUI           diffusion_model.blocks.0.self_attn.q.lora_A.weight, .diff, .diff_b; blocks.0.diff_m
    kohya             lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
    LongCat           lora___lorahyphen___blocks___lorahyphen___0..., .lora_up.blocks.0.weight, .alpha_scale
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

Rename = Callable[[str], str | Sequence[str]]
"""A published name of a tensor -> our parameter, or those of ours that it joins along its first axis, in order."""

TWO = "transformer_2"
"""The component that is the second of two transformers."""

_PREFIXES = (  # longest first: prefix, style, whether it means the second transformer
    ("base_model.model.", "peft", False),
    ("model.diffusion_model.", "comfyui", False),
    ("diffusion_model.", "comfyui", False),
    ("lora_transformer_2.", "onetrainer", True),
    ("lora_transformer_2_", "onetrainer", True),
    ("lora_transformer.", "onetrainer", False),
    ("lora_transformer_", "onetrainer", False),
    ("transformer_2.", "diffusers", True),
    ("transformer.", "diffusers", False),
    ("lora_unet_", "kohya", False),
    ("lora.", "longcat", False),
)
_HYPHEN = "___lorahyphen___"
"""LongCat's dot."""

STYLES = (
    "diffusers and PEFT (transformer.<layer>.lora_A.weight, base_model.model.<layer>.lora_A.weight), "
    "kohya (lora_unet_<layer>.lora_down.weight, .alpha), ComfyUI (diffusion_model.<layer>.lora_A.weight, .diff, "
    ".diff_b, .diff_m)"
)

_LOW_RANK = re.compile(
    r"(?P<layer>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)"
    r"(?:\.(?!weight$|bias$)\w+)?\.(?P<leaf>weight|bias)"
)
_UP_PART = re.compile(r"(?P<layer>.+)\.lora_up\.blocks\.(?P<index>\d{1,3})\.weight")
_OTHER = re.compile(r"(?P<layer>.+)\.(?P<kind>alpha|alpha_scale|diff|diff_b|diff_m|w_norm|b_norm)")
_KINDS = {"w_norm": "diff", "b_norm": "diff_b"}  # LyCORIS' names of the same
_REFUSED = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.|$)"), "DoRA"),
    (re.compile(r"\.hada_[wt]\d"), "LoHa"),
    (re.compile(r"\.lokr_[wt]\d"), "LoKr"),
    (re.compile(r"\.lora_mid\."), "LoCon with a middle factor"),
    (re.compile(r"\.lora_embedding_[AB]\."), "LoRA of an embedding"),
    (re.compile(r"\.(oft_blocks|oft_diag|oft_R)"), "OFT"),
    (re.compile(r"\.(set_weight|reshape_weight)$"), "replaced weights"),
)
_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d)?\.|lora_te\d?_|cond_stage_model\.)")
MASKS = 1 << 10
"""Ways to read the underscores of a kohya name that are tried at most."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a file, taken apart.

    Attributes:
        text: as the file has it.
        style: which program writes such keys; "bare" without a prefix.
        second: whether it names the second of two transformers.
        layer: the path between prefix and suffix.
        kind: "down", "up", "up_bias", "alpha", "alpha_scale", "diff", "diff_b" or "diff_m"; "up.0", "up.1", ... where
            each part of the outputs has its own; None: no suffix that we know.
    """

    text: str
    style: str
    second: bool
    layer: str
    kind: str | None


def parse_key(text: str) -> Key:
    """Take a key apart."""
    style, second, rest = "bare", False, text.replace(_HYPHEN, ".")
    while found := next((p for p in _PREFIXES if rest.startswith(p[0])), None):  # they may be nested
        rest, style, second = rest[len(found[0]) :], found[1], second or found[2]
    if match := _LOW_RANK.fullmatch(rest):
        down, bias = match["down"] is not None, match["leaf"] == "bias"
        kind = {(True, False): "down", (False, False): "up", (False, True): "up_bias"}.get((down, bias))
        return Key(text, style, second, match["layer"], kind)
    if match := _UP_PART.fullmatch(rest):
        return Key(text, style, second, match["layer"], f"up.{int(match['index'])}")
    if match := _OTHER.fullmatch(rest):
        return Key(text, style, second, match["layer"], _KINDS.get(match["kind"], match["kind"]))
    return Key(text, style, second, rest, None)


def refused_kind(text: str) -> str | None:
    """What a key is of that we do not apply, or None."""
    return next((name for pattern, name in _REFUSED if pattern.search(text)), None)


def names_text_encoder(text: str) -> bool:
    """Return whether a key is of a text encoder (diffusers, kohya and ComfyUI name it in the prefix)."""
    return _TEXT_ENCODER.match(text) is not None


class Names:
    """Finds a model's parameters by what files call them.

    Args:
        shapes: the model's parameters.
        rename: see `Rename`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], rename: Rename) -> None:
        self.shapes = shapes
        self._rename = rename
        self._masks: dict[str, tuple[str, ...]] = {}

    def find(self, layer: str, kind: str) -> tuple[str, ...]:
        """The parameters that a change of `kind` to `layer` is of, one after the other; none: there are none."""
        leaves = {
            "diff": (".weight", ""),  # the second: a table that is itself a parameter
            "diff_b": (".bias",),
            "up_bias": (".bias",),
            "diff_m": (".modulation",),
        }.get(kind, (".weight",))
        for path in self._spellings(layer):
            for leaf in leaves:
                found = self._rename(path + leaf)
                names = (found,) if isinstance(found, str) else tuple(found)
                if all(name in self.shapes for name in names):
                    if path != layer:
                        self._masks[re.sub(r"\d+", "#", layer)] = tuple(re.findall(r"[._]", path))
                    return names
        return ()

    def _spellings(self, layer: str) -> Iterator[str]:
        """The path itself, then with underscores read as dots: as layers of the same name had them, then every way."""
        yield layer
        words, count = re.split(r"[._]", layer), layer.count("_")
        if (known := self._masks.get(re.sub(r"\d+", "#", layer))) is not None:
            yield _join(words, known)
        if count > 0 and 1 << count <= MASKS:
            options = ["." if mark == "." else "._" for mark in re.findall(r"[._]", layer)]
            for marks in product(*options):
                yield _join(words, marks)


def _join(words: list[str], marks: tuple[str, ...]) -> str:
    return words[0] + "".join(mark + word for mark, word in zip(marks, words[1:], strict=True))
