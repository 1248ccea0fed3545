"""FlashAttention 2, 3, 4 and SageAttention 2, 3: packages that are used where they are installed and named by the user.

None adds a bias to the logits of keys, so roles that may carry one refuse them. Nothing is imported before a backend is
called or named. Call signatures are those of the packages' public functions:

- flash-attn 2.x `flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, ...)`, arXiv 2307.08691
- FlashAttention 3 (folder `hopper` of the same repository) `flash_attn_interface.flash_attn_func(q, k, v,
  softmax_scale, causal, ...)`, arXiv 2407.08608; older builds return the logsumexp too
- FlashAttention 4 `flash_attn.cute.flash_attn_func(q, k, v, softmax_scale, causal, ...)`, which returns a pair
- SageAttention 2 `sageattention.sageattn(q, k, v, tensor_layout, is_causal, ...)`, arXiv 2411.10958: int8 logits
- SageAttention 3 `sageattn3.sageattn3_blackwell(q, k, v, attn_mask, is_causal, per_block_mean)`, arXiv 2505.11594:
  FP4; it takes [R, H, N, D], ignores its mask, and subtracts the mean of k in place
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import CompositionError

HALF = (torch.float16, torch.bfloat16)


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the current CUDA device, None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


class ExternalBackend:
    """A function of an optional package.

    Args:
        name: of the backend.
        module, function: what is called.
        call: (function, q, k, v) -> output, with the function's own argument order and layout.
        install: what makes the package available.
        majors: major compute capabilities it runs on.
        gradient: whether it can be differentiated.
        head_dims: sizes of a head it takes: (largest, multiple of), or the only ones as a frozenset.
    """

    def __init__(
        self,
        name: str,
        module: str,
        function: str,
        call: Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor],
        *,
        install: str,
        majors: range,
        gradient: bool = True,
        head_dims: tuple[int, int] | frozenset[int],
    ) -> None:
        self.name, self.module, self.function, self.call = name, module, function, call
        self.install, self.majors, self.gradient, self.head_dims = install, majors, gradient, head_dims

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
        """[R, N, H, D] -> [R, N, H, D]; see `backends.math_attention`.

        Raises:
            CompositionError: a key bias, a gradient or a size of head that the package has no kernel for.
        """
        if key_bias is not None:
            raise CompositionError(f"attention backend {self.name!r} got a key bias: {self.no_bias()}; use 'auto'")
        if not self._takes(q.shape[-1]):
            raise CompositionError(f"attention backend {self.name!r} has no kernel for heads of {q.shape[-1]} channels")
        if not self.gradient and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise CompositionError(f"attention backend {self.name!r} has no gradient; train with 'auto' or 'flash2'")
        return self.call(self.load(), q, k, v)

    def _takes(self, head_dim: int) -> bool:
        if isinstance(self.head_dims, frozenset):
            return head_dim in self.head_dims
        largest, multiple = self.head_dims
        return head_dim <= largest and head_dim % multiple == 0

    def load(self) -> Callable[..., Any]:
        """The package's function.

        Raises:
            CompositionError: it cannot be imported.
        """
        try:
            return getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError, OSError) as error:
            why = " ".join(str(error).split())
            raise CompositionError(
                f"attention backend {self.name!r}: {self.module}.{self.function} cannot be imported ({why}); "
                f"install it with: {self.install}"
            ) from error

    def refuse(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve on a device type in a dtype; None where it can."""
        if device != "cuda":
            return f"it runs on CUDA only, not on {device}"
        if dtype not in HALF:
            return f"it computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        found = compute_capability()
        if found is not None and found[0] not in self.majors:
            return (
                f"it has no kernels for compute capability {found[0]}.{found[1]}, only for {_capabilities(self.majors)}"
            )
        if not _installed(self.module):
            return f"the module {self.module} is not installed ({self.install})"
        return None

    def no_bias(self, device: str = "cuda") -> str:
        """Why it cannot honour a key bias."""
        return "its kernels take no mask or bias of keys"


def _installed(module: str) -> bool:
    """Whether a module is there, found without running it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no parent package; a module without a spec
        return False


def _capabilities(majors: range) -> str:
    return f"{majors.start}.x" if len(majors) == 1 else f"{majors.start}.x to {majors.stop - 1}.x"


def _flash2(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False)


def _flash3(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(q, k, v, softmax_scale=None, causal=False)
    return out[0] if isinstance(out, tuple) else out


def _sage2(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(q, k, v, tensor_layout="NHD", is_causal=False)


def _sage3(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (q, k, v)]  # it writes into k
    return function(*heads, is_causal=False, per_block_mean=True).transpose(1, 2)


FLASH2 = ExternalBackend(
    "flash2", "flash_attn", "flash_attn_func", _flash2,
    install="pip install flash-attn --no-build-isolation", majors=range(8, 13), head_dims=(256, 8),
)  # fmt: skip
FLASH3 = ExternalBackend(
    "flash3", "flash_attn_interface", "flash_attn_func", _flash3,
    install="python setup.py install in the folder hopper of github.com/Dao-AILab/flash-attention",
    majors=range(9, 10), head_dims=(256, 8),
)  # fmt: skip
FLASH4 = ExternalBackend(
    "flash4", "flash_attn.cute", "flash_attn_func", _flash3,
    install="pip install flash-attn-4", majors=range(9, 13), head_dims=(128, 8),
)  # fmt: skip
SAGE2 = ExternalBackend(
    "sage2", "sageattention", "sageattn", _sage2,
    install="pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention",
    majors=range(8, 13), gradient=False, head_dims=(128, 1),
)  # fmt: skip
SAGE3 = ExternalBackend(
    "sage3", "sageattn3", "sageattn3_blackwell", _sage3,
    install="python setup.py install in the folder sageattention3_blackwell of github.com/thu-ml/SageAttention",
    majors=range(10, 13), gradient=False, head_dims=frozenset({64, 128}),
)  # fmt: skip
EXTERNAL = (FLASH2, FLASH3, FLASH4, SAGE2, SAGE3)
LOSSY = {"sage2": "int8 logits (arXiv 2411.10958)", "sage3": "FP4 products (arXiv 2505.11594)"}
