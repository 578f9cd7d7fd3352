"""Norms: ragged sizes, exact scales, layouts, and messages."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery import tile
from tilery.ops import elementwise, quant
from tilery.ops.kernels import norm
from tilery.ops.kernels._common import fp8_scale
from tilery.tile import Dim, Tensor, f32
from tilery.tile.errors import LaunchError


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("width", [1, 3, 64, 192])
def test_rms_norm_of_any_size(tokens, width):
    x, w = torch.randn(tokens, width, generator=gen(tokens)), torch.randn(width, generator=gen(width))
    close(norm.rms_norm.interpret(x, w, 1e-6), elementwise.rms_norm(x, w, 1e-6))


def test_residual_equals_addition_then_norm():
    x, r = (torch.randn(5, 96, generator=gen(s)).bfloat16() for s in (1, 2))
    w = torch.rand(96, generator=gen(3)) + 0.5
    y, total = norm.rms_norm_residual.interpret(x, r, w, 1e-6)
    assert torch.equal(total, x + r)
    assert torch.equal(y, norm.rms_norm.interpret(total, w, 1e-6))


def test_scales_are_exact_powers_of_two_at_the_boundary():
    """amax = 448 * 2^k needs the scale 2^k, the next float 2^(k+1); `quant.quantize_groups` says the same."""
    n = Dim("n")

    @tile.kernel
    def scales(x: Tensor[n, f32]):
        s, i = tile.empty([n], f32), tile.empty([n], f32)
        for b in tile.parallel(tile.blocks(n, "b")):
            s[b], i[b] = fp8_scale(x[b])
        return s, i

    exact = 448.0 * torch.exp2(torch.arange(-20, 20).float())
    inf = torch.tensor(float("inf"))
    x = torch.cat((exact, torch.nextafter(exact, inf), torch.nextafter(exact, -inf), torch.rand(999, generator=gen())))
    x = torch.cat((x, torch.zeros(1)))
    s, inverse = scales.interpret(x)
    assert torch.equal(s, quant.power_of_two_ceil(x.clamp(min=quant.SMALLEST_AMAX) / 448.0))
    assert torch.equal(s * inverse, torch.ones_like(s))


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_column_major_scales_are_the_row_major_ones(tokens):
    x, w = torch.randn(tokens, 256, generator=gen()).bfloat16(), torch.ones(256)
    q, s = norm.rms_norm_quant.interpret(x, w)
    q2, s2 = norm.rms_norm_quant.interpret(x, w, column_major=True)
    assert s2.shape == (2, -(-tokens // 4) * 4)
    assert torch.equal(s2.T[:tokens], s)
    assert torch.equal(q.float(), q2.float())


def test_width_of_whole_groups():
    with pytest.raises(
        LaunchError, match=r"rms_norm_quant: x.shape\[1\]: dimension H must be a multiple of 128, got 192"
    ):
        norm.rms_norm_quant.interpret(torch.randn(2, 192), torch.ones(192))


def test_weight_of_another_width():
    with pytest.raises(LaunchError, match=r"weight.shape\[0\] is H = 32, but x.shape\[1\] says H = 64"):
        norm.rms_norm.interpret(torch.randn(2, 64), torch.ones(32))
