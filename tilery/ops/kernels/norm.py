"""RMSNorm and LayerNorm over rows, with the residual addition before and the FP8 quantisation after in the same pass.

    rms_norm:    y = x / sqrt(mean(x^2) + eps) * w                       Zhang & Sennrich 2019
    layer_norm:  y = (x - mean(x)) / sqrt(var(x) + eps) * w + b          Ba et al. 2016
    residual:    r' = r + x, rounded to r's dtype;  y = rms_norm(r')
    quant:       y per group of 128: s = 2^ceil(log2(amax / 448)), q = e4m3(y / s)

Memory bound: a row is read once, held whole on chip (V3.2: 7168, 1536, 512; openPangu 7680; the bundled model 256) and
written once. The loop runs over blocks of rows. All arithmetic is f32.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import elementwise, quant
from tilery.ops.kernels._common import CLOSE, FP8_STEP, GROUP, SCALE, quantize_fp8, randn, short_rows
from tilery.tile import Dim, Float, Schedule, Static, Tensor, cdiv, e4m3, f32, lib
from tilery.tile.lang import TensorRef, Tile
from tilery.tile.passes.pad import power_of_two

T = Dim("T")
H = Dim("H", min=1)
HG = Dim("H", min=GROUP, multiple_of=GROUP)
MANY_ROWS = 1024
"""Rows from which on every multiprocessor has several programs of two rows."""


# --- references -------------------------------------------------------------------------------------------------


def _rms_norm(x: TorchTensor, weight: TorchTensor, eps: float) -> TorchTensor:
    return elementwise.rms_norm(x, weight, eps)


def _rms_norm_residual(
    x: TorchTensor, residual: TorchTensor, weight: TorchTensor, eps: float
) -> tuple[TorchTensor, ...]:
    total = (x.float() + residual.float()).to(residual.dtype)
    return elementwise.rms_norm(total.float(), weight, eps).to(x.dtype), total


def _quantize(y: TorchTensor, column_major: bool) -> tuple[TorchTensor, TorchTensor]:
    values, scale = quant.quantize_groups(y)
    if not column_major:
        return values, scale
    padded = torch.full((scale.shape[1], -(-len(scale) // 4) * 4), 2.0**-22, device=scale.device)
    padded[:, : len(scale)] = scale.T
    return values, padded


def _rms_norm_quant(x: TorchTensor, weight: TorchTensor, eps: float, column_major: bool) -> tuple[TorchTensor, ...]:
    return _quantize(elementwise.rms_norm(x.float(), weight, eps), column_major)


def _rms_norm_residual_quant(
    x: TorchTensor, residual: TorchTensor, weight: TorchTensor, eps: float, column_major: bool
) -> tuple[TorchTensor, ...]:
    total = (x.float() + residual.float()).to(residual.dtype)
    return *_quantize(elementwise.rms_norm(total.float(), weight, eps), column_major), total


def _layer_norm(x: TorchTensor, weight: TorchTensor, bias: TorchTensor, eps: float) -> TorchTensor:
    return elementwise.layer_norm(x, weight, bias, eps)


# --- kernels ----------------------------------------------------------------------------------------------------


@tile.kernel(schedule=short_rows, reference=_rms_norm, tolerance=CLOSE)
def rms_norm(x: Tensor[T, H, Float], weight: Tensor[H, Float], eps: float = 1e-6):
    """y [T, H] in x's dtype = x / sqrt(mean(x^2) + eps) * weight. Rows of x may be strided (views of a product)."""
    y = tile.empty([T, H], x.dtype)
    for t in tile.parallel(tile.blocks(T, "row")):
        y[t, :] = lib.rms_norm(x[t, :], weight[:], eps).to(x.dtype)
    return y


@tile.kernel(schedule=short_rows, reference=_rms_norm_residual, tolerance=CLOSE)
def rms_norm_residual(
    x: Tensor[T, H, Float], residual: Tensor[T, H, Float], weight: Tensor[H, Float], eps: float = 1e-6
):
    """(y, r): r [T, H] in residual's dtype = residual + x; y [T, H] in x's dtype = rms_norm(r).

    The norm reads r as stored, so that the result equals that of an addition and a norm one after the other.
    """
    y, r = tile.empty([T, H], x.dtype), tile.empty([T, H], residual.dtype)
    for t in tile.parallel(tile.blocks(T, "row")):
        total = (x[t, :].to(f32) + residual[t, :].to(f32)).to(residual.dtype)
        r[t, :] = total
        y[t, :] = lib.rms_norm(total, weight[:], eps).to(x.dtype)
    return y, r


