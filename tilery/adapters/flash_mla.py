"""FlashMLA's entry points over Tilery's kernels: decode over a paged cache, dense or sparse, and sparse prefill.

Legend: B requests, S query tokens of a request, H heads, K chosen rows, P pages of 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilery.adapters.unsupported import Unsupported

LATENT, WIDTH, PAGE, DENSE_HEADS = 512, 576, 64, (16, 32, 64, 128)


@dataclass
class FlashMLASchedMeta:
    """What FlashMLA keeps of its schedule between calls. Tilery plans on the device in each call, so it is empty."""


def get_mla_metadata(*_: Any, **__: Any) -> tuple[FlashMLASchedMeta, None]:
    """(an empty schedule, None), whatever the arguments."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA attention of S newest tokens of each request over the paged cache.

    q: bf16 [B, S, H, 576]. k_cache: bf16 [P, 64, 1, 576], or, with `is_fp8_kvcache`, bytes [P, 64, 1, 656] of any
    one-byte dtype (512 e4m3, 4 fp32 scales, 64 bf16). With `indices` (int32 [B, S, K], page * 64 + offset, -1 for
    none; `topk_length` int32 [B] counts the valid ones from the left) attention is sparse, else it reads
    `cache_seqlens` (int32 [B]) tokens through `block_table` (int32 [B, W]). `attn_sink` fp32 [H] joins the softmax's
    denominator. softmax_scale: 576^-0.5 if None. Returns bf16 [B, S, H, 512] and fp32 log-sum-exp [B, H, S], -inf where
    a query sees nothing.
    Raises `Unsupported` for what Tilery has no kernel for: a second cache, another head_dim_v or page size, a cache
    with gaps, a sparse bf16 cache, dense attention of other than 16, 32, 64 or 128 heads or more than 64 tokens a
    request, dense non-causal attention of several tokens.
    """
    _need(head_dim_v == LATENT, f"head_dim_v {head_dim_v}; only {LATENT}")
    _need(q.shape[-1] == WIDTH, f"queries of {q.shape[-1]}; only {WIDTH}")
    _need(k_cache.shape[1] == PAGE, f"pages of {k_cache.shape[1]} tokens; only {PAGE}")
    extra = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
    _need(all(one is None for one in extra), "a second cache (extra_k_cache)")
    _need(k_cache.is_contiguous(), "a cache that is not contiguous")
    scale = WIDTH**-0.5 if softmax_scale is None else softmax_scale
    q, cache = q.contiguous(), k_cache.flatten(2)
    if is_fp8_kvcache:
        cache = cache.view(torch.uint8)
    if indices is not None:
        from tilery.ops.hopper.sparse_mla import sparse_mla_decode

        _need(is_fp8_kvcache, "a sparse bf16 cache")
        lengths = None if topk_length is None else topk_length[:, None].expand(q.shape[:2]).contiguous()
        out, lse = sparse_mla_decode(q, cache, indices.contiguous(), scale=scale, sink=attn_sink, lengths=lengths)
        return out, lse.transpose(1, 2)
    from tilery.ops.hopper.dense_mla import dense_mla_decode

    _need(block_table is not None and cache_seqlens is not None, "dense attention without block_table, cache_seqlens")
    _need(attn_sink is None and topk_length is None, "attn_sink or topk_length in dense attention")
    _need(q.shape[2] in DENSE_HEADS, f"dense attention of {q.shape[2]} heads; only {DENSE_HEADS}")
    _need(q.shape[1] <= PAGE, f"dense attention of {q.shape[1]} tokens a request; at most {PAGE}")
    _need(causal or q.shape[1] == 1, "dense attention of several tokens that is not causal")
    assert block_table is not None
    assert cache_seqlens is not None
    out, lse = dense_mla_decode(q, cache, block_table, cache_seqlens, scale=scale)
    return out, lse.transpose(1, 2)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    indexer_topk: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sparse prefill: q bf16 [S, H, 576] over kv bf16 [L, 1, 576] at indices int32 [S, 1, K] (-1 or >= L: none).

    Returns bf16 [S, H, 512], None where FlashMLA returns the largest logits (no engine reads them), and the fp32
    log-sum-exp [S, H], -inf where a query sees nothing. `attn_sink` fp32 [H], `topk_length` int32 [S]. Raises
    `Unsupported` for d_v other than 512 and for a log-sum-exp of the first `indexer_topk` rows.
    """
    from tilery.ops.hopper.sparse_prefill import sparse_mla_prefill

    _need(d_v == LATENT, f"d_v {d_v}; only {LATENT}")
    _need(kv.shape[1] == 1, f"{kv.shape[1]} heads of keys; only 1")
    _need(indexer_topk == 0, "indexer_topk")
    there = kept(indices[:, 0], kv.shape[0])
    rows = kv[:, 0].contiguous()
    out, lse = sparse_mla_prefill(q.contiguous(), rows, there, scale=sm_scale, sink=attn_sink, lengths=topk_length)
    return out, None, lse


def kept(indices: Tensor, rows: int) -> Tensor:
    """int32 indices [.., K], dense, -1 for those that name none of `rows` rows: the kernels look for no others."""
    return torch.where(indices < rows, indices, -1).contiguous()


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Unsupported(f"tilery.adapters.flash_mla has no kernel for {what}.")
