"""Cases of the FP8 products: one matrix, and groups of rows by expert, sorted (contiguous) or in slots (masked)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tilery.ops.bench.case import Case, Prepared, relative_error
from tilery.ops.bench.inputs import block_quantised, group_quantised
from tilery.ops.quant import BLOCK

SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168))
"""N x K of DeepSeek-V3.2: q_a + kv_a, q_b, o_proj, gate and up of an expert."""

SORTED = ((8, 38656, 4096, 7168), (8, 32384, 7168, 2048), (32, 33280, 4096, 7168), (32, 34816, 7168, 2048))
"""Groups, rows, N, K of the contiguous form."""

SMALL = {2112: (2.0, 2.2), 24576: (2.3, 2.6), 7168: (2.4, 2.7), 4096: (2.1, 2.5)}
"""TB/s asked at 64 tokens, by N."""

SAMPLED = 64
"""Rows compared with float64 arithmetic where there are more."""


def cases() -> list[Case]:
    return [*dense(), *contiguous(), *masked()]


def dequantised(values: Tensor, scales: Tensor, rows: int) -> Tensor:
    """float64 of e4m3 [R, K] with scales of `rows` x 128 blocks."""
    wide = scales.double().repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(BLOCK, 1)
    return values.double() * wide[:, : values.shape[1]]


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """float64 [R, N] of quantised a [R, K] (1x128) and b [N, K] (128x128), a slice of N at a time."""
    left = dequantised(a, a_scale, 1)
    slices = range(0, b.shape[0], 2048)
    return torch.cat([left @ dequantised(b[i : i + 2048], b_scale[i // 128 : i // 128 + 16], 128).T for i in slices], 1)


def some_rows(count: int, generator: torch.Generator) -> Tensor:
    if count <= SAMPLED:
        return torch.arange(count, device=generator.device)
    return torch.randint(0, count, (SAMPLED,), generator=generator, device=generator.device)


def rounded(result: Tensor, reference: Tensor) -> float:
    """The error before the rounding of the output: against the reference rounded to the output's format."""
    return relative_error(result, reference.to(result.dtype))


# ---- one matrix ------------------------------------------------------------------------------------------------------


def dense() -> list[Case]:
    found = []
    for m in (1, 16, 64, 128, 4096):
        for n, k in SHAPES:
            must, aim = SMALL[n] if m == 64 else (0.92, 1.0) if m == 4096 else (None, None)
            found.append(
                Case(
                    "fp8_gemm",
                    {"m": m, "n": n, "k": k},
                    functools.partial(make_dense, m, n, k),
                    "copy" if m < 256 else "fp8",
                    metric="tb_per_s" if m < 256 else "ratio",
                    must=must,
                    aim=aim,
                    baseline=("deep_gemm_fp8_block_gemm", {"m": m, "n": n, "k": k}) if m in (64, 4096) else None,
                    cold=m < 256,
                    error_bound=1e-3,
                )
            )
    return found


def make_dense(m: int, n: int, k: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.gemm import align_scales, fp8_gemm

    (a, a_scale), (b, b_scale) = group_quantised(generator, m, k), block_quantised(generator, n, k)
    a_scale = align_scales(a_scale)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        return fp8_gemm(a, a_scale, b, b_scale, out=out)

    def error(result: Tensor) -> float:
        rows = some_rows(m, generator)
        return rounded(result[rows], product(a[rows], a_scale[rows], b, b_scale))

    size = m * k + n * k + 4.0 * (a_scale.numel() + b_scale.numel()) + 2.0 * m * n
    return Prepared(run, error, 2.0 * m * n * k, size, outputs=(out,))


# ---- groups ----------------------------------------------------------------------------------------------------------


def contiguous() -> list[Case]:
    """Prefill: rows sorted by expert, every group padded to 128 rows."""
    return [
        Case(
            "fp8_grouped_gemm_contiguous",
            {"groups": groups, "m": m, "n": n, "k": k},
            functools.partial(make_contiguous, groups, m, n, k),
            "fp8",
            must=0.92,
            aim=1.0,
            baseline=("deep_gemm_fp8_grouped_contiguous", {"groups": groups, "m": m, "n": n, "k": k}),
        )
        for groups, m, n, k in SORTED
    ]


def split_rows(generator: torch.Generator, groups: int, rows: int) -> Tensor:
    """int32 [groups + 1]: the groups' first rows, sizes multiples of 128 within 30 % of the mean, `rows` in all."""
    blocks = rows // BLOCK
    draw = 0.7 + 0.6 * torch.rand(groups, generator=generator, device=generator.device)
    ends = (draw.cumsum(0) * (blocks / draw.sum())).round().long() * BLOCK
    ends[-1] = blocks * BLOCK
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)


