"""MLA prolog: between the fused input projection and attention, one launch for queries' latent and cache row.

    q' = rms_norm(q)                           [T, Q]       to be multiplied by W_UQ: float, FP8 or INT8
    c  = rms_norm(kv[:L])                      [T, L]       the latent, cached
    k  = rope(kv[L:])                          [T, R]       the rope key of all heads, interleaved pairs, cached

and after W_UQ, `mla_query` splits each head into its nope part (to be absorbed into W_UK) and its rope part, rotated
and put where the absorbed query [T, N, L + R] wants it, beside what the W_UK product writes. Caches: plain rows, packed
FP8 rows (656 bytes) and INT8 with four scales a token; formats in `cache.py`. A slot below 0 writes no row, so
that batches may be padded. Everything is f32 between load and store: nothing is rounded before it is quantised.
Sources: DeepSeek-V2 and -V3.2-Exp reports and inference code; the contracts of PyPTO's mla_prolog_quant.

Legend: T tokens, Q query rank, L latent, R rope, N heads, P nope, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import elementwise
from tilery.ops.kernels._common import (
    BYTES,
    CLOSE,
    FP8_STEP,
    GROUP,
    INT8_STEP,
    SCALE,
    Index,
    distinct,
    heads_first,
    quantize_fp8,
    quantize_int8,
    quantize_int8_reference,
    randn,
    rotate_interleaved,
    tables,
    token_each,
    whole_groups,
)
from tilery.ops.kernels.cache import (
    ROW,
    fp8_fields,
    int8_fields,
    packed_rows,
    slots_with_hole,
    store_fields,
    store_row,
    write_mla_reference,
)
from tilery.ops.quant import quantize_groups
from tilery.tile import Dim, Float, InOut, Static, Tensor, cdiv, e4m3, f32, i8, lib, u8
from tilery.tile.lang import TensorRef, Tile
from tilery.tile.tolerance import Tolerance

T, S, Q, N, P = Dim("T"), Dim("S"), Dim("Q", min=1), Dim("N"), Dim("P", min=1)
L, R = Dim("L", min=1), Dim("R", min=2, multiple_of=2)
LG = Dim("L", min=GROUP, multiple_of=GROUP)


# --- pieces (the fused prolog with the indexer uses them too) ---------------------------------------------------


def latent_row(kv: TensorRef, weight: TensorRef, cos: TensorRef, sin: TensorRef, t: Any, eps: Any) -> tuple[Tile, Tile]:
    """f32 (normalised latent [B, L], rotated rope key [B, R]) of a block of tokens."""
    latent, rope = weight.shape[0], cos.shape[1] * 2
    normed = lib.rms_norm(kv[t, tile.span(0, latent)], weight[:], eps)
    return normed, rotate_interleaved(kv[t, tile.span(latent, rope)].to(f32), cos[t, :], sin[t, :])


def normed_query(q: TensorRef, weight: TensorRef, t: Any, eps: Any) -> Tile:
    """f32 [B, Q]."""
    return lib.rms_norm(q[t, :], weight[:], eps)


def empty_query_fp8() -> tuple[TensorRef, TensorRef]:
    """(values [T, Q] e4m3, scales [T, ceil(Q/128)] f32)."""
    return tile.empty([T, Q], e4m3), tile.empty([T, cdiv(Q, GROUP)], f32)


def store_query_fp8(values: TensorRef, scales: TensorRef, q: TensorRef, weight: TensorRef, t: Any, eps: Any) -> None:
    """Normalises and quantises a block of query latents; a last group may be partial."""
    width = whole_groups(Q)
    x = q[t, tile.span(0, width)].to(f32)  # 0 past the end: no part of the sum or of an amax
    mean = tile.sum(x * x, axis=1, keepdims=True) / Q
    codes, scale = quantize_fp8(x * tile.rsqrt(mean + eps) * weight[tile.span(0, width)].to(f32))
    values[t, tile.span(0, width)] = codes
    scales[t, :] = scale


# --- references -------------------------------------------------------------------------------------------------


def query_reference(q: TorchTensor, weight: TorchTensor, eps: float) -> TorchTensor:
    return elementwise.rms_norm(q.float(), weight, eps)


def query_fp8_reference(q: TorchTensor, weight: TorchTensor, eps: float) -> tuple[TorchTensor, TorchTensor]:
    normed = query_reference(q, weight, eps)
    padded = torch.nn.functional.pad(normed, (0, -normed.shape[1] % GROUP))
    values, scales = quantize_groups(padded)
    return values[:, : normed.shape[1]].contiguous(), scales


def latent_reference(
    kv: TorchTensor, weight: TorchTensor, cos: TorchTensor, sin: TorchTensor, eps: float
) -> tuple[TorchTensor, TorchTensor]:
    latent = weight.shape[0]
    rope = elementwise.rope_interleaved(kv[:, latent:].float(), cos, sin)
    return elementwise.rms_norm(kv[:, :latent].float(), weight, eps), rope


def write_int8_reference(
    values: TorchTensor, scales: TorchTensor, tail: TorchTensor, slots: TorchTensor, latent: TorchTensor,
    rope: TorchTensor,
) -> None:  # fmt: skip
    keep = slots >= 0
    places = slots[keep].long()
    codes, scale = quantize_int8_reference(latent[keep].unflatten(1, (-1, GROUP)))
    values[places], scales[places], tail[places] = codes.flatten(1), scale, rope[keep].to(tail.dtype)


def _mla_prolog(q, kv, q_weight, kv_weight, cos, sin, slots, cache, eps):
    write_mla_reference(cache, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    return None if q is None else query_reference(q, q_weight, eps).to(q.dtype)


def _mla_prolog_fp8(q, kv, q_weight, kv_weight, cos, sin, slots, cache, eps):
    write_mla_reference(cache, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    return query_fp8_reference(q, q_weight, eps)


def _mla_prolog_int8(q, kv, q_weight, kv_weight, cos, sin, slots, latents, ropes, scales, eps):
    write_int8_reference(latents, scales, ropes, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    return quantize_int8_reference(query_reference(q, q_weight, eps))


def _mla_prolog_int8_row(q, kv, q_weight, kv_weight, cos, sin, slots, cache, eps):
    latent, end = kv_weight.shape[0], cache.shape[1] - kv_weight.shape[0] // 32
    scales, tail = cache[:, end:].clone().view(torch.float32), cache[:, latent:end].clone().view(torch.bfloat16)
    write_int8_reference(
        cache[:, :latent], scales, tail, slots, *latent_reference(kv, kv_weight, cos, sin, eps)
    )  # fmt: skip
    cache[:, end:], cache[:, latent:end] = scales.view(torch.int8), tail.view(torch.int8)
    return quantize_int8_reference(query_reference(q, q_weight, eps))


def _mla_query(q, cos, sin, absorbed, head_major):
    rope = 2 * cos.shape[1]
    absorbed[..., -rope:] = elementwise.rope_interleaved(q[..., -rope:].float(), cos, sin).to(absorbed.dtype)
    nope = q[..., :-rope]
    return (nope.transpose(0, 1) if head_major else nope).contiguous()


# --- kernels ----------------------------------------------------------------------------------------------------


@tile.kernel(schedule=token_each, reference=_mla_prolog, tolerance=CLOSE)
def mla_prolog(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, L + R, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[L, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, L + R, Float],
    eps: float = 1e-6,
):
    """q' [T, Q] in q's dtype; plain cache rows [latent | rope] at `slots`.

    q and kv are views of the fused projection's output (rows may be strided).
    """
    out = tile.empty([T, Q], q.dtype)
    for t in tile.parallel(tile.blocks(T, "token")):
        out[t, :] = normed_query(q, q_weight, t, eps).to(q.dtype)
        store_row(cache, slots[t], *latent_row(kv, kv_weight, cos, sin, t, eps))
    return out


@tile.kernel(schedule=token_each, reference=_mla_prolog, tolerance=(CLOSE, BYTES))
def mla_prolog_packed(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, ROW, u8],
    eps: float = 1e-6,
):
    """`mla_prolog` with packed FP8 rows (contiguous) and a float query latent."""
    out, fields = tile.empty([T, Q], q.dtype), fp8_fields(cache, LG, R)
    for t in tile.parallel(tile.blocks(T, "token")):
        out[t, :] = normed_query(q, q_weight, t, eps).to(q.dtype)
        store_fields(fields, slots[t], *latent_row(kv, kv_weight, cos, sin, t, eps))
    return out


@tile.kernel(schedule=token_each, reference=_mla_prolog_fp8, tolerance=(FP8_STEP, SCALE, BYTES))
def mla_prolog_fp8(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, ROW, u8],
    eps: float = 1e-6,
):
    """(q' [T, Q] e4m3, scales [T, ceil(Q/128)] f32, powers of two) for an FP8 W_UQ; packed FP8 rows (contiguous)."""
    values, scales = empty_query_fp8()
    fields = fp8_fields(cache, LG, R)
    for t in tile.parallel(tile.blocks(T, "token")):
        store_query_fp8(values, scales, q, q_weight, t, eps)
        store_fields(fields, slots[t], *latent_row(kv, kv_weight, cos, sin, t, eps))
    return values, scales


@tile.kernel(
    schedule=token_each,
    reference=_mla_prolog_int8,
    tolerance=(INT8_STEP, SCALE, INT8_STEP, Tolerance(1e-4, 0.0078125), SCALE),
)
def mla_prolog_int8(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    latents: InOut[S, LG, i8],
    ropes: InOut[S, R, Float],
    scales: InOut[S, LG // GROUP, f32],
    eps: float = 1e-6,
):
    """(q' [T, Q] int8, scale [T] f32 per token) for an INT8 W_UQ; cache int8 latents with a scale per 128 channels.

    Symmetric, scale = amax / 127. This is mla_prolog_quant without its matrix products: its paged [blocks, 128, 1, .]
    caches are given as [S, .].
    """
    values, scale = tile.empty([T, Q], i8), tile.empty([T], f32)
    for t in tile.parallel(tile.blocks(T, "token")):
        values[t, :], scale[t] = quantize_int8(normed_query(q, q_weight, t, eps))
        store_fields((latents, scales, ropes), slots[t], *latent_row(kv, kv_weight, cos, sin, t, eps))
    return values, scale


@tile.kernel(schedule=token_each, reference=_mla_prolog_int8_row, tolerance=(INT8_STEP, SCALE, BYTES))
def mla_prolog_int8_row(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, ROW, i8],
    eps: float = 1e-6,
):
    """`mla_prolog_int8` with the cache in one int8 row (contiguous): values, bf16 rope, f32 scales (656 bytes)."""
    values, scale = tile.empty([T, Q], i8), tile.empty([T], f32)
    fields = int8_fields(cache, LG, R)
    for t in tile.parallel(tile.blocks(T, "token")):
        values[t, :], scale[t] = quantize_int8(normed_query(q, q_weight, t, eps))
        store_fields(fields, slots[t], *latent_row(kv, kv_weight, cos, sin, t, eps))
    return values, scale


@tile.kernel(schedule=heads_first, reference=_mla_query, tolerance=CLOSE)
def mla_query(
    q: Tensor[T, N, P + R, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    absorbed: InOut[T, N, L + R, Float],
    head_major: Static[bool] = False,
):
    """Splits W_UQ's output: returns the nope part [T, N, P] (with `head_major` [N, T, P], as a batched product over
    heads wants it) and writes the rotated rope part to absorbed[:, :, L:], in absorbed's dtype; the rest of `absorbed`
    is left for the W_UK product.
    """
    nope = tile.empty([N, T, P] if head_major else [T, N, P], q.dtype)
    for t, n in tile.parallel(tile.blocks(T, "token"), tile.blocks(N, "head")):
        left = q[t, n, tile.span(0, P)]
        if head_major:
            nope[n, t, :] = left.transpose(1, 0, 2)
        else:
            nope[t, n, :] = left
        right = rotate_interleaved(q[t, n, tile.span(P, R)].to(f32), cos[t, :][:, None, :], sin[t, :][:, None, :])
        absorbed[t, n, tile.span(L, R)] = right.to(absorbed.dtype)
    return nope


# --- cases and benchmarks ---------------------------------------------------------------------------------------

Args = dict[str, Any]


def projected(
    rand: torch.Generator, tokens: int, rank: int, latent: int, rope: int, slots: TorchTensor, dtype: torch.dtype,
    device: str = "cpu",
) -> Args:  # fmt: skip
    """Views of one fused projection's output (which also holds an indexer key), and what goes with them."""
    fused = randn(rand, tokens, rank + latent + rope + 128, dtype=dtype, device=device)
    cos, sin = tables(tokens, rope, device)
    return {
        "q": fused[:, :rank],
        "kv": fused[:, rank : rank + latent + rope],
        "q_weight": randn(rand, rank, device=device, mean=1.0),
        "kv_weight": randn(rand, latent, device=device, mean=1.0),
        "cos": cos,
        "sin": sin,
        "slots": slots,
        "eps": 1e-6,
    }


def int8_caches(slots: int, latent: int, rope: int, device: str = "cpu") -> Args:
    return {
        "latents": torch.zeros(slots, latent, dtype=torch.int8, device=device),
        "ropes": torch.zeros(slots, rope, dtype=torch.bfloat16, device=device),
        "scales": torch.zeros(slots, latent // GROUP, device=device),
    }


@mla_prolog.case
def plain_bf16(rand: torch.Generator) -> Args:
    args = projected(rand, 5, 48, 128, 16, slots_with_hole(rand, 5, 20), torch.bfloat16)
    return {**args, "cache": torch.zeros(20, 144, dtype=torch.bfloat16)}


@mla_prolog.case
def plain_narrow(rand: torch.Generator) -> Args:
    slots = distinct(rand, 17, 20, dtype=torch.int32)
    return {**projected(rand, 17, 40, 24, 8, slots, torch.float32), "cache": torch.zeros(20, 32)}


@mla_prolog_packed.case
def packed_float_query(rand: torch.Generator) -> Args:
    args = projected(rand, 3, 192, 512, 64, slots_with_hole(rand, 3, 8), torch.float32)
    return {**args, "cache": packed_rows(rand, 8, 512, 64)}


@mla_prolog_fp8.case
def fp8_partial_group(rand: torch.Generator) -> Args:
    args = projected(rand, 5, 192, 256, 16, slots_with_hole(rand, 5, 8), torch.bfloat16)
    return {**args, "cache": packed_rows(rand, 8, 256, 16)}


@mla_prolog_fp8.case
def fp8_one_token(rand: torch.Generator) -> Args:
    args = projected(rand, 1, 256, 512, 64, distinct(rand, 1, 8), torch.float32)
    return {**args, "cache": packed_rows(rand, 8, 512, 64)}


@mla_prolog_int8.case
def int8_tensors(rand: torch.Generator) -> Args:
    args = projected(rand, 5, 96, 256, 16, slots_with_hole(rand, 5, 8), torch.bfloat16)
    return {**args, **int8_caches(8, 256, 16)}


@mla_prolog_int8_row.case
def int8_rows(rand: torch.Generator) -> Args:
    args = projected(rand, 5, 96, 256, 16, slots_with_hole(rand, 5, 8), torch.bfloat16)
    return {**args, "cache": torch.zeros(8, 256 + 8 + 32, dtype=torch.int8)}


def _query(
    rand: torch.Generator, tokens: int, heads: int, nope: int, rope: int, latent: int, dtype: torch.dtype, major: bool,
    device: str = "cpu",
) -> Args:  # fmt: skip
    cos, sin = tables(tokens, rope, device)
    absorbed = torch.zeros(tokens, heads, latent + rope, dtype=dtype, device=device)
    q = randn(rand, tokens, heads, nope + rope, dtype=dtype, device=device)
    return {"q": q, "cos": cos, "sin": sin, "absorbed": absorbed, "head_major": major}


@mla_query.case
def token_major(rand: torch.Generator) -> Args:
    return _query(rand, 5, 3, 24, 16, 40, torch.bfloat16, False)


@mla_query.case
def head_major(rand: torch.Generator) -> Args:
    return _query(rand, 3, 18, 32, 8, 32, torch.float32, True)


@mla_prolog_fp8.bench
def fp8_64(rand: torch.Generator, device: str) -> Args:
    slots = distinct(rand, 64, 65536, device)
    cache = torch.zeros(65536, 656, dtype=torch.uint8, device=device)
    return {**projected(rand, 64, 1536, 512, 64, slots, torch.bfloat16, device), "cache": cache}


@mla_prolog_fp8.bench
def fp8_4096(rand: torch.Generator, device: str) -> Args:
    slots = distinct(rand, 4096, 65536, device)
    cache = torch.zeros(65536, 656, dtype=torch.uint8, device=device)
    return {**projected(rand, 4096, 1536, 512, 64, slots, torch.bfloat16, device), "cache": cache}


@mla_prolog_int8.bench
def int8_64(rand: torch.Generator, device: str) -> Args:
    slots = distinct(rand, 64, 65536, device)
    args = projected(rand, 64, 1536, 512, 64, slots, torch.bfloat16, device)
    return {**args, **int8_caches(65536, 512, 64, device)}


@mla_query.bench
def query_64(rand: torch.Generator, device: str) -> Args:
    return _query(rand, 64, 128, 128, 64, 512, torch.bfloat16, True, device)


@mla_query.bench
def query_4096(rand: torch.Generator, device: str) -> Args:
    return _query(rand, 4096, 128, 128, 64, 512, torch.bfloat16, True, device)
