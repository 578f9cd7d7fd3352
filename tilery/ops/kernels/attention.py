"""Attention over the latent cache: absorbed for decode, un-absorbed for prefill.

Absorbed (DeepSeek-V2 report, section 2.1.2): a cache row is a latent c (512) and a rotated key r (64), shared by all
heads; the query is q W_UK (512) next to its rotated part (64). Keys are whole rows, values their latent part:

    s = (q_c . c + q_r . r) * scale,    out = sum_i softmax(s)_i * c_i          [T, N, L], before W_UV

One pass over the rows, online softmax in powers of two (Milakov and Gimelshein 2018), with s in units of log 2:

    m' = max(m, max s),  p = 2^(s - m'),  l' = l 2^(m - m') + sum p,  acc' = acc 2^(m - m') + p c

A program holds a block of heads of one token and walks over blocks of rows: products of [heads, 512] x [512, rows] and
[heads, rows] x [rows, 512]. Latent and rope part are multiplied apart, so that every extent is a power of two. With few
tokens the rows are split among programs, each of which leaves acc / l and m + log2 l; `mla_combine` joins them.

A row is found by its slot, by a position and the block table, or by counting up to the context's length; it is stored
plain, as FP8 with power-of-two scales, or as INT8 (`row_parts`). Rows that a hole (-1) stands for are never read.

Legend: T query tokens, N heads, K rows a query reads, C context, P blocks of a request, S cache rows, W bytes or
elements of a row, L latent, R rope, D = L + R (absorbed) or nope + R, V value dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import attention
from tilery.ops import cache as torch_cache
from tilery.ops.kernels._common import GROUP, Index, randn
from tilery.tile import Dim, Float, Static, Tensor, TensorRef, Tile, Tolerance, b1, bf16, e4m3, f32, i8, i32, u8
from tilery.tile.dtypes import DType
from tilery.tile.schedule import Schedule

LOG2E = math.log2(math.e)
T, N, K, P, S = Dim("T"), Dim("N", min=1), Dim("K", min=1), Dim("P", min=1), Dim("S", min=1)
C, D, W, V, X = Dim("C"), Dim("D", min=1), Dim("W", multiple_of=4), Dim("V", min=1), Dim("X", min=1)

CLOSE = Tolerance(5e-3, 0.01)
"""One step of bf16 around 1, as weights are rounded to the operands' dtype; f32 operands come within 1e-5."""


# ---- helpers on tiles ------------------------------------------------------------------------------------------------


