"""Wan 2.1 and 2.2 (one transformer), text to video."""

from __future__ import annotations

from typing import ClassVar

from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.wan.spec import CONVENTION
from kinetoscope.train.roles import ModelBase


class WanModel(ModelBase):
    """Bidirectional Wan."""

    convention: ClassVar[Convention] = CONVENTION
