"""DeepSeek sparse attention's lightning indexer: score every cached key, keep the best k positions.

    score[t, c] = scale[c] * sum_h weight[t, h] * relu(q[t, h] . key[c])

One key head, many query heads (64 of 128), ReLU before the weights; a positive key scale may stand outside. The caller
has folded n_heads^-0.5 * head_dim^-0.5 (and an FP8 query's scale) into the weights. A program keeps all heads of a
token (prefill: of four) on chip while keys pass by, multiplies [keys, 128] x [128, heads], and reduces over heads in
registers: a score is written once, 4 bytes for 16384 floating-point operations. With the keys first the heads of a key
lie in four neighbouring threads; with the heads first they would be spread over all warps.

Keys come as plain rows, as packed FP8 pages (64 tokens: 64 * 128 e4m3 values, then 64 f32 scales, 132 bytes a token),
or as INT8 or FP8 rows with a scale each. A block table leads to them; a list of slots is a block table of pages of 1.

Legend: T query tokens, N indexer heads, D head dim, C context, P blocks of a request, S cache rows or pages, W bytes of
a page, k selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import cache as torch_cache
from tilery.ops import indexer
from tilery.ops.cache import PAGE
from tilery.ops.kernels._common import Index, randn
from tilery.ops.kernels.topk import top_k, top_k_mask, top_k_mask_tile, top_k_pieces
from tilery.tile import Dim, Float, Static, Tensor, TensorRef, Tile, Tolerance, e4m3, f32, i8, i32, u8
from tilery.tile.dtypes import DType
from tilery.tile.schedule import Schedule

T, N, D, C, P, S = Dim("T"), Dim("N", min=1), Dim("D", min=1), Dim("C"), Dim("P", min=1), Dim("S", min=1)
W = Dim("W", min=1, multiple_of=4)

CLOSE = Tolerance(1e-4, 1e-3)
"""Only the order of f32 sums differs."""
TOGETHER = 4
"""Tokens of a program of prefill: with 64 heads each they make the widest product that fits in registers."""
FOLDED = (64 * 128) ** -0.5
"""What the caller folds into the head weights at V3.2's sizes; keeps the benchmarks' scores realistic."""


# ---- helpers on tiles ------------------------------------------------------------------------------------------------


def key_rows(
    keys: TensorRef, scales: TensorRef | None, row: Tile, there: Tile, dim: Any, dtype: DType
) -> tuple[Tile, Tile | None]:
    """(keys [B, D] in the query's dtype, their scales [B] or None) of the cache rows `row`, zero where not `there`."""
    mask = there[:, None]
    pages, width = keys.shape
    if keys.dtype != u8:
        scale = scales.load(row, where=there).to(f32) if scales else None
        plain = keys.view(keys.dtype, [pages, dim], strides=[width, 1])
        return plain.load((row, slice(None)), where=mask).to(dtype), scale
    values = keys.view(e4m3, [pages, PAGE, dim], strides=[width, dim, 1])
    page_scales = keys.view(f32, [pages, PAGE], strides=[width // 4, 1], offset=PAGE * dim // 4)
    page, place = row // PAGE, row % PAGE
    return values.load((page, place, slice(None)), where=mask).to(dtype), page_scales.load((page, place), where=there)


def weigh(products: Tile, weight: Tile) -> Tile:
    """[keys, ..., heads], [..., heads] -> f32 [keys, ...]."""
    return tile.sum(tile.maximum(products, 0).to(f32) * weight, axis=-1)


# ---- references ------------------------------------------------------------------------------------------------------


def _key_matrix(keys: TorchTensor, scales: TorchTensor | None, rows: TorchTensor) -> TorchTensor:
    if keys.dtype == torch.uint8:
        return torch_cache.read_index(keys, rows, torch.float32)
    raw = keys.view(torch.uint8) if keys.element_size() == 1 else keys
    picked = raw[rows.clamp(min=0)].view(keys.dtype).float()
    return picked if scales is None else picked * scales[rows.clamp(min=0)].float()[:, None]


def _decode_reference(
    q: TorchTensor, weights: TorchTensor, keys: TorchTensor, table: TorchTensor, lens: TorchTensor | None,
    key_scale: TorchTensor | None, q_scale: TorchTensor | None, page: int,
) -> TorchTensor:  # fmt: skip
    tokens, context = len(q), table.shape[1] * page
    position = torch.arange(context, device=q.device)
    out = torch.full((tokens, context), float("-inf"), device=q.device)
    for t in range(tokens):
        block = table[t].long()[position // page]
        there = (block >= 0) & (position < (context if lens is None else int(lens[t])))
        matrix = _key_matrix(keys, key_scale, torch.where(there, block * page + position % page, -1))
        weight = weights[t : t + 1].float() if q_scale is None else (weights[t].float() * q_scale[t].float())[None]
        out[t] = indexer.indexer_scores(q[t : t + 1].float(), weight, matrix)[0].masked_fill(~there, float("-inf"))
    return out


# ---- scores for decode -----------------------------------------------------------------------------------------------


def _score_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    if target == "cpu":
        return Schedule(blocks={"run": 64, "kv": 64, "rest": 64})
    return Schedule(blocks={"run": 1024, "kv": 64, "rest": 1024}, warps=4, stages=1)


@tile.kernel(reference=_decode_reference, tolerance=CLOSE, schedule=_score_schedule)
def index_scores(
    q: Tensor[T, N, D, (*Float, e4m3, i8)], weights: Tensor[T, N, Float], keys: Tensor[S, W, (u8, *Float, e4m3, i8)],
    table: Tensor[T, P, Index], lens: Tensor[T, i32] | None = None, key_scale: Tensor[S, Float] | None = None,
    q_scale: Tensor[T, N, Float] | None = None, page: Static[int] = PAGE,
):  # fmt: skip
    """Scores of each token against its own context: [T, P * page] f32, -inf where there is no key.

    q [T, N, D]; weights [T, N], times q_scale [T, N] if given. keys: packed pages [S, 64 * 132] u8, or rows [S, D] of
    q's dtype (float, e4m3, int8), times key_scale [S] if given. Position c lies in row table[t, c // page] * page + c %
    page; table -1 means no block; with `page` 1 the table lists slots. lens [T]: positions from there on do not exist.
    Sources: DeepSeek-V3.2-Exp report and inference code; with int8 PyPTO's lightning_indexer_quant, whose scores differ
    from these by a constant factor and fp16 rounding.
    """
    context = P * page
    out = tile.empty([T, context], f32)
    for t, run in tile.parallel(T, tile.blocks(context, "run")):
        stop = run.start + run.count
        end = tile.maximum(tile.minimum(lens[t], stop), run.start) if lens else stop
        weight = weights[t, :].to(f32) * q_scale[t, :].to(f32) if q_scale else weights[t, :].to(f32)
        query = q[t, :, :].T
        for at in tile.range(tile.blocks(run.start, end, "kv")):
            block = table[t, at.index // page].to(i32)
            there = block >= 0
            key, scale = key_rows(keys, key_scale, block * page + at.index % page, there, D, q.dtype)
            score = weigh(tile.dot(key, query), weight)
            out[t, at] = tile.where(there, score if scale is None else score * scale, float("-inf"))
        for at in tile.range(tile.blocks(end, stop, "rest")):
            out[t, at] = float("-inf")
    return out


def _paged(rand: torch.Generator, tokens: int, pages: int, used: int) -> TorchTensor:
    table = torch.stack([torch.randperm(pages, generator=rand)[:used] for _ in range(tokens)])
    return table.int()


def _packed_pages(rand: torch.Generator, pages: int) -> TorchTensor:
    cache = torch.zeros(pages, PAGE * 132, dtype=torch.uint8)
    torch_cache.write_index(cache, torch.arange(pages * PAGE), randn(rand, pages * PAGE, 128))
    return cache


NONE: dict[str, Any] = {"lens": None, "key_scale": None, "q_scale": None}


@index_scores.case
def packed_pages(rand: torch.Generator) -> dict[str, Any]:
    lens = torch.tensor([70, 64], dtype=torch.int32)
    table = _paged(rand, 2, 4, 2)
    table[1, 1:] = -1
    case = {"q": randn(rand, 2, 4, 128), "weights": randn(rand, 2, 4), "keys": _packed_pages(rand, 4), "table": table}
    return {**case, **NONE, "lens": lens, "page": 64}


@index_scores.case
def slots_of_plain_rows(rand: torch.Generator) -> dict[str, Any]:
    slots = torch.randperm(50, generator=rand)[:42].view(2, 21)[:, :11].contiguous()
    slots[1, 7:] = -1
    case = {"q": randn(rand, 2, 3, 24), "weights": randn(rand, 2, 3), "keys": randn(rand, 50, 24), "table": slots}
    return {**case, **NONE, "page": 1}


@index_scores.case
def int8_rows(rand: torch.Generator) -> dict[str, Any]:
    q = torch.randint(-127, 128, (2, 5, 32), generator=rand).to(torch.int8)
    keys = torch.randint(-127, 128, (32, 32), generator=rand).to(torch.int8)
    weights, key_scale, q_scale = (torch.rand(*shape, generator=rand).half() for shape in ((2, 5), (32,), (2, 5)))
    case = {"q": q, "weights": weights / 1e4, "keys": keys, "table": _paged(rand, 2, 4, 3), "page": 8}
    lens = torch.tensor([24, 9], dtype=torch.int32)
    return {**case, "lens": lens, "key_scale": key_scale, "q_scale": q_scale}


@index_scores.case
def bf16_rows(rand: torch.Generator) -> dict[str, Any]:
    q, keys = randn(rand, 1, 16, 64, dtype=torch.bfloat16), randn(rand, 40, 64, dtype=torch.bfloat16)
    return {"q": q, "weights": randn(rand, 1, 16), "keys": keys, "table": _paged(rand, 1, 5, 4), **NONE, "page": 8}


@index_scores.bench
def packed_64_of_32768(rand: torch.Generator, device: str) -> dict[str, Any]:
    keys = torch.zeros(512, PAGE * 132, dtype=torch.uint8, device=device)
    rows = randn(rand, 512 * PAGE, 128, device=device)
    torch_cache.write_index(keys, torch.arange(512 * PAGE, device=device), rows)
    table = torch.randint(0, 512, (64, 512), generator=rand, device=rand.device).to(device, torch.int32)
    q = randn(rand, 64, 64, 128, dtype=torch.bfloat16, device=device)
    weights = randn(rand, 64, 64, device=device) * FOLDED
    return {"q": q, "weights": weights, "keys": keys, "table": table, **NONE, "page": 64}


# ---- scores for prefill ----------------------------------------------------------------------------------------------


def _prefill_reference(
    q: TorchTensor, weights: TorchTensor, keys: TorchTensor, key_scale: TorchTensor | None, together: int
) -> TorchTensor:
    matrix = keys.float() if key_scale is None else keys.float() * key_scale.float()[:, None]
    scores = indexer.indexer_scores(q.float(), weights, matrix)
    tokens, context = scores.shape
    seen = torch.ones(tokens, context, dtype=torch.bool, device=q.device).tril(context - tokens)
    return scores.masked_fill(~seen, float("-inf"))


def _prefill_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    if target == "cpu":
        return Schedule(blocks={"run": 512, "kv": 64, "rest": 512})
    return Schedule(blocks={"run": 2048, "kv": 64, "rest": 128}, warps=4, stages=3)


@tile.kernel(reference=_prefill_reference, tolerance=CLOSE, schedule=_prefill_schedule)
def index_scores_prefill(
    q: Tensor[T, N, D, (*Float, e4m3, i8)], weights: Tensor[T, N, Float], keys: Tensor[C, D, (*Float, e4m3, i8)],
    key_scale: Tensor[C, Float] | None = None, together: Static[int] = TOGETHER,
):  # fmt: skip
    """Scores of a request's T newest tokens against its C >= T keys: [T, C] f32, -inf past each token's own position.

    q [T, N, D] and keys [C, D] of one dtype; weights [T, N]; key_scale [C] positive. Query t sits at position C - T +
    t. FP8 products are exact and summed in f32, at half of the FP8 units' rate. `together`: tokens of a program, for
    speed alone; more than 1 needs a power of two of heads, at least 4. Source: DeepSeek-V3.2-Exp report.
    """
    out = tile.empty([T, C], f32)
    for n, run in tile.parallel(tile.cdiv(T, together), tile.blocks(C, "run")):
        first, stop = n * together, run.start + run.count
        end = tile.maximum(tile.minimum(first + together + (C - T), stop), run.start)
        t = n if together == 1 else tile.span(first, together)
        queries = q[t, :, :] if together == 1 else q[t, :, :].reshape(together * N, D)
        weight, position = weights[t, :].to(f32), first + (C - T)
        for at in tile.range(tile.blocks(run.start, end, "kv")):
            products = tile.dot(keys[at, :], queries.T)
            scale, place = key_scale[at].to(f32) if key_scale else None, at.index
            if together != 1:
                products = products.reshape(at.extent, together, N)
                scale, place = scale[:, None] if key_scale else None, at.index[:, None] - tile.arange(together)
            score = weigh(products, weight)
            score = score if scale is None else score * scale
            score = tile.where(place <= position, score, float("-inf"))
            out[t, at] = score if together == 1 else score.T
        for at in tile.range(tile.blocks(end, stop, "rest")):
            out[t, at] = float("-inf")
    return out


@index_scores_prefill.case
def chunk(rand: torch.Generator) -> dict[str, Any]:
    q, keys = randn(rand, 5, 4, 16), randn(rand, 21, 16)
    return {"q": q, "weights": randn(rand, 5, 4), "keys": keys, "key_scale": None, "together": 4}


@index_scores_prefill.case
def fp8_prompt(rand: torch.Generator) -> dict[str, Any]:
    q, keys = randn(rand, 9, 8, 32).to(torch.float8_e4m3fn), randn(rand, 9, 32).to(torch.float8_e4m3fn)
    scale = torch.rand(9, generator=rand) + 0.1
    return {"q": q, "weights": randn(rand, 9, 8), "keys": keys, "key_scale": scale, "together": 4}


@index_scores_prefill.case
def three_heads(rand: torch.Generator) -> dict[str, Any]:
    q, keys = randn(rand, 6, 3, 24, dtype=torch.bfloat16), randn(rand, 11, 24, dtype=torch.bfloat16)
    scale = torch.rand(11, generator=rand) + 0.1
    return {"q": q, "weights": randn(rand, 6, 3), "keys": keys, "key_scale": scale, "together": 1}


@index_scores_prefill.bench
def prefill_4096_of_32768(rand: torch.Generator, device: str) -> dict[str, Any]:
    q, keys = (randn(rand, *shape, device=device).to(torch.float8_e4m3fn) for shape in ((4096, 64, 128), (32768, 128)))
    scale = torch.rand(32768, generator=rand, device=rand.device).to(device)
    weights = randn(rand, 4096, 64, device=device) * FOLDED
    return {"q": q, "weights": weights, "keys": keys, "key_scale": scale, "together": TOGETHER}


# ---- selection -------------------------------------------------------------------------------------------------------


@tile.graph
def select_decode(
    q: Tensor[T, N, D, (*Float, e4m3, i8)], weights: Tensor[T, N, Float], keys: Tensor[S, W, (u8, *Float, e4m3, i8)],
    table: Tensor[T, P, Index], lens: Tensor[T, i32] | None, key_scale: Tensor[S, Float] | None,
    q_scale: Tensor[T, N, Float] | None, page: Static[int], k: Static[int], widths: Static[tuple[int, ...]],
):  # fmt: skip
    """Positions [T, k] i32 of each token's k best keys, -1 fill: `index_scores`, then the selection.

    `widths`: `piece_widths(device, P * page, k)`; empty, the selection reads the scores from memory (CPU). Feed the
    positions to `mla_decode` with the MLA cache's own block table.
    """
    scores = index_scores(q, weights, keys, table, lens, key_scale, q_scale, page)
    return top_k_pieces(scores, k, widths, lens) if widths else top_k(scores, k, lens)


@tile.graph
def select_prefill(
    q: Tensor[T, N, D, (*Float, e4m3, i8)], weights: Tensor[T, N, Float], keys: Tensor[C, D, (*Float, e4m3, i8)],
    key_scale: Tensor[C, Float] | None, k: Static[int], width: Static[int] = 0, together: Static[int] = TOGETHER,
):  # fmt: skip
    """Which of the C positions each of the T newest tokens may see: bool [T, C], at most k per row, all visible ones
    where there are no more than k. Arguments as `index_scores_prefill`. `width`: a power of two >= C, at most 16384,
    selects in registers (GPU); 0 from memory.
    """
    scores = index_scores_prefill(q, weights, keys, key_scale, together)
    return top_k_mask_tile(scores, k, width, None) if width else top_k_mask(scores, k, None)
