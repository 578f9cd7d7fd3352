"""Products with quantised weights and activations: FP8 blocks, INT8 rows, INT4 groups; plain, and for groups of rows.

All have the form out = a @ b^T: activations a [M, K] and weights b [N, K] as checkpoints store them, K a multiple of
128. Sums are not rounded before the result. Where rows belong to groups (the experts of a mixture), two arrangements:
*contiguous*, the rows of one group after another; *masked*, [E, R, K], room for R rows for every group, of which the
first counts[e] count. Offsets and counts lie on the device, and nothing waits for them there.

`out` may be given: dense, bf16 or fp32. Where it is not, it is made in bf16. All raise `ValueError` for shapes and
dtypes that do not fit.

Legend: M rows, N outputs, K inputs, E groups (experts), R rows a group has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilery.ops.quant import BLOCK, E4M3
from tilery.ops.registry import operator

PIECE = 64
"""What the first row of every group is a multiple of, in the contiguous arrangement."""
OUTPUTS = (torch.bfloat16, torch.float32)
ACTIVATIONS = (torch.bfloat16, E4M3)
"""What INT4 weights multiply."""


# ---- checks ----------------------------------------------------------------------------------------------------------


def require(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], *shape: int | None, dense: bool = True) -> None:
    """Raises `ValueError` unless `x` has one of `dtypes`, `shape` (None: any extent) and, if asked, a dense layout."""
    fits = x.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, x.shape))
    if not fits or x.dtype not in dtypes or (dense and not x.is_contiguous()):
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" + ("" if x.is_contiguous() else ", not dense")
        raise ValueError(f"{name} must be {'dense ' if dense else ''}{kinds} [{wanted}], not {found}")


def output(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out`, checked, or a new bf16 tensor."""
    if out is None:
        return torch.empty(shape, dtype=torch.bfloat16, device=like.device)
    require("out", out, OUTPUTS, *shape)
    return out


def blocks_of(k: int) -> int:
    """Blocks of 128 inputs."""
    if k <= 0 or k % BLOCK:
        raise ValueError(f"the number of inputs must be a positive multiple of {BLOCK}, not {k}")
    return k // BLOCK


