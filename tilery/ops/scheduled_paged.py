"""Attention and selection over paged caches: torch in batches, the tile language, Hopper's kernels.

"batched" (any device) gathers rows and multiplies in fp32, a slice of tokens at a time. "tile" reads rows where they
lie; packed ones are e4m3, which GPUs have from compute capability 8.9 on: before, torch takes them. "hopper" (sm_90)
hands what is not a kernel's over to the tile language, which takes all that the contracts allow.
Imports: the operators' module; the kernels when they are first called.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from tilery.ops import paged, tiled
from tilery.ops.cache import PAGE, read_mla
from tilery.ops.indexer import WORKSPACE_BYTES
from tilery.ops.paged import (
    DIM,
    KEY_PAGE,
    LATENT,
    PACKED,
    check_dense,
    check_keys,
    check_pages,
    check_sparse,
    check_varlen,
    ends_of,
    key_pages,
    requests_of,
    scores_for,
    select_by,
    select_paged_by,
    share,
    slices,
)
from tilery.ops.quant import E4M3
from tilery.ops.registry import Platform, implementation
from tilery.ops.scheduled import HEADS, MOST, _no_hopper
from tilery.ops.scheduled_products import _knows_fp8
from tilery.ops.topk import top_k_positions_cpu

INDEX_HEADS = (16, 32, 64)
MOST_TOKENS, MOST_INDEX_TOKENS = 64, 4
"""Newest tokens of a request that Hopper's kernels take, of attention and of the indexer."""
MOST_BYTES = 1 << 33
"""Of an indexer cache whose words 32 bits count."""
LOG2E = math.log2(math.e)
PROGRAMS = 256
"""How many programs fill a GPU."""


def _batched(of: str) -> Any:
    return implementation(of, "batched", "any", rank=10)


def _before_e4m3(platform: Platform) -> str | None:
    if platform.device == "cuda" and re.fullmatch(r"sm_([1-7]\d|8[0-8])", platform.isa):
        return f"needs compute capability 8.9 (sm_89) for e4m3, this is {platform.isa}"
    return tiled._unavailable(platform)


def _tiled_e4m3(of: str) -> Any:
    return implementation(of, "tile", "any", rank=20, unavailable=_before_e4m3)


def _hopper(of: str) -> Any:
    return implementation(of, "hopper", "cuda", rank=30, unavailable=_no_hopper)


# ---- torch: attention ------------------------------------------------------------------------------------------------


