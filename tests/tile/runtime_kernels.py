"""Kernels that the tests of the runtime share."""

from __future__ import annotations

from typing import Any

import torch

from tilery import tile
from tilery.tile import Dim, InOut, Static, Tensor, Tolerance, f32, i32

T, H, N = Dim("T"), Dim("H", multiple_of=16), Dim("N")


def norm_reference(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(1, keepdim=True) + eps) * w.float()).to(x.dtype)


@tile.kernel(reference=norm_reference, tolerance=Tolerance(1e-2, 1e-2))
def norm(x: Tensor[T, H, tile.Float], w: Tensor[H, tile.Float], eps: float = 1e-6):
    """RMSNorm."""
    y = tile.empty([T, H], x.dtype)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :].to(f32)
        v = v * tile.rsqrt(tile.mean(v * v, axis=1, keepdims=True) + eps) * w[:].to(f32)
        y[t, :] = v.to(x.dtype)
    return y


@norm.case
def ragged(rand: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(5, 32, generator=rand).bfloat16(), "w": torch.randn(32, generator=rand).bfloat16()}


@norm.case
def empty(rand: torch.Generator) -> dict[str, Any]:
    return {"x": torch.zeros(0, 32), "w": torch.ones(32)}


def scale_reference(
    x: torch.Tensor, r: torch.Tensor | None, n: int, k: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    v = x if r is None else x + r
    z = v.clone()
    x.copy_(v * k)
    return torch.full((len(x), k), n, dtype=torch.int32), z


@tile.kernel(reference=scale_reference)
def scale(x: InOut[T, f32], r: Tensor[T, f32] | None, n: int, k: Static[int] = 2):
    """An InOut tensor, an optional one, a runtime scalar, a static value, two outputs."""
    y, z = tile.empty([T, k], i32), tile.empty([T], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t]
        if r is not None:
            v = v + r[t]
        x[t] = v * float(k)
        z[t] = v
        y[t, :] = tile.full([t.extent, k], n, i32)
    return y, z


@scale.case
def with_both(rand: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(7, generator=rand), "r": torch.randn(7, generator=rand), "n": 3, "k": 4}


@scale.case
def alone(rand: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(3, generator=rand), "r": None, "n": -1}


@tile.kernel
def clear(x: InOut[T, f32]):
    """Returns nothing."""
    for t in tile.parallel(tile.blocks(T, "row")):
        x[t] = tile.full([t.extent], 0.0, f32)


@tile.kernel
def counts(i: Tensor[N, i32], bins: Static[int]):
    """An output with an initial value, atomics."""
    y = tile.empty([bins], i32, init=0)
    for n in tile.parallel(tile.blocks(N, "n")):
        y.atomic_add(i[n], tile.full([n.extent], 1, i32))
    return y