def scale_rows(tokens: Any, column_major: bool) -> Any:
    """Rows a quantising kernel loops over: the column-major scales have their row count rounded up to 4."""
    return cdiv(tokens, 4) * 4 if column_major else tokens


def empty_scales(tokens: Any, groups: Any, column_major: bool) -> TensorRef:
    """f32 [T, G], or [G, T rounded up to 4]: columns of 16-byte-aligned length, which TMA and DeepGEMM want."""
    return tile.empty([groups, scale_rows(tokens, True)] if column_major else [tokens, groups], f32)


def store_scales(scales: TensorRef, t: Any, value: Tile, column_major: bool) -> None:
    """Writes the scales [B, G] of one block of rows."""
    if column_major:
        scales[:, t] = value.T
    else:
        scales[t, :] = value


def _quant_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """As `short_rows`; where wide rows are many, two share what they read of the weights, which stay in the cache: f32
    weights are twice as wide as the rows."""
    usual = short_rows(env, target)
    if usual is None or env.get("T", 0) < MANY_ROWS or not 4096 <= power_of_two(env["H"]) <= 8192:
        return usual
    return Schedule(blocks={"row": 2}, warps=8, evict={"weight": "last"})


@tile.kernel(schedule=_quant_schedule, reference=_rms_norm_quant, tolerance=(FP8_STEP, SCALE))
def rms_norm_quant(
    x: Tensor[T, HG, Float], weight: Tensor[HG, Float], eps: float = 1e-6, column_major: Static[bool] = False
):
    """(q, s): rms_norm of x, quantised per group of 128. q [T, H] e4m3; s [T, H/128] f32, powers of two.

    H must be a multiple of 128. With `column_major` s is [H/128, T rounded up to 4] (M-major and TMA-aligned, as
    DeepGEMM takes scales on Hopper: pass `s.T[:T]`); the columns past T hold 2^-22.
    """
    q, s = tile.empty([T, HG], e4m3), empty_scales(T, HG // GROUP, column_major)
    for t in tile.parallel(tile.blocks(scale_rows(T, column_major), "row")):
        values, scale = quantize_fp8(lib.rms_norm(x[t, :], weight[:], eps))
        q[t, :] = values
        store_scales(s, t, scale, column_major)
    return q, s


@tile.kernel(schedule=short_rows, reference=_rms_norm_residual_quant, tolerance=(FP8_STEP, SCALE, CLOSE))
def rms_norm_residual_quant(
    x: Tensor[T, HG, Float],
    residual: Tensor[T, HG, Float],
    weight: Tensor[HG, Float],
    eps: float = 1e-6,
    column_major: Static[bool] = False,
):
    """(q, s, r): r = residual + x as in `rms_norm_residual`; q and s as in `rms_norm_quant` of r."""
    q, s = tile.empty([T, HG], e4m3), empty_scales(T, HG // GROUP, column_major)
    r = tile.empty([T, HG], residual.dtype)
    for t in tile.parallel(tile.blocks(scale_rows(T, column_major), "row")):
        total = (x[t, :].to(f32) + residual[t, :].to(f32)).to(residual.dtype)
        r[t, :] = total
        values, scale = quantize_fp8(lib.rms_norm(total, weight[:], eps))
        q[t, :] = values
        store_scales(s, t, scale, column_major)
    return q, s, r


@tile.kernel(schedule=short_rows, reference=_layer_norm, tolerance=CLOSE)
def layer_norm(x: Tensor[T, H, Float], weight: Tensor[H, Float], bias: Tensor[H, Float], eps: float = 1e-6):
    """y [T, H] in x's dtype = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; the variance from centred rows."""
    y = tile.empty([T, H], x.dtype)
    for t in tile.parallel(tile.blocks(T, "row")):
        y[t, :] = lib.layer_norm(x[t, :], weight[:], bias[:], eps).to(x.dtype)
    return y


# --- cases and benchmarks ---------------------------------------------------------------------------------------

Args = dict[str, Any]


def _norm(rand: torch.Generator, tokens: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Args:
    return {
        "x": randn(rand, tokens, width, dtype=dtype, device=device),
        "weight": randn(rand, width, device=device, mean=1.0),
        "eps": 1e-6,
    }


def _residual(rand: torch.Generator, tokens: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Args:
    residual = randn(rand, tokens, width, dtype=dtype, device=device) * 4
    return {**_norm(rand, tokens, width, dtype, device), "residual": residual}


@rms_norm.case
def ragged(rand: torch.Generator) -> Args:
    return _norm(rand, 5, 192, torch.bfloat16)


@rms_norm.case
def strided_rows(rand: torch.Generator) -> Args:
    return {**_norm(rand, 3, 48, torch.float32), "x": randn(rand, 3, 80)[:, 16:64]}


@rms_norm.case
def one_row(rand: torch.Generator) -> Args:
    return _norm(rand, 1, 100, torch.float16)


@rms_norm.case
def no_rows(rand: torch.Generator) -> Args:
    return _norm(rand, 0, 64, torch.float32)


@rms_norm_residual.case
def wider_residual(rand: torch.Generator) -> Args:
    args = _norm(rand, 5, 200, torch.bfloat16)
    return {**args, "residual": randn(rand, 5, 200)}


@rms_norm_residual.case
def bf16_rows(rand: torch.Generator) -> Args:
    return _residual(rand, 18, 128, torch.bfloat16)


@rms_norm_quant.case
def row_major(rand: torch.Generator) -> Args:
    return {**_norm(rand, 5, 384, torch.bfloat16), "column_major": False}


@rms_norm_quant.case
def column_major(rand: torch.Generator) -> Args:
    return {**_norm(rand, 17, 384, torch.bfloat16), "column_major": True}


@rms_norm_quant.case
def zero_row(rand: torch.Generator) -> Args:
    args = {**_norm(rand, 2, 128, torch.float32), "column_major": False}
    args["x"][1] = 0
    return args


@rms_norm_residual_quant.case
def residual_row_major(rand: torch.Generator) -> Args:
    return {**_residual(rand, 3, 256, torch.bfloat16), "column_major": False}


@rms_norm_residual_quant.case
def residual_column_major(rand: torch.Generator) -> Args:
    return {**_residual(rand, 6, 384, torch.float32), "column_major": True}


@layer_norm.case
def index_keys(rand: torch.Generator) -> Args:
    return {**_norm(rand, 5, 128, torch.bfloat16), "bias": randn(rand, 128)}


@layer_norm.case
def offset_rows(rand: torch.Generator) -> Args:
    args = _norm(rand, 3, 100, torch.float32)
    return {**args, "x": args["x"] + 50.0, "bias": randn(rand, 100), "eps": 1e-5}


@rms_norm.bench
def hidden_4096(rand: torch.Generator, device: str) -> Args:
    return _norm(rand, 4096, 7168, torch.bfloat16, device)


@rms_norm.bench
def pangu_4096(rand: torch.Generator, device: str) -> Args:
    return _norm(rand, 4096, 7680, torch.bfloat16, device)


@rms_norm.bench
def query_latent_64(rand: torch.Generator, device: str) -> Args:
    return _norm(rand, 64, 1536, torch.bfloat16, device)


@rms_norm_residual.bench
def residual_4096(rand: torch.Generator, device: str) -> Args:
    return _residual(rand, 4096, 7168, torch.bfloat16, device)


@rms_norm_quant.bench
def quant_4096(rand: torch.Generator, device: str) -> Args:
    return {**_norm(rand, 4096, 7168, torch.bfloat16, device), "column_major": True}


@rms_norm_quant.bench
def quant_64(rand: torch.Generator, device: str) -> Args:
    return {**_norm(rand, 64, 7168, torch.bfloat16, device), "column_major": True}


@rms_norm_residual_quant.bench
def residual_quant_4096(rand: torch.Generator, device: str) -> Args:
    return {**_residual(rand, 4096, 7168, torch.bfloat16, device), "column_major": True}


@layer_norm.bench
def keys_4096(rand: torch.Generator, device: str) -> Args:
    return {**_norm(rand, 4096, 128, torch.bfloat16, device), "bias": randn(rand, 128, device=device)}
