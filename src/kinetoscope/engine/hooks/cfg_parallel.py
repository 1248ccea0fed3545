"""CFG-parallel: the branches of a step shared among devices.

Each device forwards a contiguous share of the branches, and all get the predictions of all, so what follows
(guidance, scheduler) is the same arithmetic on every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kinetoscope.core.context import current_context
from kinetoscope.engine.hooks.base import Forward, Interceptor
from kinetoscope.engine.hooks.notes import notes_of, renote
from kinetoscope.engine.protocols import ModelInputs, StrategyState
from kinetoscope.parallel.comm import all_gather, broadcast, tell
from kinetoscope.parallel.groups import Group

CACHE = "cache"
"""Key of the notes of step caches."""


def shares(branches: Sequence[str], devices: int) -> list[tuple[str, ...]]:
    """The branches of each device: contiguous, those of the first devices one more where they do not divide."""
    least, more = divmod(len(branches), devices)
    starts = [i * least + min(i, more) for i in range(devices + 1)]
    return [tuple(branches[a:b]) for a, b in pairwise(starts)]


class CFGParallel(Interceptor):
    """Forwards this device's share of the branches, and gets the others' predictions from the other devices.

    A branch belongs to one device for the whole run, also in steps and passes that leave others out: what is remembered
    of it (by a step cache, which stands inside of this, or in a K/V cache) is remembered there and nowhere else. A
    device that has none of a step's branches waits for their predictions. A run of one branch is computed by all.

    Args:
        group: the devices that share the branches; of one, nothing is changed.
        lockstep: whether a device without a branch forwards one all the same and drops the result, because the devices
            share weights which they gather in every forward (FSDP).
    """

    name: ClassVar[str] = "cfg-parallel"
    order: ClassVar[int] = 130  # around step caches (150)
    from_options: ClassVar[bool] = True
    conflicts: ClassVar[frozenset[str]] = frozenset({"cache-calibration"})  # measures the branches that it sees

    def __init__(self, group: Group, *, lockstep: bool = False) -> None:
        self.group, self.lockstep = group, lockstep

    def around_forward(self, call: Forward, state: StrategyState, inputs: ModelInputs) -> Tensor:
        """[r, ...] predictions of all rows, computed by the devices of the group."""
        if self.group.size == 1 or len(inputs.whole) == 1:
            return call(state, inputs)
        owned = [[b for b in share if b in inputs.branches] for share in shares(inputs.whole, self.group.size)]
        mine = owned[self.group.index]
        made = call(state, inputs.keep(mine)) if mine else None
        if made is None and self.lockstep:
            call(state, inputs.keep(inputs.branches[-1:]))
        context = current_context()
        if context is not None and context.step is not None and "step_cache" in state.batch.logging_info:
            self._share_notes(state, bool(mine))
        return self._gather(made, [len(share) * inputs.batch for share in owned], inputs.latents.device)

    def _gather(self, made: Tensor | None, rows: Sequence[int], device: torch.device) -> Tensor:
        """The predictions of all devices, which have so many `rows`, in their order."""
        if made is not None and len(set(rows)) == 1:
            return all_gather(made, self.group, dim=0)
        kind = None if made is None else (made.shape[1:], made.dtype)
        if not all(rows):  # who has none knows neither shape nor dtype
            kind = next(k for k in tell(kind, self.group) if k is not None)
        assert kind is not None
        parts: list[Tensor] = []
        for source, count in enumerate(rows):
            if count:
                own = made if source == self.group.index else None
                part = torch.empty(count, *kind[0], dtype=kind[1], device=device) if own is None else own.contiguous()
                parts.append(broadcast(part, self.group, source))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _share_notes(self, state: StrategyState, own: bool) -> None:
        """What step caches of all devices said of the step, into the trace and the totals of each of them."""
        told = tell(list(notes_of(state).get(CACHE, ())) if own else [], self.group)
        total = state.batch.logging_info["step_cache"]
        for device, records in enumerate(told):
            if device != self.group.index:
                total["rows"] += len(records)
                total["skipped"] += sum(record["skipped"] for record in records)
        renote(state, CACHE, [record for records in told for record in records])
