"""Which backend serves which role, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kinetoscope.attention.backends import (
    SDPA_KINDS,
    math_attention,
    refuse_sdpa,
    sdpa_attention,
    sdpa_by,
    sdpa_without_bias,
)
from kinetoscope.attention.chunked import chunked_attention
from kinetoscope.attention.default import preferred_backend
from kinetoscope.attention.external import EXTERNAL, LOSSY
from kinetoscope.attention.flex import flex_dense_attention, refuse_flex
from kinetoscope.attention.roles import Role
from kinetoscope.attention.sparse.base import SparseAttention
from kinetoscope.attention.sparse.kinds import SPARSE, make_sparse
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.protocols import check_call
from kinetoscope.core.spec import unknown

Refuse = Callable[[str, torch.dtype], str | None]


def _serves(device: str, dtype: torch.dtype) -> str | None:
    return None


def _honours_bias(device: str) -> str | None:
    return None


def _refuse_chunked(device: str, dtype: torch.dtype) -> str | None:
    return None if device == "cpu" else f"it is made for the CPU, not for {device}"


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute dense attention.

    Attributes:
        function: (q [R, N, H, D], k [R, M, H, D], v, *, key_bias [R, M] float32 or None) -> [R, N, H, D].
        refuse: (device type, dtype) -> why it cannot serve there, or None.
        without_bias: device type -> why it cannot add a key bias there, or None.
        lossy: what it approximates; "" for the exact ones.
        load: called when the user names it: raises where what it needs cannot be imported.
    """

    function: Callable[..., Tensor]
    refuse: Refuse = _serves
    without_bias: Callable[[str], str | None] = _honours_bias
    lossy: str = ""
    load: Callable[[], object] | None = None


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(sdpa_attention),
    "chunked": Backend(chunked_attention, _refuse_chunked),
    "math": Backend(math_attention),
    **{
        f"sdpa:{kind}": Backend(sdpa_by(kind), partial(refuse_sdpa, kind), partial(sdpa_without_bias, kind))
        for kind in SDPA_KINDS
    },
    "flex": Backend(flex_dense_attention, refuse_flex),
    **{b.name: Backend(b, b.refuse, b.no_bias, LOSSY.get(b.name, ""), b.load) for b in EXTERNAL},
}
BUILT_IN = frozenset(BACKENDS)


def register_backend(
    name: str, backend: Callable[..., Tensor], refuse: Refuse | None = None, *, key_bias: bool = True
) -> None:
    """Make a backend known by name, for `attention="name"`; "auto" never chooses it.

    Args:
        name: how users call it; registering it again replaces it.
        backend: (q [R, N, H, D], k [R, M, H, D], v, *, key_bias [R, M] float32 or None) -> [R, N, H, D] in the dtype of
            q; see `backends.math_attention`.
        refuse: (device type, dtype) -> why it cannot serve there, or None where it can.
        key_bias: whether it adds `key_bias`; one that does not is refused for roles that may carry one.

    Raises:
        ConfigError: the name is "auto", that of a built-in backend or of a sparse kind; a function takes other
            arguments.
    """
    check_call(backend, math_attention, f"attention backend {name!r}", ConfigError)
    if refuse is not None:
        check_call(refuse, _serves, f"attention backend {name!r}, refuse", ConfigError)
    if name == "auto" or name in BUILT_IN or name in SPARSE:
        raise ConfigError(f"attention: the backend name {name!r} is taken; choose another")
    if set(name) & set(":;=,"):
        raise ConfigError(f"attention: the backend name {name!r} may not hold any of : ; = ,")
    without = _honours_bias if key_bias else (lambda device: "it was registered with key_bias=False")
    BACKENDS[name] = Backend(backend, refuse or _serves, without)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can serve in a dtype.

    Attributes:
        device: device type, such as "cpu" or "cuda".
        dtype: what queries, keys and values are in.
        refused: backend -> why it cannot serve here.
        preferred: the backend that "auto" takes.
        reason: why.
        without_bias: backend -> why it cannot add a key bias here.
    """

    device: str
    dtype: torch.dtype
    refused: Mapping[str, str]
    preferred: str
    reason: str
    without_bias: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The backend of one role.

    Attributes:
        backend: its name, a key of `BACKENDS`, or the settings of a sparse kind written out.
        reason: why it was taken.
        sparse: the sparse kind itself; None for a backend.
    """

    backend: str
    reason: str
    sparse: SparseAttention | None = None


class AttentionTable(Mapping[str, Callable[..., Tensor]]):
    """Role -> function, ready for `ForwardContext.attention`; `choices` says which backend each is and why."""

    def __init__(self, choices: Mapping[str, AttentionChoice]) -> None:
        self.choices = dict(choices)

    def __getitem__(self, role: str) -> Callable[..., Tensor]:
        choice = self.choices[role]
        return BACKENDS[choice.backend].function if choice.sparse is None else choice.sparse

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __str__(self) -> str:
        return "; ".join(f"{role}: {c.backend} ({c.reason})" for role, c in self.choices.items())


def capabilities(device: str, dtype: torch.dtype) -> Capabilities:
    """Return what the backends registered so far can do on a device type in a dtype."""
    refused = {name: why for name, b in BACKENDS.items() if (why := b.refuse(device, dtype))}
    without = {name: why for name, b in BACKENDS.items() if (why := b.without_bias(device))}
    preferred, reason = preferred_backend(device, dtype)
    return Capabilities(device, dtype, refused, preferred, reason, without)