def grouped_weights(generator: torch.Generator, groups: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """e4m3 [groups, n, k] and fp32 scales [groups, n / 128, k / 128]."""
    values, scales = block_quantised(generator, groups * n, k)
    return values.view(groups, n, k), scales.view(groups, n // BLOCK, k // BLOCK)


def make_contiguous(groups: int, m: int, n: int, k: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.gemm import align_scales
    from tilery.ops.hopper.grouped_gemm import fp8_gemm_contiguous

    (a, a_scale), (b, b_scale) = group_quantised(generator, m, k), grouped_weights(generator, groups, n, k)
    a_scale, offsets = align_scales(a_scale), split_rows(generator, groups, m)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        return fp8_gemm_contiguous(a, a_scale, b, b_scale, offsets, out=out)

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for group in {0, groups // 2, groups - 1}:
            rows = slice(int(offsets[group]), int(offsets[group]) + 16)
            wanted.append(product(a[rows], a_scale[rows], b[group], b_scale[group]))
            found.append(result[rows])
        return rounded(torch.cat(found), torch.cat(wanted))

    size = m * k + groups * n * k + 4.0 * (a_scale.numel() + b_scale.numel()) + 2.0 * m * n
    return Prepared(run, error, 2.0 * m * n * k, size, outputs=(out,))


def masked() -> list[Case]:
    """Decode: 32 experts with slots for rows, of which the first few are taken."""
    asked = {192: (0.97, 1.1), 20: (0.97, 1.03)}
    return [
        Case(
            "fp8_grouped_gemm_masked",
            {"groups": 32, "mean_m": mean, "n": n, "k": k},
            functools.partial(make_masked, 32, mean, n, k),
            "fp8" if mean > 64 else "copy",
            must=asked[mean][0],
            aim=asked[mean][1],
            baseline=("deep_gemm_fp8_grouped_masked", {"groups": 32, "mean_m": mean, "n": n, "k": k}),
            cold=True,
        )
        for mean in (192, 20)
        for n, k in ((4096, 7168), (7168, 2048))
    ]


def make_masked(groups: int, mean: int, n: int, k: int, generator: torch.Generator) -> Prepared:
    from tilery.ops.hopper.gemm import align_scales
    from tilery.ops.hopper.grouped_gemm import fp8_gemm_masked

    slots = -(-int(mean * 1.3 + 1) // 64) * 64
    (a, a_scale), (b, b_scale) = group_quantised(generator, groups * slots, k), grouped_weights(generator, groups, n, k)
    a, a_scale = a.view(groups, slots, k), align_scales(a_scale).unflatten(0, (groups, slots))
    draw = 0.7 + 0.6 * torch.rand(groups, generator=generator, device="cuda")
    counts = (draw * mean).round().to(torch.int32)
    out = torch.empty(groups, slots, n, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        return fp8_gemm_masked(a, a_scale, b, b_scale, counts, mean, out=out)

    def error(result: Tensor) -> float:
        found, wanted = [], []
        for group in {0, groups // 2, groups - 1}:
            rows = slice(0, int(counts[group]))
            wanted.append(product(a[group, rows], a_scale[group, rows], b[group], b_scale[group]))
            found.append(result[group, rows])
        return rounded(torch.cat(found), torch.cat(wanted))

    rows = float(counts.sum())
    size = rows * (k + 4 * k // BLOCK) + groups * n * k + 4.0 * b_scale.numel() + 2.0 * rows * n
    return Prepared(run, error, 2.0 * rows * n * k, size, outputs=(out,), complete=False)
