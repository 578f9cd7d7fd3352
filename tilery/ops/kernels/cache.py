"""Rows and blocks of the KV cache: written by slot, read back by slot, copied and gathered by block.

A slot is block * block_size + offset, the same in every group of a layer. Formats (`ops.cache` has the first two):

    plain MLA     [S, L + R] float            latent, then rope key
    packed MLA    [S, L + L/32 + 2R] u8       L e4m3 | L/128 f32 power-of-two scales | R bf16      656 bytes at 512 + 64
    int8 MLA      [S, L + 2R + L/32] i8       L int8 | R bf16 | L/128 f32 scales                   656 bytes at 512 + 64
    plain index   [S, D] float
    packed index  [P, 64 * 132] u8            per page of 64 tokens: 64 x 128 e4m3, then 64 f32 scales

Packed MLA rows are those of FlashMLA, packed index pages those of DeepGEMM; int8 rows gather nope, rope and scales in
one access as PyPTO's sparse_attention_antiquant does. The fields of a row are views of the same memory with a dtype of
their own. Everywhere a slot below 0 means "none": nothing is written, zeros are read. Slots written by one call must
differ.

Legend: S slots, T tokens, L latent, R rope, D indexer head dim, P pages or blocks, E elements of a block, K slots read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import cache as reference
from tilery.ops.cache import PAGE
from tilery.ops.kernels._common import (
    BYTES,
    GROUP,
    Index,
    distinct,
    fp8_scale,
    quantize_fp8,
    quantize_int8_groups,
    randn,
    sizes,
)
from tilery.tile import Dim, Float, InOut, Schedule, Static, Tensor, bf16, e4m3, f16, f32, i8, i16, i32, i64, u8
from tilery.tile.dtypes import DType
from tilery.tile.lang import TensorRef, Tile
from tilery.tile.passes.pad import power_of_two
from tilery.tile.tolerance import EXACT

S, T, K, P, E, M, D = Dim("S"), Dim("T"), Dim("K"), Dim("P"), Dim("E"), Dim("M"), Dim("D")
L, R = Dim("L", min=1), Dim("R", min=2, multiple_of=2)
LG = Dim("L", min=GROUP, multiple_of=GROUP)
"""A latent of whole groups, which the quantised rows need."""

C = Dim("C", multiple_of=4)
"""Bytes of a quantised row, where no other tensor tells L and R."""
ROW = LG + LG // 32 + 2 * R
"""Bytes of a packed MLA row."""
PAGE_BYTES = PAGE * (GROUP + 4)
"""Bytes of a packed indexer page."""
Storage = (u8, i8, i16, bf16, f16, i32, f32, i64)
"""dtypes of a cache tensor whose blocks are only moved."""


# --- fields of packed rows --------------------------------------------------------------------------------------

Fields = tuple[TensorRef, TensorRef, TensorRef]


def fp8_fields(cache: TensorRef, latent: Any, rope: Any) -> Fields:
    """(values [S, L] e4m3, scales [S, L/128] f32, rope [S, R] bf16) of packed MLA rows [S, bytes] u8."""
    rows, row = cache.shape
    values = cache.view(e4m3, [rows, latent], strides=[row, 1])
    scales = cache.view(f32, [rows, latent // GROUP], strides=[row // 4, 1], offset=latent // 4)
    return values, scales, cache.view(bf16, [rows, rope], strides=[row // 2, 1], offset=(latent + latent // 32) // 2)


def int8_fields(cache: TensorRef, latent: Any, rope: Any) -> Fields:
    """(values [S, L] i8, scales [S, L/128] f32, rope [S, R] bf16) of int8 MLA rows [S, bytes] i8."""
    rows, row = cache.shape
    values = cache.view(i8, [rows, latent], strides=[row, 1])
    scales = cache.view(f32, [rows, latent // GROUP], strides=[row // 4, 1], offset=(latent + 2 * rope) // 4)
    return values, scales, cache.view(bf16, [rows, rope], strides=[row // 2, 1], offset=latent // 2)


def index_fields(pages: TensorRef) -> tuple[TensorRef, TensorRef]:
    """(keys [P, 64, 128] e4m3, scales [P, 64] f32) of packed indexer pages."""
    count = pages.shape[0]
    keys = pages.view(e4m3, [count, PAGE, GROUP], strides=[PAGE_BYTES, GROUP, 1])
    return keys, pages.view(f32, [count, PAGE], strides=[PAGE_BYTES // 4, 1], offset=PAGE * GROUP // 4)


# --- writing one block of rows (the prologs use these too) ------------------------------------------------------


def store_row(cache: TensorRef, slot: Tile, latent: Tile, rope: Tile) -> None:
    """Plain rows from f32 latent [B, L] and rope [B, R]."""
    keep, width = (slot >= 0)[:, None], latent.shape[1]
    cache.store((slot, tile.span(0, width)), latent.to(cache.dtype), where=keep)
    cache.store((slot, tile.span(width, rope.shape[1])), rope.to(cache.dtype), where=keep)


def store_fields(fields: Fields, slot: Tile, latent: Tile, rope: Tile) -> None:
    """Quantised rows, FP8 or INT8 by the fields' dtype, from f32 latent [B, L] and rope [B, R]."""
    values, scales, tail = fields
    keep = (slot >= 0)[:, None]
    quantize = quantize_fp8 if values.dtype == e4m3 else quantize_int8_groups
    rows, scale = quantize(latent)
    values.store((slot, slice(None)), rows, where=keep)
    scales.store((slot, slice(None)), scale, where=keep)
    tail.store((slot, slice(None)), rope.to(tail.dtype), where=keep)


