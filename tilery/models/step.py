"""What a model computes on in one step: a flat batch of tokens of many requests, and where their context lies.

Legend: T tokens of the step, D decode rows, C context length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")
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
    """[D, C] int64, the context's slots in order of position, -1 past its end. C is max_len rounded up to whole blocks:
    kernels are launched by a plan for each shape, and this shape is new once a block, not once a token."""


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


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x`, made on the CPU, on `device`. On its way to a GPU it goes through pinned memory, so that the host queues the
    copy and goes on instead of waiting for everything queued before it."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def build_step(chunks: Sequence[Chunk], block_size: int, device: torch.device = CPU) -> StepInput:
    """Lays chunks out flat. They must be ordered with those that decode first (`order_chunks`).

    Every chunk's blocks cover its context: `len(blocks) * block_size >= stop`. All numbers cross to `device` as one
    tensor; block ids cross rather than slots, which are `block_size` times as many.
    """
    rows = [(chunk, stop) for chunk in chunks if chunk.decodes for stop in range(chunk.start + 1, chunk.stop + 1)]
    prefills = [chunk for chunk in chunks if not chunk.decodes]
    lens = [stop for _, stop in rows]
    max_len = max(lens, default=0)
    width = -(-max_len // block_size)
    numbers: list[list[int]] = [
        [token for chunk in chunks for token in chunk.token_ids],
        [p for chunk in chunks for p in range(chunk.start, chunk.stop)],
        [c.blocks[p // block_size] * block_size + p % block_size for c in chunks for p in range(c.start, c.stop)],
        lens,
        [block for chunk, _ in rows for block in (*chunk.blocks[:width], *[0] * (width - len(chunk.blocks)))],
        *[list(chunk.blocks[: -(-chunk.stop // block_size)]) for chunk in prefills],
    ]
    flat = torch.tensor(list(itertools.chain.from_iterable(numbers)), dtype=torch.int64, device="cpu")
    token_ids, positions, slots, lens_D, table, *contexts = upload(flat, device).split([len(part) for part in numbers])
    decode = None
    if rows:
        seen = _slots(table.view(len(rows), width), block_size)
        seen.masked_fill_(torch.arange(width * block_size, device=device) >= lens_D[:, None], -1)
        decode = DecodeRows(len(rows), lens_D, max_len, seen)
    segments, row = [], len(rows)
    for chunk, blocks in zip(prefills, contexts):
        stop = row + len(chunk.token_ids)
        segments.append(PrefillSegment(row, stop, _slots(blocks, block_size)[: chunk.stop]))
        row = stop
    return StepInput(token_ids, positions, slots, decode, tuple(segments))


def _slots(blocks: Tensor, block_size: int) -> Tensor:
    """[..., P] block ids -> [..., P * block_size] slots."""
    return (blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)).flatten(-2)


def order_chunks(chunks: Sequence[Chunk]) -> list[int]:
    """Indices of `chunks` in the order `build_step` wants them: those that decode first, otherwise as given."""
    return sorted(range(len(chunks)), key=lambda i: not chunks[i].decodes)
