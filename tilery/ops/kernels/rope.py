"""Rotary position embedding: interleaved and half-split pairs, whole or partial heads, one or several position axes.

    (a, b) -> (a cos - b sin, b cos + a sin)        angle = position * frequency[i]          Su et al. 2021

    interleaved   pairs (2i, 2i + 1)                MLA's queries and keys (DeepSeek-V2, -V3, -V3.2)
    half-split    pairs (i, i + R/2)                the indexer's (DeepSeek-V3.2), and most other models'

Only R of a head's D dims rotate: the first R, or with `last` the last R; the rest is copied. The tables cos and sin
[., R/2] f32 carry the frequencies, so YaRN and any other scaling belongs to whoever builds them
(`models.deepseek.rope_table` blends YaRN's). Tokens and heads are both cut into blocks. Arithmetic is f32.

Legend: T tokens, N heads, D head dim, R rotated dims, M table rows, A position axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import elementwise
from tilery.ops.kernels._common import CLOSE, Index, heads_first, randn, rotate, rotate_interleaved, sizes, tables
from tilery.tile import Dim, Float, InOut, Static, Tensor, f32
from tilery.tile.lang import TensorRef, Tile

T, N, D, M, A = Dim("T"), Dim("N"), Dim("D"), Dim("M"), Dim("A")
R = Dim("R", min=2, multiple_of=2)


# --- pieces -----------------------------------------------------------------------------------------------------


def turn(
    source: TensorRef, target: TensorRef, t: Any, n: Any, at: Any, cos: Tile, sin: Tile, interleaved: bool
) -> None:
    """Rotates source[t, n, at : at + R] into the same place of `target`; cos, sin [B, 1, R/2]."""
    half = sizes(cos)[-1]
    if interleaved:
        x = source[t, n, tile.span(at, half * 2)].to(f32)
        target[t, n, tile.span(at, half * 2)] = rotate_interleaved(x, cos, sin).to(target.dtype)
    else:
        first, second = tile.span(at, half), tile.span(at + half, half)
        a, b = rotate(source[t, n, first].to(f32), source[t, n, second].to(f32), cos, sin)
        target[t, n, first] = a.to(target.dtype)
        target[t, n, second] = b.to(target.dtype)


def rotated_from(last: bool) -> Any:
    """Where the rotated part of a head starts."""
    return D - R if last else 0


# --- references -------------------------------------------------------------------------------------------------


def rotate_reference(x: TorchTensor, cos: TorchTensor, sin: TorchTensor, interleaved: bool, last: bool) -> TorchTensor:
    """The operators of `ops.elementwise` on the rotated part, the rest as it is."""
    width = 2 * cos.shape[-1]
    operator = elementwise.rope_interleaved if interleaved else elementwise.rope_half_split
    part = operator(x[..., -width:] if last else x[..., :width], cos, sin)
    return torch.cat((x[..., :-width], part) if last else (part, x[..., width:]), dim=-1)


def _rope(x: TorchTensor, cos: TorchTensor, sin: TorchTensor, interleaved: bool, last: bool) -> TorchTensor:
    return rotate_reference(x, cos, sin, interleaved, last)


def _rope_inplace(x: TorchTensor, cos: TorchTensor, sin: TorchTensor, interleaved: bool, last: bool) -> None:
    x.copy_(rotate_reference(x, cos, sin, interleaved, last))


def _rope_at(
    x: TorchTensor, positions: TorchTensor, cos: TorchTensor, sin: TorchTensor, interleaved: bool, last: bool
) -> TorchTensor:
    return rotate_reference(x, cos[positions.long()], sin[positions.long()], interleaved, last)


def _rope_at_inplace(
    x: TorchTensor, positions: TorchTensor, cos: TorchTensor, sin: TorchTensor, interleaved: bool, last: bool
) -> None:
    x.copy_(_rope_at(x, positions, cos, sin, interleaved, last))


def sections_reference(sections: tuple[int, ...], cyclic: bool) -> list[int]:
    """The position axis of each pair."""
    if not cyclic:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes, length = len(sections), sum(sections)
    return [i % axes if i < axes * sections[i % axes] else 0 for i in range(length)]


def _mrope(
    x: TorchTensor,
    positions: TorchTensor,
    cos: TorchTensor,
    sin: TorchTensor,
    sections: tuple[int, ...],
    cyclic: bool,
    interleaved: bool,
    last: bool,
) -> TorchTensor:
    axis = torch.tensor(sections_reference(sections, cyclic), device=x.device)
    place = positions.long()[axis].T  # [T, R/2]
    pair = torch.arange(cos.shape[1], device=x.device)
    return rotate_reference(x, cos[place, pair], sin[place, pair], interleaved, last)


# --- kernels ----------------------------------------------------------------------------------------------------


@tile.kernel(schedule=heads_first, reference=_rope, tolerance=CLOSE)
def rope(
    x: Tensor[T, N, D, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    interleaved: Static[bool] = False,
    last: Static[bool] = False,
):
    """y [T, N, D] in x's dtype: x with R dims of each head rotated. Row t of the tables belongs to token t.

    x may be a strided view. A tensor without heads is given as [T, 1, D].
    """
    y = tile.empty([T, N, D], x.dtype)
    for t, n in tile.parallel(tile.blocks(T, "token"), tile.blocks(N, "head")):
        at = rotated_from(last)
        turn(x, y, t, n, at, cos[t, :][:, None, :], sin[t, :][:, None, :], interleaved)
        for d in tile.range(tile.blocks(0 if last else R, D - R if last else D, "rest")):
            y[t, n, d] = x[t, n, d]
    return y


@tile.kernel(schedule=heads_first, reference=_rope_inplace, tolerance=CLOSE)
def rope_inplace(
    x: InOut[T, N, D, Float],
    cos: Tensor[T, R // 2, f32],
    sin: Tensor[T, R // 2, f32],
    interleaved: Static[bool] = False,
    last: Static[bool] = False,
):
    """`rope` in place: only the rotated dims are touched. Adjacent query and key heads of a product go in one call."""
    for t, n in tile.parallel(tile.blocks(T, "token"), tile.blocks(N, "head")):
        turn(x, x, t, n, rotated_from(last), cos[t, :][:, None, :], sin[t, :][:, None, :], interleaved)


@tile.kernel(schedule=heads_first, reference=_rope_at, tolerance=CLOSE)
def rope_at(
    x: Tensor[T, N, D, Float],
    positions: Tensor[T, Index],
    cos: Tensor[M, R // 2, f32],
    sin: Tensor[M, R // 2, f32],
    interleaved: Static[bool] = False,
    last: Static[bool] = False,
):
    """`rope` with tables of all positions: token t takes row positions[t], which must be in 0 .. M - 1."""
    y = tile.empty([T, N, D], x.dtype)
    for t, n in tile.parallel(tile.blocks(T, "token"), tile.blocks(N, "head")):
        place = positions[t]
        turn(x, y, t, n, rotated_from(last), cos[place, :][:, None, :], sin[place, :][:, None, :], interleaved)
        for d in tile.range(tile.blocks(0 if last else R, D - R if last else D, "rest")):
            y[t, n, d] = x[t, n, d]
    return y


@tile.kernel(schedule=heads_first, reference=_rope_at_inplace, tolerance=CLOSE)
def rope_at_inplace(
    x: InOut[T, N, D, Float],
    positions: Tensor[T, Index],
    cos: Tensor[M, R // 2, f32],
    sin: Tensor[M, R // 2, f32],
    interleaved: Static[bool] = False,
    last: Static[bool] = False,
):
    """`rope_at` in place."""
    for t, n in tile.parallel(tile.blocks(T, "token"), tile.blocks(N, "head")):
        place = positions[t]
        turn(x, x, t, n, rotated_from(last), cos[place, :][:, None, :], sin[place, :][:, None, :], interleaved)


@tile.kernel(schedule=heads_first, reference=_mrope, tolerance=CLOSE)
def mrope(
    x: Tensor[T, N, D, Float],
    positions: Tensor[A, T, Index],
    cos: Tensor[M, R // 2, f32],
    sin: Tensor[M, R // 2, f32],
    sections: Static[tuple[int, ...]],
    cyclic: Static[bool] = False,
    interleaved: Static[bool] = False,
    last: Static[bool] = False,
):
    """Multi-section RoPE: each pair of dims turns by the position on its own axis (time, height, width).

    sections: pairs per axis, in order of the axes; their sum must be R/2. Axis a of token t is at positions[a, t], a
    row of the tables. In the plain form the first sections[0] pairs belong to axis 0, the next sections[1] to axis 1
    and so on (Qwen2-VL); with `cyclic` pair i belongs to axis i mod A while that axis has pairs left, else to axis 0
    (Qwen3-VL). Returns y [T, N, D].
    """
    y = tile.empty([T, N, D], x.dtype)
    for t, n in tile.parallel(tile.blocks(T, "token"), tile.blocks(N, "head")):
        pair = tile.arange(R // 2)
        axis = _section_of(pair, sections, cyclic)
        place = positions[axis[None, :], t.index[:, None]]
        c, s = cos[place, pair[None, :]], sin[place, pair[None, :]]
        turn(x, y, t, n, rotated_from(last), c[:, None, :], s[:, None, :], interleaved)
        for d in tile.range(tile.blocks(0 if last else R, D - R if last else D, "rest")):
            y[t, n, d] = x[t, n, d]
    return y


def _section_of(pair: Tile, sections: tuple[int, ...], cyclic: bool) -> Tile:
    """i32 [R/2]: the position axis of each pair."""
    axis, start = pair * 0, 0
    for number, count in enumerate(sections):
        if cyclic and number > 0:
            mine = (pair % len(sections) == number) & (pair < len(sections) * count)
            axis = tile.where(mine, number, axis)
        elif not cyclic:
            axis = tile.where(pair >= start, number, axis)
        start += count
    return axis


# --- cases and benchmarks ---------------------------------------------------------------------------------------

Args = dict[str, Any]


def _given(
    rand: torch.Generator, shape: tuple[int, int, int], rotated: int, dtype: torch.dtype, interleaved: bool, last: bool,
    device: str = "cpu",
) -> Args:  # fmt: skip
    cos, sin = tables(shape[0], rotated, device)
    x = randn(rand, *shape, dtype=dtype, device=device)
    return {"x": x, "cos": cos, "sin": sin, "interleaved": interleaved, "last": last}


def _gathered(
    rand: torch.Generator, shape: tuple[int, int, int], rotated: int, dtype: torch.dtype, interleaved: bool, last: bool,
    rows: int = 40, index: torch.dtype = torch.int64, device: str = "cpu",
) -> Args:  # fmt: skip
    cos, sin = tables(rows, rotated, device, first=0)
    positions = torch.randint(0, rows, (shape[0],), generator=rand, device=rand.device).to(device=device, dtype=index)
    x = randn(rand, *shape, dtype=dtype, device=device)
    return {"x": x, "positions": positions, "cos": cos, "sin": sin, "interleaved": interleaved, "last": last}


def _axes(
    rand: torch.Generator, shape: tuple[int, int, int], sections: tuple[int, ...], cyclic: bool, interleaved: bool
) -> Args:
    args = _gathered(rand, shape, 2 * sum(sections), torch.float32, interleaved, False)
    positions = torch.randint(0, 40, (len(sections), shape[0]), generator=rand)
    return {**args, "positions": positions, "sections": sections, "cyclic": cyclic}


@rope.case
def mla_query(rand: torch.Generator) -> Args:
    return _given(rand, (5, 3, 24), 16, torch.bfloat16, True, True)


@rope.case
def index_query(rand: torch.Generator) -> Args:
    return _given(rand, (2, 17, 24), 16, torch.float32, False, False)


@rope.case
def whole_head(rand: torch.Generator) -> Args:
    return _given(rand, (17, 1, 8), 8, torch.float32, True, False)


@rope.case
def half_split_last(rand: torch.Generator) -> Args:
    return _given(rand, (2, 2, 20), 12, torch.float16, False, True)


@rope_inplace.case
def inplace_interleaved(rand: torch.Generator) -> Args:
    return _given(rand, (5, 3, 24), 16, torch.bfloat16, True, True)


@rope_inplace.case
def inplace_half_split_view(rand: torch.Generator) -> Args:
    args = _given(rand, (4, 3, 16), 8, torch.float32, False, False)
    return {**args, "x": randn(rand, 4, 5, 16)[:, 1:4]}


@rope_at.case
def at_interleaved(rand: torch.Generator) -> Args:
    return _gathered(rand, (5, 3, 24), 16, torch.bfloat16, True, True)


@rope_at.case
def at_half_split_i32(rand: torch.Generator) -> Args:
    return _gathered(rand, (18, 2, 16), 16, torch.float32, False, False, index=torch.int32)


@rope_at_inplace.case
def at_inplace(rand: torch.Generator) -> Args:
    return _gathered(rand, (3, 20, 12), 8, torch.float32, False, True)


@mrope.case
def contiguous_sections(rand: torch.Generator) -> Args:
    return _axes(rand, (5, 3, 20), (2, 3, 3), False, False)


@mrope.case
def cyclic_sections(rand: torch.Generator) -> Args:
    return _axes(rand, (17, 2, 24), (5, 2, 1), True, False)


@mrope.case
def two_axes_interleaved(rand: torch.Generator) -> Args:
    return _axes(rand, (3, 1, 16), (4, 4), False, True)


@rope.bench
def mla_query_4096(rand: torch.Generator, device: str) -> Args:
    return _given(rand, (4096, 128, 192), 64, torch.bfloat16, True, True, device)


@rope_inplace.bench
def inplace_mla_query_4096(rand: torch.Generator, device: str) -> Args:
    return _given(rand, (4096, 128, 192), 64, torch.bfloat16, True, True, device)


@rope_at.bench
def index_query_64(rand: torch.Generator, device: str) -> Args:
    return _gathered(rand, (64, 64, 128), 64, torch.bfloat16, False, False, rows=163840, device=device)