def store_index(fields: tuple[TensorRef, TensorRef], slot: Tile, rows: Tile) -> None:
    """Packed indexer keys from f32 rows [B, 128]."""
    keys, scales = fields
    page, offset, keep = slot // PAGE, slot % PAGE, slot >= 0
    scale, inverse = fp8_scale(tile.max(abs(rows), axis=1))
    keys.store((page, offset, slice(None)), (rows * inverse[:, None]).to(e4m3), where=keep[:, None])
    scales.store((page, offset), scale, where=keep)


# --- references -------------------------------------------------------------------------------------------------


def _kept(slots: TorchTensor, *rows: TorchTensor) -> tuple[TorchTensor, ...]:
    keep = slots >= 0
    return slots[keep].long(), *(r[keep] for r in rows)


def write_mla_reference(cache: TorchTensor, slots: TorchTensor, latent: TorchTensor, rope: TorchTensor) -> None:
    slots, latent, rope = _kept(slots, latent, rope)
    reference.write_mla(cache, slots, latent, rope)


def write_index_reference(cache: TorchTensor, slots: TorchTensor, keys: TorchTensor) -> None:
    slots, keys = _kept(slots, keys)
    reference.write_index(cache, slots, keys)


def _zero_holes(rows: TorchTensor, slots: TorchTensor) -> TorchTensor:
    return torch.where((slots >= 0)[:, None], rows, 0)


def _read_mla(cache: TorchTensor, slots: TorchTensor, dtype: DType) -> TorchTensor:
    return _zero_holes(cache[slots.long().clamp(min=0)].to(dtype.torch), slots)


def _read_mla_fp8(cache: TorchTensor, slots: TorchTensor, latent: int, dtype: DType) -> TorchTensor:
    return _zero_holes(reference.read_mla(cache, slots.long(), latent, dtype.torch), slots)


def int8_row_parts(rows: TorchTensor, latent: int) -> tuple[TorchTensor, TorchTensor, TorchTensor]:
    """(int8 values, f32 scales, bf16 rope) of int8 MLA rows."""
    end = rows.shape[1] - latent // 32
    scales = rows[:, end:].contiguous().view(torch.float32)
    return rows[:, :latent], scales, rows[:, latent:end].contiguous().view(torch.bfloat16)


def _read_mla_int8(cache: TorchTensor, slots: TorchTensor, latent: int, dtype: DType) -> TorchTensor:
    values, scales, tail = int8_row_parts(cache[slots.long().clamp(min=0)], latent)
    wide = (values.float().unflatten(1, (-1, GROUP)) * scales[..., None]).flatten(1)
    return _zero_holes(torch.cat((wide.to(dtype.torch), tail.to(dtype.torch)), 1), slots)


def _read_index(pages: TorchTensor, slots: TorchTensor, dtype: DType) -> TorchTensor:
    return _zero_holes(reference.read_index(pages, slots.long(), dtype.torch), slots)


def _copy_blocks(cache: TorchTensor, sources: TorchTensor, targets: TorchTensor) -> None:
    cache[targets.long()] = cache[sources.long()]


def _gather_blocks(cache: TorchTensor, blocks: TorchTensor) -> TorchTensor:
    return cache[blocks.long()]


def _scatter_blocks(cache: TorchTensor, blocks: TorchTensor, rows: TorchTensor) -> None:
    cache[blocks.long()] = rows


# --- rows: write ------------------------------------------------------------------------------------------------


