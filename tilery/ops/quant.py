"""DeepSeek's 8-bit formats: 128x128 weight blocks and 1x128 groups.

Legend: O outputs, I inputs of a weight; R rows, D columns of an activation.
"""

import torch
from torch import Tensor

from tilery.ops.registry import operator

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BLOCK = 128
SMALLEST_AMAX = 1e-4
"""Scales are computed from at least this amplitude (DeepSeek's clamp), so that an all-zero group has a finite scale."""


def power_of_two_ceil(x: Tensor) -> Tensor:
    """The smallest power of two that is not below x (x > 0, fp32), exactly."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


@operator
def dequantize_blocks(weight_OI: Tensor, scale_inv: Tensor) -> Tensor:
    """e4m3 weight [O, I] with fp32 scales [ceil(O/128), ceil(I/128)] -> fp32 [O, I].

    Despite its name `scale_inv` multiplies. The last block of a dimension may be partial (models_data: kv_a_proj).
    """
    rows, columns = weight_OI.shape
    expected = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scales for a [{rows}, {columns}] weight must be {list(expected)}, got {list(scale_inv.shape)}"
        )
    scale = scale_inv.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight_OI.float() * scale


@operator
def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Float weight [O, I] -> (e4m3 [O, I], fp32 scales [ceil(O/128), ceil(I/128)]), scale = amax / 448 per block."""
    rows, columns = weight_OI.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight_OI.float()
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)).clamp_(min=SMALLEST_AMAX) / E4M3_MAX
    values = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return values.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


@operator
def quantize_groups(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Float [R, D], D a multiple of 128 -> (e4m3 [R, D], fp32 power-of-two scales [R, D/128]) per row and group.

    amax is clamped to at least 1e-4, the scale rounded *up* to a power of two (`scale_fmt: ue8m0`).
    """
    groups = x_RD.float().unflatten(-1, (-1, BLOCK))
    scale = power_of_two_ceil(groups.abs().amax(-1).clamp_(min=SMALLEST_AMAX) / E4M3_MAX)
    values = (groups / scale[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values.flatten(-2), scale
