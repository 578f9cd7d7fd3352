"""What a CUDA device runs beside the tile language: hand-scheduled Hopper kernels (`ops.hopper`), and torch in batches.

Implementations named "hopper" are for compute capability 9.0; where the shapes are not a kernel's, they hand over to
the next best. Selection without a Hopper GPU is torch's products and the tile language's top-k.

Selection stays so on Hopper: `index_select` and `index_select_paged` take e4m3 queries, and the contracts of
`select_decode` and `select_prefill` speak of the queries as they are; rounding them would choose other keys. What calls
them has quantised its queries itself. `scheduled_products` and `scheduled_paged` have the rest.
Imports: the operators' modules; the kernels when they are first called.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from tilery.ops import attention, indexer, tiled
from tilery.ops.registry import Platform, implementation

PACKED = 656
"""Bytes of the cache row that the attention kernels read: 512 e4m3, 4 fp32 scales, 64 bf16."""
LATENT, ROPE, HEADS = 512, 64, (16, 32, 64, 128)
MOST = 2048
"""The most winners that the top-k kernels keep."""


def _no_triton(platform: Platform) -> str | None:
    return None if importlib.util.find_spec("triton") else "needs the triton package"


def _no_hopper(platform: Platform) -> str | None:
    if not platform.isa.startswith("sm_90"):
        return f"needs compute capability 9.0 (sm_90), this is {platform.isa}"
    return _no_triton(platform)


# ---- selection -------------------------------------------------------------------------------------------------------


@implementation("top_k_positions", "tile", "cuda", rank=20, unavailable=_no_triton)
def top_k_positions(scores_RL: Tensor, k: int) -> Tensor:
    from tilery.ops.kernels.topk import top_k_fast

    k = min(k, scores_RL.shape[1])
    if not 0 < k <= MOST:
        return indexer.top_k_positions(scores_RL, k)
    return top_k_fast(scores_RL.float(), k).long()


@implementation("select_decode", "batched-gather", "cuda", rank=10, unavailable=_no_triton)
def select_decode(q_TND: Tensor, weight_TN: Tensor, cache: Tensor, slots_TC: Tensor, k: int) -> Tensor:
    tokens, context = slots_TC.shape
    keys = tiled.read_index(cache, slots_TC.clamp(min=0).reshape(-1), q_TND.dtype).view(tokens, context, -1)
    products = torch.bmm(q_TND, keys.transpose(1, 2)).relu_()
    scores = torch.bmm(weight_TN[:, None].float(), products.float())[:, 0]
    scores.masked_fill_(slots_TC < 0, float("-inf"))
    chosen = top_k_positions(scores, k)
    return torch.where(chosen < 0, -1, slots_TC.gather(1, chosen.clamp(min=0)))


@implementation("select_prefill", "sliced", "cuda", rank=10, unavailable=_no_triton)
def select_prefill(q_TND: Tensor, weight_TN: Tensor, keys_CD: Tensor, k: int) -> Tensor:
    return indexer.select_prefill_by(q_TND, weight_TN, keys_CD, k, indexer.scores_by_products, top_k_positions)


# ---- attention -------------------------------------------------------------------------------------------------------


@implementation("mla_decode", "hopper", "cuda", rank=30, unavailable=_no_hopper)
def mla_decode(q_TND: Tensor, cache: Tensor, slots_TK: Tensor, latent: int, scale: float) -> Tensor:
    if _plain(q_TND, cache, latent) and slots_TK.shape[1]:
        from tilery.ops.hopper.sparse_prefill import sparse_mla_prefill

        indices = slots_TK.to(torch.int32).contiguous()
        return sparse_mla_prefill(q_TND.contiguous(), cache, indices, scale=scale)[0]
    fits = cache.dtype is torch.uint8 and cache.shape[1] == PACKED and latent == LATENT and cache.is_contiguous()
    if not fits or q_TND.dtype is not torch.bfloat16 or q_TND.shape[1] not in HEADS or not slots_TK.shape[1]:
        return tiled.mla_decode(q_TND, cache, slots_TK, latent, scale)
    from tilery.ops.hopper.sparse_mla import sparse_mla_decode

    q = q_TND.contiguous()[:, None]
    rows = cache.view(-1, 1, PACKED)
    indices = slots_TK.to(torch.int32)[:, None].contiguous()
    return sparse_mla_decode(q, rows, indices, scale=scale)[0][:, 0]


def _plain(q_TND: Tensor, cache: Tensor, latent: int) -> bool:
    """Whether the rows are bf16 and of the width that the kernel for plain rows reads."""
    shapes = q_TND.shape[2] == cache.shape[1] == LATENT + ROPE and latent == LATENT and q_TND.shape[1] in HEADS
    aligned = (q_TND.data_ptr() | cache.data_ptr()) % 16 == 0
    return shapes and q_TND.dtype is cache.dtype is torch.bfloat16 and cache.is_contiguous() and aligned


@implementation("mha_prefill", "hopper", "cuda", rank=30, unavailable=_no_hopper)
def mha_prefill(q_TND: Tensor, k_CND: Tensor, v_CNV: Tensor, allowed_TC: Tensor | None, scale: float) -> Tensor:
    shapes = (q_TND.shape[2], v_CNV.shape[2]) == (192, 128)
    if allowed_TC is not None or not shapes or q_TND.dtype is not torch.bfloat16:
        return attention.mha_prefill_sdpa(q_TND, k_CND, v_CNV, allowed_TC, scale)
    from tilery.ops.hopper import prefill

    q, k, v = (x.contiguous() for x in (q_TND, k_CND, v_CNV))
    return prefill.mha_prefill(q, k, v, scale=scale)[0]