@tile.kernel(reference=write_mla_reference, tolerance=EXACT)
def write_mla(
    cache: InOut[S, L + R, Float], slots: Tensor[T, Index], latent: Tensor[T, L, Float], rope: Tensor[T, R, Float]
):
    """Stores normalised latents and rotated rope keys of T tokens as plain rows at their slots."""
    for t in tile.parallel(tile.blocks(T, "token")):
        store_row(cache, slots[t], latent[t, :].to(f32), rope[t, :].to(f32))


@tile.kernel(reference=write_mla_reference, tolerance=BYTES)
def write_mla_fp8(
    cache: InOut[S, ROW, u8], slots: Tensor[T, Index], latent: Tensor[T, LG, Float], rope: Tensor[T, R, Float]
):
    """`write_mla` into packed rows (contiguous): latents quantised per group of 128, rope keys as bf16."""
    fields = fp8_fields(cache, LG, R)
    for t in tile.parallel(tile.blocks(T, "token")):
        store_fields(fields, slots[t], latent[t, :].to(f32), rope[t, :].to(f32))


@tile.kernel(reference=write_index_reference, tolerance=EXACT)
def write_index(cache: InOut[S, D, Float], slots: Tensor[T, Index], keys: Tensor[T, D, Float]):
    """Stores rotated indexer keys of T tokens as plain rows at their slots."""
    for t in tile.parallel(tile.blocks(T, "token")):
        slot = slots[t]
        cache.store((slot, slice(None)), keys[t, :].to(f32).to(cache.dtype), where=(slot >= 0)[:, None])


@tile.kernel(reference=write_index_reference, tolerance=BYTES)
def write_index_fp8(cache: InOut[P, PAGE_BYTES, u8], slots: Tensor[T, Index], keys: Tensor[T, GROUP, Float]):
    """`write_index` into packed pages (contiguous): a key is one FP8 group."""
    fields = index_fields(cache)
    for t in tile.parallel(tile.blocks(T, "token")):
        store_index(fields, slots[t], keys[t, :].to(f32))


# --- rows: read -------------------------------------------------------------------------------------------------


@tile.kernel(reference=_read_mla, tolerance=EXACT)
def read_rows(cache: Tensor[S, D, Float], slots: Tensor[K, Index], dtype: Static[DType] = bf16):
    """Plain rows (MLA or indexer) at `slots` as [K, D] of `dtype`."""
    rows = tile.empty([K, D], dtype)
    for k in tile.parallel(tile.blocks(K, "slot")):
        slot = slots[k]
        rows[k, :] = cache.load((slot, slice(None)), where=(slot >= 0)[:, None]).to(dtype)
    return rows


