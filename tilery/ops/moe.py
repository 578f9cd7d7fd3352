"""Mixture of experts: group-limited sigmoid routing and the experts' products.

Legend: T tokens, H hidden, E routed experts, K experts per token, G groups, I expert width.
"""

import torch
from torch import Tensor

from tilery.ops.elementwise import swiglu, swiglu_cpu
from tilery.ops.linear import fitting
from tilery.ops.quant import Weight, widen
from tilery.ops.registry import implementation, operator


@operator
def route_grouped(
    logits_TE: Tensor, bias_E: Tensor, k: int, groups: int, kept_groups: int, normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek's `noaux_tc` gate: (weights [T, K] fp32, experts [T, K] int32).

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
    return weights * factor, experts.int()


@operator
def experts_swiglu(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EIH: Weight, down_EHI: Weight,
    shared: tuple[Weight, Weight] | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = sum_k weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]), e = experts[t, k], plus the shared expert.

    x [T, H]; gate_up [E, 2I, H], gate first; down [E, H, I]; shared: (gate_up [2S, H], down [H, S]) of the expert that
    every token takes with weight 1. Returns [T, H] in x's dtype, sums in fp32.
    """
    out = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for expert in experts_TK.unique().tolist():
        token, slot = torch.where(experts_TK == expert)
        hidden = swiglu(x_TH[token].float() @ widen(gate_up_EIH[expert], torch.float32).T)
        part = hidden @ widen(down_EHI[expert], torch.float32).T
        out.index_add_(0, token, part * weights_TK[token, slot, None].float())
    if shared is not None:
        gate_up, down = (widen(weight, torch.float32) for weight in shared)
        out += swiglu(x_TH.float() @ gate_up.T) @ down.T
    return out.to(x_TH.dtype)


@implementation("experts_swiglu", "dense-or-sorted", "cpu")
def experts_swiglu_cpu(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EIH: Weight, down_EHI: Weight,
    shared: tuple[Weight, Weight] | None = None,
) -> Tensor:  # fmt: skip
    # Few tokens hit most experts anyway and one big product beats many small ones: compute all experts, weigh the
    # unselected by zero. Many tokens: sort by expert, so that each expert's rows are one contiguous product.
    tokens, k = experts_TK.shape
    experts, width = gate_up_EIH.shape[0], gate_up_EIH.shape[1] // 2
    if shared is None:
        out = torch.zeros_like(x_TH)
    else:
        gate_up, down = (fitting(weight, x_TH) for weight in shared)
        out = swiglu_cpu(x_TH @ gate_up.T) @ down.T
    if experts <= 4 * k and tokens <= 48:
        gate_up, down = fitting(gate_up_EIH, x_TH), fitting(down_EHI, x_TH)
        hidden = swiglu_cpu((x_TH @ gate_up.flatten(0, 1).T).view(tokens, experts, 2 * width))
        dense = torch.zeros(tokens, experts, dtype=x_TH.dtype).scatter_(1, experts_TK.long(), weights_TK.to(x_TH.dtype))
        hidden = hidden.mul_(dense[:, :, None]).transpose(0, 1)
        return out.add_(torch.bmm(hidden, down.transpose(1, 2)).sum(0))
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    token = order // k
    weights = weights_TK.flatten()[order, None].to(x_TH.dtype)
    rows = x_TH[token]
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        span = slice(start, start + count)
        hidden = swiglu_cpu(rows[span] @ fitting(gate_up_EIH[expert], x_TH).T).mul_(weights[span])
        out.index_add_(0, token[span], hidden @ fitting(down_EHI[expert], x_TH).T)
        start += count
    return out
