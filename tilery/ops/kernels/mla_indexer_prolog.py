"""Both prologs in one launch: query latent, MLA cache row and indexer key, all from the same fused projection.

The maths stands in `mla_prolog.py` and `indexer_prolog.py`; a decode step is launch-bound there, so one launch in place
of two counts. The indexer's queries need another product first and stay in `index_query*`. INT8 has the contract of
PyPTO's mla_indexer_prolog_quant without its matrix products.

Legend: T tokens, Q query rank, L latent, R rope (the same for both), E the rest of an indexer key, S slots, P pages.
"""

from __future__ import annotations

from typing import Any

import torch

from tilery import tile
from tilery.ops.kernels._common import (
    BYTES,
    CLOSE,
    F16_SCALE,
    FP8_STEP,
    GROUP,
    INT8_STEP,
    SCALE,
    Index,
    distinct,
    hadamard_128,
    quantize_int8,
    quantize_int8_reference,
    token_each,
)
from tilery.ops.kernels.cache import (
    PAGE_BYTES,
    ROW,
    fp8_fields,
    index_fields,
    packed_rows,
    slots_with_hole,
    store_fields,
    store_index,
    store_row,
    write_index_reference,
    write_mla_reference,
)
from tilery.ops.kernels.indexer_prolog import (
    KEY_BYTES,
    key_reference,
    key_rows,
    projected_key,
    store_key_int8,
    write_key_int8_reference,
)
from tilery.ops.kernels.mla_prolog import (
    empty_query_fp8,
    int8_caches,
    latent_reference,
    latent_row,
    normed_query,
    projected,
    query_fp8_reference,
    query_reference,
    store_query_fp8,
    write_int8_reference,
)
from tilery.tile import Dim, Float, InOut, Static, Tensor, f16, f32, i8, u8
from tilery.tile.tolerance import Tolerance

T, S, P, Q = Dim("T"), Dim("S"), Dim("P"), Dim("Q", min=1)
L, R, E = Dim("L", min=1), Dim("R", min=2, multiple_of=2), Dim("E", min=1)
LG = Dim("L", min=GROUP, multiple_of=GROUP)


