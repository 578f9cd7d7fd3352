"""SwiGLU, alone and fused with the FP8 quantisation that the down projection wants.

    y = silu(gate) * up,   silu(x) = x / (1 + exp(-x))

A row holds gate, then up. One program handles whole rows: gate and up are two contiguous reads, the output's groups of
128 stand in registers for their amplitude, so each element is read and written once. Products in f32.

Legend: M rows, I width of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilery import tile
from tilery.ops import quant
from tilery.ops.elementwise import swiglu as torch_swiglu
from tilery.ops.kernels._common import FP8_STEP, GROUP, SCALE, quantize_fp8, randn
from tilery.tile import Dim, Float, InOut, Tensor, Tolerance, e4m3, f32, i32
from tilery.tile.schedule import Schedule

M, E = Dim("M"), Dim("E")
I, J = Dim("I"), Dim("J", multiple_of=GROUP)  # noqa: E741


def silu_product(gate: tile.Tile, up: tile.Tile) -> tile.Tile:
    """silu(gate) * up in f32."""
    g = gate.to(f32)
    return g * tile.sigmoid(g) * up.to(f32)


def _schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """About 4096 outputs a program, 16 bytes a thread of each half: the fastest of 24 that were measured."""
    width = env.get("I", env.get("J", 1))
    return (
        Schedule(blocks={"row": 1 << max(0, (4096 // max(width, 1)).bit_length() - 1)}, warps=8)
        if target == "triton"
        else None
    )


def _swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    return torch_swiglu(gate_up)


@tile.kernel(reference=_swiglu_reference, tolerance=Tolerance(atol=1e-6, rtol=8e-3), schedule=_schedule)
def swiglu(gate_up: Tensor[M, 2 * I, Float]):
    """gate_up [M, 2I] -> [M, I] of its dtype; gate is the first half. Source: Shazeer 2020."""
    y = tile.empty([M, I], gate_up.dtype)
    for row in tile.parallel(tile.blocks(M, "row")):
        y[row, :] = silu_product(gate_up[row, 0:I], gate_up[row, I : 2 * I]).to(gate_up.dtype)
    return y


@swiglu.case
def odd_width(rand: torch.Generator) -> dict[str, Any]:
    return {"gate_up": randn(rand, 5, 74)}


@swiglu.case
def large_values(rand: torch.Generator) -> dict[str, Any]:
    return {"gate_up": 40 * randn(rand, 3, 64).bfloat16()}


@swiglu.case
def empty(rand: torch.Generator) -> dict[str, Any]:
    return {"gate_up": torch.empty(0, 32)}


@swiglu.bench
def experts_32768(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"gate_up": randn(rand, 32768, 4096, dtype=torch.bfloat16, device=device)}


def _quant_reference(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quant.quantize_groups(torch_swiglu(gate_up.float()))


@tile.kernel(reference=_quant_reference, tolerance=(FP8_STEP, SCALE), schedule=_schedule)
def swiglu_quant(gate_up: Tensor[M, 2 * J, Float]):
    """gate_up [M, 2J] -> (e4m3 [M, J], f32 power-of-two scales [M, J/128]): SwiGLU in f32, then FP8 in groups of 128.

    The product is not rounded to the input's dtype in between. Scales as in `quantize_fp8_groups`.
    """
    q, s = tile.empty([M, J], e4m3), tile.empty([M, J // GROUP], f32)
    for row in tile.parallel(tile.blocks(M, "row")):
        q[row, :], s[row, :] = quantize_fp8(silu_product(gate_up[row, 0:J], gate_up[row, J : 2 * J]))
    return q, s


@swiglu_quant.case
def three_groups(rand: torch.Generator) -> dict[str, Any]:
    return {"gate_up": randn(rand, 5, 768)}


@swiglu_quant.case
def zeros_and_large(rand: torch.Generator) -> dict[str, Any]:
    x = 20 * randn(rand, 3, 256).bfloat16()
    x[1] = 0.0
    return {"gate_up": x}


@swiglu_quant.case
def no_rows(rand: torch.Generator) -> dict[str, Any]:
    return {"gate_up": torch.empty(0, 256)}


@swiglu_quant.bench
def quant_32768(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"gate_up": randn(rand, 32768, 4096, dtype=torch.bfloat16, device=device)}


def _masked_reference(gate_up: torch.Tensor, counts: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> None:
    for expert, count in enumerate(counts.tolist()):
        values, scale = _quant_reference(gate_up[expert, :count])
        q[expert, :count].view(torch.uint8).copy_(values.view(torch.uint8))
        s[expert, :count] = scale


@tile.kernel(reference=_masked_reference, tolerance=(FP8_STEP, SCALE), schedule=_schedule)
def swiglu_quant_masked(
    gate_up: Tensor[E, M, 2 * J, Float],
    counts: Tensor[E, i32],
    q: InOut[E, M, J, e4m3],
    s: InOut[E, M, J // GROUP, f32],
):
    """`swiglu_quant` for the masked layout of grouped products: expert e uses its first counts[e] of M rows.

    Writes q [E, M, J] and s [E, M, J/128] below the counts and leaves the rest as it is; 0 <= counts[e] <= M.
    Nothing is returned. Cost follows the counts, not M.
    """
    for e, row in tile.parallel(E, tile.blocks(M, "row")):
        count = counts[e]
        if row.start < count:
            values, scale = quantize_fp8(silu_product(gate_up[e, row, 0:J], gate_up[e, row, J : 2 * J]))
            valid = (row.index < count)[:, None]
            q.store((e, row), values, where=valid)
            s.store((e, row), scale, where=valid)


@swiglu_quant_masked.case
def uneven_counts(rand: torch.Generator) -> dict[str, Any]:
    return {
        "gate_up": randn(rand, 4, 9, 512),
        "counts": torch.tensor([0, 9, 3, 8], dtype=torch.int32),
        "q": torch.zeros(4, 9, 256).to(torch.float8_e4m3fn),
        "s": torch.full((4, 9, 2), -1.0),
    }


@swiglu_quant_masked.bench
def decode_32_experts(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {
        "gate_up": randn(rand, 32, 128, 4096, dtype=torch.bfloat16, device=device),
        "counts": torch.randint(0, 65, (32,), generator=rand, device=rand.device, dtype=torch.int32).to(device),
        "q": torch.zeros(32, 128, 2048, device=device).to(torch.float8_e4m3fn),
        "s": torch.zeros(32, 128, 16, device=device),
    }