def resolve_attention(
    request: str | Mapping[str, str], capabilities: Capabilities, roles: Sequence[str]
) -> AttentionTable:
    """Choose a backend for each role. The same arguments give the same table.

    Args:
        request: "auto"; a backend or a sparse kind with its parameters ("vsa:sparsity=0.8") for all roles; or role ->
            one of these (roles left out are "auto"), also written as "self=vsa:sparsity=0.8;cross=sdpa". A sparse kind
            for all roles serves those that have a grid of video tokens, and the others are "auto".
        capabilities: what the device serves.
        roles: the roles of the model's attention layers; a `Role` says what its calls may carry.

    Raises:
        ConfigError: unknown backend, role or parameter.
        CompositionError: a backend that was named cannot serve on this device in this dtype, or not this role.
    """
    known = {str(role): Role.of(role) for role in roles}
    named = isinstance(request, str) and not _is_mapping(request)
    request = named_backends(request, list(known))
    if unknown := sorted(set(request) - set(known)):
        raise ConfigError(f"attention: unknown roles {unknown}; this model has {list(known)}")
    if named and request and not any(role.grid for role in known.values()):
        _refuse_sparse_model(next(iter(request.values())), known)
    choices: dict[str, AttentionChoice] = {}
    for name, role in known.items():
        backend = request.get(name, "auto")
        kind = backend.partition(":")[0]
        auto = AttentionChoice(capabilities.preferred, f"auto: {capabilities.reason}")
        if backend == "auto":
            choices[name] = auto
        elif kind not in SPARSE:
            choices[name] = _dense(backend, role, capabilities, known)
        elif named and not role.grid:
            make_sparse(backend)  # its parameters are checked all the same
            reason = f"auto: {kind} serves roles whose tokens are a video's grid; {capabilities.reason}"
            choices[name] = AttentionChoice(capabilities.preferred, reason)
        else:
            choices[name] = _sparse(backend, role, capabilities)
    return AttentionTable(choices)


def named_backends(request: str | Mapping[str, str], roles: Sequence[str]) -> dict[str, str]:
    """Role -> what a request asks for it, unchecked; roles that it does not name are left out.

    Raises:
        ConfigError: words that are no request.
    """
    if isinstance(request, str) and not _is_mapping(request):
        return dict.fromkeys(roles, request)
    return _mapping(request)


def approximates(backend: str) -> bool:
    """Whether what the user names computes something else than softmax attention over all keys."""
    return backend.partition(":")[0] in SPARSE or (backend in BACKENDS and bool(BACKENDS[backend].lossy))


def _is_mapping(request: str) -> bool:
    """Whether a request in words tells roles apart: "self=sdpa;cross=math"."""
    return "=" in request.partition(":")[0]


def _mapping(request: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(request, str):
        return dict(request)
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in request.split(";"))):
        role, equals, backend = part.partition("=")
        if not equals or not role.strip() or not backend.strip() or role.strip() in found:
            raise ConfigError(f"attention: {part!r} should be ROLE=BACKEND, each role once, in {request!r}")
        found[role.strip()] = backend.strip()
    return found


def _dense(name: str, role: Role, served: Capabilities, known: Mapping[str, Role]) -> AttentionChoice:
    if name not in BACKENDS:
        raise ConfigError(
            f"attention of role {str(role)!r}: {unknown('backend or sparse kind', name, ['auto', *BACKENDS, *SPARSE])}"
        )
    if name in served.refused:
        dtype = str(served.dtype).removeprefix("torch.")
        raise CompositionError(
            f"attention backend {name!r} for {str(role)!r} cannot serve on {served.device} in {dtype}: "
            f"{served.refused[name]}; use 'auto'"
        )
    if role.key_bias and name in served.without_bias:
        able = [f"{r}={name}" for r, other in known.items() if not other.key_bias]
        instead = f"name it for the others: {';'.join(able)}" if able else "use 'auto'"
        raise CompositionError(
            f"attention backend {name!r} cannot serve {str(role)!r}, whose keys may carry a bias (a mask of text, or "
            f"folded padding): {served.without_bias[name]}; {instead}"
        )
    backend = BACKENDS[name]
    if backend.load is not None:
        backend.load()
    return AttentionChoice(name, f"named by the user; lossy: {backend.lossy}" if backend.lossy else "named by the user")


def _sparse(name: str, role: Role, served: Capabilities) -> AttentionChoice:
    sparse = make_sparse(name)
    if not role.grid:
        raise CompositionError(
            f"attention {name!r} cannot serve {str(role)!r}, whose tokens are not the whole grid of a video; use 'auto'"
        )
    if why := sparse.refuse(served.device, served.dtype):
        raise CompositionError(f"attention {name!r} for {str(role)!r} cannot serve on {served.device}: {why}")
    return AttentionChoice(str(sparse), f"named by the user; lossy: {sparse.lossy}", sparse)


def _refuse_sparse_model(name: str, known: Mapping[str, Role]) -> None:
    if name.partition(":")[0] in SPARSE:
        make_sparse(name)
        raise CompositionError(
            f"attention {name!r} serves roles whose tokens are the whole grid of a video; this model has none "
            f"({', '.join(known)}: its tokens come block by block, or with others between them); use 'auto'"
        )
