"""AMLA: absorbed decode whose accumulator is rescaled by adding integers to its bits (arXiv 2509.25224).

Online softmax multiplies the accumulator by exp(m - m') whenever the maximum grows from m to m'. AMLA keeps it at a
power-of-two scale instead. With scores s in units of log 2 and n = -round(m),

    r = 2^(m + n),  in [2^-1/2, 2^1/2],       P = 2^(s - m),       acc = 2^(n' - n) acc + (r P) V,

and for a normal f32, 2^k F has the bits of F plus k 2^23: the multiplication is an integer addition. On an NPU that is
an atomic add to the accumulator in global memory, which saves its way to the vector core and back; here, on chip, it is
the same arithmetic without the atomic.

r is rounded to bf16, r~, so that the largest entry of a row stays exact in bf16. The accumulator is then at the scale
2^n / c with c = r / r~, and each step owes a factor c / c' = 1 + e. F (1 + e) moves the bits by e M 2^23 with the
mantissa M in [1, 2), of which the mean, 1.5, is added along: the error compensation. The end divides by sum(P) r~.

Two guards that the addition needs: powers are kept above -30, and numbers below 2^-96 (zeros, above all) become 0.

Legend: T query tokens, N heads, K rows a query reads, S cache rows, L latent, R rope, D = L + R.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops.kernels._common import Index, randn
from tilery.ops.kernels.attention import LOG2E
from tilery.tile import Dim, Static, Tensor, Tile, Tolerance, bf16, f32, i32
from tilery.tile.schedule import Schedule

T, N, K, S, D = Dim("T"), Dim("N", min=1), Dim("K", min=1), Dim("S", min=1), Dim("D", min=1)

MANTISSA = 2.0**23
LEAST_POWER = -30.0
SMALLEST = 2.0**-96
"""Numbers below lose nothing that bf16 weights show, and 30 powers further down are still normal."""
CLOSE = Tolerance(5e-3, 0.01)
"""One step of bf16 around 1, as for `mla_decode`; docs/notes/amla.md has the error of whole rows."""


def scale_of(m: Tile) -> tuple[Tile, Tile, Tile]:
    """(-n, r~, c) f32 of a finite running maximum m in units of log 2."""
    whole = tile.round(m)
    r = tile.exp2(m - whole)
    rounded = r.to(bf16).to(f32)
    return whole, rounded, r / rounded


def times_power(x: Tile, power: Tile) -> Tile:
    """f32 x [B, L] times about 2^power [B] (from -30 to 0), by integer addition to the bits; below 2^-96 gives 0."""
    shift = tile.round(power * MANTISSA).to(i32)
    return tile.where(abs(x) < SMALLEST, 0.0, (x.bitcast(i32) + shift[:, None]).bitcast(f32))


def step(
    scores: Tile, values: Tile, m: Tile, total: Tile, acc: Tile, compensate: bool
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """One block: scores [B, C] in units of log 2 (-inf: not seen), values bf16 [C, L]."""
    top = tile.maximum(m, tile.max(scores, axis=1))
    before, after = tile.where(m == float("-inf"), 0.0, m), tile.where(top == float("-inf"), 0.0, top)
    old, _, old_ratio = scale_of(before)
    new, rounded, ratio = scale_of(after)
    p = tile.exp2(scores - after[:, None])
    power = tile.maximum(tile.minimum(old - new, 0.0), LEAST_POWER)
    if compensate:
        power = power + 1.5 * (old_ratio / ratio - 1.0)
    acc = tile.dot((p * rounded[:, None]).to(bf16), values, times_power(acc, power))
    return top, total * tile.exp2(m - after) + tile.sum(p, axis=1), acc


def _reference(
    q: TorchTensor, cache: TorchTensor, slots: TorchTensor, latent: int, scale: float, compensate: bool = True
) -> TorchTensor:
    """The plain softmax in f64."""
    rows = cache.double()[slots.long().clamp(min=0)]
    hole = (slots < 0)[:, None]
    scores = torch.einsum("tnd,tkd->tnk", q.double(), rows) * scale
    weights = scores.masked_fill(hole, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("tnk,tkl->tnl", weights, rows[..., :latent].nan_to_num(0.0)).float()


def _schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    """As `mla_decode`: the accumulator [heads, 512] is what limits a program on a GPU."""
    if target == "cpu":
        return Schedule(blocks={"head": 16, "kv": 32})
    if target == "ascend":
        return Schedule(blocks={"head": 16, "kv": 64})
    return Schedule(blocks={"head": 16, "kv": 32}, warps=4, stages=2)


@tile.kernel(reference=_reference, tolerance=CLOSE, schedule=_schedule)
def amla_decode(
    q: Tensor[T, N, D, bf16], cache: Tensor[S, D, bf16], slots: Tensor[T, K, Index], latent: Static[int],
    scale: float, compensate: bool = True,
):  # fmt: skip
    """Absorbed attention of q [T, N, L + R] over the cache rows slots [T, K] (-1: none) -> [T, N, L] f32.

    scale multiplies the scores; values are the rows' latent part; a token without any row gives zeros. The accumulator
    is rescaled by integer additions, with (`compensate`) or without the correction for the rounding of r.
    Source: arXiv 2509.25224, algorithm 2.
    """
    out = tile.empty([T, N, latent], f32)
    for t, head in tile.parallel(T, tile.blocks(N, "head")):
        q_latent, q_rope = q[t, head, 0:latent], q[t, head, latent:D]
        m, total = tile.full([head.extent], float("-inf"), f32), tile.zeros([head.extent], f32)
        acc = tile.zeros([head.extent, latent], f32)
        for at in tile.range(tile.blocks(K, "kv")):
            row = slots[t, at].to(i32)
            there = row >= 0
            key = cache.load((row, slice(0, latent)), where=there[:, None])
            rope = cache.load((row, slice(latent, D)), where=there[:, None])
            scores = tile.dot(q_rope, rope.T, tile.dot(q_latent, key.T)) * (scale * LOG2E)
            m, total, acc = step(tile.where(there[None, :], scores, float("-inf")), key, m, total, acc, compensate)
        _, rounded, _ = scale_of(tile.where(m == float("-inf"), 0.0, m))
        out[t, head, :] = acc / tile.where(total == 0.0, 1.0, total * rounded)[:, None]
    return out


def case(
    rand: torch.Generator, tokens: int, heads: int, rows: int, latent: int, rope: int, spread: float, holes: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Arguments whose scores are normal with a standard deviation of `spread`."""
    width = latent + rope
    cache = randn(rand, rows, width, dtype=torch.bfloat16, device=device)
    q = randn(rand, tokens, heads, width, dtype=torch.bfloat16, device=device)
    slots = torch.stack([torch.randperm(rows, generator=rand, device=rand.device) for _ in range(tokens)]).int()
    slots[:, :holes] = -1
    return {"q": q, "cache": cache, "slots": slots.to(device), "latent": latent, "scale": spread * width**-0.5}