def check_fp8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None, experts: tuple[int, ...] = (),
    masked: bool = False,
) -> Tensor:  # fmt: skip
    """Checks the operands of an FP8 product; b, and a where it is `masked`, begin with `experts`. Returns `out`."""
    blocks, n = _check_operands(a, b, E4M3, experts, masked)
    require("a_scale", a_scale, (torch.float32,), *a.shape[:-1], blocks, dense=False)
    require("b_scale", b_scale, (torch.float32,), *experts, -(-n // BLOCK), blocks)
    return output(out, (*a.shape[:-1], n), a)


def check_int8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None, experts: tuple[int, ...] = (),
    masked: bool = False,
) -> Tensor:  # fmt: skip
    """The same for an INT8 product."""
    _, n = _check_operands(a, b, torch.int8, experts, masked)
    require("a_scale", a_scale, (torch.float32,), *a.shape[:-1])
    require("b_scale", b_scale, (torch.float32,), *experts, n)
    return output(out, (*a.shape[:-1], n), a)


def _check_operands(
    a: Tensor, b: Tensor, dtype: torch.dtype, experts: tuple[int, ...], masked: bool
) -> tuple[int, int]:
    """(blocks of inputs, outputs)."""
    require("a", a, (dtype,), *(experts if masked else ()), None, None)
    require("b", b, (dtype,), *experts, None, a.shape[-1])
    return blocks_of(a.shape[-1]), b.shape[-2]


def tiles_of(a: Tensor) -> int:
    """Tiles of 128 rows."""
    if a.dim() != 2 or a.shape[0] % BLOCK:
        raise ValueError(f"a must be int8 [M, K], M a multiple of {BLOCK}, not {list(a.shape)}")
    return a.shape[0] // BLOCK


def check_experts(b: Tensor, name: str, x: Tensor, count: int | None = None) -> tuple[int]:
    """Checks that b has experts, and `count` int32 numbers (one for each, if not given). Returns how many experts."""
    if b.dim() != 3:
        raise ValueError(f"b must have experts, [E, N, K], not {list(b.shape)}")
    require(name, x, (torch.int32,), b.shape[0] if count is None else count)
    return (b.shape[0],)


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def _widen(x: Tensor, scale: Tensor, rows: int = 1) -> Tensor:
    """FP8 [R, K] times its scales, in float64."""
    scale = scale.double().repeat_interleave(rows, 0)[: x.shape[0]].repeat_interleave(BLOCK, 1)
    return x.double() * scale


@operator
def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    """out[m, n] = sum over blocks k of 128 inputs of a_scale[m, k] * b_scale[n / 128, k] * (a[m, k, .] . b[n, k, .]).

    a e4m3 [M, K], a_scale fp32 [M, K/128] in any layout, b e4m3 [N, K], b_scale fp32 [ceil(N/128), K/128]: what
    `quantize_groups` and `quantize_blocks` give. Returns out [M, N]. Implementations may sum the 128 products of a
    block in a tensor core's FP8 units (on Hopper in about 14 bits), blocks in fp32. Source: DeepSeek-V3 report, 3.3.
    """
    out = check_fp8(a, a_scale, b, b_scale, out)
    return out.copy_(_widen(a, a_scale) @ _widen(b, b_scale, BLOCK).T)


@operator
def fp8_grouped_gemm_contiguous(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor | None = None
) -> Tensor:
    """`fp8_gemm` where the rows offsets[e] <= m < offsets[e + 1] are multiplied by the weights of group e.

    a e4m3 [M, K], a_scale fp32 [M, K/128] in any layout, b e4m3 [E, N, K], b_scale fp32 [E, ceil(N/128), K/128],
    offsets int32 [E + 1], ascending multiples of 64 from 0: pad every group; the padding is computed like other rows.
    Returns out [M, N], whose rows from offsets[E] on are left alone.
    """
    out = check_fp8(a, a_scale, b, b_scale, out, check_experts(b, "offsets", offsets, len(b) + 1))
    bounds = offsets.tolist()
    for e, rows in enumerate(map(slice, bounds, bounds[1:])):
        out[rows] = (_widen(a[rows], a_scale[rows]) @ _widen(b[e], b_scale[e], BLOCK).T).to(out.dtype)
    return out


@operator
def fp8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor | None = None
) -> Tensor:
    """`fp8_gemm` of every group: out[e, r] for r < counts[e]; what the other rows hold afterwards is not defined.

    a e4m3 [E, R, K], a_scale fp32 [E, R, K/128] in any layout, b e4m3 [E, N, K], b_scale fp32 [E, ceil(N/128), K/128],
    counts int32 [E] in 0 .. R. expected: rows a group usually has; it may choose how the product is computed, not the
    result. Returns out [E, R, N].
    """
    out = check_fp8(a, a_scale, b, b_scale, out, check_experts(b, "counts", counts), masked=True)
    for e, count in enumerate(counts.tolist()):
        y = _widen(a[e, :count], a_scale[e, :count]) @ _widen(b[e], b_scale[e], BLOCK).T
        out[e, :count] = y.to(out.dtype)
    return out


# ---- INT8 ------------------------------------------------------------------------------------------------------------


def _int8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Tensor:
    return out.copy_((a.double() @ b.double().T) * a_scale.double()[:, None] * b_scale.double())


@operator
def int8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    """out[m, n] = (a[m, .] . b[n, .]) * a_scale[m] * b_scale[n], the sum exact.

    a int8 [M, K], a_scale fp32 [M] (per token), b int8 [N, K], b_scale fp32 [N] (per output). Returns out [M, N].
    Source: W8A8 products with dynamic scales (SmoothQuant, section 2).
    """
    return _int8(a, a_scale, b, b_scale, check_int8(a, a_scale, b, b_scale, out))


