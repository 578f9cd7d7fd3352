"""Indexer prolog: the indexer's key into its cache, and its queries and head weights ready for scoring.

    key     k' = rope(layer_norm(k))          LayerNorm with weight and bias; half-split RoPE on the first R of 128 dims
    query   q' = rope(q)                      [T, 64, 128], the same RoPE
    both    x' = H x / sqrt(128)              optional; Sylvester-Hadamard, spreads outliers before quantisation
            s = 2^ceil(log2(amax / 448)), x8 = e4m3(x' / s)               one scale per key, per query head
    weight  w' = w * n_heads^-1/2 * head_dim^-1/2 * s_q

so that the score is s_k * sum_h w'_h relu(q8_h . k8). The Hadamard product takes and gives bf16 (as in the released
inference code), with f32 sums. Keys are few: two rows per warp, transformed by butterflies. Queries are many: a block
of one token's heads in three pieces - the two halves that rotate into each other, and the rest - each multiplied by its
rows of H on the tensor cores; the amplitude is the largest over the pieces. Keys and queries must agree on the
transform. A key's slot below 0 writes nothing. The interleaved RoPE of MLA would select wrong tokens here.
Sources: DeepSeek-V3.2-Exp inference code with the fix of 2025-11-17; the contract of PyPTO's
lightning_indexer_prolog_quant for INT8.

Legend: T tokens, N heads, D = R + E head dim, R rotated, E the rest, S slots, P pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import elementwise
from tilery.ops.kernels._common import (
    CLOSE,
    F16_SCALE,
    FP8_STEP,
    GROUP,
    INT8_STEP,
    Index,
    distinct,
    fp8_scale,
    hadamard,
    hadamard_128,
    hadamard_rows,
    int8_scale,
    quantize_int8,
    quantize_int8_reference,
    randn,
    sizes,
    tables,
    to_int8,
)
from tilery.ops.kernels.cache import (
    PAGE_BYTES,
    index_fields,
    slots_with_hole,
    store_index,
    write_index_reference,
)
from tilery.ops.kernels.rope import rotate_reference
from tilery.ops.quant import quantize_groups
from tilery.tile import Dim, Float, InOut, Schedule, Static, Tensor, bf16, e4m3, f16, f32, i8, u8
from tilery.tile.lang import TensorRef, Tile
from tilery.tile.passes.pad import power_of_two
from tilery.tile.tolerance import Tolerance

T, N, S, P = Dim("T"), Dim("N"), Dim("S"), Dim("P")
R, E = Dim("R", min=2, multiple_of=2), Dim("E", min=1)
RD = Dim("R", min=2, max=GROUP - 2, multiple_of=2)
"""Rotated dims of a head of 128."""

KEY_BYTES = Tolerance(1.0, 0.0, 0.002)
"""A step of e4m3 is a step of a byte; scales are equal."""


# --- pieces (the fused prolog with MLA uses them too) -----------------------------------------------------------


Piece = tuple[Any, Any, Tile]
"""(start, size, tile [B, size]): a part of a row."""


def largest(pieces: list[Piece]) -> Tile:
    """f32 [B]: the largest amplitude over the pieces of each row."""
    top = tile.max(abs(pieces[0][2]), axis=1)
    for _, _, x in pieces[1:]:
        top = tile.maximum(top, tile.max(abs(x), axis=1))
    return top


def turned(first: Tile, second: Tile, rest: Tile, cos: Tile, sin: Tile) -> list[Piece]:
    """A row from its three parts, the first two rotated. Each product is rounded by itself, as in torch: a query goes
    on to bf16 and through H, where one product more or less exact in 45,000 moves all 128 results of its row."""
    half, width = sizes(first)[1], sizes(rest)[1]
    first, second = (
        tile.mul_rn(first, cos) - tile.mul_rn(second, sin),
        tile.mul_rn(second, cos) + tile.mul_rn(first, sin),
    )
    return [(0, half, first), (half, half, second), (half * 2, width, rest)]


def key_rows(
    key: TensorRef, weight: TensorRef, bias: TensorRef, cos: TensorRef, sin: TensorRef, t: Any, eps: Any
) -> Tile:
    """f32 [B, D]: a block of keys, normalised and rotated. Elements meet their partners by reading the row again."""
    half, place = cos.shape[1], tile.arange(key.shape[1])
    rotated, second = place < half * 2, place >= half
    partner = tile.where(rotated, tile.where(second, place - half, place + half), place)
    row = key[t, :].to(f32)
    mean = tile.mean(row, axis=1, keepdims=True)
    deviation = tile.rsqrt(tile.mean((row - mean) * (row - mean), axis=1, keepdims=True) + eps)
    own = (row - mean) * deviation * weight[:].to(f32) + bias[:].to(f32)
    other = (key[t, partner].to(f32) - mean) * deviation * weight[partner].to(f32) + bias[partner].to(f32)
    c = cos.load((t, place % half), where=rotated[None, :], other=1.0)
    s = sin.load((t, place % half), where=rotated[None, :])
    return own * c + tile.where(second, other, -other) * s


def query_pieces(q: TensorRef, cos: TensorRef, sin: TensorRef, t: Any, n: Any) -> list[Piece]:
    """f32 pieces of a block of one token's heads, rotated."""
    half = cos.shape[1]
    rest = q[t, n, tile.span(half * 2, q.shape[2] - half * 2)].to(f32)
    first, second = q[t, n, tile.span(0, half)].to(f32), q[t, n, tile.span(half, half)].to(f32)
    return turned(first, second, rest, cos[t, :], sin[t, :])