def load_fields(fields: Fields, slot: Tile, dtype: DType) -> tuple[Tile, Tile]:
    """Dequantised (latent [B, L], rope [B, R]) of `dtype` from FP8 or INT8 rows."""
    values, scales, tail = fields
    keep = (slot >= 0)[:, None]
    codes = values.load((slot, slice(None)), where=keep).to(f32)
    scale = scales.load((slot, slice(None)), where=keep)
    rows, width = sizes(codes)
    latent = (codes.reshape(rows, width // GROUP, GROUP) * scale[:, :, None]).reshape(rows, width)
    return latent.to(dtype), tail.load((slot, slice(None)), where=keep).to(dtype)


@tile.kernel(reference=_read_mla_fp8, tolerance=EXACT)
def read_mla_fp8(
    cache: Tensor[S, C, u8], slots: Tensor[K, Index], latent: Static[int] = 512, dtype: Static[DType] = bf16
):
    """Packed MLA rows (contiguous) at `slots`, dequantised: [K, L + R] of `dtype`, L = `latent`, R from the row."""
    rope = (C - latent - latent // 32) // 2
    fields = fp8_fields(cache, latent, rope)
    rows = tile.empty([K, rope + latent], dtype)
    for k in tile.parallel(tile.blocks(K, "slot")):
        left, right = load_fields(fields, slots[k], dtype)
        rows[k, :latent] = left
        rows[k, latent:] = right
    return rows


@tile.kernel(reference=_read_mla_int8, tolerance=EXACT)
def read_mla_int8(
    cache: Tensor[S, C, i8], slots: Tensor[K, Index], latent: Static[int] = 512, dtype: Static[DType] = bf16
):
    """`read_mla_fp8` of int8 rows."""
    rope = (C - latent - latent // 32) // 2
    fields = int8_fields(cache, latent, rope)
    rows = tile.empty([K, rope + latent], dtype)
    for k in tile.parallel(tile.blocks(K, "slot")):
        left, right = load_fields(fields, slots[k], dtype)
        rows[k, :latent] = left
        rows[k, latent:] = right
    return rows


@tile.kernel(reference=_read_index, tolerance=EXACT)
def read_index_fp8(pages: Tensor[P, PAGE_BYTES, u8], slots: Tensor[K, Index], dtype: Static[DType] = bf16):
    """Indexer keys of packed pages (contiguous) at `slots`, dequantised: [K, 128] of `dtype`."""
    keys, scales = index_fields(pages)
    rows = tile.empty([K, GROUP], dtype)
    for k in tile.parallel(tile.blocks(K, "slot")):
        slot = slots[k]
        page, offset, keep = slot // PAGE, slot % PAGE, slot >= 0
        codes = keys.load((page, offset, slice(None)), where=keep[:, None]).to(f32)
        rows[k, :] = (codes * scales.load((page, offset), where=keep)[:, None]).to(dtype)
    return rows


# --- blocks -----------------------------------------------------------------------------------------------------


def _block_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """8 KiB a program, of bytes: with 1 KiB, starting programs takes longer than copying."""
    return None if target == "cpu" else Schedule(blocks={"part": min(8192, power_of_two(env.get("E", 8192)))}, warps=8)


@tile.kernel(reference=_copy_blocks, tolerance=EXACT, schedule=_block_schedule)
def copy_blocks(cache: InOut[P, E, Storage], sources: Tensor[M, Index], targets: Tensor[M, Index]):
    """cache[targets[i]] = cache[sources[i]] for M pairs, as for copy-on-write of shared prefixes.

    A cache group [S, C] is given as [P, E]: `group.view(P, -1)`. Targets must differ from each other and from all
    sources.
    """
    for m, e in tile.parallel(M, tile.blocks(E, "part")):
        cache[targets[m], e] = cache[sources[m], e]


@tile.kernel(reference=_gather_blocks, tolerance=EXACT, schedule=_block_schedule)
def gather_blocks(cache: Tensor[P, E, Storage], blocks: Tensor[M, Index]):
    """[M, E]: the named blocks, one after the other (swapping out, sending to another machine)."""
    rows = tile.empty([M, E], cache.dtype)
    for m, e in tile.parallel(M, tile.blocks(E, "part")):
        rows[m, e] = cache[blocks[m], e]
    return rows


@tile.kernel(reference=_scatter_blocks, tolerance=EXACT, schedule=_block_schedule)
def scatter_blocks(cache: InOut[P, E, Storage], blocks: Tensor[M, Index], rows: Tensor[M, E, Storage]):
    """The reverse of `gather_blocks`: cache[blocks[i]] = rows[i]; both of one dtype, blocks distinct."""
    for m, e in tile.parallel(M, tile.blocks(E, "part")):
        cache[blocks[m], e] = rows[m, e]


# --- cases and benchmarks ---------------------------------------------------------------------------------------

Args = dict[str, Any]


def slots_with_hole(rand: torch.Generator, count: int, below: int, device: str = "cpu") -> TorchTensor:
    """Distinct slots, the second one -1."""
    slots = distinct(rand, count, below, device)
    slots[1:2] = -1
    return slots


def _rows(rand: torch.Generator, tokens: int, latent: int, rope: int, dtype: torch.dtype, device: str = "cpu") -> Args:
    return {
        "latent": randn(rand, tokens, latent, dtype=dtype, device=device),
        "rope": randn(rand, tokens, rope, dtype=dtype, device=device),
    }


def packed_rows(rand: torch.Generator, slots: int, latent: int, rope: int, device: str = "cpu") -> TorchTensor:
    """A packed MLA cache full of real rows."""
    cache = torch.zeros(slots, latent + latent // 32 + 2 * rope, dtype=torch.uint8, device=device)
    rows = _rows(rand, slots, latent, rope, torch.float32, device)
    write_mla_reference(cache, torch.arange(slots, device=device), rows["latent"], rows["rope"])
    return cache


@write_mla.case
def plain_bf16(rand: torch.Generator) -> Args:
    cache = randn(rand, 40, 40, dtype=torch.bfloat16)
    return {"cache": cache, "slots": slots_with_hole(rand, 5, 40), **_rows(rand, 5, 24, 16, torch.float32)}


@write_mla.case
def plain_views(rand: torch.Generator) -> Args:
    both = randn(rand, 19, 40)
    slots = distinct(rand, 19, 40, dtype=torch.int32)
    return {"cache": torch.zeros(40, 40), "slots": slots, "latent": both[:, :24], "rope": both[:, 24:]}


@write_mla_fp8.case
def packed(rand: torch.Generator) -> Args:
    cache = packed_rows(rand, 30, 256, 16)
    return {"cache": cache, "slots": slots_with_hole(rand, 5, 30), **_rows(rand, 5, 256, 16, torch.bfloat16)}


@write_index.case
def plain_index(rand: torch.Generator) -> Args:
    return {"cache": torch.zeros(20, 24), "slots": slots_with_hole(rand, 3, 20), "keys": randn(rand, 3, 24)}


@write_index_fp8.case
def packed_index(rand: torch.Generator) -> Args:
    cache = torch.zeros(3, PAGE_BYTES, dtype=torch.uint8)
    return {"cache": cache, "slots": slots_with_hole(rand, 18, 192), "keys": randn(rand, 18, 128, dtype=torch.bfloat16)}


@read_rows.case
def plain_rows(rand: torch.Generator) -> Args:
    return {"cache": randn(rand, 30, 40), "slots": slots_with_hole(rand, 18, 30), "dtype": bf16}


@read_mla_fp8.case
def packed_slots(rand: torch.Generator) -> Args:
    cache = packed_rows(rand, 30, 256, 16)
    return {"cache": cache, "slots": slots_with_hole(rand, 5, 30), "latent": 256, "dtype": f32}


@read_mla_fp8.case
def packed_full_width(rand: torch.Generator) -> Args:
    slots = distinct(rand, 3, 9, dtype=torch.int32)
    return {"cache": packed_rows(rand, 9, 512, 64), "slots": slots, "latent": 512, "dtype": bf16}


@read_mla_int8.case
def int8_slots(rand: torch.Generator) -> Args:
    cache = torch.randint(-127, 128, (12, 256 + 8 + 32), generator=rand, dtype=torch.int8)
    parts = [cache[:, :256], randn(rand, 12, 16, dtype=torch.bfloat16), randn(rand, 12, 2).abs()]
    cache = torch.cat([p.contiguous().view(torch.int8) for p in parts], 1)
    return {"cache": cache, "slots": slots_with_hole(rand, 5, 12), "latent": 256, "dtype": f32}


@read_index_fp8.case
def packed_keys(rand: torch.Generator) -> Args:
    pages = torch.zeros(2, PAGE_BYTES, dtype=torch.uint8)
    write_index_reference(pages, torch.arange(128), randn(rand, 128, 128))
    return {"pages": pages, "slots": slots_with_hole(rand, 17, 128), "dtype": f32}


@copy_blocks.case
def copied_bytes(rand: torch.Generator) -> Args:
    order = distinct(rand, 6, 7)
    cache = torch.randint(0, 256, (7, 150), generator=rand, dtype=torch.uint8)
    return {"cache": cache, "sources": order[:3], "targets": order[3:]}


@gather_blocks.case
def gathered(rand: torch.Generator) -> Args:
    return {"cache": randn(rand, 7, 33, dtype=torch.bfloat16), "blocks": distinct(rand, 3, 7, dtype=torch.int32)}


@scatter_blocks.case
def scattered(rand: torch.Generator) -> Args:
    return {"cache": torch.zeros(7, 33), "blocks": distinct(rand, 3, 7), "rows": randn(rand, 3, 33)}


@write_mla_fp8.bench
def packed_4096(rand: torch.Generator, device: str) -> Args:
    cache = torch.zeros(65536, 656, dtype=torch.uint8, device=device)
    slots = distinct(rand, 4096, 65536, device)
    return {"cache": cache, "slots": slots, **_rows(rand, 4096, 512, 64, torch.bfloat16, device)}


@read_mla_fp8.bench
def read_65536(rand: torch.Generator, device: str) -> Args:
    slots = distinct(rand, 65536, 65536, device)
    return {"cache": packed_rows(rand, 65536, 512, 64, device), "slots": slots, "latent": 512, "dtype": bf16}


@copy_blocks.bench
def copy_256(rand: torch.Generator, device: str) -> Args:
    order = distinct(rand, 512, 1024, device)
    cache = torch.zeros(1024, 64 * 656, dtype=torch.uint8, device=device)
    return {"cache": cache, "sources": order[:256], "targets": order[256:]}


@gather_blocks.bench
def gather_256(rand: torch.Generator, device: str) -> Args:
    cache = torch.zeros(1024, 64 * 656, dtype=torch.uint8, device=device)
    return {"cache": cache, "blocks": distinct(rand, 256, 1024, device)}
