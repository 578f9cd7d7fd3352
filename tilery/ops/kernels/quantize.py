"""Quantisation of activations and dequantisation of weights.

    FP8, groups of 128    s = 2^ceil(log2(max(amax, 1e-4) / 448)),   q = e4m3(x / s)
    INT8, one per token   s = max(amax, 1e-4) / 127,                 q = round(x / s), ties to even
    INT4, groups of 128   w = q * s, q in -8 .. 7, two to a byte
    FP8, blocks 128x128   w = q * s

Legend: M rows, D columns, G = D/128 groups, O outputs and I inputs of a weight.
"""

from __future__ import annotations

from typing import Any

import torch

from tilery import tile
from tilery.ops import quant
from tilery.ops.kernels._common import FP8_STEP, GROUP, INT8_STEP, SCALE, quantize_fp8, quantize_int8, randn
from tilery.ops.kernels._common import quantize_int8_reference as int8_rows
from tilery.tile import Dim, Float, Static, Tensor, Tolerance, bf16, e4m3, f32, i8, i32, u8
from tilery.tile.dtypes import DType

M, D = Dim("M"), Dim("D", multiple_of=GROUP)
O, I = Dim("O"), Dim("I")  # noqa: E741


# ---- FP8 groups ----------------------------------------------------------------------------------------------------


def _groups_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quant.quantize_groups(x)


