"""DeepSeek sparse attention's lightning indexer: score every cached key, keep the best k.

score[t, c] = sum_h weight[t, h] * relu(q[t, h] . key[c]), ReLU before the weights; the caller has folded
n_heads^-0.5 * head_dim^-0.5 into the weights. One selection per query token, shared by all attention heads.
Source: DeepSeek-V3.2-Exp report and inference code.

Legend: T query tokens, N indexer heads, D indexer head dim, C context length, K selected.
"""

import torch
from torch import Tensor

from tilery.ops.cache import read_index, read_index_cpu
from tilery.ops.registry import implementation, operator
from tilery.ops.topk import top_k_positions, top_k_positions_cpu

WORKSPACE_BYTES = 16 << 20
"""Scores of one slice of queries, all heads, in fp32, stay below this."""


@operator
def indexer_scores(q_TND: Tensor, weight_TN: Tensor, keys_CD: Tensor) -> Tensor:
    """[T, N, D], [T, N] fp32, [C, D] -> [T, C] fp32, without any causal mask."""
    products = torch.einsum("tnd,cd->tnc", q_TND.float(), keys_CD.float())
    return torch.einsum("tn,tnc->tc", weight_TN.float(), products.relu())


@operator
def select_decode(q_TND: Tensor, weight_TN: Tensor, cache: Tensor, slots_TC: Tensor, k: int) -> Tensor:
    """Selects each token's k best cache rows out of its own context.

    slots [T, C] int64: the context's rows in order of position, -1 past its end. Returns slots [T, min(k, C)], -1
    where the context has fewer than k. Tie rule: the lowest position wins.
    """
    rows = []
    for q, weight, slots in zip(q_TND, weight_TN, slots_TC):
        keys = read_index(cache, slots, torch.float32)
        scores = indexer_scores(q[None], weight[None], keys).masked_fill(slots < 0, float("-inf"))
        chosen = top_k_positions(scores, k)[0]
        rows.append(torch.where(chosen < 0, -1, slots[chosen]))
    return torch.stack(rows)


@implementation("select_decode", "batched-gather", "cpu")
def select_decode_cpu(q_TND: Tensor, weight_TN: Tensor, cache: Tensor, slots_TC: Tensor, k: int) -> Tensor:
    tokens, context = slots_TC.shape
    keys = read_index_cpu(cache, slots_TC.reshape(-1), q_TND.dtype).view(tokens, context, -1)
    products = torch.bmm(q_TND, keys.transpose(1, 2)).relu_()
    scores = torch.bmm(weight_TN[:, None].to(products.dtype), products)[:, 0].float()
    scores.masked_fill_(slots_TC < 0, float("-inf"))
    chosen = top_k_positions_cpu(scores, k)
    return torch.where(chosen < 0, -1, slots_TC.gather(1, chosen.clamp(min=0)))


@operator
def select_prefill(q_TND: Tensor, weight_TN: Tensor, keys_CD: Tensor, k: int) -> Tensor:
    """Selects for the T newest tokens of a context of C keys which k positions, up to its own, each may see.

    Returns a bool mask [T, C]; rows with at most k visible positions allow them all. Tie rule: the lowest position
    wins.
    """
    return select_prefill_by(q_TND, weight_TN, keys_CD, k, indexer_scores, top_k_positions)


@implementation("select_prefill", "sliced", "cpu")
def select_prefill_cpu(q_TND: Tensor, weight_TN: Tensor, keys_CD: Tensor, k: int) -> Tensor:
    return select_prefill_by(q_TND, weight_TN, keys_CD, k, scores_by_products, top_k_positions_cpu)


def scores_by_products(q_TND: Tensor, weight_TN: Tensor, keys_CD: Tensor) -> Tensor:
    """`indexer_scores` as two matrix products in q's dtype."""
    tokens, heads, _ = q_TND.shape
    products = (q_TND.reshape(tokens * heads, -1) @ keys_CD.to(q_TND.dtype).T).relu_().view(tokens, heads, -1)
    return torch.bmm(weight_TN[:, None].to(products.dtype), products)[:, 0].float()


def select_prefill_by(q_TND: Tensor, weight_TN: Tensor, keys_CD: Tensor, k: int, score, choose) -> Tensor:
    """`select_prefill` with `score` for `indexer_scores` and `choose` for `top_k_positions`, a slice of queries at a
    time."""
    tokens, heads, _ = q_TND.shape
    context = keys_CD.shape[0]
    first = context - tokens
    position = torch.arange(context, device=q_TND.device)
    allowed = position <= torch.arange(first, context, device=q_TND.device)[:, None]
    start = min(max(0, k - first), tokens)  # queries at positions below k see everything
    step = max(1, WORKSPACE_BYTES // (4 * heads * context))
    while start < tokens:
        stop = min(start + step, tokens)
        visible = first + stop  # keys past the slice's last query need no score
        scores = score(q_TND[start:stop], weight_TN[start:stop], keys_CD[:visible])
        scores = scores.masked_fill(~allowed[start:stop, :visible], float("-inf"))
        chosen = choose(scores, k)
        allowed[start:stop] = False
        allowed[start:stop].scatter_(1, chosen, True)
        start = stop
    return allowed
