"""What several kernels share: functions on tiles, and makers of test arguments.

Quantisation follows `ops.quant`: amplitudes below 1e-4 count as 1e-4, FP8 scales are the smallest power of two that is
not below amax / 448, so that dividing by one is exact.

Legend: B rows of a block, H width, G groups of 128, R rotated dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilery import tile
from tilery.ops.quant import BLOCK, SMALLEST_AMAX
from tilery.tile import Schedule, Tile, bf16, cdiv, e4m3, f32, i8, i32, i64
from tilery.tile.passes.pad import power_of_two
from tilery.tile.tolerance import Tolerance

GROUP = BLOCK
Index = (i32, i64)
"""dtypes of positions, slots and ids; the engine's are int64."""

INT8_MAX = 127.0

CLOSE = Tolerance(1e-5, 0.0078125)
"""One step of bf16: the result of fp32 arithmetic in another order. f32 results are far closer."""
FP8_STEP = Tolerance(2.0**-9, 0.126)
"""One step of e4m3 (a value at a rounding boundary)."""
INT8_STEP = Tolerance(1.0, 0.0)
SCALE = Tolerance(0.0, 1e-5)
"""Power-of-two scales are equal; others differ by the rounding of a division."""
F16_SCALE = Tolerance(2.5e-5, 0.0005)
"""One step of f16."""
BYTES = Tolerance(1.0, 0.0, 0.002)
"""Rows of mixed bytes: a step of e4m3 or bf16 is one step of a byte, but for the rare carry."""


def sizes(x: Tile) -> tuple[Any, ...]:
    """A tile's shape, for arithmetic on its sizes."""
    return x.shape


# --- rotary embedding -------------------------------------------------------------------------------------------


def rotate(first: Tile, second: Tile, cos: Tile, sin: Tile) -> tuple[Tile, Tile]:
    """(first + i second) * (cos + i sin)."""
    return first * cos - second * sin, second * cos + first * sin


