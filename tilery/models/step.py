"""What a model computes on in one step: a flat batch of tokens of many requests, and where their context lies.

Legend: T tokens of the step, D decode rows, C context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DECODE_TOKENS = 8
"""A request with at most this many tokens in a step is decoded (absorbed), with more it is prefilled."""


@dataclass(frozen=True)
class DecodeRows:
    """The first D tokens of the step: each sees its own context through a row of cache slots.

    A request with drafts contributes one row per token; row i's context ends with its own token.
    """

    count: int
    lens: Tensor
    """[D] int64, position + 1."""
    max_len: int
    slots: Tensor
    """[D, max_len] int64, the context's slots in order of position, -1 past its end."""
    ragged: bool
    """Whether any row is shorter than max_len."""


@dataclass(frozen=True)
class PrefillSegment:
    """Tokens `start` to `stop` of the step: the newest of one request, whose context (they included) lies in
    `slots`."""

    start: int
    stop: int
    slots: Tensor
    """[C] int64 in order of position."""


@dataclass(frozen=True)
class StepInput:
    """One step. Decode rows come first, prefill segments follow in order and cover the rest."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    slots: Tensor
    """[T] int64: where each token's cache rows are written."""
    decode: DecodeRows | None
    prefills: tuple[PrefillSegment, ...]


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one request: their ids, the position of the first, and the request's cache blocks in order."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def decodes(self) -> bool:
        return len(self.token_ids) <= DECODE_TOKENS


def build_step(chunks: Sequence[Chunk], block_size: int) -> StepInput:
    """Lays chunks out flat. They must be ordered with those that decode first (`order_chunks`).

    Every chunk's blocks cover its context: `len(blocks) * block_size >= stop`.
    """
    token_ids = torch.tensor([token for chunk in chunks for token in chunk.token_ids], dtype=torch.int64)
    positions = torch.tensor([p for chunk in chunks for p in range(chunk.start, chunk.stop)], dtype=torch.int64)
    slots = torch.tensor(
        [c.blocks[p // block_size] * block_size + p % block_size for c in chunks for p in range(c.start, c.stop)],
        dtype=torch.int64,
    )
    decode, row = None, 0
    if rows := [(chunk, stop) for chunk in chunks if chunk.decodes for stop in range(chunk.start + 1, chunk.stop + 1)]:
        decode, row = _decode_rows(rows, block_size), len(rows)
    prefills = []
    offset = torch.arange(block_size)
    for chunk in chunks:
        if chunk.decodes:
            continue
        blocks = torch.tensor(chunk.blocks[: -(-chunk.stop // block_size)], dtype=torch.int64)
        context = (blocks[:, None] * block_size + offset).flatten()[: chunk.stop]
        prefills.append(PrefillSegment(row, row + len(chunk.token_ids), context))
        row += len(chunk.token_ids)
    return StepInput(token_ids, positions, slots, decode, tuple(prefills))


def order_chunks(chunks: Sequence[Chunk]) -> list[int]:
    """Indices of `chunks` in the order `build_step` wants them: those that decode first, otherwise as given."""
    return sorted(range(len(chunks)), key=lambda i: not chunks[i].decodes)


def _decode_rows(rows: list[tuple[Chunk, int]], block_size: int) -> DecodeRows:
    lens = [stop for _, stop in rows]
    max_len = max(lens)
    width = -(-max_len // block_size)
    table = torch.tensor(
        [[*chunk.blocks[:width], *[0] * (width - len(chunk.blocks))] for chunk, _ in rows], dtype=torch.int64
    )
    slots = (table[:, :, None] * block_size + torch.arange(block_size)).flatten(1)[:, :max_len]
    lens_D = torch.tensor(lens, dtype=torch.int64)
    ragged = min(lens) < max_len
    if ragged:
        slots = slots.masked_fill(torch.arange(max_len) >= lens_D[:, None], -1)
    return DecodeRows(len(rows), lens_D, max_len, slots, ragged)
