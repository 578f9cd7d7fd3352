"""Normalisation, activation and rotary position embedding.

Legend: T tokens, H hidden (last dimension of any size), N heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilery.ops.registry import implementation, operator


@operator
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., H] float, weight [H]; computed in fp32, returned in x's dtype. Source: Zhang & Sennrich 2019.
    """
    x = x_TH.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (y * weight_H.float()).to(x_TH.dtype)


@implementation("rms_norm", "fused", "cpu")
def rms_norm_cpu(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    if x_TH.dtype != torch.float32:
        return rms_norm(x_TH, weight_H, eps)
    # One reduction instead of square + mean: |x| / sqrt(H) is the root mean square.
    norm = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True)
    scale = norm.square_().mul_(1.0 / x_TH.shape[-1]).add_(eps).rsqrt_()
    return (x_TH * scale).mul_(weight_H)


@operator
def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) of sum = residual + x, rounded to their dtype before the norm. New tensors."""
    total = residual_TH + x_TH
    return rms_norm(total, weight_H, eps), total


@implementation("add_rms_norm", "fused", "cpu")
def add_rms_norm_cpu(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual_TH + x_TH
    return rms_norm_cpu(total, weight_H, eps), total


@operator
def layer_norm(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    """LayerNorm with weight and bias over the last dimension, computed in fp32, returned in x's dtype.

    The indexer's key norm is this and not RMSNorm (DeepSeek-V3.2-Exp inference code).
    """
    return F.layer_norm(x_TH.float(), weight_H.shape, weight_H.float(), bias_H.float(), eps).to(x_TH.dtype)


@operator
def swiglu(gate_up_TI: Tensor) -> Tensor:
    """silu(gate) * up for [..., 2I] -> [..., I]; gate is the first half. Products in fp32."""
    gate, up = gate_up_TI.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up_TI.dtype)


@implementation("swiglu", "fused", "cpu")
def swiglu_cpu(gate_up_TI: Tensor) -> Tensor:
    if gate_up_TI.dtype != torch.float32:
        return swiglu(gate_up_TI)
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@operator
def rope_interleaved(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates pairs (2i, 2i+1) of the last dimension: MLA's rotary embedding.

    x [T, N, D] or [T, D]; cos, sin [T, D/2] fp32. Computed in fp32, returned in x's dtype, new tensor.
    """
    cos, sin = (cos_TD[:, None], sin_TD[:, None]) if x_TND.dim() == 3 else (cos_TD, sin_TD)
    pairs = x_TND.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_TND.dtype)


@operator
def rope_half_split(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates pairs (i, i + D/2) of the last dimension: the indexer's rotary embedding (not interleaved).

    x [T, N, D] or [T, D]; cos, sin [T, D/2] fp32. Computed in fp32, returned in x's dtype, new tensor.
    Source: DeepSeek-V3.2-Exp inference code with the fix of 2025-11-17; the interleaved form selects wrong tokens.
    """
    cos, sin = (cos_TD[:, None], sin_TD[:, None]) if x_TND.dim() == 3 else (cos_TD, sin_TD)
    first, second = x_TND.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TND.dtype)
