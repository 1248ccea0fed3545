"""Families that learned with padded text can also read true lengths; each row is then what its text alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinetoscope.core.errors import InputError
from kinetoscope.engine.protocols import take_rows
from kinetoscope.nn.text_padding import TEXT_MULTIPLE, mask_padding
from models import test_cosmos, test_longcat, test_skyreels, test_wan

LENGTHS, TOTAL = [5, 37, 1], 512


@pytest.fixture(
    params=[test_wan.TestWan, test_cosmos.TestCosmos, test_skyreels.TestTextToVideo, test_longcat.TestLongCat]
)
def contract(request: pytest.FixtureRequest) -> Any:
    return request.param()


@torch.no_grad()
def test_true_lengths_are_each_text_alone(contract: Any) -> None:
    model = contract.make_model()
    inputs = contract.inputs((3, *contract.SHAPES[0][1:]), torch.Generator().manual_seed(1))
    width = inputs.pop("encoder_hidden_states").shape[-1]
    inputs.pop("text_lengths", None)
    text = torch.randn(3, TOTAL, width, generator=torch.Generator().manual_seed(2))
    for row, length in enumerate(LENGTHS):
        text[row, length:] = 0
    lengths = torch.tensor(LENGTHS)
    found: dict[str, torch.Tensor] = {}
    for mode in ("padded", "true_length"):
        conditioning = model.prepare_conditioning(encoder_hidden_states=text, text_lengths=lengths, text_mode=mode)
        found[mode] = model(**inputs, **conditioning)
    for row, length in enumerate(LENGTHS):
        alone = model(**take_rows(inputs, slice(row, row + 1)), encoder_hidden_states=text[row : row + 1, :length])
        torch.testing.assert_close(found["true_length"][row : row + 1], alone, rtol=0, atol=1e-5)
    assert (found["padded"] - found["true_length"]).abs().max() > 1e-3, "padding means nothing to this model"


def test_what_is_kept_of_the_text() -> None:
    text = torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(0))
    kept, bias = mask_padding(text, torch.tensor([3, 33]))
    assert kept.shape == (2, 2 * TEXT_MULTIPLE, 4)
    assert torch.equal(bias == 0, torch.arange(64) < torch.tensor([[3], [33]]))
    assert mask_padding(text, torch.tensor([3, 100]))[0].shape == (2, 100, 4)
    for lengths in ([0, 3], [3, 101]):
        with pytest.raises(InputError, match=r"\[1, 100\]"):
            mask_padding(text, torch.tensor(lengths))
