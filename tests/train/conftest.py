"""What several files of these tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import make_tiny_wan
from train.data_sets import make_clips


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny Wan model."""
    return make_tiny_wan(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips with captions."""
    return make_clips(tmp_path_factory.mktemp("clips"))