def hadamard_pieces(pieces: list[Piece]) -> list[Piece]:
    """The rows [B, 128] times H / sqrt(128), as one piece; bf16 in and out. Piece times rows of H, added up."""
    total = None
    for start, size, x in pieces:
        total = tile.dot(x.to(bf16), hadamard_rows(GROUP, start, size), total)
    assert total is not None
    return [(0, GROUP, (total * GROUP**-0.5).to(bf16).to(f32))]


def store_key_int8(keys: TensorRef, scales: TensorRef, slot: Tile, rows: Tile) -> None:
    """int8 keys [B, 128] and f16 scales, one per key, at their slots."""
    keep = slot >= 0
    codes, scale = quantize_int8(rows)
    keys.store((slot, slice(None)), codes, where=keep[:, None])
    scales.store((slot,), scale.to(f16), where=keep)


# --- references -------------------------------------------------------------------------------------------------


def key_reference(
    key: TorchTensor, weight: TorchTensor, bias: TorchTensor, cos: TorchTensor, sin: TorchTensor, eps: float,
    transform: bool = False,
) -> TorchTensor:  # fmt: skip
    """f32 keys [T, D]."""
    normed = elementwise.layer_norm(key.float(), weight, bias, eps)
    turned = rotate_reference(normed, cos, sin, interleaved=False, last=False)
    return hadamard(turned) if transform else turned


def _index_key(key, weight, bias, cos, sin, slots, cache, eps):
    write_index_reference(cache, slots, key_reference(key, weight, bias, cos, sin, eps))


def _index_key_fp8(key, weight, bias, cos, sin, slots, pages, eps, transform):
    write_index_reference(pages, slots, key_reference(key, weight, bias, cos, sin, eps, transform))


def write_key_int8_reference(keys: TorchTensor, scales: TorchTensor, slots: TorchTensor, rows: TorchTensor) -> None:
    keep = slots >= 0
    codes, scale = quantize_int8_reference(rows[keep])
    keys[slots[keep].long()], scales[slots[keep].long()] = codes, scale.half()


def _index_key_int8(key, weight, bias, cos, sin, slots, keys, scales, eps, transform):
    write_key_int8_reference(keys, scales, slots, key_reference(key, weight, bias, cos, sin, eps, transform))


