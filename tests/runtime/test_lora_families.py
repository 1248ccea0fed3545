"""A LoRA of every linear layer, in the flattened names of kohya, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kinetoscope.loading.lora_keys import TWO
from lora_files import write
from runtime.families import FAMILIES, SHORT, open_family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    generator = open_family(family, tmp_path / "model")
    names = [n for n in ("transformer", TWO) if n in generator.pipeline.model.components()]
    module = generator.pipeline.get_module(names[0])
    draw = torch.Generator().manual_seed(0)
    content: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            down, up = (
                torch.randn(2, layer.in_features, generator=draw),
                torch.randn(layer.out_features, 2, generator=draw),
            )
            stem = f"lora_unet_{name.replace('.', '_')}"
            content |= {f"{stem}.lora_down.weight": 0.1 * down, f"{stem}.lora_up.weight": 0.1 * up}
            deltas[f"{name}.weight"] = 0.01 * up @ down
    component = None if len(names) == 1 else "both"
    before = {n: v.clone() for n, v in module.state_dict().items()}
    lora = generator.load_lora(write(tmp_path / "a.safetensors", content), component=component)
    assert lora.unmatched == () and lora.parameters == len(deltas) * len(names) >= 20
    got = generator.generate_video(SHORT, **FAMILIES[family].request()).latents

    by_hand = open_family(family, tmp_path / "model")
    for name in names:
        parameters = dict(by_hand.pipeline.get_module(name).named_parameters())
        for key, delta in deltas.items():
            parameters[key].data += delta
    expected = by_hand.generate_video(SHORT, **FAMILIES[family].request()).latents
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    generator.set_lora({})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    base = generator.generate_video(SHORT, **FAMILIES[family].request()).latents
    assert (expected - base).abs().max() > 1e-2 * base.std()
