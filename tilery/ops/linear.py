"""Matrix products with weights.

A weight is a tensor of the activations' dtype. Where `Operators.narrow_weights` says so it may also be bf16 beside fp32
activations, or a `BlockWeight`.

Legend: T tokens, I inputs, O outputs, N heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilery.ops.quant import Weight, widen
from tilery.ops.registry import operator


def fitting(weight: Weight, x: Tensor) -> Tensor:
    """A weight that torch multiplies with `x`."""
    return weight if isinstance(weight, Tensor) and weight.dtype == x.dtype else widen(weight, x.dtype)


@operator
def linear(x_TI: Tensor, weight_OI: Weight) -> Tensor:
    """y = x @ weight^T: [T, I] x [O, I] -> [T, O] in x's dtype; sums in fp32."""
    return F.linear(x_TI, fitting(weight_OI, x_TI))


@operator
def heads_linear(x_TNI: Tensor, weight_NOI: Weight) -> Tensor:
    """y = x @ weight^T for each head: [T, N, I] x [N, O, I] -> [T, N, O] (the values of MLA, from its latent)."""
    y = torch.bmm(x_TNI.transpose(0, 1), fitting(weight_NOI, x_TNI).transpose(1, 2))
    return y.transpose(0, 1).contiguous()


@operator
def heads_absorb(x_TNO: Tensor, weight_NOI: Weight, out_TNI: Tensor) -> None:
    """out = x @ weight for each head: [T, N, O] x [N, O, I] -> [T, N, I] (queries of MLA, absorbed into the latent).

    `out` may be a view of something wider.
    """
    out_TNI.copy_(torch.bmm(x_TNO.transpose(0, 1), fitting(weight_NOI, x_TNO)).transpose(0, 1))
