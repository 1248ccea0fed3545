"""Which backend serves which role, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kinetoscope.attention.backends import chunked_attention, math_attention, sdpa_attention
from kinetoscope.core.errors import CompositionError, ConfigError

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa_attention,
    "chunked": chunked_attention,
    "math": math_attention,
}
BUILT_IN = frozenset(BACKENDS)
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # asked here, since a compiled region cannot ask
Refuse = Callable[[str, torch.dtype], str | None]
_REFUSALS: dict[str, Refuse] = {}


def register_backend(name: str, backend: Callable[..., Tensor], refuse: Refuse | None = None) -> None:
    """Make a backend known by name, for `attention="name"`; "auto" never chooses it.

    Args:
        name: how users call it; registering it again replaces it.
        backend: (q [R, N, H, D], k [R, M, H, D], v, *, key_bias [R, M] float32 or None) -> [R, N, H, D] in the dtype of
            q; see `backends.math_attention`.
        refuse: (device type, dtype) -> why it cannot serve there, or None where it can.

    Raises:
        ConfigError: the name is "auto" or that of a built-in backend.
    """
    if name == "auto" or name in BUILT_IN:
        raise ConfigError(f"attention: the backend name {name!r} is taken; choose another")
    BACKENDS[name] = backend
    _REFUSALS[name] = refuse or (lambda device, dtype: None)
    capabilities.cache_clear()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can serve in a dtype.

    Attributes:
        device: device type, such as "cpu" or "cuda".
        dtype: what queries, keys and values are in.
        refused: backend -> why it cannot serve here.
        preferred: the backend that "auto" takes.
        reason: why.
    """

    device: str
    dtype: torch.dtype
    refused: Mapping[str, str]
    preferred: str
    reason: str


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The backend of one role.

    Attributes:
        backend: its name, a key of `BACKENDS`.
        reason: why it was taken.
    """

    backend: str
    reason: str


class AttentionTable(Mapping[str, Callable[..., Tensor]]):
    """Role -> function, ready for `ForwardContext.attention`; `choices` says which backend each is and why."""

    def __init__(self, choices: Mapping[str, AttentionChoice]) -> None:
        self.choices = dict(choices)

    def __getitem__(self, role: str) -> Callable[..., Tensor]:
        return BACKENDS[self.choices[role].backend]

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __str__(self) -> str:
        return "; ".join(f"{role}: {c.backend} ({c.reason})" for role, c in self.choices.items())


@cache
def capabilities(device: str, dtype: torch.dtype) -> Capabilities:
    """What the backends registered so far can do on a device type in a dtype."""
    refused: dict[str, str] = {}
    for name, refuse in _REFUSALS.items():  # a plain loop: compiled regions trace it
        why = refuse(device, dtype)
        if why is not None:
            refused[name] = why
    if device != "cpu":
        refused["chunked"] = f"it is made for the CPU, not for {device}"
        return Capabilities(device, dtype, refused, "sdpa", "torch picks a fused kernel of the device")
    if not AVX512:
        return Capabilities(device, dtype, refused, "sdpa", "without AVX512 it was 1.5 times as fast as chunked")
    if dtype in (torch.bfloat16, torch.float32):
        return Capabilities(device, dtype, refused, "chunked", "its matmuls use faster CPU kernels than sdpa's own")
    return Capabilities(device, dtype, refused, "sdpa", "the CPU's fast matmuls have no kernel for this dtype")


def resolve_attention(
    request: str | Mapping[str, str], capabilities: Capabilities, roles: Sequence[str]
) -> AttentionTable:
    """Choose a backend for each role. Pure: the same arguments give the same table.

    Args:
        request: "auto", a backend for all roles, or role -> backend (roles left out are "auto").
        capabilities: what the device serves.
        roles: the roles of the model's attention layers, such as ("self", "cross").

    Raises:
        ConfigError: unknown backend or role.
        CompositionError: a backend that was named cannot serve on this device in this dtype.
    """
    if isinstance(request, str):
        request = dict.fromkeys(roles, request)
    if unknown := sorted(set(request) - set(roles)):
        raise ConfigError(f"attention: unknown roles {unknown}; this model has {list(roles)}")
    choices: dict[str, AttentionChoice] = {}
    for role in roles:
        name = request.get(role, "auto")
        if name == "auto":
            choices[role] = AttentionChoice(capabilities.preferred, f"auto: {capabilities.reason}")
            continue
        if name not in BACKENDS:
            raise ConfigError(
                f"attention: unknown backend {name!r} for {role!r}; known are auto, {', '.join(BACKENDS)}"
            )
        if name in capabilities.refused:
            raise CompositionError(
                f"attention backend {name!r} for {role!r} cannot serve on {capabilities.device} in "
                f"{str(capabilities.dtype).removeprefix('torch.')}: {capabilities.refused[name]}; use 'auto'"
            )
        choices[role] = AttentionChoice(name, "named by the user")
    return AttentionTable(choices)