@amla_decode.case
def amla_peaky(rand: torch.Generator) -> dict[str, Any]:
    return case(rand, 1, 3, 70, 32, 16, spread=3.0)


@amla_decode.case
def amla_holes(rand: torch.Generator) -> dict[str, Any]:
    """The first rows are holes, so a block without any row comes before one with some."""
    return case(rand, 2, 5, 40, 32, 16, spread=1.0, holes=33)


@amla_decode.case
def amla_growing(rand: torch.Generator) -> dict[str, Any]:
    """Scores that grow by hundreds, each block's above the last's: every step takes the largest power."""
    given = case(rand, 1, 2, 40, 16, 16, spread=1.0)
    given["slots"] = torch.arange(40, dtype=torch.int32)[None]
    given["cache"][:, 16] = torch.linspace(-60, 60, 40)
    given["q"][..., 16] = 40.0
    return given


@amla_decode.case
def amla_uncompensated(rand: torch.Generator) -> dict[str, Any]:
    return {**case(rand, 1, 2, 36, 32, 16, spread=0.3), "compensate": False}


@amla_decode.case
def amla_nothing(rand: torch.Generator) -> dict[str, Any]:
    """A token all of whose rows are holes."""
    return case(rand, 1, 2, 20, 16, 16, spread=1.0, holes=20)


@amla_decode.bench
def rows_2048(rand: torch.Generator, device: str) -> dict[str, Any]:
    return case(rand, 64, 128, 2048, 512, 64, spread=1.0, device=device)