def rotate_interleaved(x: Tile, cos: Tile, sin: Tile) -> Tile:
    """Pairs (2i, 2i + 1) of the last axis of x [..., R]; cos, sin [..., R/2]."""
    *rest, width = sizes(x)
    even, odd = rotate(*tile.split(x.reshape(*rest, width // 2, 2)), cos, sin)
    return tile.join(even, odd).reshape(*rest, width)


# --- quantisation -----------------------------------------------------------------------------------------------


def fp8_scale(amax: Tile) -> tuple[Tile, Tile]:
    """The smallest power of two s with amax <= 448 s, and 1 / s, both exact and without a division.

    amax = m 2^e with m in [1, 2); 448 = 1.75 * 2^8, so s = 2^(e - 8), or one more if m > 1.75. Adding
    0x1fffff = 2^23 - 1 - 0.75 * 2^23 to the bits carries into the exponent exactly in that case.
    """
    bits = tile.maximum(amax, SMALLEST_AMAX).bitcast(i32)
    exponent = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    return exponent.bitcast(f32), (0x7F000000 - exponent).bitcast(f32)


def quantize_fp8(x_BH: Tile) -> tuple[Tile, Tile]:
    """f32 [B, H] (H a multiple of 128) -> (e4m3 [B, H], f32 scales [B, H/128])."""
    rows, width = sizes(x_BH)
    groups = x_BH.reshape(rows, width // GROUP, GROUP)
    scale, inverse = fp8_scale(tile.max(abs(groups), axis=2))
    return (groups * inverse[:, :, None]).to(e4m3).reshape(rows, width), scale


def int8_scale(amax: Tile) -> tuple[Tile, Tile]:
    """amax / 127 and its inverse, f32."""
    top = tile.maximum(amax, SMALLEST_AMAX)
    return top * (1.0 / INT8_MAX), INT8_MAX / top


def to_int8(x: Tile) -> Tile:
    """Rounded to nearest, ties to even, kept within +-127."""
    return tile.round(tile.minimum(tile.maximum(x, -INT8_MAX), INT8_MAX)).to(i8)


def quantize_int8(x_BH: Tile) -> tuple[Tile, Tile]:
    """f32 [B, H] -> (i8 [B, H], f32 scales [B]), symmetric, one scale a row."""
    scale, inverse = int8_scale(tile.max(abs(x_BH), axis=1))
    return to_int8(x_BH * inverse[:, None]), scale


def quantize_int8_groups(x_BH: Tile) -> tuple[Tile, Tile]:
    """f32 [B, H] (H a multiple of 128) -> (i8 [B, H], f32 scales [B, H/128])."""
    rows, width = sizes(x_BH)
    groups = x_BH.reshape(rows, width // GROUP, GROUP)
    scale, inverse = int8_scale(tile.max(abs(groups), axis=2))
    return to_int8(groups * inverse[:, :, None]).reshape(rows, width), scale


def whole_groups(size: Any) -> Any:
    """`size` rounded up to whole groups of 128: a span of it reads 0 past the end, which no amax minds."""
    return cdiv(size, GROUP) * GROUP


def _odd(x: Tile) -> Tile:
    """i32: the sign bit, set where x < 256 has an odd number of ones."""
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    return (x ^ (x >> 1)) << 31


def hadamard_rows(width: Any, first: Any, count: Any) -> Tile:
    """Rows first .. first + count of the Sylvester-Hadamard matrix [width, width], +-1 in bf16: entry (i, j) is
    (-1)^popcount(i & j). `width` is a power of two, 8 to 2048.

    H_width is the Kronecker product of H_(width/8) and H_8: two small tables of signs, then one exclusive or and half a
    conversion per entry, where counting ones takes ten operations.
    """
    row = tile.arange(count, first)[:, None]
    outer = _odd((row >> 3) & tile.arange(width // 8)[None, :])
    inner = _odd(row & tile.arange(8)[None, :]) ^ 0x3F800000  # the bits of 1.0
    return (outer[:, :, None] ^ inner[:, None, :]).bitcast(f32).to(bf16).reshape(count, width)


def _butterflies(x_BAN: Tile, levels: int) -> Tile:
    """x [B, A, N = 2^levels] times H_N along the last axis: each level adds and subtracts pairs, and turns the index
    by one bit, so that the next level finds its pairs beside each other and the last restores the order."""
    rows, outer, width = sizes(x_BAN)
    for _ in range(levels):
        even, odd = tile.split(x_BAN.reshape(rows, outer, width // 2, 2))
        x_BAN = tile.join(even + odd, even - odd).transpose(0, 1, 3, 2).reshape(rows, outer, width)
    return x_BAN


def hadamard_128(x_BD: Tile) -> Tile:
    """f32 [B, 128] times H / sqrt(128), bf16 in and out, for rows so few that a dot would be all padding: butterflies
    over the low 3 bits of the index, then over the high 4, each time within a thread's registers."""
    rows = sizes(x_BD)[0]
    x = _butterflies(x_BD.to(bf16).to(f32).reshape(rows, 16, 8), 3)
    x = _butterflies(x.transpose(0, 2, 1), 4).transpose(0, 2, 1)
    return (x.reshape(rows, GROUP) * GROUP**-0.5).to(bf16).to(f32)


# --- schedules --------------------------------------------------------------------------------------------------


def short_rows(env: Mapping[str, int], target: str) -> Schedule | None:
    """About 1,024 elements per program for rows of H, at least one row: few tokens must still fill the machine."""
    if target == "cpu" or "H" not in env:
        return None
    width = power_of_two(env["H"])
    rows = max(1, 1024 // width)
    return Schedule(blocks={"row": rows}, warps=min(8, max(1, rows * width // 512)))


def token_each(env: Mapping[str, int], target: str) -> Schedule | None:
    """One token per program: a decode step has no more than a few per multiprocessor."""
    return None if target == "cpu" else Schedule(blocks={"token": 1}, warps=4)


def heads_first(env: Mapping[str, int], target: str) -> Schedule | None:
    """A token's heads together, so that its cos and sin are read once; several tokens where there are few heads."""
    heads = power_of_two(env.get("N", 16))
    return Schedule(blocks={"head": min(heads, 32), "token": max(1, 32 // heads)})


# --- the same in torch, for references --------------------------------------------------------------------------


def hadamard_matrix(width: int, device: torch.device) -> Tensor:
    """[width, width] f32 of +-1, Sylvester order."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < width:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] times H_D * D^-1/2; bf16 in and out, summed in f32 (DeepSeek-V3.2-Exp inference code)."""
    width = x.shape[-1]
    out = x.bfloat16().float() @ hadamard_matrix(width, x.device) * width**-0.5
    return out.bfloat16().float()


def quantize_int8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., H] -> (int8, f32 scale [...]) with scale = amax / 127 over the last axis."""
    scale = x.float().abs().amax(-1).clamp(min=SMALLEST_AMAX) / INT8_MAX
    return (x.float() / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


# --- arguments for cases and benchmarks -------------------------------------------------------------------------


def randn(
    rand: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", mean: float = 0.0
) -> Tensor:
    """Normal numbers around `mean`, drawn on `rand`'s device."""
    return (torch.randn(*shape, generator=rand, device=rand.device) + mean).to(device=device, dtype=dtype)


def distinct(
    rand: torch.Generator, count: int, below: int, device: str = "cpu", dtype: torch.dtype = torch.int64
) -> Tensor:
    """`count` different integers below `below`: slots of a cache."""
    return torch.randperm(below, generator=rand, device=rand.device)[:count].to(device=device, dtype=dtype)


def tables(tokens: int, rotated: int, device: str = "cpu", first: int = 3) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, rotated / 2] f32 of positions first, first + 1, ..."""
    inverse = 1e4 ** (-torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    angle = torch.outer(torch.arange(first, first + tokens, dtype=torch.float32), inverse)
    return angle.cos().to(device), angle.sin().to(device)
