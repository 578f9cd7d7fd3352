"""Embedding lookup.

    y[t] = table[ids[t] - first]   where that row exists, else 0

The range lets each rank of a vocabulary-parallel table look up its own rows and add the results (`first` is the
rank's first id); with the whole table and first = 0 it also makes padding ids (-1) harmless. Pure movement: T * H
elements read and written; a row is cut into blocks so that one token fills the machine.

Legend: V vocabulary rows, H hidden, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops.kernels._common import Index, randn
from tilery.tile import Dim, Float, Static, Tensor, bf16, f32
from tilery.tile.dtypes import DType
from tilery.tile.tolerance import EXACT

T, V, H, M, R = Dim("T"), Dim("V"), Dim("H"), Dim("M"), Dim("R")


def _embedding(table: TorchTensor, ids: TorchTensor, first: int, dtype: DType) -> TorchTensor:
    rows = ids.long() - first
    known = (rows >= 0) & (rows < table.shape[0])
    return torch.where(known[:, None], table[torch.where(known, rows, 0)], 0).to(dtype.torch)


@tile.kernel(reference=_embedding, tolerance=EXACT)
def embedding(table: Tensor[V, H, Float], ids: Tensor[T, Index], first: int = 0, dtype: Static[DType] = bf16):
    """y [T, H] of `dtype`: the rows of `table` [V, H] that `ids` [T] name, counted from `first`; 0 for other ids."""
    y = tile.empty([T, H], dtype)
    for t, h in tile.parallel(T, tile.blocks(H, "part")):
        row = ids[t] - first
        y[t, h] = table.load((row, h), where=(row >= 0) & (row < V)).to(dtype)
    return y


def _embed_at(
    table: TorchTensor, ids: TorchTensor, cos: TorchTensor, sin: TorchTensor, positions: TorchTensor, dtype: DType
) -> tuple[TorchTensor, TorchTensor, TorchTensor]:
    at = positions.long()
    return _embedding(table, ids, 0, dtype), cos[at], sin[at]


@tile.kernel(reference=_embed_at, tolerance=EXACT)
def embed_at(
    table: Tensor[V, H, Float], ids: Tensor[T, Index], cos: Tensor[M, R, f32], sin: Tensor[M, R, f32],
    positions: Tensor[T, Index], dtype: Static[DType] = bf16,
):  # fmt: skip
    """(`embedding` [T, H] of `dtype`, cos [T, R], sin [T, R]): a step's rows of the embedding and of the rotary tables,
    whose rows `positions` [T] are."""
    y, c, s = tile.empty([T, H], dtype), tile.empty([T, R], f32), tile.empty([T, R], f32)
    for t in tile.parallel(T):
        row, at = ids[t], positions[t]
        y[t, :] = table.load((row, slice(None)), where=(row >= 0) & (row < V)).to(dtype)
        c[t, :] = cos[at, :]
        s[t, :] = sin[at, :]
    return y, c, s


Args = dict[str, Any]


def _lookup(
    rand: torch.Generator, rows: int, width: int, tokens: int, source: torch.dtype, dtype: DType, device: str = "cpu"
) -> Args:
    table = randn(rand, rows, width, dtype=source, device=device)
    ids = torch.randint(0, rows, (tokens,), generator=rand, device=rand.device).to(device)
    return {"table": table, "ids": ids, "first": 0, "dtype": dtype}


@embedding.case
def whole_table(rand: torch.Generator) -> Args:
    return _lookup(rand, 48, 21, 7, torch.bfloat16, tile.f32)


@embedding.case
def rank_of_four(rand: torch.Generator) -> Args:
    args = _lookup(rand, 48, 16, 19, torch.bfloat16, bf16)
    return {**args, "first": 24, "ids": args["ids"].int()}


@embedding.case
def padding_ids(rand: torch.Generator) -> Args:
    args = _lookup(rand, 16, 40, 5, torch.float32, bf16)
    args["ids"][2:4] = -1
    return args


@embedding.bench
def decode_64(rand: torch.Generator, device: str) -> Args:
    return _lookup(rand, 129280, 7168, 64, torch.bfloat16, bf16, device)


@embedding.bench
def prefill_4096(rand: torch.Generator, device: str) -> Args:
    return _lookup(rand, 129280, 7168, 4096, torch.bfloat16, bf16, device)


@embed_at.case
def a_step(rand: torch.Generator) -> Args:
    args = {"table": randn(rand, 20, 40).bfloat16(), "ids": torch.tensor([3, -1, 19]), "dtype": f32}
    return {**args, "cos": randn(rand, 9, 8), "sin": randn(rand, 9, 8), "positions": torch.tensor([0, 8, 4])}
