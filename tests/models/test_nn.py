"""Fast paths of the leaves against the plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.core import onednn
from kinetoscope.core.cpu import ONEDNN_BFLOAT16, CpuLevel, cpu_level
from kinetoscope.nn.linear import Linear, linear_gelu
from kinetoscope.nn.norm import ModulatedNorm, RMSNorm
from kinetoscope.nn.rope import apply_rope, rope_table, split_rope_dims


def layer_and_input(dtype: torch.dtype = torch.float32) -> tuple[Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(24, 40)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype), torch.randn(2, 5, 24, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.13)])
def test_linear_inference_equals_training_path(dtype: torch.dtype, atol: float) -> None:
    layer, x = layer_and_input(dtype)
    plain, plain_gelu = layer(x).detach(), linear_gelu(layer, x).detach()
    with torch.no_grad():
        chosen = cpu_level() >= CpuLevel.AVX512 and (dtype == torch.float32 or ONEDNN_BFLOAT16)
        assert onednn.onednn_serves(x, layer.weight) == chosen
        torch.testing.assert_close(layer(x), plain, rtol=0, atol=atol)
        torch.testing.assert_close(linear_gelu(layer, x), plain_gelu, rtol=0, atol=atol)
        strided = x.transpose(0, 1)
        torch.testing.assert_close(layer(strided), plain.transpose(0, 1), rtol=0, atol=atol)


def test_linear_gelu_calls_a_layer_that_was_replaced_or_hooked() -> None:
    layer, x = layer_and_input()

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * layer(x)

    with torch.no_grad():
        torch.testing.assert_close(linear_gelu(Doubled(), x), F.gelu(2 * layer(x), approximate="tanh"))
        calls: list[int] = []
        layer.register_forward_hook(lambda *_: calls.append(1))
        linear_gelu(layer, x)
    assert calls == [1]


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 1), (3, 1, 1)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_fast_convolutions_equal_plain_ones(kernel: tuple[int, int, int], stride: int, padding: int) -> None:
    plain = nn.Conv3d(6, 8, kernel, stride=stride, padding=padding)
    fast = copy.deepcopy(onednn.speed_up_convolutions(copy.deepcopy(plain)))
    x = torch.randn(1, 6, 5, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=1e-5)
        fast.weight.zero_()  # the copy uses its own weight
        torch.testing.assert_close(fast(x), fast.bias.view(1, 8, 1, 1, 1).expand_as(plain(x)))
    assert torch.autograd.grad(fast(x).sum(), fast.weight)[0].abs().sum() > 0
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_modulated_norm_for_all_tokens_equals_one_a_token() -> None:
    generator = torch.Generator().manual_seed(1)
    x, shift, scale = (torch.randn(s, generator=generator) for s in ((2, 1, 6, 8), (1, 1, 1, 8), (1, 1, 1, 8)))
    norm = ModulatedNorm(8, 1e-6)
    fused = norm(x, shift, scale)
    spread = norm(x, shift.expand(2, 1, 1, 8), scale.expand(2, 1, 1, 8))
    torch.testing.assert_close(fused, spread, rtol=0, atol=1e-6)
    torch.testing.assert_close(fused, F.layer_norm(x, (8,), eps=1e-6) * scale + shift, rtol=0, atol=1e-6)


def test_rms_norm_keeps_the_dtype_of_its_input() -> None:
    norm = RMSNorm(8, 1e-6)
    assert norm(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()).dtype == torch.bfloat16


def test_rope_keeps_relative_positions() -> None:
    """The product of a rotated query and key depends on the difference of their positions alone."""
    generator = torch.Generator().manual_seed(2)
    dims = split_rope_dims(16)
    assert dims == (8, 4, 4)
    table = rope_table([torch.arange(4), torch.arange(5), torch.arange(6)], dims)
    assert table.shape == (120, 8)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 120, 1, 16)
    q, k = apply_rope(q, table).view(4, 5, 6, 16), apply_rope(k, table).view(4, 5, 6, 16)
    moved = (q[1, 2, 3] * k[3, 4, 5]).sum(), (q[0, 0, 0] * k[2, 2, 2]).sum()
    torch.testing.assert_close(*moved)
    torch.testing.assert_close(q.norm(dim=-1), q[:1, :1, :1].norm(dim=-1).expand(4, 5, 6))
