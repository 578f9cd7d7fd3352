"""FP8 block matrix products of groups of rows, each with its own weight: the experts of a mixture.

Two arrangements of the rows. Contiguous: the rows of one group after another, each group beginning at a multiple of
64 (prefill). Masked: equal room for every group, of which the first rows count (decode). How many rows a group has is
known on the device only, and nothing waits for it: every program works out its tiles from the numbers there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tilery.ops.hopper._host import on_its_device
from tilery.ops.hopper.gemm import LARGE, LARGE_SHALLOW, PIECE, Config, align_scales, launch, output, reference, variant
from tilery.ops.hopper.variant import Variant
from tilery.ops.quant import BLOCK, E4M3

ALIGNMENT = PIECE
"""What the first row of every group is a multiple of."""
MAX_GROUPS = 1024
"""Above 512 the search for a tile's group spills registers, once a tile."""

FEW = Config(swap=True, pieces=2, height=1, width=64, stages=8, split=True)
"""Up to 64 rows a group, 128 outputs a tile."""
FEWER = Config(swap=True, pieces=2, height=1, width=32, stages=10, split=True, burst=5)
MANY = replace(LARGE, turns=0)
"""256 x 128, of which pieces without rows are not multiplied."""


def choose(expected: float, contiguous: bool) -> Config:
    """The configuration for groups of about `expected` rows."""
    if expected <= PIECE:
        return FEWER if expected <= 24 else FEW
    return LARGE_SHALLOW if contiguous else MANY


@on_its_device
def fp8_gemm_contiguous(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """out[r] = a[r] @ b[g]^T for the rows offsets[g] <= r < offsets[g + 1] of every group g, with block scales.

    a e4m3 [R, K], a_scale fp32 [R, K/128] with the rows contiguous (`gemm.align_scales`; otherwise copied), b e4m3
    [G, N, K], b_scale fp32 [G, ceil(N/128), K/128], offsets int32 [G + 1] on the device, each a multiple of 64, so pad
    every group; out bf16 [R, N]. Padding rows are computed like others; rows from offsets[G] on stay as they are.
    K a multiple of 128, N of 8, at most 1,024 groups. Capture and workspace: see `fp8_gemm`.
    """
    groups, n, k = _weights(b, b_scale)
    rows = a.shape[0]
    _rows(a, a_scale, (rows, k))
    if tuple(offsets.shape) != (groups + 1,) or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise ValueError(f"offsets must be int32 [{groups + 1}], dense, not {offsets.dtype} {list(offsets.shape)}")
    out = output(out, (rows, n), a)
    if rows:
        config = config or choose(rows / groups, contiguous=True)
        count = _tiles(config, rows, n, groups)
        launch(
            config, a, align_scales(a_scale), b.view(-1, k), b_scale, out, n, count,
            starts=offsets, stops=offsets[1:], groups=groups,
        )  # fmt: skip
    return out


@on_its_device
def fp8_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """out[g, r] = a[g, r] @ b[g]^T for r < counts[g] of every group g, with block scales.

    a e4m3 [G, R, K], R a multiple of 64; a_scale fp32 [G, R, K/128], read as strides (R, 1, G * R) (otherwise copied);
    b and b_scale as in `fp8_gemm_contiguous`; counts int32 [G] on the device; expected: rows a group has on average,
    known on the host, by which the kernel is chosen. out bf16 [G, R, N]; what it holds in the rows from counts[g] on is
    not defined. Capture and workspace: see `fp8_gemm`.
    """
    groups, n, k = _weights(b, b_scale)
    if a.dim() != 3 or a.shape[0] != groups or a.shape[1] % PIECE:
        raise ValueError(f"a must be [{groups}, R, {k}] with R a multiple of {PIECE}, not {list(a.shape)}")
    room = a.shape[1]
    _rows(a, a_scale, (groups, room, k))
    if tuple(counts.shape) != (groups,) or counts.dtype != torch.int32 or not counts.is_contiguous():
        raise ValueError(f"counts must be int32 [{groups}], dense, not {counts.dtype} {list(counts.shape)}")
    out = output(out, (groups, room, n), a)
    if room:
        config = config or choose(expected, contiguous=False)
        flat = a_scale.permute(2, 0, 1).reshape(k // BLOCK, groups * room).T
        launch(
            config, a.view(-1, k), align_scales(flat), b.view(-1, k), b_scale, out.view(-1, n), n,
            _tiles(config, room * groups, n, groups), starts=counts, stops=counts, spacing=room, groups=groups,
        )  # fmt: skip
    return out


def _tiles(config: Config, rows: int, n: int, groups: int) -> int:
    """At most how many tiles groups of together `rows` rows have."""
    tokens, outputs = config.tile
    return (rows // tokens + groups) * -(-n // outputs)


def _weights(b: Tensor, b_scale: Tensor) -> tuple[int, int, int]:
    if b.dim() != 3 or b.dtype != E4M3 or not b.is_contiguous() or b.shape[1] % 8 or b.shape[2] % BLOCK:
        raise ValueError(f"b must be dense e4m3 [G, N, K], N % 8 = 0, K % {BLOCK} = 0, not {b.dtype} {list(b.shape)}")
    groups, n, k = b.shape
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"1 to {MAX_GROUPS} groups, not {groups}")
    expected = (groups, -(-n // BLOCK), k // BLOCK)
    if tuple(b_scale.shape) != expected or b_scale.dtype != torch.float32 or not b_scale.is_contiguous():
        raise ValueError(f"b_scale must be dense fp32 {list(expected)}, not {b_scale.dtype} {list(b_scale.shape)}")
    return groups, n, k


def _rows(a: Tensor, a_scale: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(a.shape) != shape or a.dtype != E4M3 or not a.is_contiguous():
        raise ValueError(f"a must be dense e4m3 {list(shape)}, not {a.dtype} {list(a.shape)}")
    expected = (*shape[:-1], shape[-1] // BLOCK)
    if tuple(a_scale.shape) != expected or a_scale.dtype != torch.float32:
        raise ValueError(f"a_scale must be fp32 {list(expected)}, not {a_scale.dtype} {list(a_scale.shape)}")


def grouped_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, starts: list[int], stops: list[int]
) -> Tensor:
    """The contiguous product in float64; rows of no group are zero. Any device."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64, device=a.device)
    for group, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        rows = slice(start, stop)
        out[rows] = reference(a[rows], a_scale[rows], b[group], b_scale[group])
    return out


def variants() -> list[Variant]:
    """Every configuration that `choose` returns, for 32 and 512 groups."""
    configs = {"fewer": FEWER, "few": FEW, "masked": choose(192, False), "contiguous": choose(4096, True)}
    return [variant(f"grouped_{name}_{n}", config, n) for name, config in configs.items() for n in (32, 512)]