def row_parts(cache: TensorRef, row: Tile, there: Tile, latent: int, rope: Any, dtype: DType) -> tuple[Tile, Tile]:
    """(latent [B, L], rope [B, R]) of the cache rows `row` [B] in `dtype`, zero where not `there`.

    float cache [S, L + R]: as it is. u8: L e4m3 values, L/128 f32 scales, R bf16 (656 bytes). i8: L int8 values, R
    bf16, L/128 f32 scales (656 bytes).
    """
    mask = there[:, None]
    if cache.dtype not in (u8, i8):
        return (
            cache.load((row, slice(0, latent)), where=mask).to(dtype),
            cache.load((row, slice(latent, latent + rope)), where=mask).to(dtype),
        )
    rows, width = cache.shape
    groups = latent // GROUP
    scale_at, rope_at = (latent, latent + 4 * groups) if cache.dtype == u8 else (latent + 2 * rope, latent)
    values = cache.view(e4m3 if cache.dtype == u8 else i8, [rows, latent], strides=[width, 1])
    scales = cache.view(f32, [rows, groups], strides=[width // 4, 1], offset=scale_at // 4)
    ropes = cache.view(bf16, [rows, rope], strides=[width // 2, 1], offset=rope_at // 2)
    value = values.load((row, slice(None)), where=mask).to(f32).reshape(row.shape[0], groups, GROUP)
    scaled = value * scales.load((row, slice(None)), where=mask)[:, :, None]
    return scaled.reshape(row.shape[0], latent).to(dtype), ropes.load((row, slice(None)), where=mask).to(dtype)


def locate(slots: TensorRef | None, table: TensorRef | None, t: Tile, at: Any, page: int) -> tuple[Tile, Tile]:
    """(cache row, bool whether there is one) of the positions `at` of token t's list or context."""
    place = slots[t, at].to(i32) if slots else at.index
    if table is None:
        return place, place >= 0
    there = place >= 0
    block = table.load((t, tile.maximum(place, 0) // page), where=there, other=-1)
    return block * page + place % page, there & (block >= 0)


def step(scores: Tile, values: Tile, m: Tile, total: Tile, acc: Tile) -> tuple[Tile, Tile, Tile]:
    """One block of the online softmax: scores [B, C] in units of log 2 (-inf: not seen), values [C, L]."""
    top = tile.maximum(m, tile.max(scores, axis=1))
    base = tile.where(top == float("-inf"), 0.0, top)
    p, shrink = tile.exp2(scores - base[:, None]), tile.exp2(m - base)
    acc = tile.dot(p.to(values.dtype), values, acc * shrink[:, None])
    return top, total * shrink + tile.sum(p, axis=1), acc


# ---- references ------------------------------------------------------------------------------------------------------


def unpack_int8_rows(cache: TorchTensor, latent: int) -> TorchTensor:
    """int8 [S, W] -> f32 [S, L + R]: L int8 values, R bf16, L/128 f32 scales (PyPTO's sparse_attention_antiquant)."""
    tail = 4 * (latent // GROUP)
    scale = cache[:, cache.shape[1] - tail :].contiguous().view(torch.float32)
    rope = cache[:, latent : cache.shape[1] - tail].contiguous().view(torch.bfloat16).float()
    values = (cache[:, :latent].float().unflatten(1, (-1, GROUP)) * scale[..., None]).flatten(1)
    return torch.cat((values, rope), dim=1)


def pack_int8_rows(rows: TorchTensor, latent: int) -> TorchTensor:
    """f32 [S, L + R] -> int8 [S, W], as `unpack_int8_rows` reads it; scale = amax / 127 per group of 128."""
    groups = rows[:, :latent].unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2).clamp(min=1e-4) / 127
    values = (groups / scale[..., None]).round().to(torch.int8).flatten(1)
    return torch.cat((values, rows[:, latent:].bfloat16().view(torch.int8), scale.view(torch.int8)), dim=1)


def _rows_of(
    slots: TorchTensor | None, table: TorchTensor | None, lens: TorchTensor | None, page: int, device: torch.device
) -> TorchTensor:
    """[T, K] cache rows, -1 where there is none."""
    if slots is None:
        assert table is not None
        assert lens is not None
        width = int(lens.max()) if lens.numel() else 0
        slots = torch.arange(width, device=device).expand(len(lens), width)
        slots = torch.where(slots < lens[:, None], slots, -1)
    if table is None:
        return slots.long()
    block = table.long().gather(1, slots.clamp(min=0).long() // page)
    return torch.where((slots < 0) | (block < 0), -1, block * page + slots.long() % page)


def _mla_reference(
    q: TorchTensor, cache: TorchTensor, slots: TorchTensor | None, table: TorchTensor | None, lens: TorchTensor | None,
    latent: int, scale: float, page: int,
) -> TorchTensor:  # fmt: skip
    rows = _rows_of(slots, table, lens, page, q.device)
    if not rows.numel():
        return torch.zeros(*q.shape[:2], latent, dtype=q.dtype, device=q.device)
    plain = unpack_int8_rows(cache, latent) if cache.dtype == torch.int8 else cache
    out = attention.mla_decode(q, plain, rows, latent, scale)
    return out.masked_fill((rows < 0).all(1)[:, None, None], 0.0)


# ---- decode ----------------------------------------------------------------------------------------------------------


def _decode_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """On a GPU the accumulator [heads, 512] takes half of the registers: these blocks of rows fit without spills."""
    if target == "cpu":  # few heads of one token: two programs, or a second core has nothing to do
        alone = env.get("T", 2) <= 1 and env.get("N", 128) <= 16
        return Schedule(blocks={"head": 8 if alone else 16, "kv": 32})
    if env.get("N", 128) > 16:
        return Schedule(blocks={"head": 64, "kv": 16}, warps=8, stages=2)
    return Schedule(blocks={"head": 16, "kv": 32}, warps=4, stages=2)


@tile.kernel(reference=_mla_reference, tolerance=CLOSE, schedule=_decode_schedule)
def mla_decode(
    q: Tensor[T, N, D, Float], cache: Tensor[S, W, (u8, i8, *Float)], slots: Tensor[T, K, Index] | None,
    table: Tensor[T, P, i32] | None, lens: Tensor[T, i32] | None, latent: Static[int], scale: float,
    page: Static[int] = 64,
):  # fmt: skip
    """Absorbed attention of q [T, N, L + R] over cache rows -> [T, N, L] in q's dtype.

    Which rows: `slots` [T, K] alone: those cache rows, -1 means none there; `slots` and `table`: positions whose block
    `table[t, position // page]` holds them; `table` and `lens`: all positions below lens[t]. A token without any row
    gives zeros. cache: see `row_parts`; W, a packed row's bytes, is a multiple of 4. scale multiplies the scores.
    Softmax in f32. Source: DeepSeek-V2 report, section 2.1.2; V3.2-Exp for the chosen rows.
    """
    out = tile.empty([T, N, latent], q.dtype)
    for t, head in tile.parallel(T, tile.blocks(N, "head")):
        q_latent, q_rope = q[t, head, 0:latent], q[t, head, latent:D]
        m, total = tile.full([head.extent], float("-inf"), f32), tile.zeros([head.extent], f32)
        acc = tile.zeros([head.extent, latent], f32)
        for at in tile.range(tile.blocks(lens[t] if lens else K, "kv")):
            row, there = locate(slots, table, t, at, page)
            key, rope = row_parts(cache, row, there, latent, D - latent, q.dtype)
            scores = tile.dot(q_rope, rope.T, tile.dot(q_latent, key.T)) * (scale * LOG2E)
            m, total, acc = step(tile.where(there[None, :], scores, float("-inf")), key, m, total, acc)
        out[t, head, :] = (acc / tile.where(total == 0.0, 1.0, total)[:, None]).to(q.dtype)
    return out


def _plain_cache(rand: torch.Generator, slots: int, latent: int, rope: int, kind: torch.dtype) -> TorchTensor:
    rows = randn(rand, slots, latent + rope)
    if kind == torch.int8:
        return pack_int8_rows(rows, latent)
    if kind != torch.uint8:
        return rows.to(kind)
    cache = torch.zeros(slots, torch_cache.packed_mla_bytes(latent, rope), dtype=torch.uint8)
    torch_cache.write_mla(cache, torch.arange(slots), rows[:, :latent], rows[:, latent:])
    return cache


def _chosen(rand: torch.Generator, tokens: int, width: int, below: int, holes: int) -> TorchTensor:
    slots = torch.stack([torch.randperm(below, generator=rand)[:width] for _ in range(tokens)])
    for t in range(tokens):
        slots[t, torch.randperm(width, generator=rand)[:holes]] = -1
    return slots


def _decode_case(
    rand: torch.Generator,
    kind: torch.dtype,
    latent: int = 128,
    rope: int = 8,
    heads: int = 2,
    tokens: int = 2,
    **given: Any,
) -> dict[str, Any]:
    cache = _plain_cache(rand, 40, latent, rope, kind)
    q = randn(rand, tokens, heads, latent + rope)
    empty = {"slots": None, "table": None, "lens": None}
    return {"q": q, "cache": cache, **empty, "latent": latent, "scale": 0.1, "page": 8, **given}


def _table(rand: torch.Generator, tokens: int) -> TorchTensor:
    return torch.stack([torch.randperm(5, generator=rand) for _ in range(tokens)]).int()


@mla_decode.case
def plain_slots(rand: torch.Generator) -> dict[str, Any]:
    return _decode_case(rand, torch.float32, latent=16, slots=_chosen(rand, 2, 13, 40, 5))


@mla_decode.case
def fp8_slots(rand: torch.Generator) -> dict[str, Any]:
    return _decode_case(rand, torch.uint8, latent=256, slots=_chosen(rand, 2, 14, 40, 11))


@mla_decode.case
def int8_positions(rand: torch.Generator) -> dict[str, Any]:
    return _decode_case(rand, torch.int8, slots=_chosen(rand, 2, 11, 40, 2).int(), table=_table(rand, 2))


@mla_decode.case
def dense_ragged(rand: torch.Generator) -> dict[str, Any]:
    lens = torch.tensor([19, 0], dtype=torch.int32)
    return _decode_case(rand, torch.uint8, table=_table(rand, 2), lens=lens)


@mla_decode.case
def bf16_many_heads(rand: torch.Generator) -> dict[str, Any]:
    case = _decode_case(rand, torch.bfloat16, latent=64, rope=16, heads=18, slots=_chosen(rand, 2, 9, 40, 0))
    return {**case, "q": case["q"].bfloat16()}


@mla_decode.case
def no_tokens(rand: torch.Generator) -> dict[str, Any]:
    return _decode_case(rand, torch.float32, latent=16, tokens=0, slots=torch.empty(0, 4, dtype=torch.int64))


def _v32(rand: torch.Generator, device: str, tokens: int, context: int = 32768) -> dict[str, Any]:
    cache = torch.zeros(max(tokens, 4) * context // 4, 656, dtype=torch.uint8, device=device)
    for start in range(0, len(cache), 65536):
        rows = randn(rand, min(65536, len(cache) - start), 576, device=device)
        at = torch.arange(start, start + len(rows), device=device)
        torch_cache.write_mla(cache, at, rows[:, :512], rows[:, 512:])
    slots = torch.stack([torch.randperm(len(cache), generator=rand, device=rand.device)[:2048] for _ in range(tokens)])
    q = randn(rand, tokens, 128, 576, dtype=torch.bfloat16, device=device)
    rest = {"table": None, "lens": None, "latent": 512, "scale": 192**-0.5, "page": 64}
    return {"q": q, "cache": cache, "slots": slots.int().to(device), **rest}


@mla_decode.bench
def sparse_fp8_64(rand: torch.Generator, device: str) -> dict[str, Any]:
    return _v32(rand, device, 64)


# ---- decode, rows split among programs -------------------------------------------------------------------------------


def _partial_reference(
    q: TorchTensor, cache: TorchTensor, slots: TorchTensor | None, table: TorchTensor | None, lens: TorchTensor | None,
    latent: int, scale: float, splits: int, page: int,
) -> tuple[TorchTensor, TorchTensor]:  # fmt: skip
    rows = _rows_of(slots, table, lens, page, q.device)
    plain = unpack_int8_rows(cache, latent) if cache.dtype == torch.int8 else cache
    count = lens.long() if lens is not None else torch.full((len(q),), rows.shape[1], device=q.device)
    part = torch.zeros(len(q), splits, q.shape[1], latent, device=q.device)
    weight = torch.full((len(q), splits, q.shape[1]), float("-inf"), device=q.device)
    for t in range(len(q)):
        for j in range(splits):
            own = rows[t, int(count[t]) * j // splits : int(count[t]) * (j + 1) // splits]
            own = own[own >= 0]
            if own.numel():
                kept = torch_cache.read_mla(plain, own, latent, torch.float32)
                scores = q[t].float() @ kept.T * scale
                part[t, j] = scores.softmax(1) @ kept[:, :latent]
                weight[t, j] = scores.logsumexp(1) * LOG2E
    return part, weight


@tile.kernel(reference=_partial_reference, tolerance=(CLOSE, Tolerance(1e-3, 1e-3)), schedule=_decode_schedule)
def mla_partial(
    q: Tensor[T, N, D, Float], cache: Tensor[S, W, (u8, i8, *Float)], slots: Tensor[T, K, Index] | None,
    table: Tensor[T, P, i32] | None, lens: Tensor[T, i32] | None, latent: Static[int], scale: float,
    splits: Static[int], page: Static[int] = 64,
):  # fmt: skip
    """`mla_decode` with a token's rows cut into `splits` equal parts: (part [T, splits, N, L] f32: each part's own
    softmax-weighted mean, 0 of no rows; weight [T, splits, N] f32: log2 of its softmax denominator, -inf of no rows).

    For few tokens, so that T * N / block * splits programs fill the machine.
    """
    part = tile.empty([T, splits, N, latent], f32)
    weight = tile.empty([T, splits, N], f32)
    for t, j, head in tile.parallel(T, splits, tile.blocks(N, "head")):
        q_latent, q_rope = q[t, head, 0:latent], q[t, head, latent:D]
        m, total = tile.full([head.extent], float("-inf"), f32), tile.zeros([head.extent], f32)
        acc = tile.zeros([head.extent, latent], f32)
        count = lens[t] if lens else tile.full([], K, i32)
        for at in tile.range(tile.blocks(count * j // splits, count * (j + 1) // splits, "kv")):
            row, there = locate(slots, table, t, at, page)
            key, rope = row_parts(cache, row, there, latent, D - latent, q.dtype)
            scores = tile.dot(q_rope, rope.T, tile.dot(q_latent, key.T)) * (scale * LOG2E)
            m, total, acc = step(tile.where(there[None, :], scores, float("-inf")), key, m, total, acc)
        part[t, j, head, :] = acc / tile.where(total == 0.0, 1.0, total)[:, None]
        weight[t, j, head] = m + tile.log2(total)
    return part, weight


@mla_partial.case
def three_parts(rand: torch.Generator) -> dict[str, Any]:
    return {**_decode_case(rand, torch.uint8, slots=_chosen(rand, 2, 11, 40, 8)), "splits": 3}


@mla_partial.case
def dense_parts(rand: torch.Generator) -> dict[str, Any]:
    lens = torch.tensor([3, 17], dtype=torch.int32)
    return {**_decode_case(rand, torch.float32, latent=16, table=_table(rand, 2), lens=lens), "splits": 4}


@mla_partial.bench
def one_token(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**_v32(rand, device, 1), "splits": 32}


def _combine_reference(part: TorchTensor, weight: TorchTensor, dtype: DType) -> TorchTensor:
    share = (weight / LOG2E).softmax(1).nan_to_num(0.0)
    return (part * share[..., None]).sum(1).to(dtype.torch)


def _combine_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    return Schedule(blocks={"head": 1}, warps=4) if target == "triton" else None  # few tokens: a program per head


@tile.kernel(reference=_combine_reference, tolerance=CLOSE, schedule=_combine_schedule)
def mla_combine(part: Tensor[T, X, N, V, f32], weight: Tensor[T, X, N, f32], dtype: Static[DType]):
    """`mla_partial`'s parts [T, X, N, V] and weights [T, X, N] -> [T, N, V] of `dtype`: parts weighted by 2^weight,
    zeros where all parts are empty."""
    out = tile.empty([T, N, V], dtype)
    for t, head in tile.parallel(T, tile.blocks(N, "head")):
        top = tile.max(weight[t, :, head], axis=0)
        top = tile.where(top == float("-inf"), 0.0, top)
        total, acc = tile.zeros([head.extent], f32), tile.zeros([head.extent, V], f32)
        for j in tile.range(X):
            share = tile.exp2(weight[t, j, head] - top)
            total = total + share
            acc = acc + part[t, j, head, :] * share[:, None]
        out[t, head, :] = (acc / tile.where(total == 0.0, 1.0, total)[:, None]).to(dtype)
    return out


@mla_combine.case
def with_an_empty_part(rand: torch.Generator) -> dict[str, Any]:
    weight = randn(rand, 2, 3, 5) * 4
    weight[0, 1] = weight[1, :, 2] = float("-inf")
    return {"part": randn(rand, 2, 3, 5, 48), "weight": weight, "dtype": f32}


@mla_combine.bench
def one_token_32_parts(rand: torch.Generator, device: str) -> dict[str, Any]:
    part, weight = randn(rand, 1, 32, 128, 512, device=device), randn(rand, 1, 32, 128, device=device)
    return {"part": part, "weight": weight, "dtype": bf16}


# ---- prefill ---------------------------------------------------------------------------------------------------------


def _prefill_reference(
    q: TorchTensor, k: TorchTensor, v: TorchTensor, allowed: TorchTensor | None, scale: float, part: int
) -> TorchTensor:
    return attention.mha_prefill(q, k, v, allowed, scale)


def _prefill_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    return (
        Schedule(blocks={"query": 32, "kv": 64})
        if target == "cpu"
        else Schedule(blocks={"query": 128, "kv": 64}, warps=8, stages=2)
    )


@tile.kernel(reference=_prefill_reference, tolerance=CLOSE, schedule=_prefill_schedule)
def mha_prefill(
    q: Tensor[T, N, D, Float], k: Tensor[C, N, D, Float], v: Tensor[C, N, V, Float], allowed: Tensor[T, C, b1] | None,
    scale: float, part: Static[int] = 128,
):  # fmt: skip
    """Un-absorbed causal attention of a request's T newest tokens over its context of C >= T tokens -> [T, N, V].

    q [T, N, D], k [C, N, D], v [C, N, V] of one dtype; query t sits at position C - T + t and sees positions up to its
    own; with `allowed` (bool [T, C]) only the allowed ones among them, at least one per row. Softmax in f32. `part` <
    D: the leading part of D that is multiplied apart, for speed alone (128 of 192: both are powers of two). Source: Dao
    2023 for the loop.
    """
    out = tile.empty([T, N, V], q.dtype)
    for n, query in tile.parallel(N, tile.blocks(T, "query")):
        q_first, q_rest = q[query, n, 0:part], q[query, n, part:D]
        position = query.index + (C - T)
        m, total = tile.full([query.extent], float("-inf"), f32), tile.zeros([query.extent], f32)
        acc = tile.zeros([query.extent, V], f32)
        for at in tile.range(tile.blocks(query.start + query.count + (C - T), "kv")):
            scores = tile.dot(q_first, k[at, n, 0:part].T)
            scores = tile.dot(q_rest, k[at, n, part:D].T, scores) * (scale * LOG2E)
            seen = at.index[None, :] <= position[:, None]
            if allowed:
                seen = seen & allowed[query, at]
            m, total, acc = step(tile.where(seen, scores, float("-inf")), v[at, n, :], m, total, acc)
        out[query, n, :] = (acc / total[:, None]).to(q.dtype)
    return out


def _prefill_case(rand: torch.Generator, tokens: int, context: int, heads: int = 2, dim: int = 24) -> dict[str, Any]:
    q, k, v = randn(rand, tokens, heads, dim), randn(rand, context, heads, dim), randn(rand, context, heads, 16)
    return {"q": q, "k": k, "v": v, "allowed": None, "scale": 0.2, "part": 16}


@mha_prefill.case
def whole_prompt(rand: torch.Generator) -> dict[str, Any]:
    return _prefill_case(rand, 19, 19)


@mha_prefill.case
def chunk_with_mask(rand: torch.Generator) -> dict[str, Any]:
    allowed = torch.rand(7, 23, generator=rand) < 0.3
    allowed[:, 0] = True
    return {**_prefill_case(rand, 7, 23, heads=1), "allowed": allowed}


@mha_prefill.case
def bf16_chunk(rand: torch.Generator) -> dict[str, Any]:
    case = _prefill_case(rand, 5, 33, heads=1)
    return {**case, **{name: case[name].bfloat16() for name in "qkv"}}


@mha_prefill.case
def no_queries(rand: torch.Generator) -> dict[str, Any]:
    return _prefill_case(rand, 0, 3)


@mha_prefill.bench
def prefill_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    q, k = (randn(rand, 4096, 128, 192, dtype=torch.bfloat16, device=device) for _ in range(2))
    v = randn(rand, 4096, 128, 128, dtype=torch.bfloat16, device=device)
    return {"q": q, "k": k, "v": v, "allowed": None, "scale": 192**-0.5, "part": 128}
