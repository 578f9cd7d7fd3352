"""Products with quantised weights: FP8 in blocks, INT8 by row and output, INT4 in groups; plain, and in groups of rows.

    FP8     out[m, n] = sum_k sa[m, k] * sb[n / 128, k] * (a[m, k, .] . b[n, k, .])         k: blocks of 128 inputs
    INT8    out[m, n] = (a[m, .] . b[n, .]) * sa[m] * sb[n]                                 summed in i32
    W4A16   out[m, n] = sum_k s[n, k] * (a[m, k, .] . (q[n, k, .] - zero[n, k]))
    W4A8    the same times sa[m, k]

A block of 128 inputs is a dimension of every operand, so a program walks over blocks, one product of tiles each, and
scales its sums. INT4 weights are made numbers of the activations' kind as they are read (-15 .. 15 is exact in bf16 and
f16), their scales meet the sums, so nothing is rounded before the result. Byte j of a block holds input j in its low
half and input j + 64 in its high half: each half of the bytes meets one half of the activations, and no lane moves.

FP8 operands may be given as bytes (u8), for GPUs without e4m3: sign, exponent and mantissa are moved to where f16 has
them, which makes the number 2^-8 times as large, and the scales make up for it. The codes of NaN count as +-480.

`out` is an argument, so that its dtype is the caller's and rows that are not to be written stay as they are.

Legend: M rows, N outputs, K blocks of 128 inputs, E experts (groups), R rows each has room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops.kernels._common import GROUP, randn
from tilery.ops.quant import E4M3, quantize_blocks, quantize_groups
from tilery.tile import Dim, InOut, Static, Tensor, TensorRef, Tile, Tolerance, bf16, e4m3, f16, f32, i8, i16, i32, u8
from tilery.tile.dtypes import DType
from tilery.tile.passes.pad import power_of_two
from tilery.tile.schedule import Schedule

PIECE = 64
"""What the first row of every group is a multiple of, in the contiguous arrangement."""
HALF = GROUP // 2

M, N, K = Dim("M"), Dim("N", min=1), Dim("K", min=1)
E, R = Dim("E", min=1), Dim("R")

OUT, FP8 = (bf16, f32), (e4m3, u8)
CLOSE = Tolerance(1e-5, 0.0078125)
"""One step of bf16 and what fp32 sums in another order differ by; f32 results are far closer."""


# ---- schedules -------------------------------------------------------------------------------------------------------


def _schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """Few rows: narrow tiles, so that the weights are read by many programs; many: 128 x 128."""
    if target == "cpu":
        return Schedule(blocks={"row": 32, "column": 64})
    rows = power_of_two(max(env.get("M", env.get("R", GROUP)), 1))
    if rows <= 32:
        return Schedule(blocks={"row": max(rows, 16), "column": 32}, warps=4, stages=4)
    if rows <= PIECE or "R" in env:  # in a room that is large, few rows are taken as a rule
        return Schedule(blocks={"row": PIECE, "column": PIECE}, warps=4, stages=4)
    return Schedule(blocks={"row": GROUP, "column": GROUP}, warps=8, stages=3)


def _pieces_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    return Schedule(blocks={"column": PIECE if target == "cpu" else GROUP}, warps=4, stages=3)


# ---- functions on tiles ----------------------------------------------------------------------------------------------


def fp8_number(x: Tile) -> Tile:
    """e4m3 as it is; bytes as f16 2^-8 times as large."""
    if x.dtype != u8:
        return x
    bits = x.to(i16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).bitcast(f16)


def fp8_factor(dtype: DType) -> float:
    """What makes up for `fp8_number`."""
    return 1.0 if dtype == e4m3 else 256.0


@tile.function
def fp8_product(
    a: TensorRef, a_scale: TensorRef, rows: tuple[Any, ...], height: Any, b: TensorRef, b_scale: TensorRef,
    expert: tuple[Any, ...], column: Any,
) -> Tile:  # fmt: skip
    """f32 [height, columns]: the rows a[rows] times the weights b[expert, column]."""
    acc = tile.zeros([height, column.extent], f32)
    factor = fp8_factor(a.dtype) * fp8_factor(b.dtype)
    for k in tile.range(a.shape[-2]):
        x, w = fp8_number(a[(*rows, k)]), fp8_number(b[(*expert, column, k)])
        row_scale = a_scale[(*rows, k)] * factor if factor != 1.0 else a_scale[(*rows, k)]
        scale = row_scale[:, None] * b_scale[(*expert, column.index // GROUP, k)][None, :]
        acc = acc + tile.dot(x, w.T) * scale
    return acc


@tile.function
def int8_product(
    a: TensorRef, a_scale: TensorRef, rows: tuple[Any, ...], height: Any, b: TensorRef, b_scale: TensorRef,
    expert: tuple[Any, ...], column: Any,
) -> Tile:  # fmt: skip
    """f32 [height, columns], scaled."""
    acc = tile.zeros([height, column.extent], i32)
    for k in tile.range(a.shape[-2]):
        acc = tile.dot(a[(*rows, k)], b[(*expert, column, k)].T, acc)
    return acc.to(f32) * a_scale[rows][:, None] * b_scale[(*expert, column)][None, :]


@tile.function
def int4_product(
    a: TensorRef, a_scale: TensorRef | None, rows: tuple[Any, ...], height: Any, packed: TensorRef, scale: TensorRef,
    zero: TensorRef | None, expert: tuple[Any, ...], column: Any, kind: DType,
) -> Tile:  # fmt: skip
    """f32 [height, columns]; both sides are multiplied as numbers of `kind`."""
    acc = tile.zeros([height, column.extent], f32)
    for k in tile.range(a.shape[-2]):
        byte = packed[(*expert, column, k)].to(i16)
        offset = 8 if zero is None else zero[(*expert, column, k)].to(i16)[:, None]
        low, high = ((byte & 15) - offset).to(kind), ((byte >> 4) - offset).to(kind)
        first, second = a[(*rows, k, slice(0, HALF))], a[(*rows, k, slice(HALF, GROUP))]
        if a.dtype != bf16:
            first, second = (fp8_number(x).to(kind) for x in (first, second))
        factor = scale[(*expert, column, k)].to(f32)[None, :]
        if a_scale is not None:
            factor = factor * (a_scale[(*rows, k)] * fp8_factor(a.dtype))[:, None]
        acc = acc + tile.dot(second, high.T, tile.dot(first, low.T)) * factor
    return acc


# ---- references ------------------------------------------------------------------------------------------------------


def unpack_int4(packed: TorchTensor, zero: TorchTensor | None) -> TorchTensor:
    """u8 [.., K, 64] -> int64 [.., K, 128], less the zeros (8 where there are none)."""
    values = torch.cat((packed & 15, packed >> 4), dim=-1).long()
    return values - (8 if zero is None else zero[..., None].long())


def pack_int4(values: TorchTensor) -> TorchTensor:
    """Integers 0 .. 15 [.., K, 128] -> u8 [.., K, 64]: input j in the low half of byte j, j + 64 in its high half."""
    low, high = values.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def _fp8(x: TorchTensor) -> TorchTensor:
    return (x if x.dtype == E4M3 else x.view(E4M3)).double()


def _fp8_reference(
    a: TorchTensor, a_scale: TorchTensor, b: TorchTensor, b_scale: TorchTensor, out: TorchTensor
) -> None:
    per_row = b_scale.double().repeat_interleave(GROUP, 0)[: len(b)]
    weight = (_fp8(b) * per_row[..., None]).flatten(1)
    out.copy_((_fp8(a) * a_scale.double()[..., None]).flatten(1) @ weight.T)


def _contiguous_reference(
    a: TorchTensor, a_scale: TorchTensor, b: TorchTensor, b_scale: TorchTensor, offsets: TorchTensor, out: TorchTensor
) -> None:
    bounds = offsets.tolist()
    for e, rows in enumerate(map(slice, bounds, bounds[1:])):
        _fp8_reference(a[rows], a_scale[rows], b[e], b_scale[e], out[rows])


def _fp8_masked_reference(
    a: TorchTensor, a_scale: TorchTensor, b: TorchTensor, b_scale: TorchTensor, counts: TorchTensor, out: TorchTensor
) -> None:
    for e, count in enumerate(counts.tolist()):
        _fp8_reference(a[e, :count], a_scale[e, :count], b[e], b_scale[e], out[e, :count])


def _int8_reference(
    a: TorchTensor, a_scale: TorchTensor, b: TorchTensor, b_scale: TorchTensor, out: TorchTensor
) -> None:
    sums = a.flatten(1).double() @ b.flatten(1).double().T
    out.copy_(sums * a_scale.double()[:, None] * b_scale.double())


def _int8_tiles_reference(
    a: TorchTensor, a_scale: TorchTensor, b: TorchTensor, b_scale: TorchTensor, groups: TorchTensor, out: TorchTensor
) -> None:
    for tile_number, e in enumerate(groups.tolist()):
        rows = slice(tile_number * GROUP, (tile_number + 1) * GROUP)
        if e >= 0:
            _int8_reference(a[rows], a_scale[rows], b[e], b_scale[e], out[rows])


def _int8_masked_reference(
    a: TorchTensor, a_scale: TorchTensor, b: TorchTensor, b_scale: TorchTensor, counts: TorchTensor, out: TorchTensor
) -> None:
    for e, count in enumerate(counts.tolist()):
        _int8_reference(a[e, :count], a_scale[e, :count], b[e], b_scale[e], out[e, :count])


def _int4_reference(
    a: TorchTensor, a_scale: TorchTensor | None, packed: TorchTensor, scale: TorchTensor, zero: TorchTensor | None,
    out: TorchTensor, kind: DType,
) -> None:  # fmt: skip
    rows = a.double() if a_scale is None else _fp8(a) * a_scale.double()[..., None]
    weight = unpack_int4(packed, zero).double() * scale.double()[..., None]
    out.copy_(rows.flatten(1) @ weight.flatten(1).T)


def _int4_masked_reference(
    a: TorchTensor, a_scale: TorchTensor | None, packed: TorchTensor, scale: TorchTensor, zero: TorchTensor | None,
    counts: TorchTensor, out: TorchTensor, kind: DType,
) -> None:  # fmt: skip
    for e, n in enumerate(counts.tolist()):
        scales, zeros = (None if x is None else x[e] for x in (a_scale, zero))
        _int4_reference(a[e, :n], None if scales is None else scales[:n], packed[e], scale[e], zeros, out[e, :n], kind)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _blocks(x: TorchTensor) -> TorchTensor:
    return x.unflatten(-1, (-1, GROUP))


def _out(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> TorchTensor:
    return torch.full(shape, -7.0, dtype=dtype, device=device)


def _ints(rand: torch.Generator, low: int, high: int, *shape: int, device: str = "cpu") -> TorchTensor:
    return torch.randint(low, high, shape, generator=rand, device=rand.device).to(device)


def _scales(rand: torch.Generator, *shape: int, device: str = "cpu") -> TorchTensor:
    return (torch.rand(shape, generator=rand, device=rand.device) + 0.5).to(device) / GROUP


def _fp8_rows(rand: torch.Generator, *shape: int, device: str = "cpu") -> dict[str, Any]:
    x = randn(rand, *shape, device=device)
    values, scale = quantize_groups(x.flatten(0, -2))
    return {"a": _blocks(values.view(shape)), "a_scale": scale.view(*shape[:-1], shape[-1] // GROUP)}


def _fp8_weights(rand: torch.Generator, *shape: int, device: str = "cpu") -> dict[str, Any]:
    pairs = [quantize_blocks(randn(rand, *shape[-2:], device=device)) for _ in range(shape[0] if len(shape) > 2 else 1)]
    b, b_scale = (torch.stack([x.view(torch.uint8) if x.dtype == E4M3 else x for x in part]) for part in zip(*pairs))
    b = _blocks(b).view(E4M3)
    return {"b": b, "b_scale": b_scale} if len(shape) > 2 else {"b": b[0], "b_scale": b_scale[0]}


def _int8_operands(
    rand: torch.Generator, a: tuple[int, ...], b: tuple[int, ...], device: str = "cpu"
) -> dict[str, Any]:
    return {
        "a": _blocks(_ints(rand, -127, 128, *a, device=device).to(torch.int8)),
        "a_scale": _scales(rand, *a[:-1], device=device),
        "b": _blocks(_ints(rand, -127, 128, *b, device=device).to(torch.int8)),
        "b_scale": _scales(rand, *b[:-1], device=device),
    }


def _int4_weights(
    rand: torch.Generator, *shape: int, zero: bool = False, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> dict[str, Any]:
    blocks = (*shape[:-1], shape[-1] // GROUP)
    return {
        "packed": _ints(rand, 0, 256, *blocks, HALF, device=device).to(torch.uint8),
        "scale": _scales(rand, *blocks, device=device).to(dtype),
        "zero": _ints(rand, 0, 16, *blocks, device=device).to(torch.uint8) if zero else None,
    }


def _bf16_rows(rand: torch.Generator, *shape: int, device: str = "cpu") -> dict[str, Any]:
    return {"a": _blocks(randn(rand, *shape, dtype=torch.bfloat16, device=device)), "a_scale": None}


def _counts(*counts: int) -> TorchTensor:
    return torch.tensor(counts, dtype=torch.int32)


def _uneven(rand: torch.Generator, experts: int, most: int, device: str) -> TorchTensor:
    return _ints(rand, 0, most, experts, device=device).int()


# ---- FP8 -------------------------------------------------------------------------------------------------------------


@tile.kernel(reference=_fp8_reference, tolerance=CLOSE, schedule=_schedule)
def fp8_gemm(
    a: Tensor[M, K, GROUP, FP8], a_scale: Tensor[M, K, f32], b: Tensor[N, K, GROUP, FP8],
    b_scale: Tensor[(N + 127) // GROUP, K, f32], out: InOut[M, N, OUT],
):  # fmt: skip
    """out [M, N] = a @ b^T, a with a scale per row and 128 inputs, b per 128 outputs and 128 inputs.

    a [M, K, 128], a_scale [M, K], b [N, K, 128], b_scale [ceil(N/128), K]; bytes of e4m3 may be u8. Products are exact
    and summed in f32. Source: DeepSeek-V3 report, section 3.3.
    """
    for row, column in tile.parallel(tile.blocks(M, "row"), tile.blocks(N, "column")):
        out[row, column] = fp8_product(a, a_scale, (row,), row.extent, b, b_scale, (), column).to(out.dtype)


@fp8_gemm.case
def ragged(rand: torch.Generator) -> dict[str, Any]:
    return {**_fp8_rows(rand, 2, 256), **_fp8_weights(rand, 130, 256), "out": _out(2, 130)}


@fp8_gemm.case
def one_row_of_bytes(rand: torch.Generator) -> dict[str, Any]:
    case = {**_fp8_rows(rand, 1, 128), **_fp8_weights(rand, 24, 128), "out": _out(1, 24, dtype=torch.float32)}
    return {**case, **{name: case[name].view(torch.uint8) for name in ("a", "b")}}


@fp8_gemm.case
def no_rows(rand: torch.Generator) -> dict[str, Any]:
    return {**_fp8_rows(rand, 0, 128), **_fp8_weights(rand, 8, 128), "out": _out(0, 8)}


def _fp8_bench(rand: torch.Generator, device: str, m: int, n: int, k: int) -> dict[str, Any]:
    weights = _fp8_weights(rand, n, k, device=device)
    return {**_fp8_rows(rand, m, k, device=device), **weights, "out": _out(m, n, device=device)}


@fp8_gemm.bench
def fp8_16(rand: torch.Generator, device: str) -> dict[str, Any]:
    return _fp8_bench(rand, device, 16, 7168, 2048)


@fp8_gemm.bench
def fp8_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    return _fp8_bench(rand, device, 4096, 7168, 2048)


@tile.kernel(reference=_contiguous_reference, tolerance=CLOSE, schedule=_pieces_schedule)
def fp8_gemm_contiguous(
    a: Tensor[M, K, GROUP, FP8], a_scale: Tensor[M, K, f32], b: Tensor[E, N, K, GROUP, FP8],
    b_scale: Tensor[E, (N + 127) // GROUP, K, f32], offsets: Tensor[E + 1, i32], out: InOut[M, N, OUT],
):  # fmt: skip
    """`fp8_gemm` where rows offsets[e] <= m < offsets[e + 1] meet the weights of expert e.

    offsets: ascending multiples of 64. Rows from offsets[E] on are left as they are. Source: the experts of DeepSeek-V3
    in prefill.
    """
    for piece, column in tile.parallel(tile.cdiv(M, PIECE), tile.blocks(N, "column")):
        rows = tile.span(piece * PIECE, PIECE)
        expert = tile.sum((offsets[:] <= piece * PIECE).to(i32)) - 1
        if (expert >= 0) & (expert < E):
            out[rows, column] = fp8_product(a, a_scale, (rows,), PIECE, b, b_scale, (expert,), column).to(out.dtype)


@fp8_gemm_contiguous.case
def groups_of_whole_pieces(rand: torch.Generator) -> dict[str, Any]:
    case = {**_fp8_rows(rand, 192, 128), **_fp8_weights(rand, 4, 24, 128), "out": _out(192, 24)}
    return {**case, "offsets": _counts(0, 0, 64, 128, 128)}


@fp8_gemm_contiguous.bench
def fp8_contiguous_8192(rand: torch.Generator, device: str) -> dict[str, Any]:
    weights = _fp8_weights(rand, 8, 4096, 7168, device=device)
    offsets = (torch.arange(9, dtype=torch.int32) * 1024).to(device)
    return {**_fp8_rows(rand, 8192, 7168, device=device), **weights, "offsets": offsets,
            "out": _out(8192, 4096, device=device)}  # fmt: skip


@tile.kernel(reference=_fp8_masked_reference, tolerance=CLOSE, schedule=_schedule)
def fp8_gemm_masked(
    a: Tensor[E, R, K, GROUP, FP8], a_scale: Tensor[E, R, K, f32], b: Tensor[E, N, K, GROUP, FP8],
    b_scale: Tensor[E, (N + 127) // GROUP, K, f32], counts: Tensor[E, i32], out: InOut[E, R, N, OUT],
):  # fmt: skip
    """`fp8_gemm` for each expert's first counts[e] of R rows; the others are left as they are.

    Source: the experts of DeepSeek-V3 in decode.
    """
    for e, row, column in tile.parallel(E, tile.blocks(R, "row"), tile.blocks(N, "column")):
        count = counts[e]
        if row.start < count:
            y = fp8_product(a, a_scale, (e, row), row.extent, b, b_scale, (e,), column)
            out.store((e, row, column), y.to(out.dtype), where=(row.index < count)[:, None])


@fp8_gemm_masked.case
def uneven_counts(rand: torch.Generator) -> dict[str, Any]:
    case = {**_fp8_rows(rand, 3, 5, 256), **_fp8_weights(rand, 3, 24, 256), "out": _out(3, 5, 24)}
    return {**case, "counts": _counts(0, 5, 2)}


@fp8_gemm_masked.bench
def fp8_masked_32_experts(rand: torch.Generator, device: str) -> dict[str, Any]:
    weights, out = _fp8_weights(rand, 32, 4096, 7168, device=device), _out(32, 128, 4096, device=device)
    return {**_fp8_rows(rand, 32, 128, 7168, device=device), **weights, "counts": _uneven(rand, 32, 64, device),
            "out": out}  # fmt: skip


# ---- INT8 ------------------------------------------------------------------------------------------------------------


@tile.kernel(reference=_int8_reference, tolerance=CLOSE, schedule=_schedule)
def int8_gemm(
    a: Tensor[M, K, GROUP, i8], a_scale: Tensor[M, f32], b: Tensor[N, K, GROUP, i8], b_scale: Tensor[N, f32],
    out: InOut[M, N, OUT],
):  # fmt: skip
    """out [M, N] = (a @ b^T) * a_scale[m] * b_scale[n], summed in i32.

    a [M, K, 128], b [N, K, 128]. Source: W8A8 products with dynamic scales (SmoothQuant, section 2).
    """
    for row, column in tile.parallel(tile.blocks(M, "row"), tile.blocks(N, "column")):
        out[row, column] = int8_product(a, a_scale, (row,), row.extent, b, b_scale, (), column).to(out.dtype)


@int8_gemm.case
def int8_ragged(rand: torch.Generator) -> dict[str, Any]:
    return {**_int8_operands(rand, (5, 256), (40, 256)), "out": _out(5, 40, dtype=torch.float32)}


@int8_gemm.case
def int8_one_row(rand: torch.Generator) -> dict[str, Any]:
    return {**_int8_operands(rand, (1, 128), (72, 128)), "out": _out(1, 72)}


@int8_gemm.bench
def int8_16(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**_int8_operands(rand, (16, 2048), (7168, 2048), device), "out": _out(16, 7168, device=device)}


@int8_gemm.bench
def int8_4096(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**_int8_operands(rand, (4096, 2048), (7168, 2048), device), "out": _out(4096, 7168, device=device)}


@tile.kernel(reference=_int8_tiles_reference, tolerance=CLOSE, schedule=_pieces_schedule)
def int8_gemm_tiles(
    a: Tensor[M, K, GROUP, i8], a_scale: Tensor[M, f32], b: Tensor[E, N, K, GROUP, i8], b_scale: Tensor[E, N, f32],
    groups: Tensor[(M + 127) // GROUP, i32], out: InOut[M, N, OUT],
):  # fmt: skip
    """`int8_gemm` where the rows 128 i to 128 i + 127 meet the weights of expert groups[i]; -1 leaves them as they are.

    Source: the experts of a mixture in prefill.
    """
    for piece, column in tile.parallel(tile.cdiv(M, PIECE), tile.blocks(N, "column")):
        rows, expert = tile.span(piece * PIECE, PIECE), groups[piece // (GROUP // PIECE)]
        if expert >= 0:
            out[rows, column] = int8_product(a, a_scale, (rows,), PIECE, b, b_scale, (expert,), column).to(out.dtype)


@int8_gemm_tiles.case
def tiles_and_a_hole(rand: torch.Generator) -> dict[str, Any]:
    return {**_int8_operands(rand, (384, 128), (2, 24, 128)), "groups": _counts(1, -1, 0), "out": _out(384, 24)}


@int8_gemm_tiles.bench
def int8_tiles_8192(rand: torch.Generator, device: str) -> dict[str, Any]:
    groups = (torch.arange(64, dtype=torch.int32) // 8).to(device)
    return {**_int8_operands(rand, (8192, 7168), (8, 4096, 7168), device), "groups": groups,
            "out": _out(8192, 4096, device=device)}  # fmt: skip


@tile.kernel(reference=_int8_masked_reference, tolerance=CLOSE, schedule=_schedule)
def int8_gemm_masked(
    a: Tensor[E, R, K, GROUP, i8], a_scale: Tensor[E, R, f32], b: Tensor[E, N, K, GROUP, i8],
    b_scale: Tensor[E, N, f32], counts: Tensor[E, i32], out: InOut[E, R, N, OUT],
):  # fmt: skip
    """`int8_gemm` for each expert's first counts[e] of R rows; the others are left as they are.

    Source: the experts of a mixture in decode.
    """
    for e, row, column in tile.parallel(E, tile.blocks(R, "row"), tile.blocks(N, "column")):
        count = counts[e]
        if row.start < count:
            y = int8_product(a, a_scale, (e, row), row.extent, b, b_scale, (e,), column)
            out.store((e, row, column), y.to(out.dtype), where=(row.index < count)[:, None])


@int8_gemm_masked.case
def int8_uneven_counts(rand: torch.Generator) -> dict[str, Any]:
    case = _int8_operands(rand, (3, 5, 256), (3, 24, 256))
    return {**case, "counts": _counts(0, 5, 2), "out": _out(3, 5, 24)}


@int8_gemm_masked.bench
def int8_masked_32_experts(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**_int8_operands(rand, (32, 128, 7168), (32, 4096, 7168), device),
            "counts": _uneven(rand, 32, 64, device), "out": _out(32, 128, 4096, device=device)}  # fmt: skip


# ---- INT4 ------------------------------------------------------------------------------------------------------------


@tile.kernel(reference=_int4_reference, tolerance=CLOSE, schedule=_schedule)
def int4_gemm(
    a: Tensor[M, K, GROUP, (bf16, *FP8)], a_scale: Tensor[M, K, f32] | None, packed: Tensor[N, K, HALF, u8],
    scale: Tensor[N, K, OUT], zero: Tensor[N, K, u8] | None, out: InOut[M, N, OUT], kind: Static[DType] = bf16,
):  # fmt: skip
    """out [M, N] = a @ w^T, w[n, k, i] = (q[n, k, i] - zero[n, k]) * scale[n, k].

    a bf16 [M, K, 128], or FP8 with a_scale [M, K]. packed [N, K, 64]: q in 0 .. 15, input i < 64 in the low half of
    byte i, i + 64 in its high half. zero [N, K] in 0 .. 15; 8 where it is absent. Weights are not rounded. `kind`: what
    FP8 rows and weights are multiplied as, bf16 or f16, which hold both; a CPU converts to one faster, a GPU to the
    other (bytes: f16). Source: the usual INT4 weights in groups of 128 (GPTQ, AWQ).
    """
    for row, column in tile.parallel(tile.blocks(M, "row"), tile.blocks(N, "column")):
        out[row, column] = int4_product(
            a, a_scale, (row,), row.extent, packed, scale, zero, (), column, kind
        ).to(out.dtype)  # fmt: skip


@int4_gemm.case
def bf16_with_zeros(rand: torch.Generator) -> dict[str, Any]:
    return {**_bf16_rows(rand, 5, 256), **_int4_weights(rand, 40, 256, zero=True), "out": _out(5, 40), "kind": bf16}


@int4_gemm.case
def bf16_one_row(rand: torch.Generator) -> dict[str, Any]:
    case = {**_bf16_rows(rand, 1, 128), **_int4_weights(rand, 72, 128, dtype=torch.float32)}
    return {**case, "out": _out(1, 72, dtype=torch.float32), "kind": bf16}


@int4_gemm.case
def fp8_ragged(rand: torch.Generator) -> dict[str, Any]:
    return {**_fp8_rows(rand, 3, 256), **_int4_weights(rand, 24, 256), "out": _out(3, 24), "kind": bf16}


@int4_gemm.case
def bytes_ragged(rand: torch.Generator) -> dict[str, Any]:
    case = {**_fp8_rows(rand, 2, 128), **_int4_weights(rand, 24, 128), "out": _out(2, 24)}
    return {**case, "a": case["a"].view(torch.uint8), "kind": f16}


@int4_gemm.bench
def w4a16_16(rand: torch.Generator, device: str) -> dict[str, Any]:
    weights = _int4_weights(rand, 7168, 2048, device=device)
    rows = _bf16_rows(rand, 16, 2048, device=device)
    return {**rows, **weights, "out": _out(16, 7168, device=device), "kind": bf16}


@int4_gemm.bench
def w4a8_16(rand: torch.Generator, device: str) -> dict[str, Any]:
    weights = _int4_weights(rand, 7168, 2048, device=device)
    rows = _fp8_rows(rand, 16, 2048, device=device)
    return {**rows, **weights, "out": _out(16, 7168, device=device), "kind": f16}


@tile.kernel(reference=_int4_masked_reference, tolerance=CLOSE, schedule=_schedule)
def int4_gemm_masked(
    a: Tensor[E, R, K, GROUP, (bf16, *FP8)], a_scale: Tensor[E, R, K, f32] | None, packed: Tensor[E, N, K, HALF, u8],
    scale: Tensor[E, N, K, OUT], zero: Tensor[E, N, K, u8] | None, counts: Tensor[E, i32], out: InOut[E, R, N, OUT],
    kind: Static[DType] = bf16,
):  # fmt: skip
    """`int4_gemm` for each expert's first counts[e] of R rows; the others are left as they are.

    Source: the experts of a mixture in decode.
    """
    for e, row, column in tile.parallel(E, tile.blocks(R, "row"), tile.blocks(N, "column")):
        count = counts[e]
        if row.start < count:
            y = int4_product(a, a_scale, (e, row), row.extent, packed, scale, zero, (e,), column, kind)
            out.store((e, row, column), y.to(out.dtype), where=(row.index < count)[:, None])


@int4_gemm_masked.case
def fp8_uneven_counts(rand: torch.Generator) -> dict[str, Any]:
    case = {**_fp8_rows(rand, 3, 5, 128), **_int4_weights(rand, 3, 24, 128, zero=True), "out": _out(3, 5, 24)}
    return {**case, "counts": _counts(0, 5, 2), "kind": f16}


@int4_gemm_masked.case
def bf16_uneven_counts(rand: torch.Generator) -> dict[str, Any]:
    case = {**_bf16_rows(rand, 2, 3, 128), **_int4_weights(rand, 2, 24, 128, zero=True), "out": _out(2, 3, 24)}
    return {**case, "counts": _counts(3, 1), "kind": bf16}


@int4_gemm_masked.bench
def w4a8_masked_32_experts(rand: torch.Generator, device: str) -> dict[str, Any]:
    weights, out = _int4_weights(rand, 32, 4096, 7168, device=device), _out(32, 128, 4096, device=device)
    return {**_fp8_rows(rand, 32, 128, 7168, device=device), **weights, "counts": _uneven(rand, 32, 64, device),
            "out": out, "kind": f16}  # fmt: skip
