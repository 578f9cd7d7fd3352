"""Mixture of experts: group-limited sigmoid routing and the experts' products.

Legend: T tokens, H hidden, E routed experts, K experts per token, G groups, I expert width.
"""

import torch
from torch import Tensor

from tilery.ops.elementwise import swiglu, swiglu_cpu
from tilery.ops.registry import implementation, operator


@operator
def route_grouped(
    logits_TE: Tensor, bias_E: Tensor, k: int, groups: int, kept_groups: int, normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek's `noaux_tc` gate: (weights [T, K] fp32, experts [T, K] int64).

    s = sigmoid(logits), in fp32; choice = s + bias. A group scores the sum of its two best choices; the best
    `kept_groups` groups stay, the rest drop out; the k best choices win (lowest expert id on equal choice). Weights are
    the winners' s, *without* bias, divided by their sum + 1e-20 if `normalize`, times `factor`. Needs at least two
    experts per group when there is more than one group. Source: DeepSeek-V3 report, section 2.1.2; transformers.
    """
    score = logits_TE.float().sigmoid()
    choice = score + bias_E
    if groups > 1 and kept_groups < groups:
        group_score = choice.unflatten(1, (groups, -1)).topk(2, dim=2).values.sum(2)
        kept = group_score.topk(kept_groups, dim=1, sorted=False).indices
        dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
        choice = choice.masked_fill(dropped.repeat_interleave(choice.shape[1] // groups, dim=1), float("-inf"))
    experts = choice.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = score.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * factor, experts


@operator
def experts_swiglu(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EIH: Tensor, down_HEI: Tensor
) -> Tensor:
    """y[t] = sum_k weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]) with e = experts[t, k].

    x [T, H]; gate_up [E, 2I, H], gate first; down [H, E * I], expert e in columns e*I .. (e+1)*I. Returns [T, H] in
    x's dtype.
    """
    width = gate_up_EIH.shape[1] // 2
    out = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for expert in experts_TK.unique().tolist():
        token, slot = torch.where(experts_TK == expert)
        hidden = swiglu(x_TH[token].float() @ gate_up_EIH[expert].float().T)
        part = hidden @ down_HEI[:, expert * width : (expert + 1) * width].float().T
        out.index_add_(0, token, part * weights_TK[token, slot, None].float())
    return out.to(x_TH.dtype)


@implementation("experts_swiglu", "dense-or-sorted", "cpu")
def experts_swiglu_cpu(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EIH: Tensor, down_HEI: Tensor
) -> Tensor:
    # Few tokens hit most experts anyway and one big product beats many small ones: compute all experts, weigh the
    # unselected by zero. Many tokens: sort by expert, so that each expert's rows are one contiguous product.
    tokens, k = experts_TK.shape
    experts, width = gate_up_EIH.shape[0], gate_up_EIH.shape[1] // 2
    if experts <= 4 * k and tokens <= 48:
        hidden = swiglu_cpu((x_TH @ gate_up_EIH.flatten(0, 1).T).view(tokens, experts, 2 * width))
        dense = torch.zeros(tokens, experts, dtype=x_TH.dtype).scatter_(1, experts_TK, weights_TK.to(x_TH.dtype))
        return hidden.mul_(dense[:, :, None]).flatten(1) @ down_HEI.T
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    token = order // k
    weights = weights_TK.flatten()[order, None].to(x_TH.dtype)
    rows = x_TH[token]
    out = torch.zeros_like(x_TH)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        span = slice(start, start + count)
        hidden = swiglu_cpu(rows[span] @ gate_up_EIH[expert].T).mul_(weights[span])
        out.index_add_(0, token[span], hidden @ down_HEI[:, expert * width : (expert + 1) * width].T)
        start += count
    return out