@tile.kernel(reference=_groups_reference, tolerance=(FP8_STEP, SCALE))
def quantize_fp8_groups(x: Tensor[M, D, Float]):
    """x [M, D] -> (e4m3 [M, D], f32 power-of-two scales [M, D/128]); `x ~ q * s`.

    The scale is the smallest power of two that keeps the group inside +-448, the amplitude taken as 1e-4 at least.
    Source: DeepSeek-V3 report, section 3.3; `scale_fmt: ue8m0` of V3.2.
    """
    q, s = tile.empty([M, D], e4m3), tile.empty([M, D // GROUP], f32)
    for row in tile.parallel(tile.blocks(M, "row")):
        q[row, :], s[row, :] = quantize_fp8(x[row, :].to(f32))
    return q, s


@quantize_fp8_groups.case
def ragged(rand: torch.Generator) -> dict[str, Any]:
    x = randn(rand, 5, 384)
    x[2] = 0.0
    x[3, :4] = torch.tensor([448.0, -1e4, 3e-7, 17.0])
    return {"x": x}


@quantize_fp8_groups.case
def bf16_rows(rand: torch.Generator) -> dict[str, Any]:
    return {"x": randn(rand, 3, 256).bfloat16()}


@quantize_fp8_groups.case
def empty(rand: torch.Generator) -> dict[str, Any]:
    return {"x": torch.empty(0, 128)}


@quantize_fp8_groups.bench
def hidden_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"x": randn(rand, 4096, 7168, dtype=torch.bfloat16, device=device)}


# ---- INT8 per token ------------------------------------------------------------------------------------------------


def _int8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return int8_rows(x)


@tile.kernel(reference=_int8_reference, tolerance=(INT8_STEP, SCALE))
def quantize_int8_rows(x: Tensor[M, I, Float]):
    """x [M, I] -> (int8 [M, I] in -127 .. 127, f32 scales [M]); symmetric, dynamic, one scale per row (token).

    Rounded to nearest, ties to even. Source: W8A8 dynamic quantisation (SmoothQuant, section 2; PyPTO's prologs).
    """
    q, s = tile.empty([M, I], i8), tile.empty([M], f32)
    for row in tile.parallel(tile.blocks(M, "row")):
        q[row, :], s[row] = quantize_int8(x[row, :].to(f32))
    return q, s


@quantize_int8_rows.case
def odd_width(rand: torch.Generator) -> dict[str, Any]:
    x = randn(rand, 6, 77)
    x[1] = 0.0
    return {"x": x}


@quantize_int8_rows.case
def bf16_wide(rand: torch.Generator) -> dict[str, Any]:
    return {"x": 30 * randn(rand, 3, 512).bfloat16()}


@quantize_int8_rows.case
def no_rows(rand: torch.Generator) -> dict[str, Any]:
    return {"x": torch.empty(0, 64)}


@quantize_int8_rows.bench
def query_latent(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"x": randn(rand, 4096, 1536, dtype=torch.bfloat16, device=device)}


# ---- weights -------------------------------------------------------------------------------------------------------


def _int4_reference(packed: torch.Tensor, scale: torch.Tensor, dtype: DType) -> torch.Tensor:
    low, high = (packed & 15).to(torch.int32), (packed >> 4).to(torch.int32)
    values = torch.stack((low, high), dim=-1).flatten(1)
    values = values - 16 * (values > 7).int()
    return (values.float().unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1).to(dtype.torch)


@tile.kernel(reference=_int4_reference, tolerance=Tolerance(atol=0.0, rtol=1e-6))
def dequantize_int4_groups(
    packed: Tensor[O, D // 2, u8], scale: Tensor[O, D // GROUP, Float], dtype: Static[DType] = f32
):
    """packed [O, D/2] -> `dtype` [O, D]: two's-complement nibbles, element 2j in the low half of byte j, times the
    group's scale [O, D/128]. Source: the usual group-128 symmetric INT4 weight format (GPTQ, AWQ).
    """
    w = tile.empty([O, D], dtype)
    for row in tile.parallel(tile.blocks(O, "row")):
        byte = packed[row, :].to(i32)
        pair = tile.join(byte & 15, byte >> 4)
        values = (pair - ((pair & 8) << 1)).reshape(row.extent, D // GROUP, GROUP).to(f32)
        w[row, :] = (values * scale[row, :].to(f32)[:, :, None]).to(dtype).reshape(row.extent, D)
    return w


@dequantize_int4_groups.case
def int4_rows(rand: torch.Generator) -> dict[str, Any]:
    packed = torch.randint(0, 256, (5, 192), generator=rand, dtype=torch.uint8)
    return {"packed": packed, "scale": torch.rand(5, 3, generator=rand), "dtype": f32}


@dequantize_int4_groups.bench
def int4_expert(rand: torch.Generator, device: str) -> dict[str, Any]:
    packed = torch.randint(0, 256, (4096, 3584), generator=rand, device=rand.device, dtype=torch.uint8).to(device)
    scale = torch.rand(4096, 56, generator=rand, device=rand.device).to(device, torch.bfloat16)
    return {"packed": packed, "scale": scale, "dtype": bf16}


def _blocks_reference(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: DType) -> torch.Tensor:
    return quant.dequantize_blocks(weight, scale_inv).to(dtype.torch)


@tile.kernel(reference=_blocks_reference, tolerance=Tolerance(atol=0.0, rtol=1e-6))
def dequantize_fp8_blocks(
    weight: Tensor[O, I, e4m3],
    scale_inv: Tensor[(O + 127) // GROUP, (I + 127) // GROUP, f32],
    dtype: Static[DType] = f32,
):
    """e4m3 [O, I] with f32 scales [ceil(O/128), ceil(I/128)] -> `dtype` [O, I]. The last block of a dimension may be
    partial. Despite its name `scale_inv` multiplies. Source: DeepSeek-V3 checkpoints (`weight_scale_inv`).
    """
    w = tile.empty([O, I], dtype)
    for r, c in tile.parallel(tile.cdiv(O, GROUP), tile.cdiv(I, GROUP)):
        rows, columns = tile.span(r * GROUP, GROUP), tile.span(c * GROUP, GROUP)
        w[rows, columns] = (weight[rows, columns].to(f32) * scale_inv[r, c]).to(dtype)
    return w


@dequantize_fp8_blocks.case
def partial_blocks(rand: torch.Generator) -> dict[str, Any]:
    weight = randn(rand, 150, 200).to(torch.float8_e4m3fn)
    return {"weight": weight, "scale_inv": torch.rand(2, 2, generator=rand), "dtype": f32}


@dequantize_fp8_blocks.case
def one_block(rand: torch.Generator) -> dict[str, Any]:
    weight = randn(rand, 7, 128).to(torch.float8_e4m3fn)
    return {"weight": weight, "scale_inv": torch.rand(1, 1, generator=rand), "dtype": bf16}


@dequantize_fp8_blocks.bench
def fp8_o_proj(rand: torch.Generator, device: str) -> dict[str, Any]:
    weight = randn(rand, 7168, 16384, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(56, 128, generator=rand, device=rand.device).to(device)
    return {"weight": weight, "scale_inv": scale, "dtype": bf16}
