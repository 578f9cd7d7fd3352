"""8-bit formats: scales exactly, values within half a step of e4m3."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import FEW, draw, seeds
from tilery.ops.quant import dequantize_blocks, power_of_two_ceil, quantize_blocks, quantize_groups

HALF_STEP = 2.0**-4
"""e4m3 has 3 bits of mantissa: a rounded normal number is off by at most 1/16 of itself."""


@given(st.floats(2.0**-120, 2.0**120, width=32))
def test_power_of_two_ceil_is_exact(x):
    expected = 2.0 ** (math.frexp(x)[1] - (math.frexp(x)[0] == 0.5))
    assert expected >= x > expected / 2
    assert power_of_two_ceil(torch.tensor([x])).item() == expected


def test_power_of_two_ceil_around_powers():
    powers = 2.0 ** torch.arange(-126, 127)
    assert torch.equal(power_of_two_ceil(powers), powers)
    above = torch.nextafter(powers, torch.full_like(powers, math.inf))
    assert torch.equal(power_of_two_ceil(above), powers * 2)
    assert torch.equal(power_of_two_ceil(torch.nextafter(powers[1:], torch.zeros(252))), powers[1:])


@FEW
@given(seeds, st.integers(1, 300), st.integers(1, 300), st.floats(1e-3, 1e3))
def test_blocks_round_trip_with_partial_blocks(seed, rows, columns, size):
    weight = draw(seed)(rows, columns) * size
    values, scale = quantize_blocks(weight)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (-(-rows // 128), -(-columns // 128)))
    back = dequantize_blocks(values, scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            span = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            assert torch.isclose(scale[i, j], weight[span].abs().max().clamp(min=1e-4) / 448)
            # Below 2^-6 steps are constant: 2^-9 of the scale.
            bound = (weight[span].abs() * HALF_STEP * 1.001).clamp(min=scale[i, j].item() * 2.0**-10 * 1.001)
            assert ((back[span] - weight[span]).abs() <= bound).all()
            assert torch.equal(back[span], values[span].float() * scale[i, j])


def test_dequantise_refuses_scales_of_another_shape():
    with pytest.raises(ValueError, match=r"^scales for a \[130, 128\] weight must be \[2, 1\], got \[1, 1\]$"):
        dequantize_blocks(torch.zeros(130, 128).to(torch.float8_e4m3fn), torch.ones(1, 1))


@FEW
@given(seeds, st.integers(1, 9), st.integers(1, 4), st.floats(1e-6, 1e4))
def test_groups(seed, rows, groups, size):
    x = draw(seed)(rows, groups * 128) * size
    values, scale = quantize_groups(x)
    amax = x.unflatten(1, (groups, 128)).abs().amax(-1).clamp(min=1e-4)
    assert torch.equal(scale, power_of_two_ceil(scale)), "scales are powers of two"
    assert (scale >= amax / 448).all()
    assert (scale < amax / 448 * 2).all()
    back = values.float().unflatten(1, (groups, 128)) * scale[..., None]
    bound = (x.unflatten(1, (groups, 128)).abs() * HALF_STEP).maximum(scale[..., None] * 2.0**-10)
    assert ((back - x.unflatten(1, (groups, 128))).abs() <= bound).all()


def test_an_all_zero_group_has_a_finite_scale():
    values, scale = quantize_groups(torch.zeros(1, 128))
    assert (values.float() == 0).all()
    assert scale.item() == 2.0 ** math.ceil(math.log2(1e-4 / 448))
