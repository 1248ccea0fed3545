"""Which settings of a generator go together: declared once, refused by name, and walked pair by pair in the tests.

`docs/composition.md` is made from what is declared here (`python docs/composition.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kinetoscope.core.errors import CompositionError


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that changes how, and not what, is computed.

    Attributes:
        text: as `kinetoscope ab` reads it; {lora} stands for a file.
        exact: the same video to rounding; else another, near or far.
        what: what it does.
    """

    text: str
    exact: bool
    what: str

    @property
    def name(self) -> str:
        """The option it sets."""
        return self.text.partition("=")[0]


SETTINGS: tuple[Setting, ...] = (
    Setting("cfg=batched", True, "all branches of guidance in one forward"),
    Setting("attention=math", True, "another exact attention backend"),
    Setting("compile=true", True, "compiled blocks"),
    Setting("offload=components", True, "components on the device while their stage runs"),
    Setting("offload=blocks", True, "two blocks of the transformer on the device at a time"),
    Setting("vae=streaming", True, "one latent frame decoded at a time"),
    Setting("perf_logging=true", True, "an observer"),
    Setting("vae=tiled", False, "latents decoded in tiles that overlap"),
    Setting("text_mode=true_length", False, "padding of the text is not attended to"),
    Setting("dtype=bfloat16", False, "half precision"),
    Setting("quantize=int8", False, "8-bit weights in the blocks"),
    Setting("attention=sta:window=1,1,1,tile=1,1,2", False, "sparse attention"),
    Setting("cache=taylorseer:interval=2,warmup=1", False, "blocks of some steps foretold"),
    Setting("cache=fbcache:threshold=0.9", False, "blocks left out where the first changed little"),
    Setting("lora={lora}", False, "changed weights"),
    Setting("guidance=cfg:reuse=0.5", False, "the last difference of the branches used again"),
    Setting("guidance=apg:momentum=-0.5", False, "projected guidance, with a memory"),
)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two settings that are refused together when a model is opened.

    Attributes:
        first, second: `name`, or `name=value|value` where only some values conflict.
        why: they do.
    """

    first: str
    second: str
    why: str


CONFLICTS: tuple[Conflict, ...] = (
    Conflict("quantize", "autocast", "autocast keeps weights in float32"),
    Conflict("quantize", "modules=transformer|transformer_2", "what is given is used as it is"),
    Conflict("vae=tiled", "modules=vae", "other pipelines would decode in tiles too"),
    Conflict("offload", "modules", "shared weights would leave while another pipeline uses them"),
    Conflict(
        "offload", "compile=reduce-overhead|max-autotune",
        "CUDA graphs replay addresses of weights, which offloading changes; use compile='default'",
    ),
)  # fmt: skip

MODEL_CONFLICTS: tuple[tuple[str, str, str], ...] = (
    ("vae=streaming", "a VAE other than AutoencoderKLWan", "it may look ahead in time"),
    ("vae=tiled", "a VAE without tiles", "it has none"),
    ("cache=teacache", "two experts, or a model whose polynomial is not known", "it is of one network; calibrate"),
    ("cache=magcache", "a model that is not calibrated", "its ratios are the model's own; calibrate"),
    ("a sparse kind of attention", "causal Wan, Matrix-Game", "tokens come block by block"),
    ("an attention backend without key biases", "roles whose keys may carry one", "it would drop the mask"),
    ("text_mode=...", "models trained in the other mode alone", "Wan, SkyReels, Cosmos 1 and 2 and LongCat know both"),
    ("guidance=...", "models without an unconditional row (distilled)", "there is nothing to guide with"),
    ("guidance=cfg-zero", "Cosmos Predict 1 and 2", "they are guided on clean estimates, not on velocities"),
    ("compile=reduce-overhead", "a device without CUDA graphs", "that is what it means"),
    ("quantize=fp8-dynamic", "a device that does not multiply 8-bit floats", "use fp8, or int8-dynamic"),
    (
        "quantize=int8-dynamic", "a CPU whose oneDNN an environment variable holds below its 8-bit instructions",
        "sums would saturate; unset it, or use int8",
    ),
)  # fmt: skip
"""(setting, what it meets, why it is refused): checked where model and device are known; the message names both."""


def check_pairs(values: Mapping[str, Any]) -> None:
    """Refuse settings that do not work together.

    Args:
        values: option -> value; None and False are not set. `modules` are the names of the components given.

    Raises:
        CompositionError: names both, and why.
    """
    for conflict in CONFLICTS:
        first, second = _found(conflict.first, values), _found(conflict.second, values)
        if first and second:
            raise CompositionError(f"{first} and {second} cannot be used together: {conflict.why}")


def _found(setting: str, values: Mapping[str, Any]) -> str | None:
    """`setting` as it is set in `values`, or None."""
    name, _, wanted = setting.partition("=")
    value = values.get(name)
    if value is None or value is False:
        return None
    if name == "modules":
        given = [n for n in value if not wanted or n in wanted.split("|")]
        return f"modules= ({', '.join(given)})" if given else None
    if wanted and value not in wanted.split("|"):
        return None
    return f"{name}={value!r}"
