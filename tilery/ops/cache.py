"""The KV cache's rows: writing them, and reading them back by slot.

A slot is block * block_size + offset, the same in every group of a layer. Two formats, told apart by the tensor's
dtype:

* plain: MLA rows [S, L + R] and indexer rows [S, D] of a float dtype;
* packed (uint8), the field's FP8 layouts, so that kernels of FlashMLA and DeepGEMM read the same bytes:
  an MLA row is L e4m3 values, L/128 fp32 power-of-two scales, R bf16 rope values (512 + 16 + 128 = 656 bytes);
  an indexer *page* of 64 tokens is 64 x 128 e4m3 values, then 64 fp32 scales (132 bytes a token).

Legend: S slots, T tokens, L latent, R rope, D indexer head dim, P pages.
"""

import torch
from torch import Tensor

from tilery.ops.quant import BLOCK, E4M3, quantize_groups
from tilery.ops.registry import implementation, operator

PAGE = 64
"""Tokens of an indexer page: fixed by the kernels that read it."""


def packed_mla_bytes(latent: int, rope: int) -> int:
    """Bytes of one packed MLA row (656 for 512 + 64). Raises `ValueError` if the latent is no multiple of 128."""
    if latent % BLOCK:
        raise ValueError(f"the packed FP8 cache needs kv_lora_rank to be a multiple of {BLOCK}, got {latent}")
    return latent + 4 * (latent // BLOCK) + 2 * rope


def packed_index_bytes(head_dim: int) -> int:
    """Bytes of one packed indexer row (132 for 128). Raises `ValueError` for any other head dimension."""
    if head_dim != BLOCK:
        raise ValueError(f"the packed FP8 cache needs index_head_dim to be {BLOCK}, got {head_dim}")
    return head_dim + 4


@operator
def write_mla(cache: Tensor, slots_T: Tensor, latent_TL: Tensor, rope_TR: Tensor) -> None:
    """Stores the normalised latent [T, L] and the rotated rope key [T, R] of T tokens at their slots (int64, distinct).

    cache: [S, L + R] float, or [S, bytes] uint8 (packed). In place.
    """
    latent = latent_TL.shape[1]
    if cache.dtype != torch.uint8:
        cache.index_copy_(0, slots_T, torch.cat((latent_TL, rope_TR), dim=1).to(cache.dtype))
        return
    values, scale = quantize_groups(latent_TL)
    parts = (values, scale, rope_TR.to(torch.bfloat16).contiguous())
    row = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    if row.shape[1] != cache.shape[1]:
        raise ValueError(f"a packed row of latent {latent} has {row.shape[1]} bytes, the cache has {cache.shape[1]}")
    cache.index_copy_(0, slots_T, row)


@operator
def read_mla(cache: Tensor, slots_T: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """Rows at `slots_T` (int64; -1 reads slot 0, to be masked by the caller) as [T, L + R] of `dtype`."""
    rows = cache.index_select(0, slots_T.clamp(min=0))
    if cache.dtype != torch.uint8:
        return rows.to(dtype)
    groups = latent // BLOCK
    values = rows[:, :latent].view(E4M3).to(torch.float32).unflatten(1, (groups, BLOCK))
    scale = rows[:, latent : latent + 4 * groups].contiguous().view(torch.float32)
    rope = rows[:, latent + 4 * groups :].contiguous().view(torch.bfloat16)
    return torch.cat(((values * scale[..., None]).flatten(1).to(dtype), rope.to(dtype)), dim=1)


def e4m3_to_float(x: Tensor) -> Tensor:
    """e4m3 bytes (uint8) to fp32, exactly, NaN excepted: shifted left by 7 they are fp16 numbers 256 times smaller.

    Four vector operations; the CPU's own conversion handles one element at a time.
    """
    half = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)
    return half.to(torch.float32).mul_(256.0)


@implementation("read_mla", "bit-shift", "cpu")
def read_mla_cpu(cache: Tensor, slots_T: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    rows = cache.index_select(0, slots_T.clamp(min=0))
    if cache.dtype != torch.uint8:
        return rows.to(dtype)
    groups = latent // BLOCK
    scale = rows[:, latent : latent + 4 * groups].contiguous().view(torch.float32)
    rope = rows[:, latent + 4 * groups :].contiguous().view(torch.bfloat16)
    out = torch.empty(rows.shape[0], latent + rope.shape[1], dtype=dtype)
    values = e4m3_to_float(rows[:, :latent].contiguous()).unflatten(1, (groups, BLOCK))
    torch.mul(values, scale[..., None], out=values)
    out[:, :latent] = values.flatten(1)
    out[:, latent:] = rope
    return out


@operator
def write_index(cache: Tensor, slots_T: Tensor, keys_TD: Tensor) -> None:
    """Stores the rotated indexer keys [T, D] of T tokens at their slots. In place.

    cache: [S, D] float, or [P, 64 * 132] uint8 (packed pages).
    """
    if cache.dtype != torch.uint8:
        cache.index_copy_(0, slots_T, keys_TD.to(cache.dtype))
        return
    values, scale = quantize_groups(keys_TD)
    page, offset = slots_T // PAGE, slots_T % PAGE
    keys = cache[:, : PAGE * BLOCK].unflatten(1, (PAGE, BLOCK))
    scales = cache[:, PAGE * BLOCK :].unflatten(1, (PAGE, 4))
    keys[page, offset] = values.view(torch.uint8)
    scales[page, offset] = scale.view(torch.uint8)


@operator
def read_index(cache: Tensor, slots_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Indexer keys at `slots_T` (int64; -1 reads slot 0, to be masked by the caller) as [T, D] of `dtype`."""
    slots = slots_T.clamp(min=0)
    if cache.dtype != torch.uint8:
        return cache.index_select(0, slots).to(dtype)
    page, offset = slots // PAGE, slots % PAGE
    keys = cache[:, : PAGE * BLOCK].unflatten(1, (PAGE, BLOCK))[page, offset]
    scales = cache[:, PAGE * BLOCK :].unflatten(1, (PAGE, 4))[page, offset]
    return (keys.view(E4M3).to(torch.float32) * scales.contiguous().view(torch.float32)).to(dtype)


@implementation("read_index", "bit-shift", "cpu")
def read_index_cpu(cache: Tensor, slots_T: Tensor, dtype: torch.dtype) -> Tensor:
    slots = slots_T.clamp(min=0)
    if cache.dtype != torch.uint8:
        return cache.index_select(0, slots).to(dtype)
    page, offset = slots // PAGE, slots % PAGE
    keys = cache[:, : PAGE * BLOCK].unflatten(1, (PAGE, BLOCK))[page, offset]
    scales = cache[:, PAGE * BLOCK :].unflatten(1, (PAGE, 4))[page, offset]
    return e4m3_to_float(keys).mul_(scales.contiguous().view(torch.float32)).to(dtype)