def _turned_query(q, cos, sin, transform):
    rows = rotate_reference(q.float(), cos, sin, interleaved=False, last=False)
    return hadamard(rows) if transform else rows


def _index_query(q, weights, cos, sin, scale):
    return _turned_query(q, cos, sin, False).to(q.dtype), weights.float() * scale


def _index_query_fp8(q, weights, cos, sin, scale, transform):
    values, scales = quantize_groups(_turned_query(q, cos, sin, transform))
    return values, weights.float() * scale * scales[..., 0]


def _index_query_int8(q, weights, cos, sin, scale, transform):
    values, scales = quantize_int8_reference(_turned_query(q, cos, sin, transform))
    return values, scales.half(), (weights.float() * scale).half()


# --- schedules --------------------------------------------------------------------------------------------------


def _key_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """Two keys per warp: no step of a row waits for another warp."""
    return None if target == "cpu" else Schedule(blocks={"token": 2}, warps=1)


def _query_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """A token's heads, at most 64 and enough for a dot; where tokens are many, programs make their part of H once: four
    on a multiprocessor, for which a thread must do with 128 registers."""
    if target == "cpu":
        return None
    heads = max(16, min(64, power_of_two(env.get("N", 64))))
    persistent = 4 if env.get("T", 0) * env.get("N", 64) > 64 * 1024 else 0
    return Schedule(blocks={"head": heads}, warps=4, stages=1, persistent=persistent, registers=128)


# --- keys -------------------------------------------------------------------------------------------------------


@tile.kernel(schedule=_key_schedule, reference=_index_key, tolerance=CLOSE)
def index_key(
    key: Tensor[T, R + E, Float],
    weight: Tensor[R + E, Float],
    bias: Tensor[R + E, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, R + E, Float],
    eps: float = 1e-6,
):
    """Keys [T, D] (a view of the fused projection's output) -> normalised, rotated plain rows of `cache` at `slots`."""
    for t in tile.parallel(tile.blocks(T, "token")):
        slot = slots[t]
        rows = key_rows(key, weight, bias, cos, sin, t, eps)
        cache.store((slot, slice(None)), rows.to(cache.dtype), where=(slot >= 0)[:, None])


