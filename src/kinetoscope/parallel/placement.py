"""How a component comes onto the devices of a layout: the one order, for inference and for training.

    build on the meta device -> share out by tensor parallel -> compile blocks -> share out by FSDP -> read the own part

Weights are read last, since only then does a process know which part of each it holds: no process ever has the whole.
A model that is there already (a student in training, a copy of its teacher) keeps its part of what it has.
Sequence parallel and attention backends change no module; they come with each forward (`core.context`). A component
that is on one device is read first, then quantized and compiled (`runtime.care`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinetoscope.core.sharding import ShardPlan, Share, keep_share, share_of
from kinetoscope.parallel.comm import all_reduce
from kinetoscope.parallel.fsdp import matrices, shard_fully
from kinetoscope.parallel.groups import Groups
from kinetoscope.parallel.share import HeldShare
from kinetoscope.parallel.tensor import apply_plan, misfit

Change = Callable[[nn.Module], object]
"""Changes a module where it stands."""


def placing(groups: Groups | None, *, compiled: Change | None = None) -> Callable[[nn.Module, ShardPlan], Share] | None:
    """What shares components out in a layout; None where every device holds all weights.

    Args:
        groups: this process's place; None: one device.
        compiled: see `place_module`.
    """
    if groups is None or (groups.tp.size == 1 and not (groups.config.fsdp and groups.shard.size > 1)):
        return None

    def place(module: nn.Module, plan: ShardPlan) -> Share:
        return place_module(module, plan, groups, compiled=compiled)

    return place


def place_module(module: nn.Module, plan: ShardPlan, groups: Groups, *, compiled: Change | None = None) -> Share:
    """Share a module out; its weights are read or cut accordingly. All processes of the layout call it.

    Args:
        module: on the meta device, or with its weights.
        plan: of its family.
        groups: this process's place.
        compiled: compiles the module's blocks, or None.

    Raises:
        ConfigError: the plan does not fit the module, or its sizes do not divide.
        CompositionError: FSDP of a module without blocks.
    """
    whole = plan.may_be_whole and misfit(module, plan.styles, groups.tp.size) is not None
    by_tensor = {} if whole else apply_plan(module, plan.styles, groups.tp, groups.mesh["tp"])
    if compiled is not None:
        compiled(module)
    fully = shard_fully(module, plan, groups) if groups.config.fsdp else {}
    share = HeldShare(module, by_tensor, fully)
    keep_share(module, share)
    return share


def is_placed(module: nn.Module) -> bool:
    """Whether `place_module` has shared the module out, so that nothing else may move or change its weights."""
    return share_of(module) is not None


def average_gradients(module: nn.Module, groups: Groups) -> None:
    """Make gradients the mean over the processes that hold equal weights, after a backward pass of all of them.

    Those of one replica have shares of a batch's tokens and the same loss (ulysses, ring), or batches of their own
    (cfg); replicas have batches of their own. FSDP takes the mean of what it shares out; what tensor parallel shares
    out has its whole gradient already.

    Args:
        module: after `place_module`, if weights are shared out.
        groups: this process's place.
    """
    done = set(matrices(module)) if groups.config.fsdp else set[str]()
    for name, grad in _gradients(module):
        for group in (groups.replica,) if name in done else (groups.shard, groups.replica):
            if group.size > 1:
                grad.copy_(all_reduce(grad.contiguous(), group).div_(group.size))


@torch.no_grad()
def clip_gradients(module: nn.Module, groups: Groups, limit: float) -> float:
    """Scale gradients so that their norm over the whole model is at most `limit`, after `average_gradients`.

    Not for weights that tensor parallel shares out.

    Returns:
        the norm before, the same on all processes.
    """
    done = set(matrices(module)) if groups.config.fsdp else set[str]()
    grads = list(_gradients(module))
    squares = torch.zeros(2, device=groups.device)  # of what everyone has, and of the own part of what is shared out
    for name, grad in grads:
        squares[int(name in done)] += grad.square().sum()
    norm = float((squares[0] + all_reduce(squares[1:], groups.shard)[0]).sqrt())
    for _, grad in grads:
        grad.mul_(min(1.0, limit / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
    return norm


def _gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that there are, by parameter: of a matrix that is shared out, this process's part."""
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is not None:
            yield name, grad.to_local() if isinstance(grad, DTensor) else grad
