"""Top-k with a stated tie rule.

Legend: R rows, L candidates, K winners.
"""

import torch
from torch import Tensor

from tilery.ops.registry import implementation, operator


@operator
def top_k_positions(scores_RL: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores of each row: [R, L] fp32 -> [R, min(k, L)] int64.

    Tie rule: of equal scores the lowest position wins, so the chosen *set* does not depend on shapes or on the order of
    summation elsewhere (exact-zero ties are common in the indexer: sums of ReLUs). A position whose score is -inf is
    never chosen: -1 stands in its place. The order within a row is not specified. NaN is not allowed.
    """
    k = min(k, scores_RL.shape[1])
    values, positions = torch.sort(scores_RL, dim=1, descending=True, stable=True)
    return torch.where(values[:, :k] == float("-inf"), -1, positions[:, :k])


@implementation("top_k_positions", "select-then-repair", "cpu")
def top_k_positions_cpu(scores_RL: Tensor, k: int) -> Tensor:
    # torch.topk is several times faster than a sort but breaks ties as it likes: only rows with a tie *at the boundary*
    # are sorted again.
    rows, length = scores_RL.shape
    if k >= length:
        every = torch.arange(length, device=scores_RL.device).expand(rows, length)
        return torch.where(scores_RL == float("-inf"), -1, every)
    values, positions = torch.topk(scores_RL, k, dim=1, sorted=False)
    boundary = values.amin(1)
    tied = (scores_RL >= boundary[:, None]).sum(1) > k
    tied &= boundary > float("-inf")
    positions = torch.where(values == float("-inf"), -1, positions)
    if tied.any():
        positions[tied] = top_k_positions(scores_RL[tied], k)
    return positions
