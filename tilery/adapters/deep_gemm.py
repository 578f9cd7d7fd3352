"""DeepGEMM's entry points over Tilery's kernels: FP8 products with 1x128 and 128x128 scales, and the indexer's logits.

Operands come as (e4m3 values, fp32 scales), as DeepGEMM takes them on Hopper: activations [M, K] with scales [M, K/128]
in either memory order, weights [N, K] with scales [ceil(N/128), K/128]. Scales need not be powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilery.adapters.unsupported import Unsupported

Quantised = tuple[Tensor, Tensor]
PAGE, HEADS, DIM, ROOM, MOST_NEW = 64, 64, 128, 64, 4


def fp8_gemm_nt(
    a: Quantised, b: Quantised, d: Tensor, c: Tensor | None = None, recipe: Any = None, **options: Any
) -> None:
    """d [M, N] bf16 = a [M, K] @ b [N, K]^T. Raises `Unsupported` for an addend, another recipe or fp32 results."""
    from tilery.ops.hopper.gemm import fp8_gemm

    _plain("fp8_gemm_nt", d, recipe, options)
    _need(c is None, "fp8_gemm_nt with an addend c")
    _dense("fp8_gemm_nt", a, b, d)
    fp8_gemm(a[0], a[1], b[0], b[1], out=d)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Quantised, b: Quantised, d: Tensor, m_indices: Tensor, recipe: Any = None, **options: Any
) -> None:
    """d [M, N] bf16: row m times matrix m_indices[m] of b [G, N, K]; int32, sorted in runs of a multiple of 128 rows
    (`get_mk_alignment_for_contiguous_layout`), -1 where a row is padding."""
    from tilery.ops.hopper.grouped_gemm import fp8_gemm_contiguous

    _plain("m_grouped_fp8_gemm_nt_contiguous", d, recipe, options)
    _dense("m_grouped_fp8_gemm_nt_contiguous", a, b, d)
    fp8_gemm_contiguous(a[0], a[1], b[0], b[1], offsets_of(m_indices, b[0].shape[0]), out=d)


def offsets_of(m_indices: Tensor, groups: int) -> Tensor:
    """int32 [groups + 1], each group's first row, of a group number for every row, sorted; -1 belongs to the group
    before. No synchronisation."""
    sorted_groups = m_indices.cummax(0).values
    return torch.searchsorted(sorted_groups, torch.arange(groups + 1, device=m_indices.device), out_int32=True)


def m_grouped_fp8_gemm_nt_masked(
    a: Quantised, b: Quantised, d: Tensor, masked_m: Tensor, expected_m: int, recipe: Any = None, **options: Any
) -> None:
    """d [G, M, N] bf16: the first masked_m[g] (int32) rows of a [G, M, K] times b [G, N, K]; `expected_m` rows a group
    are what the tiles are chosen for. Other rows of d are undefined, as they are there."""
    from tilery.ops.hopper.grouped_gemm import fp8_gemm_masked

    _plain("m_grouped_fp8_gemm_nt_masked", d, recipe, options)
    _dense("m_grouped_fp8_gemm_nt_masked", a, b, d)
    room = a[0].shape[1]
    _need(room % ROOM == 0, f"m_grouped_fp8_gemm_nt_masked with room for {room} rows; only multiples of {ROOM}")
    fp8_gemm_masked(a[0], a[1], b[0], b[1], masked_m, expected_m, out=d)


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


def fp8_mqa_logits(
    q: Tensor,
    kv: Quantised,
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Tensor:
    """fp32 [S, L]: sum over heads of weights [S, 64] times relu(q [S, 64, 128] . k [L, 128]) times k's scale [L].

    Row s is defined from cu_seq_len_k_start[s] up to cu_seq_len_k_end[s]; with `clean_logits` the rest is -inf.
    Raises `Unsupported` for other heads or dimensions, and for the compressed form (`max_seqlen_k`).
    """
    from tilery.ops.hopper.index_logits import index_logits

    _heads("fp8_mqa_logits", q)
    _need(max_seqlen_k == 0, "fp8_mqa_logits with max_seqlen_k")
    bounds = (cu_seq_len_k_start, cu_seq_len_k_end)
    return index_logits(q, weights.contiguous(), kv[0], kv[1], *bounds, fill=2 if clean_logits else 0)


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """An int32 tensor of DeepGEMM's shape [num_sms + 1, 2]. Tilery plans on the device in each call and ignores it."""
    _need(block_kv == PAGE, f"pages of {block_kv} tokens; only {PAGE}")
    _need(indices is None, "get_paged_mqa_logits_metadata with indices")
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:
    """fp32 [B * next_n, max_context_len] logits of q [B, next_n, 64, 128] over the paged keys.

    kv_cache: bytes [P, 64, 1, 132], a page's 64 x 128 e4m3 values, then its 64 fp32 scales. context_lens: int32 [B], or
    [B, next_n] where query j of a request sees its own number of keys, each one more than the query before.
    weights: fp32 [B * next_n, 64]. What lies past a row's length is -inf with `clean_logits`, else undefined.
    """
    from tilery.ops.hopper.index_logits import index_logits_paged

    _heads("fp8_paged_mqa_logits", q)
    _need(indices is None, "fp8_paged_mqa_logits with indices")
    _need(kv_cache.shape[1] == PAGE, f"pages of {kv_cache.shape[1]} tokens; only {PAGE}")
    _need(q.shape[1] <= MOST_NEW, f"fp8_paged_mqa_logits with {q.shape[1]} tokens a request; at most {MOST_NEW}")
    lengths = context_lens if context_lens.dim() == 1 else context_lens[:, -1].contiguous()
    pages = kv_cache.view(torch.uint8).flatten(1)
    # Our rows are as wide as the block table; what an engine's table has beyond the longest request is not read.
    table = block_table[:, : -(-max_context_len // PAGE)]
    logits = index_logits_paged(
        q.flatten(0, 1), weights.contiguous(), pages, table, lengths, fill=2 if clean_logits else 0
    )
    return logits[:, :max_context_len]


def get_num_sms() -> int:
    """The multiprocessors of the current device; Tilery's kernels use all of them."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows to which a group is padded in the contiguous layout."""
    return 128


def _heads(name: str, q: Tensor) -> None:
    _need(tuple(q.shape[-2:]) == (HEADS, DIM), f"{name} with heads {list(q.shape[-2:])}; only [{HEADS}, {DIM}]")


def _plain(name: str, d: Tensor, recipe: Any, options: dict[str, Any]) -> None:
    """Refuses what changes the meaning; tuning hints and the cast to packed scales (Blackwell's) do not."""
    hints = {"compiled_dims", "disable_ue8m0_cast"}
    unknown = [option for option, value in options.items() if option not in hints and value]
    _need(not unknown, f"{name} with {', '.join(unknown)}")
    _need(recipe is None or tuple(recipe) == (1, 128, 128), f"{name} with recipe {recipe}; only (1, 128, 128)")
    _need(d.dtype == torch.bfloat16, f"{name} with results in {d.dtype}; only bfloat16")


def _dense(name: str, a: Quantised, b: Quantised, d: Tensor) -> None:
    """Refuses layouts and sizes that DeepGEMM takes and the kernels do not."""
    _need(all(x.is_contiguous() for x in (a[0], *b, d)), f"{name} with operands that are not contiguous")
    n, k = b[0].shape[-2:]
    _need(k % DIM == 0 and n % 8 == 0, f"{name} with [N, K] = {[n, k]}; only multiples of [8, {DIM}]")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Unsupported(f"tilery.adapters.deep_gemm has no kernel for {what}.")