@tile.kernel(schedule=_key_schedule, reference=_index_key_fp8, tolerance=KEY_BYTES)
def index_key_fp8(
    key: Tensor[T, GROUP, Float],
    weight: Tensor[GROUP, Float],
    bias: Tensor[GROUP, Float],
    cos: Tensor[T, RD // 2, f32],
    sin: Tensor[T, RD // 2, f32],
    slots: Tensor[T, Index],
    pages: InOut[P, PAGE_BYTES, u8],
    eps: float = 1e-6,
    transform: Static[bool] = True,
):
    """`index_key` into packed pages (contiguous): Hadamard with `transform`, then e4m3 and a power-of-two scale."""
    fields = index_fields(pages)
    for t in tile.parallel(tile.blocks(T, "token")):
        rows = key_rows(key, weight, bias, cos, sin, t, eps)
        store_index(fields, slots[t], hadamard_128(rows) if transform else rows)


@tile.kernel(schedule=_key_schedule, reference=_index_key_int8, tolerance=(INT8_STEP, F16_SCALE))
def index_key_int8(
    key: Tensor[T, GROUP, Float],
    weight: Tensor[GROUP, Float],
    bias: Tensor[GROUP, Float],
    cos: Tensor[T, RD // 2, f32],
    sin: Tensor[T, RD // 2, f32],
    slots: Tensor[T, Index],
    keys: InOut[S, GROUP, i8],
    scales: InOut[S, f16],
    eps: float = 1e-6,
    transform: Static[bool] = True,
):
    """`index_key` as int8 with a scale amax / 127 per key (the key half of lightning_indexer_prolog_quant)."""
    for t in tile.parallel(tile.blocks(T, "token")):
        rows = key_rows(key, weight, bias, cos, sin, t, eps)
        store_key_int8(keys, scales, slots[t], hadamard_128(rows) if transform else rows)


# --- queries ----------------------------------------------------------------------------------------------------


@tile.kernel(reference=_index_query, tolerance=CLOSE)
def index_query(
    q: Tensor[T, N, R + E, Float],
    weights: Tensor[T, N, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    scale: float,
):
    """(q' [T, N, D] in q's dtype, rotated; w' [T, N] f32 = weights * scale).

    `scale` is (n_heads * head_dim)^-1/2, or 1 if the projection holds it already.
    """
    turned_q, w = tile.empty([T, N, R + E], q.dtype), tile.empty([T, N], f32)
    for t, n in tile.parallel(T, tile.blocks(N, "head")):
        for start, size, x in query_pieces(q, cos, sin, t, n):
            turned_q[t, n, tile.span(start, size)] = x.to(q.dtype)
        w[t, n] = weights[t, n].to(f32) * scale
    return turned_q, w


@tile.kernel(schedule=_query_schedule, reference=_index_query_fp8, tolerance=(FP8_STEP, CLOSE))
def index_query_fp8(
    q: Tensor[T, N, GROUP, Float],
    weights: Tensor[T, N, Float],
    cos: Tensor[T, RD // 2, f32],
    sin: Tensor[T, RD // 2, f32],
    scale: float,
    transform: Static[bool] = True,
):
    """(q8 [T, N, 128] e4m3, w' [T, N] f32 = weights * scale * the head's own power-of-two scale)."""
    values, w = tile.empty([T, N, GROUP], e4m3), tile.empty([T, N], f32)
    for t, n in tile.parallel(T, tile.blocks(N, "head")):
        pieces = query_pieces(q, cos, sin, t, n)
        pieces = hadamard_pieces(pieces) if transform else pieces
        own, inverse = fp8_scale(largest(pieces))
        for start, size, x in pieces:
            values[t, n, tile.span(start, size)] = (x * inverse[:, None]).to(e4m3)
        w[t, n] = weights[t, n].to(f32) * scale * own
    return values, w


@tile.kernel(schedule=_query_schedule, reference=_index_query_int8, tolerance=(INT8_STEP, F16_SCALE, F16_SCALE))
def index_query_int8(
    q: Tensor[T, N, GROUP, Float],
    weights: Tensor[T, N, Float],
    cos: Tensor[T, RD // 2, f32],
    sin: Tensor[T, RD // 2, f32],
    scale: float,
    transform: Static[bool] = True,
):
    """(q8 [T, N, 128] int8, its scales [T, N] f16, w' [T, N] f16 = weights * scale), the query half of
    lightning_indexer_prolog_quant without its matrix products."""
    values = tile.empty([T, N, GROUP], i8)
    scales, w = tile.empty([T, N], f16), tile.empty([T, N], f16)
    for t, n in tile.parallel(T, tile.blocks(N, "head")):
        pieces = query_pieces(q, cos, sin, t, n)
        pieces = hadamard_pieces(pieces) if transform else pieces
        own, inverse = int8_scale(largest(pieces))
        for start, size, x in pieces:
            values[t, n, tile.span(start, size)] = to_int8(x * inverse[:, None])
        scales[t, n] = own.to(f16)
        w[t, n] = (weights[t, n].to(f32) * scale).to(f16)
    return values, scales, w


# --- cases and benchmarks ---------------------------------------------------------------------------------------

Args = dict[str, Any]


def projected_key(
    rand: torch.Generator, tokens: int, rotated: int, width: int, slots: TorchTensor, dtype: torch.dtype,
    device: str = "cpu",
) -> Args:  # fmt: skip
    """A key as a view of a wider product, and what goes with it."""
    cos, sin = tables(tokens, rotated, device)
    return {
        "key": randn(rand, tokens, width + 64, dtype=dtype, device=device)[:, 64:],
        "weight": randn(rand, width, device=device, mean=1.0),
        "bias": randn(rand, width, device=device),
        "cos": cos,
        "sin": sin,
        "slots": slots,
        "eps": 1e-6,
    }


def _query(
    rand: torch.Generator, tokens: int, heads: int, rotated: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> Args:
    cos, sin = tables(tokens, rotated, device)
    return {
        "q": randn(rand, tokens, heads, width, dtype=dtype, device=device),
        "weights": randn(rand, tokens, heads, device=device),
        "cos": cos,
        "sin": sin,
        "scale": (heads * width) ** -0.5,
    }


def _pages(count: int, device: str = "cpu") -> TorchTensor:
    return torch.zeros(count, PAGE_BYTES, dtype=torch.uint8, device=device)


@index_key.case
def plain_key(rand: torch.Generator) -> Args:
    args = projected_key(rand, 5, 16, 40, slots_with_hole(rand, 5, 20), torch.bfloat16)
    return {**args, "cache": torch.zeros(20, 40, dtype=torch.bfloat16)}


@index_key.case
def plain_key_f32(rand: torch.Generator) -> Args:
    args = projected_key(rand, 18, 64, 128, distinct(rand, 18, 20, dtype=torch.int32), torch.float32)
    return {**args, "cache": torch.zeros(20, 128)}


@index_key_fp8.case
def key_hadamard(rand: torch.Generator) -> Args:
    args = projected_key(rand, 5, 64, 128, slots_with_hole(rand, 5, 128), torch.bfloat16)
    return {**args, "pages": _pages(2), "transform": True}


@index_key_fp8.case
def key_without_hadamard(rand: torch.Generator) -> Args:
    args = projected_key(rand, 17, 16, 128, slots_with_hole(rand, 17, 128), torch.float32)
    return {**args, "pages": _pages(2), "transform": False}


@index_key_int8.case
def key_int8(rand: torch.Generator) -> Args:
    args = projected_key(rand, 3, 64, 128, slots_with_hole(rand, 3, 9), torch.bfloat16)
    caches = {"keys": torch.zeros(9, 128, dtype=torch.int8), "scales": torch.zeros(9, dtype=torch.float16)}
    return {**args, **caches, "transform": True}


@index_query.case
def plain_query(rand: torch.Generator) -> Args:
    return _query(rand, 3, 18, 16, 40, torch.bfloat16)


@index_query_fp8.case
def query_hadamard(rand: torch.Generator) -> Args:
    return {**_query(rand, 2, 16, 64, 128, torch.bfloat16), "transform": True}


@index_query_fp8.case
def query_few_heads(rand: torch.Generator) -> Args:
    return {**_query(rand, 3, 5, 16, 128, torch.float32), "transform": False}


@index_query_int8.case
def query_int8(rand: torch.Generator) -> Args:
    return {**_query(rand, 2, 18, 64, 128, torch.bfloat16), "transform": True}


def _bench_query(rand: torch.Generator, tokens: int, device: str) -> Args:
    return {**_query(rand, tokens, 64, 64, 128, torch.bfloat16, device), "transform": True}


@index_query_fp8.bench
def query_64(rand: torch.Generator, device: str) -> Args:
    return _bench_query(rand, 64, device)


@index_query_fp8.bench
def query_4096(rand: torch.Generator, device: str) -> Args:
    return _bench_query(rand, 4096, device)


@index_query_int8.bench
def query_int8_64(rand: torch.Generator, device: str) -> Args:
    return _bench_query(rand, 64, device)


@index_key_fp8.bench
def key_4096(rand: torch.Generator, device: str) -> Args:
    args = projected_key(rand, 4096, 64, 128, distinct(rand, 4096, 65536, device), torch.bfloat16, device)
    return {**args, "pages": _pages(1024, device), "transform": True}
