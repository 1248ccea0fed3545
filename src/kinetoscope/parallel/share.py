"""What this process holds of a model whose weights are shared out, for those who read the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinetoscope.core.sharding import Cut


class HeldShare:
    """`core.sharding.Share` of a module after `apply_plan` and `shard_fully`.

    Args:
        module: as they left it.
        cuts: of each, in their order.
    """

    def __init__(self, module: nn.Module, *cuts: Mapping[str, Cut]) -> None:
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._cuts = cuts

    def cuts(self, name: str) -> Sequence[Cut]:
        """See `core.sharding.Share`."""
        return [cuts[name] for cuts in self._cuts if name in cuts]

    def held(self, name: str, own: Tensor) -> Tensor:
        """See `core.sharding.Share`."""
        place = self._parameters.get(name)
        if not isinstance(place, DTensor):
            return own
        return DTensor.from_local(
            own, place.device_mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
        )