def _mix(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension of scores [n, R, K] fp32 (-inf: not seen), times values [n, K, V]."""
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
    return torch.bmm(weights, values), lse


def _attend_batched(
    q_THD: Tensor, rows: Tensor, slots_TK: Tensor, scale: float, sink: Tensor | None, out_THL: Tensor, lse_TH: Tensor
) -> None:
    """Attention over the rows `slots` (-1: none), which are gathered."""
    width = slots_TK.shape[1] if len(rows) else 0
    if not width:
        out_THL.zero_()
        lse_TH.fill_(float("-inf"))
    for some in slices(len(q_THD), 4 * DIM * width, WORKSPACE_BYTES):
        slots = slots_TK[some]
        hole = slots < 0
        kept = read_mla(rows, slots.flatten().long(), LATENT, torch.float32).view(len(slots), width, DIM)
        kept = kept.masked_fill(hole[..., None], 0.0)
        scores = torch.bmm(q_THD[some].float(), kept.transpose(1, 2)).mul_(scale)
        values, sums = _mix(scores.masked_fill_(hole[:, None], float("-inf")), kept[..., :LATENT])
        out_THL[some], lse_TH[some] = (values * share(sums, sink)[..., None]).to(out_THL.dtype), sums


@_batched("dense_mla_decode")
def dense_mla_decode_batched(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows, out, lse = check_dense(q, cache, block_table, lengths, scale, out)
    step, position = q.shape[1], torch.arange(block_table.shape[1] * PAGE, device=q.device)
    for b in range(len(q)):
        slots = block_table[b].repeat_interleave(PAGE) * PAGE + position % PAGE
        hidden = position >= ends_of(lengths[b : b + 1], step)[:, None]
        _attend_batched(q[b], rows, torch.where(hidden, -1, slots), scale, None, out[b], lse[b])
    return out, lse


def _named(indices: Tensor, lengths: Tensor | None) -> Tensor:
    """[.., K] -> [T, K]: -1 from each token's length on."""
    if lengths is not None:
        past = torch.arange(indices.shape[-1], device=indices.device) >= lengths[..., None]
        indices = indices.masked_fill(past, -1)
    return indices.flatten(0, -2)


def _sparse_batched(
    q: Tensor, cache: Tensor, indices: Tensor, *, scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, out: Tensor | None = None, name: str = "cache",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, out, lse = check_sparse(q, cache, indices, scale, sink, lengths, out, name)
    slots = _named(indices, lengths)
    _attend_batched(q.flatten(0, -3), rows, slots, scale, sink, out.flatten(0, -3), lse.flatten(0, -2))
    return out, lse


@_batched("sparse_mla_decode")
def sparse_mla_decode_batched(q: Tensor, cache: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return _sparse_batched(q, cache, indices, **options)


@_batched("sparse_mla_prefill")
def sparse_mla_prefill_batched(q: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    paged.check_flat(q, kv)
    return _sparse_batched(q, kv, indices, name="kv", **options)


@_batched("mha_prefill_varlen")
def mha_prefill_varlen_batched(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, out: Tensor | None = None,
    starts: Tensor | None = None, longest: int | None = None, longest_keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Waits for the device, to see where requests begin."""
    out, lse = check_varlen(q, k, v, scale, causal, out, starts, longest, longest_keys)
    out.zero_()
    lse.fill_(float("-inf"))
    for own, keys in requests_of(starts, len(q), len(k)):
        queries, context, heads = own.stop - own.start, keys.stop - keys.start, q.shape[1]
        keys_HDC, values_HCV = k[keys].float().permute(1, 2, 0), v[keys].float().transpose(0, 1)
        for some in slices(queries, 4 * heads * context, WORKSPACE_BYTES):
            rows = slice(own.start + some.start, own.start + some.stop)
            scores = torch.bmm(q[rows].float().transpose(0, 1), keys_HDC).mul_(scale)
            if causal:
                last = torch.arange(some.start, some.stop, device=q.device) + (context - queries)
                hidden = torch.arange(context, device=q.device) > last[:, None]
                scores.masked_fill_(hidden, float("-inf"))
            mixed, sums = _mix(scores, values_HCV)
            out[rows], lse[rows] = mixed.transpose(0, 1).to(out.dtype), sums.T
    return out, lse


# ---- torch: scores and selection -------------------------------------------------------------------------------------


@_batched("index_logits")
def index_logits_batched(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor,
    out: Tensor | None = None, *, fill: int = 2,
) -> Tensor:  # fmt: skip
    check_keys(q, weights, keys, key_scales, starts, ends)
    out = scores_for(out, len(q), len(keys), fill, q)
    position, wide = torch.arange(len(keys), device=q.device), keys.float().T
    for some in slices(len(q), 4 * q.shape[1] * len(keys), WORKSPACE_BYTES):
        products = (q[some].float().flatten(0, 1) @ wide).relu_().view(-1, q.shape[1], len(keys))
        scores = torch.bmm(weights[some, None], products)[:, 0] * key_scales
        outside = (position < starts[some, None]) | (position >= ends[some, None])
        out[some] = scores.masked_fill_(outside, float("-inf"))
    return out


@_batched("index_logits_paged")
def index_logits_paged_batched(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None, *,
    fill: int = 2, limits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    step = check_pages(q, weights, cache, block_table, lengths)
    width = block_table.shape[1] * PAGE
    out = scores_for(out, len(q), width, fill, q)
    ends = _ends(lengths, step, limits)
    if not len(cache):
        return out.fill_(float("-inf"))
    position = torch.arange(width, device=q.device)
    first = torch.arange(block_table.shape[1], device=q.device) * PAGE
    for some in slices(len(block_table), 4 * (step * q.shape[1] + paged.KEY) * width, WORKSPACE_BYTES):
        rows, count = slice(some.start * step, some.stop * step), some.stop - some.start
        pages = torch.where(first < lengths[some, None], block_table[some], -1).clamp(min=0)
        keys, scales = key_pages(cache, pages.flatten())
        queries = q[rows].float().view(count, -1, paged.KEY)
        products = torch.bmm(queries, keys.float().view(count, width, -1).transpose(1, 2)).relu_()
        scores = torch.bmm(weights[rows, None], products.view(count * step, -1, width))[:, 0].view(count, step, width)
        scores = (scores * scales.view(count, 1, width)).view(-1, width)
        out[rows] = scores.masked_fill_(position >= ends[rows, None], float("-inf"))
    return out


def _ends(lengths: Tensor, step: int, limits: Tensor | None) -> Tensor:
    """Where each row's keys end; also into `limits`."""
    ends = ends_of(lengths, step)
    if limits is not None:
        paged.require("limits", limits, paged.INT32, len(ends))
        limits.copy_(ends)
    return ends


@_batched("index_select")
def index_select_batched(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return select_by(index_logits_batched, top_k_positions_cpu, q, weights, keys, key_scales, starts, ends, k, out)


@_batched("index_select_paged")
def index_select_paged_batched(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    score, choose = index_logits_paged_batched, top_k_positions_cpu
    return select_paged_by(score, choose, q, weights, cache, block_table, lengths, k, out)


# ---- tile language ---------------------------------------------------------------------------------------------------


def _splits(q_THD: Tensor, width: int) -> int:
    """Programs that share a token's rows: a power of two, so that few tokens fill a GPU too."""
    heads = q_THD.shape[1]
    programs = max(1, len(q_THD) * -(-heads // (64 if heads > 16 else 16)))
    most = min(32, PROGRAMS // programs, width // PAGE) if q_THD.is_cuda else 1
    return 1 << (max(most, 1).bit_length() - 1)


def _attend_tiled(
    q_THD: Tensor, rows: Tensor, slots: Tensor | None, table: Tensor | None, lens: Tensor | None, scale: float,
    sink: Tensor | None, out_THL: Tensor, lse_TH: Tensor,
) -> None:  # fmt: skip
    """Attention over rows as `ops.kernels.attention.mla_decode` finds them."""
    from tilery.ops.kernels import attention
    from tilery.tile.dtypes import BY_TORCH

    if slots is not None:
        width = slots.shape[1]
    else:
        assert table is not None
        width = table.shape[1] * PAGE
    if not q_THD.shape[:2].numel() or not width or not len(rows):
        out_THL.zero_()
        lse_TH.fill_(float("-inf"))
        return
    splits = _splits(q_THD, width)
    part, weight = attention.mla_partial(q_THD, rows, slots, table, lens, LATENT, scale, splits, PAGE)
    lse_TH.copy_(torch.logsumexp(weight / LOG2E, 1))
    kind = BY_TORCH[out_THL.dtype if sink is None else torch.float32]
    values = part[:, 0] if splits == 1 else attention.mla_combine(part, weight, kind)
    out_THL.copy_(values if sink is None else values * share(lse_TH, sink)[..., None])


def _torch_takes(cache: Tensor) -> bool:
    return cache.dtype is torch.uint8 and cache.is_cuda and not _knows_fp8(cache.device)


@tiled.tiled("dense_mla_decode")
def dense_mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if _torch_takes(cache):
        return dense_mla_decode_batched(q, cache, block_table, lengths, scale=scale, out=out)
    rows, out, lse = check_dense(q, cache, block_table, lengths, scale, out)
    step = q.shape[1]
    table = tiled._rows(block_table if step == 1 else block_table.repeat_interleave(step, 0))
    lens = ends_of(lengths, step).clamp_(min=0)
    _attend_tiled(q.flatten(0, 1), rows, None, table, lens, scale, None, out.flatten(0, 1), lse.flatten(0, 1))
    return out, lse


def _sparse_tiled(
    q: Tensor, cache: Tensor, indices: Tensor, *, scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, out: Tensor | None = None, name: str = "cache",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _torch_takes(cache):
        return _sparse_batched(q, cache, indices, scale=scale, sink=sink, lengths=lengths, out=out, name=name)
    rows, out, lse = check_sparse(q, cache, indices, scale, sink, lengths, out, name)
    slots = _named(indices, lengths)
    flat = (out.flatten(0, -3), lse.flatten(0, -2))
    _attend_tiled(q.flatten(0, -3), rows, slots, None, None, scale, sink, *flat)
    return out, lse


@tiled.tiled("sparse_mla_decode")
def sparse_mla_decode(q: Tensor, cache: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return _sparse_tiled(q, cache, indices, **options)


@tiled.tiled("sparse_mla_prefill")
def sparse_mla_prefill(q: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    paged.check_flat(q, kv)
    return _sparse_tiled(q, kv, indices, name="kv", **options)


@_tiled_e4m3("index_logits")
def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor,
    out: Tensor | None = None, *, fill: int = 2,
) -> Tensor:  # fmt: skip
    """Scores keys before a range too, to be hidden afterwards."""
    check_keys(q, weights, keys, key_scales, starts, ends)
    out = scores_for(out, len(q), len(keys), fill, q)
    if not out.numel() or not q.shape[1]:
        return out.fill_(float("-inf"))
    from tilery.ops.kernels.indexer import index_scores

    pages = torch.arange(-(-len(keys) // PAGE), dtype=torch.int32, device=q.device)
    scores = index_scores(q, weights, keys, pages.expand(len(q), -1), ends, key_scales, None, PAGE)[:, : len(keys)]
    before = torch.arange(len(keys), device=q.device) < starts[:, None]
    return out.copy_(scores.masked_fill_(before, float("-inf")))


@_tiled_e4m3("index_logits_paged")
def index_logits_paged(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None, *,
    fill: int = 2, limits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    step = check_pages(q, weights, cache, block_table, lengths)
    out = scores_for(out, len(q), block_table.shape[1] * PAGE, fill, q)
    ends = _ends(lengths, step, limits)
    if not out.numel() or not q.shape[1] or not len(cache):
        return out.fill_(float("-inf"))
    from tilery.ops.kernels.indexer import index_scores

    table = tiled._rows(block_table if step == 1 else block_table.repeat_interleave(step, 0))
    return out.copy_(index_scores(q, weights, cache, table, ends, None, None, PAGE))


def _choose(scores: Tensor, k: int) -> Tensor:
    k = min(k, scores.shape[1])
    if k > MOST:
        return top_k_positions_cpu(scores, k)
    from tilery.ops.kernels.topk import top_k_fast

    return top_k_fast(scores, k)


@_tiled_e4m3("index_select")
def index_select(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return select_by(index_logits, _choose, q, weights, keys, key_scales, starts, ends, k, out)


@_tiled_e4m3("index_select_paged")
def index_select_paged(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return select_paged_by(index_logits_paged, _choose, q, weights, cache, block_table, lengths, k, out)


# ---- Hopper ----------------------------------------------------------------------------------------------------------


def _plain(*tensors: Tensor) -> bool:
    """Whether all are dense and begin where Hopper's copies of tiles can."""
    return all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)


def _fits_mla(q: Tensor, rows: Tensor, out: Tensor | None, scale: float) -> bool:
    bf16 = torch.bfloat16
    right = q.dtype is bf16 and (out is None or out.dtype is bf16) and rows.dtype in (bf16, torch.uint8)
    shapes = q.dim() > 2 and q.shape[-1] == DIM and q.shape[-2] in HEADS and rows.numel() > 0 and scale > 0
    return right and shapes and _plain(q, rows, *(() if out is None else (out,)))


@_hopper("dense_mla_decode")
def dense_mla_decode_hopper(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shapes = q.dim() == 4 and q.shape[1] <= MOST_TOKENS and block_table.dim() == 2 and block_table.shape[1] > 0
    if not shapes or block_table.stride(1) != 1 or not _fits_mla(q, cache, out, scale):
        return dense_mla_decode(q, cache, block_table, lengths, scale=scale, out=out)
    from tilery.ops.hopper import dense_mla

    return dense_mla.dense_mla_decode(q, cache, block_table, lengths, scale=scale, out=out)


@_hopper("sparse_mla_decode")
def sparse_mla_decode_hopper(
    q: Tensor, cache: Tensor, indices: Tensor, *, scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options: dict[str, Any] = {"scale": scale, "sink": sink, "lengths": lengths, "out": out}
    packed = cache.dtype is torch.uint8 and cache.shape[-1] == PACKED
    if not packed or not indices.numel() or not _fits_mla(q, cache, out, scale):
        return sparse_mla_decode(q, cache, indices, **options)
    from tilery.ops.hopper import sparse_mla

    return sparse_mla.sparse_mla_decode(q, cache, indices, **options)


@_hopper("sparse_mla_prefill")
def sparse_mla_prefill_hopper(
    q: Tensor, kv: Tensor, indices: Tensor, *, scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options: dict[str, Any] = {"scale": scale, "sink": sink, "lengths": lengths, "out": out}
    if q.dim() != 3 or kv.dim() != 2 or not indices.numel() or not _fits_mla(q, kv, out, scale):
        return sparse_mla_prefill(q, kv, indices, **options)
    from tilery.ops.hopper import sparse_prefill

    return sparse_prefill.sparse_mla_prefill(q, kv, indices, **options)


@_hopper("mha_prefill_varlen")
def mha_prefill_varlen_hopper(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, out: Tensor | None = None,
    starts: Tensor | None = None, longest: int | None = None, longest_keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "out": out, "starts": starts, "longest": longest, "longest_keys": longest_keys
    }  # fmt: skip
    given = (q, k, v) if out is None else (q, k, v, out)
    fits = all(x.dtype is torch.bfloat16 for x in given) and q.dim() == v.dim() == 3 and _plain(*given)
    if not fits or (q.shape[2], v.shape[2]) != (192, 128) or not q.numel() or not k.numel():
        return mha_prefill_varlen_batched(q, k, v, **options)
    from tilery.ops.hopper import prefill

    return prefill.mha_prefill(q, k, v, **options)


def _fits_index(q: Tensor, *others: Tensor) -> bool:
    return q.dtype is E4M3 and q.dim() == 3 and q.shape[1] in INDEX_HEADS and _plain(q, *others)


def _fits_pages(q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor) -> bool:
    if block_table.dim() != 2 or not block_table.numel() or block_table.stride(1) != 1 or not cache.numel():
        return False
    few = 0 < len(q) <= MOST_INDEX_TOKENS * len(block_table) and len(cache) * KEY_PAGE < MOST_BYTES
    return few and _fits_index(q, weights, cache)


@_hopper("index_logits")
def index_logits_hopper(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor,
    out: Tensor | None = None, *, fill: int = 2,
) -> Tensor:  # fmt: skip
    if not _fits_index(q, weights, keys, key_scales):
        return index_logits(q, weights, keys, key_scales, starts, ends, out, fill=fill)
    from tilery.ops.hopper import index_logits as kernels

    return kernels.index_logits(q, weights, keys, key_scales, starts, ends, out, fill=fill)


@_hopper("index_logits_paged")
def index_logits_paged_hopper(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None, *,
    fill: int = 2, limits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options: dict[str, Any] = {"fill": fill, "limits": limits}
    if not _fits_pages(q, weights, cache, block_table):
        return index_logits_paged(q, weights, cache, block_table, lengths, out, **options)
    from tilery.ops.hopper import index_logits as kernels

    return kernels.index_logits_paged(q, weights, cache, block_table, lengths, out, **options)


@_hopper("index_select")
def index_select_hopper(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, starts: Tensor, ends: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if k > MOST or not _fits_index(q, weights, keys, key_scales):
        return index_select(q, weights, keys, key_scales, starts, ends, k, out)
    from tilery.ops.hopper import index_select as kernels

    return kernels.index_select(q, weights, keys, key_scales, starts, ends, k, out)


@_hopper("index_select_paged")
def index_select_paged_hopper(
    q: Tensor, weights: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, k: int = 2048,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if k > MOST or not _fits_pages(q, weights, cache, block_table):
        return index_select_paged(q, weights, cache, block_table, lengths, k, out)
    from tilery.ops.hopper import index_select as kernels

    return kernels.index_select_paged(q, weights, cache, block_table, lengths, k, out)