@operator
def int8_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, groups: Tensor, out: Tensor | None = None
) -> Tensor:
    """`int8_gemm` where the rows 128 i to 128 i + 127 are multiplied by the weights of group groups[i].

    a int8 [M, K], M a multiple of 128, a_scale fp32 [M], b int8 [E, N, K], b_scale fp32 [E, N], groups int32 [M/128];
    -1 leaves the rows alone. Returns out [M, N].
    """
    out = check_int8(a, a_scale, b, b_scale, out, check_experts(b, "groups", groups, tiles_of(a)))
    for i, e in enumerate(groups.tolist()):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        if e >= 0:
            _int8(a[rows], a_scale[rows], b[e], b_scale[e], out[rows])
    return out


@operator
def int8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor | None = None,
    expected: int | None = None,
) -> Tensor:  # fmt: skip
    """`int8_gemm` of every group: out[e, r] for r < counts[e]; other rows are left alone.

    a int8 [E, R, K], a_scale fp32 [E, R], b int8 [E, N, K], b_scale fp32 [E, N], counts int32 [E] in 0 .. R. expected:
    see `fp8_grouped_gemm_masked`. Returns out [E, R, N].
    """
    out = check_int8(a, a_scale, b, b_scale, out, check_experts(b, "counts", counts), masked=True)
    for e, count in enumerate(counts.tolist()):
        _int8(a[e, :count], a_scale[e, :count], b[e], b_scale[e], out[e, :count])
    return out


# ---- INT4 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int4Weight:
    """INT4 weights of `shape` [N, K] or [E, N, K] in the plain packing.

    packed u8 [.., N, K/128, 64]: q in 0 .. 15; of a group of 128 inputs, input i < 64 lies in the low half of byte i,
    input i + 64 in its high half. scale bf16 or fp32 [.., N, K/128], zero u8 likewise, or None where it is 8
    everywhere. activations: what it multiplies, bf16 or e4m3.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, ...]
    activations: torch.dtype = torch.bfloat16

    def double(self) -> Tensor:
        """The weights in float64, [.., N, K]."""
        q = torch.cat((self.packed & 15, self.packed >> 4), dim=-1).double()
        zero: Tensor | int = 8 if self.zero is None else self.zero.double()[..., None]
        return ((q - zero) * self.scale.double()[..., None]).flatten(-2)


# Tensor cores want nibbles in orders of their own, which differ even between activation types; the contract therefore
# is on numbers. `pack_int4` turns them, once at load time, into what the products beside it read, so that weights exist
# in one form only. A plain `Int4Weight` is understood by every implementation; other forms by the one that made them.


@operator
def pack_int4(
    weight_q: Tensor, scale: Tensor, zero: Tensor | None = None, activations: torch.dtype = torch.bfloat16
) -> Any:
    """INT4 weights w[n, k] = (q[n, k] - zero[n, k / 128]) * scale[n, k / 128] for the products of the same selection.

    weight_q integers [N, K] or [E, N, K], in 0 .. 15 with `zero`, in -8 .. 7 (and nothing subtracted) without; scale
    bf16 or fp32 [.., N, K/128], zero integers in 0 .. 15 likewise. activations: what will be multiplied, bf16 or e4m3.
    The result is opaque, but for its `shape` and `activations`. Any device; the result is on the same one. Looks at
    the numbers, so it waits for the device: call it when weights are loaded. Source: GPTQ, AWQ (groups of 128).
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"INT4 weights multiply bfloat16 or float8_e4m3fn activations, not {activations}")
    if weight_q.dim() not in (2, 3) or not weight_q.numel() or weight_q.is_floating_point():
        raise ValueError(f"weight_q must be integers [N, K] or [E, N, K], not {weight_q.dtype} {list(weight_q.shape)}")
    groups = (*weight_q.shape[:-1], blocks_of(weight_q.shape[-1]))
    require("scale", scale, OUTPUTS, *groups, dense=False)
    if zero is not None and (tuple(zero.shape) != groups or int(zero.min()) < 0 or int(zero.max()) > 15):
        raise ValueError(f"zero must be {list(groups)} in 0 .. 15")
    low = -8 if zero is None else 0
    if int(weight_q.min()) < low or int(weight_q.max()) > low + 15:
        raise ValueError(f"weight_q must be in {low} .. {low + 15}")
    first, second = (weight_q - low).to(torch.uint8).unflatten(-1, (-1, BLOCK)).chunk(2, dim=-1)
    zeros = None if zero is None else zero.to(torch.uint8).contiguous()
    return Int4Weight(first | (second << 4), scale.contiguous(), zeros, tuple(weight_q.shape), activations)


