"""Matrix products with weights.

Legend: T tokens, I inputs, O outputs, N heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilery.ops.registry import operator


@operator
def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """y = x @ weight^T: [T, I] x [O, I] -> [T, O]. Operands share a float dtype (or fp32 by bf16
    where `Operators.narrow_weights` says so); sums in fp32."""
    return F.linear(x_TI, weight_OI)


@operator
def heads_linear(x_TNI: Tensor, weight_NIO: Tensor) -> Tensor:
    """One small matrix per head: [T, N, I] x [N, I, O] -> [T, N, O] (the absorbed W_UK and W_UV of MLA)."""
    if x_TNI.shape[0] == 1:
        return torch.bmm(x_TNI.transpose(0, 1), weight_NIO).transpose(0, 1)
    return torch.bmm(x_TNI.transpose(0, 1), weight_NIO).transpose(0, 1).contiguous()
