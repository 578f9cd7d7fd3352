"""Cases of the INT8 and INT4 products, beside torch's in the same run, and W4A8 beside our own FP8 kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tilery.ops.bench.case import Case, Prepared, relative_error
from tilery.ops.bench.gemm import SHAPES, dequantised, grouped_weights, rounded, some_rows
from tilery.ops.bench.inputs import group_quantised, normal
from tilery.ops.quant import BLOCK


def cases() -> list[Case]:
    return [*int8(), *w4a16(), *w4a8()]


def integers(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """int8 [rows, columns], rounded normal numbers of deviation 40."""
    return normal(generator, rows, columns, scale=40.0).round_().clamp_(-127, 127).to(torch.int8)


# ---- W8A8 ------------------------------------------------------------------------------------------------------------


def int8() -> list[Case]:
    return [
        Case(
            "int8_gemm",
            {"m": 4096, "n": n, "k": k},
            functools.partial(make_int8, 4096, n, k),
            "int8",
            must=0.9,
            aim=1.0,
        )
        for n, k in SHAPES
    ]


def make_int8(m: int, n: int, k: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.int8_gemm import int8_gemm

    a, b = integers(generator, m, k), integers(generator, n, k)
    a_scale = normal(generator, m).abs_() * 1e-2 + 1e-3
    b_scale = (normal(generator, n).abs_() + 0.1) * 1e-3
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        return int8_gemm(a, a_scale, b, b_scale, out=out)

    def error(result: Tensor) -> float:
        rows = some_rows(m, generator)
        exact = a[rows].double() @ b.double().T * a_scale[rows].double()[:, None] * b_scale.double()
        return relative_error(result[rows], exact.to(result.dtype))

    size = float(m * k + n * k + 4 * (m + n) + 2 * m * n)
    return Prepared(run, error, 2.0 * m * n * k, size, outputs=(out,), rival=lambda: torch._int_mm(a, b.t()))


# ---- W4 --------------------------------------------------------------------------------------------------------------


def w4a16() -> list[Case]:
    return [
        Case(
            "w4a16_gemm",
            {"m": m, "n": n, "k": k, "zeros": int(zeros)},
            functools.partial(make_w4a16, m, n, k, zeros),
            "copy",
            must=2.2,
            aim=3.0,
            cold=True,
        )
        for m, zeros in ((1, False), (16, False), (16, True))
        for n, k in SHAPES
    ]


def nibbles(generator: torch.Generator, *shape: int) -> Tensor:
    """int8 of `shape`, uniform in 0 .. 15."""
    return torch.randint(0, 16, shape, generator=generator, device=generator.device, dtype=torch.int8)


def make_w4a16(m: int, n: int, k: int, zeros: bool, generator: torch.Generator) -> Prepared:
    """The rival is torch.mm with the same matrix in bf16."""
    from tilery.ops.hopper.int4_gemm import pack_int4, w4a16_gemm

    weight_q, groups = nibbles(generator, n, k), (n, k // BLOCK)
    zero = nibbles(generator, *groups) if zeros else None
    if zero is None:
        weight_q = weight_q - 8
    scale = ((normal(generator, *groups).abs_() + 0.5) * 0.2 * k**-0.5).to(torch.bfloat16)
    weight = pack_int4(weight_q, scale, zero)
    shift = 0.0 if zero is None else zero.double().repeat_interleave(BLOCK, 1)
    exact = (weight_q.double() - shift) * scale.double().repeat_interleave(BLOCK, 1)
    wide = exact.to(torch.bfloat16)
    a = normal(generator, m, k, dtype=torch.bfloat16)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    wanted = a.double() @ exact.T
    del exact, weight_q, shift

    def run() -> Tensor:
        return w4a16_gemm(a, weight, out=out)

    size = n * k / 2 + 2.0 * n * k / BLOCK * (2 if zeros else 1) + 2.0 * m * (k + n)
    flops = 2.0 * m * n * k
    return Prepared(
        run, lambda result: rounded(result, wanted), flops, size, outputs=(out,), rival=lambda: torch.mm(a, wide.T)
    )


def w4a8() -> list[Case]:
    return [
        Case(
            "w4a8_grouped_gemm_masked",
            {"groups": 32, "mean_m": 20, "n": n, "k": k},
            functools.partial(make_w4a8, 32, 20, n, k),
            "copy",
            must=1.5,
            aim=1.9,
            cold=True,
        )
        for n, k in ((4096, 7168), (7168, 2048))
    ]


def make_w4a8(groups: int, mean: int, n: int, k: int, generator: torch.Generator) -> Prepared:
    """The rival is our FP8 masked product of the same shape."""
    from tilery.ops.hopper.gemm import align_scales
    from tilery.ops.hopper.grouped_gemm import fp8_gemm_masked
    from tilery.ops.hopper.int4_gemm import pack_int4, w4a8_grouped_gemm_masked

    weight_q = nibbles(generator, groups, n, k) - 8
    scale = (normal(generator, groups, n, k // BLOCK).abs_() + 0.5) * 0.2 * k**-0.5
    weight = pack_int4(weight_q, scale, activations=torch.float8_e4m3fn)
    slots = 64
    a, a_scale = group_quantised(generator, groups * slots, k)
    b, b_scale = grouped_weights(generator, groups, n, k)
    a, a_scale = a.view(groups, slots, k), align_scales(a_scale).unflatten(0, (groups, slots))
    draw = 0.7 + 0.6 * torch.rand(groups, generator=generator, device="cuda")
    counts = (draw * mean).round().to(torch.int32)
    out = torch.empty(groups, slots, n, dtype=torch.bfloat16, device="cuda")
    other = torch.empty_like(out)

    def run() -> Tensor:
        return w4a8_grouped_gemm_masked(a, a_scale, weight, counts, out=out, expected=mean)

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for group in {0, groups // 2, groups - 1}:
            rows = slice(0, int(counts[group]))
            exact = weight_q[group].double() * scale[group].double().repeat_interleave(BLOCK, 1)
            wanted.append(dequantised(a[group, rows], a_scale[group, rows], 1) @ exact.T)
            found.append(result[group, rows])
        return rounded(torch.cat(found), torch.cat(wanted))

    rows = float(counts.sum())
    size = rows * (k + 4 * k // BLOCK) + groups * n * k * (0.5 + 4 / BLOCK) + 2.0 * rows * n
    return Prepared(
        run, error, 2.0 * rows * n * k, size, outputs=(out,), complete=False,
        rival=lambda: fp8_gemm_masked(a, a_scale, b, b_scale, counts, mean, out=other),
    )  # fmt: skip
