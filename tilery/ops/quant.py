"""DeepSeek's 8-bit formats: 128x128 weight blocks and 1x128 groups.

Legend: O outputs, I inputs of a weight; R rows, D columns of an activation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK, device=weight_OI.device)
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


@dataclass(frozen=True)
class BlockWeight:
    """An FP8 matrix that stays as the checkpoint stores it: a quarter of the bytes of fp32, and exactly its numbers.

    `values` e4m3 [..., O, I], `scale` fp32 [..., O, ceil(I / 128)]: one per row, so that rows of several matrices can
    be stacked, sliced and viewed as heads like those of a tensor. Indices and shapes speak of all dimensions but the
    last. Operators that multiply by weights take it where a tensor is expected.
    """

    values: Tensor
    scale: Tensor

    @staticmethod
    def of(values: Tensor, scale_inv: Tensor) -> BlockWeight:
        """From a checkpoint's pair: e4m3 [O, I], fp32 [ceil(O/128), ceil(I/128)]."""
        return BlockWeight(values, scale_inv.float().repeat_interleave(BLOCK, 0)[: values.shape[0]].contiguous())

    @functools.cached_property
    def addresses(self) -> tuple[int, int]:
        """Of the numbers and the scales, for C."""
        return self.values.data_ptr(), self.scale.data_ptr()

    @functools.cached_property
    def dense(self) -> bool:
        return self.values.is_contiguous()

    @functools.cached_property
    def heads(self) -> tuple[int, int] | None:
        """Of [N, O, I]: how far heads lie apart (numbers, scales); None if a head is not dense in itself."""
        dense = self.values[0].is_contiguous() and self.scale[0].is_contiguous()
        return (self.values.stride(0), self.scale.stride(0)) if dense else None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def float(self) -> Tensor:
        """Dequantised, fp32."""
        scale = self.scale.repeat_interleave(BLOCK, -1)[..., : self.values.shape[-1]]
        return self.values.float() * scale

    def new_empty(self, *shape: int) -> BlockWeight:
        blocks = -(-shape[-1] // BLOCK)
        return BlockWeight(self.values.new_empty(shape), self.scale.new_empty(*shape[:-1], blocks))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> BlockWeight:
        return BlockWeight(self.values.unflatten(dim, sizes), self.scale.unflatten(dim, sizes))

    def __getitem__(self, index: Any) -> BlockWeight:
        return BlockWeight(self.values[index], self.scale[index])

    def __setitem__(self, index: Any, weight: BlockWeight) -> None:
        self.values[index], self.scale[index] = weight.values, weight.scale


Weight = Tensor | BlockWeight
"""What operators multiply by."""


def widen(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a tensor of `dtype`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.float().to(dtype)


def stack_rows(weights: Sequence[Weight]) -> Weight:
    """One matrix of the rows of several. Where only some are FP8, those are widened to the dtype of the others."""
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    if tensors:
        return torch.cat([widen(weight, tensors[0].dtype) for weight in weights])
    blocks = [weight for weight in weights if isinstance(weight, BlockWeight)]
    return BlockWeight(torch.cat([w.values for w in blocks]), torch.cat([w.scale for w in blocks]))
