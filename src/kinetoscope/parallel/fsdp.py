"""Weights shared out and gathered block by block (FSDP2, torch's `fully_shard`), for models that do not fit.

Only the matrices of linear layers are shared: they are nearly all of a model, and norms, biases and tables are read in
many places. What a model calls of its blocks before they run (keys and values of the text) gathers that block, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from kinetoscope.core.errors import CompositionError
from kinetoscope.core.sharding import Cut, ShardPlan
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.groups import Group, Groups

AXES = ("cfg", "ring", "ulysses")
"""Axes of the mesh along which weights are equal."""
NAME = "fsdp"
"""Under which `comm.SENT` counts what gathering sends."""


def shard_fully(module: nn.Module, plan: ShardPlan, groups: Groups) -> dict[str, Cut]:
    """Share a model's matrices among `groups.shard`, where it stands: on the meta device, or with its weights.

    After tensor parallel, of which each part is shared out again.

    Args:
        module: its blocks are `blocks`, or else its longest list of modules.
        plan: says what is called outside of forwards.
        groups: this process's place.

    Returns:
        Parameter -> what this process has of it.
    """
    group = groups.shard
    if group.size == 1:
        return {}
    mesh = _mesh(groups)
    cuts = {name: Cut(0, group.index, group.size) for name in matrices(module)}
    kept = {p for n, p in module.named_parameters() if n not in cuts}
    for part, names in [*((b, plan.outside) for b in blocks_of(module)), (module, plan.roots)]:
        shared: Any = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        shared.set_custom_all_gather(_CountedGather(group))
        _gather_for(shared, names)
    return cuts


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that run one after another.

    Raises:
        CompositionError: there are none.
    """
    named: Any = getattr(module, "blocks", None)
    if named is not None:
        return list(named)
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise CompositionError(f"parallel fsdp and {type(module).__name__} cannot be used together: it has no blocks")
    return list(max(lists, key=len))


def matrices(module: nn.Module) -> list[str]:
    """Names of the weights of linear layers, which are what is shared out."""
    return [f"{path}.weight" for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def _mesh(groups: Groups) -> DeviceMesh:
    """The processes that hold equal weights, as one axis of the mesh. All processes call it."""
    return groups.mesh[AXES]._flatten("shard")  # pyright: ignore[reportPrivateUsage] - nothing else makes 2-D weights


class _CountedGather:
    """The gathering of a block, counted as what each process sends to each of the others."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        SENT[NAME] += input_tensor.nbytes * (self.group.size - 1)
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _Gathered:
    """How many calls of a module are in progress that have gathered its weights."""

    def __init__(self) -> None:
        self.depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1


def _gather_for(shared: Any, names: Sequence[str]) -> None:
    """Let methods that are called outside of a forward gather the weights for their time."""
    gathered = _Gathered()
    shared.register_forward_pre_hook(gathered.enter)
    shared.register_forward_hook(gathered.leave, always_call=True)
    shared.as_forward = _called
    register_fsdp_forward_method(shared, "as_forward")
    for name in names:
        path, _, leaf = name.rpartition(".")
        try:
            owner = shared.get_submodule(path)
        except AttributeError:  # not every block has it
            continue
        if hasattr(owner, leaf):
            setattr(owner, leaf, _gathering(shared, gathered, getattr(owner, leaf)))


def _called(method: Any, *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


def _gathering(shared: Any, gathered: _Gathered, method: Any) -> Any:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if gathered.depth:
            return method(*args, **kwargs)
        gathered.depth += 1
        try:
            if torch.is_grad_enabled():  # the weights are gathered once more for the gradients, as those of a forward
                return shared.as_forward(method, *args, **kwargs)
            shared.unshard()
            try:
                return method(*args, **kwargs)
            finally:
                shared.reshard()
        finally:
            gathered.depth -= 1

    return call
