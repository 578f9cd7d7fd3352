"""Quantisation kernels: formats spelled out, and messages."""

import pytest
import torch

from tests.ops.kernels.support import gen
from tilery.ops.kernels import quantize
from tilery.tile import f32
from tilery.tile.errors import LaunchError


def test_low_nibble_comes_first_and_is_signed():
    packed = torch.full((1, 64), 0xF7, dtype=torch.uint8)
    w = quantize.dequantize_int4_groups.interpret(packed, torch.tensor([[0.5]]), f32)
    assert w[0, :2].tolist() == [3.5, -0.5]


def test_int8_rows_come_back_within_half_a_step():
    x = torch.randn(9, 200, generator=gen()) * 7
    q, s = quantize.quantize_int8_rows.interpret(x)
    assert float(((q.float() * s[:, None] - x).abs() / s[:, None]).max()) <= 0.501
    assert q.abs().max() == 127


def test_scales_of_another_size():
    weight = torch.zeros(130, 128).to(torch.float8_e4m3fn)
    with pytest.raises(LaunchError, match=r"scale_inv.shape\[0\] must be .* = 2, got 1"):
        quantize.dequantize_fp8_blocks.interpret(weight, torch.ones(1, 1), f32)


def test_width_of_whole_groups():
    with pytest.raises(LaunchError, match="dimension D must be a multiple of 128, got 100"):
        quantize.quantize_fp8_groups.interpret(torch.zeros(2, 100))