def _plain(q, kv, key, q_weight, kv_weight, k_weight, k_bias, cos, sin, slots, cache, index, eps):
    write_mla_reference(cache, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    write_index_reference(index, slots, key_reference(key, k_weight, k_bias, cos, sin, eps))
    return query_reference(q, q_weight, eps).to(q.dtype)


def _fp8(q, kv, key, q_weight, kv_weight, k_weight, k_bias, cos, sin, slots, cache, pages, eps, transform):
    write_mla_reference(cache, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    write_index_reference(pages, slots, key_reference(key, k_weight, k_bias, cos, sin, eps, transform))
    return query_fp8_reference(q, q_weight, eps)


def _int8(
    q, kv, key, q_weight, kv_weight, k_weight, k_bias, cos, sin, slots, latents, ropes, scales, keys, key_scales, eps,
    transform,
):  # fmt: skip
    write_int8_reference(latents, scales, ropes, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    rows = key_reference(key, k_weight, k_bias, cos, sin, eps, transform)
    write_key_int8_reference(keys, key_scales, slots, rows)
    return quantize_int8_reference(query_reference(q, q_weight, eps))


@tile.kernel(schedule=token_each, reference=_plain, tolerance=CLOSE)
def mla_indexer_prolog(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, L + R, Float],
    key: Tensor[T, R + E, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[L, Float],
    k_weight: Tensor[R + E, Float],
    k_bias: Tensor[R + E, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, L + R, Float],
    index: InOut[S, R + E, Float],
    eps: float = 1e-6,
):
    """`mla_prolog` and `index_key`: q' [T, Q] in q's dtype, plain rows of both groups."""
    out = tile.empty([T, Q], q.dtype)
    for t in tile.parallel(tile.blocks(T, "token")):
        slot = slots[t]
        out[t, :] = normed_query(q, q_weight, t, eps).to(q.dtype)
        store_row(cache, slot, *latent_row(kv, kv_weight, cos, sin, t, eps))
        rows = key_rows(key, k_weight, k_bias, cos, sin, t, eps)
        index.store((slot, slice(None)), rows.to(index.dtype), where=(slot >= 0)[:, None])
    return out


def _packed_reference(q, kv, key, q_weight, kv_weight, k_weight, k_bias, cos, sin, slots, cache, pages, eps, transform):
    write_mla_reference(cache, slots, *latent_reference(kv, kv_weight, cos, sin, eps))
    write_index_reference(pages, slots, key_reference(key, k_weight, k_bias, cos, sin, eps, transform))
    return query_reference(q, q_weight, eps).to(q.dtype)


@tile.kernel(schedule=token_each, reference=_packed_reference, tolerance=(CLOSE, BYTES, KEY_BYTES))
def mla_indexer_prolog_packed(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    key: Tensor[T, GROUP, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    k_weight: Tensor[GROUP, Float],
    k_bias: Tensor[GROUP, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, ROW, u8],
    pages: InOut[P, PAGE_BYTES, u8],
    eps: float = 1e-6,
    transform: Static[bool] = True,
):
    """`mla_prolog_packed` and `index_key_fp8`: q' [T, Q] in q's dtype, packed rows of both."""
    out = tile.empty([T, Q], q.dtype)
    fields, keys = fp8_fields(cache, LG, R), index_fields(pages)
    for t in tile.parallel(tile.blocks(T, "token")):
        slot = slots[t]
        out[t, :] = normed_query(q, q_weight, t, eps).to(q.dtype)
        store_fields(fields, slot, *latent_row(kv, kv_weight, cos, sin, t, eps))
        rows = key_rows(key, k_weight, k_bias, cos, sin, t, eps)
        store_index(keys, slot, hadamard_128(rows) if transform else rows)
    return out


@tile.kernel(schedule=token_each, reference=_fp8, tolerance=(FP8_STEP, SCALE, BYTES, KEY_BYTES))
def mla_indexer_prolog_fp8(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    key: Tensor[T, GROUP, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    k_weight: Tensor[GROUP, Float],
    k_bias: Tensor[GROUP, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    cache: InOut[S, ROW, u8],
    pages: InOut[P, PAGE_BYTES, u8],
    eps: float = 1e-6,
    transform: Static[bool] = True,
):
    """`mla_prolog_fp8` and `index_key_fp8`: (q' [T, Q] e4m3, scales [T, ceil(Q/128)] f32), packed rows of both."""
    values, scales = empty_query_fp8()
    fields, keys = fp8_fields(cache, LG, R), index_fields(pages)
    for t in tile.parallel(tile.blocks(T, "token")):
        slot = slots[t]
        store_query_fp8(values, scales, q, q_weight, t, eps)
        store_fields(fields, slot, *latent_row(kv, kv_weight, cos, sin, t, eps))
        rows = key_rows(key, k_weight, k_bias, cos, sin, t, eps)
        store_index(keys, slot, hadamard_128(rows) if transform else rows)
    return values, scales


@tile.kernel(
    schedule=token_each,
    reference=_int8,
    tolerance=(INT8_STEP, SCALE, INT8_STEP, Tolerance(1e-4, 0.0078125), SCALE, INT8_STEP, F16_SCALE),
)
def mla_indexer_prolog_int8(
    q: Tensor[T, Q, Float],
    kv: Tensor[T, LG + R, Float],
    key: Tensor[T, GROUP, Float],
    q_weight: Tensor[Q, Float],
    kv_weight: Tensor[LG, Float],
    k_weight: Tensor[GROUP, Float],
    k_bias: Tensor[GROUP, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    slots: Tensor[T, Index],
    latents: InOut[S, LG, i8],
    ropes: InOut[S, R, Float],
    scales: InOut[S, LG // GROUP, f32],
    keys: InOut[S, GROUP, i8],
    key_scales: InOut[S, f16],
    eps: float = 1e-6,
    transform: Static[bool] = True,
):
    """`mla_prolog_int8` and `index_key_int8`: (q' [T, Q] int8, scale [T] f32), int8 caches of both groups."""
    values, scale = tile.empty([T, Q], i8), tile.empty([T], f32)
    for t in tile.parallel(tile.blocks(T, "token")):
        slot = slots[t]
        values[t, :], scale[t] = quantize_int8(normed_query(q, q_weight, t, eps))
        store_fields((latents, scales, ropes), slot, *latent_row(kv, kv_weight, cos, sin, t, eps))
        rows = key_rows(key, k_weight, k_bias, cos, sin, t, eps)
        store_key_int8(keys, key_scales, slot, hadamard_128(rows) if transform else rows)
    return values, scale


# --- cases and benchmarks ---------------------------------------------------------------------------------------

Args = dict[str, Any]


def _both(
    rand: torch.Generator, tokens: int, rank: int, latent: int, rope: int, width: int, slots: torch.Tensor,
    dtype: torch.dtype, device: str = "cpu",
) -> Args:  # fmt: skip
    key = projected_key(rand, tokens, rope, width, slots, dtype, device)
    args = projected(rand, tokens, rank, latent, rope, slots, dtype, device)
    return {**args, "key": key["key"], "k_weight": key["weight"], "k_bias": key["bias"]}


def _packed(rand: torch.Generator, tokens: int, rank: int, slots: torch.Tensor, size: int, device: str = "cpu") -> Args:
    args = _both(rand, tokens, rank, 512, 64, 128, slots, torch.bfloat16, device)
    pages = torch.zeros(size // 64, PAGE_BYTES, dtype=torch.uint8, device=device)
    return {**args, "cache": packed_rows(rand, size, 512, 64, device), "pages": pages, "transform": True}


@mla_indexer_prolog.case
def plain_both(rand: torch.Generator) -> Args:
    args = _both(rand, 5, 48, 40, 16, 24, slots_with_hole(rand, 5, 20), torch.float32)
    return {**args, "cache": torch.zeros(20, 56), "index": torch.zeros(20, 24)}


@mla_indexer_prolog_packed.case
def packed_float_query(rand: torch.Generator) -> Args:
    return {**_packed(rand, 3, 192, slots_with_hole(rand, 3, 64), 64), "transform": False}


@mla_indexer_prolog_fp8.case
def packed_both(rand: torch.Generator) -> Args:
    return _packed(rand, 3, 192, slots_with_hole(rand, 3, 64), 64)


@mla_indexer_prolog_int8.case
def int8_both(rand: torch.Generator) -> Args:
    args = _both(rand, 5, 96, 256, 32, 128, slots_with_hole(rand, 5, 8), torch.bfloat16)
    caches = {"keys": torch.zeros(8, 128, dtype=torch.int8), "key_scales": torch.zeros(8, dtype=torch.float16)}
    return {**args, **int8_caches(8, 256, 32), **caches, "transform": True}


@mla_indexer_prolog_fp8.bench
def both_64(rand: torch.Generator, device: str) -> Args:
    return _packed(rand, 64, 1536, distinct(rand, 64, 65536, device), 65536, device)


@mla_indexer_prolog_fp8.bench
def both_4096(rand: torch.Generator, device: str) -> Args:
    return _packed(rand, 4096, 1536, distinct(rand, 4096, 65536, device), 65536, device)
