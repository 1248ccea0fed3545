"""Some tokens with all heads, turned into all tokens with some heads, and back (Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetoscope.parallel.adjoint import all_gather, all_to_all
from kinetoscope.parallel.groups import Group


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Heads shared out among a group; where they do not divide, heads of zeros are added at the end.

    Attributes:
        group: who shares them.
        count: H.
        own: n, tokens of each process.
        held: the real tokens of all of them: those beyond, at the end, are padding.
    """

    group: Group
    count: int
    own: int
    held: int

    @property
    def each(self) -> int:
        """h, heads of each process."""
        return -(-self.count // self.group.size)

    def _padded(self, x: Tensor) -> Tensor:
        missing = self.each * self.group.size - self.count
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def spread(self, x: Tensor, lead: int = 0) -> Tensor:
        """[R, lead + n + L, H, D] -> [R, lead + held + L, h, D]

        The first `lead` and the last L tokens every process has already.
        """
        if self.group.size == 1:
            return x if self.held == self.own else torch.cat([x[:, : lead + self.held], x[:, lead + self.own :]], dim=1)
        x = self._padded(x)
        first, video, last = x.split((lead, self.own, x.shape[1] - lead - self.own), dim=1)
        parts = [all_to_all(video, self.group, scatter=2, gather=1)[:, : self.held]]
        mine = slice(self.group.index * self.each, (self.group.index + 1) * self.each)
        if lead:
            parts.insert(0, first[:, :, mine])
        if last.shape[1]:
            parts.append(last[:, :, mine])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def collect(self, x: Tensor) -> Tensor:
        """[R, held + L, h, D] -> [R, n + L, H, D]"""
        total = self.own * self.group.size
        video, last = x[:, : self.held], x[:, self.held :]
        if self.held < total:
            video = F.pad(video, (0, 0, 0, 0, 0, total - self.held))
        video = all_to_all(video, self.group, scatter=1, gather=2)[:, :, : self.count]
        if not last.shape[1]:
            return video
        return torch.cat([video, all_gather(last, self.group, 2)[:, :, : self.count]], dim=1)