def check_int4(
    a: Tensor, a_scale: Tensor | None, weight: Any, out: Tensor | None, leading: int = 0, counts: Tensor | None = None
) -> Tensor:
    """Checks the operands of a product with a plain weight. Returns `out`."""
    kind = torch.bfloat16 if a_scale is None else E4M3
    if not isinstance(weight, Int4Weight):
        raise ValueError("the weight is not in the plain packing: take pack_int4 and the product from one selection")
    if weight.activations != kind or len(weight.shape) != leading + 2:
        raise ValueError(
            f"the weight {list(weight.shape)} is packed for {weight.activations}, not for {kind} in {leading + 2} "
            "dimensions"
        )
    require("a", a, (kind,), *weight.shape[:leading], None, weight.shape[-1])
    if a_scale is not None:
        require("a_scale", a_scale, (torch.float32,), *a.shape[:-1], a.shape[-1] // BLOCK, dense=False)
    if counts is not None:
        require("counts", counts, (torch.int32,), weight.shape[0])
    return output(out, (*a.shape[:-1], weight.shape[-2]), a)


def _int4_masked(a: Tensor, a_scale: Tensor | None, weight: Any, counts: Tensor, out: Tensor | None) -> Tensor:
    out, w = check_int4(a, a_scale, weight, out, 1, counts), weight.double()
    for e, count in enumerate(counts.tolist()):
        rows = a[e, :count].double() if a_scale is None else _widen(a[e, :count], a_scale[e, :count])
        out[e, :count] = (rows @ w[e].T).to(out.dtype)
    return out


@operator
def w4a16_gemm(a: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    """out = a @ w^T: a bf16 [M, K], w [N, K] from `pack_int4`. Returns out [M, N]. Weights are not rounded to bf16."""
    out = check_int4(a, None, weight, out)
    return out.copy_(a.double() @ weight.double().T)


@operator
def w4a8_gemm(a: Tensor, a_scale: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    """`w4a16_gemm` with a e4m3 [M, K] times a_scale fp32 [M, K/128], in any layout; sums as in `fp8_gemm`."""
    out = check_int4(a, a_scale, weight, out)
    return out.copy_(_widen(a, a_scale) @ weight.double().T)


@operator
def w4a16_grouped_gemm_masked(
    a: Tensor, weight: Any, counts: Tensor, out: Tensor | None = None, expected: int | None = None
) -> Tensor:
    """`w4a16_gemm` of every group: out[e, r] for r < counts[e]; other rows are left alone.

    a bf16 [E, R, K], weight [E, N, K] from `pack_int4`, counts int32 [E] in 0 .. R. expected: see
    `fp8_grouped_gemm_masked`. Returns out [E, R, N].
    """
    return _int4_masked(a, None, weight, counts, out)


@operator
def w4a8_grouped_gemm_masked(
    a: Tensor, a_scale: Tensor, weight: Any, counts: Tensor, out: Tensor | None = None, expected: int | None = None
) -> Tensor:
    """`w4a16_grouped_gemm_masked` with a e4m3 [E, R, K] times a_scale fp32 [E, R, K/128], in any layout."""
    return _int4_masked(a, a_scale, weight, counts, out)
