"""LongCat-Video, text to video."""

from __future__ import annotations

from typing import ClassVar

from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.longcat.spec import CONVENTION
from kinetoscope.train.roles import ModelBase


class LongCatModel(ModelBase):
    """LongCat's network predicts the negative velocity, which its convention says."""

    convention: ClassVar[Convention] = CONVENTION
