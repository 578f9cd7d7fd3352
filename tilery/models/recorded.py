"""Decode steps as tapes: the C calls of one step, recorded once for its shapes, replayed by one call from Python.

A step that does nothing but decode a few tokens is bound by the calls between its kernels, not by them. Steps of equal
shapes - rows, context in whole blocks, sparse or dense - make the same calls with other numbers in the same places, so
the model's own code is recorded (`tile.targets.cpu.tape`) on a `StepInput` that stays, and later steps only fill that
in. Steps of other kinds, and those that cannot be recorded, take the plain way; both give the same numbers.

Legend: D decode rows, C context in whole blocks, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tilery.models.cache import LayerCache
from tilery.models.deepseek import DeepseekModel
from tilery.models.step import Chunk, DecodeRows, StepInput
from tilery.ops import native
from tilery.tile.targets.cpu.tape import Arena, NotRecordable, Recording, Tape

TAPES = 256
"""Kept at most, the one not used for longest goes first; one takes about 10 KB."""

Key = tuple[int, int, bool]
"""D, C, and whether attention is sparse."""


class _Inputs:
    """A step input whose numbers are filled in for each step."""

    def __init__(self, rows: int, width: int, max_len: int, arena: Arena) -> None:
        flat = arena.reserve(8 * rows * (4 + width))[: 8 * rows * (4 + width)].view(torch.int64)
        ids, positions, slots, lens, context = flat.split([rows, rows, rows, rows, rows * width])
        self.step = StepInput(ids, positions, slots, DecodeRows(rows, lens, max_len, context.view(rows, width)), ())
        numbers = flat.numpy()
        self._tokens, self._context = numbers[: 4 * rows].reshape(4, rows), numbers[4 * rows :].reshape(rows, width)

    def fill(self, chunks: Sequence[Chunk], block_size: int) -> None:
        """The numbers that `build_step` works out for these chunks."""
        row, width = 0, self._context.shape[1]
        inside = np.arange(block_size)
        for chunk in chunks:
            blocks = np.array(chunk.blocks[: width // block_size])
            slots = (blocks[:, None] * block_size + inside).ravel()
            for position, token in enumerate(chunk.token_ids, chunk.start):
                context = self._context[row]
                context[: position + 1] = slots[: position + 1]
                context[position + 1 :] = -1
                self._tokens[:, row] = token, position, context[position], position + 1
                row += 1


class RecordedDecode:
    """The decode steps of one model and its caches, which both stay where they are while this lives."""

    def __init__(self, model: DeepseekModel, caches: list[LayerCache], block_size: int) -> None:
        self.model, self.caches, self.block_size = model, caches, block_size
        self.replayed = 0
        """Steps computed by replay."""
        self._arena, self._input_arena = Arena(), Arena()
        self._tapes: dict[Key, tuple[_Inputs, Tape] | None] = {}
        """Last used last; None where a step cannot be recorded."""
        self._seen: set[Key] = set()

    def forward(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Writes the cache rows of chunks that all decode and returns hidden states [D, H] after the final norm, as
        `DeepseekModel.forward` does; None if it has to be asked."""
        rows = sum(len(chunk.token_ids) for chunk in chunks)
        if rows > native.SMALL:
            return None
        max_len = max(chunk.stop for chunk in chunks)
        width = -(-max_len // self.block_size) * self.block_size
        key = (rows, width, self.model.config.sparse and max_len > self.model.config.index_topk)
        if key not in self._tapes:
            return self._record(key, chunks, max_len) if self._again(key) else None
        found = self._tapes[key] = self._tapes.pop(key)
        if found is None:
            return None
        inputs, tape = found
        inputs.fill(chunks, self.block_size)
        tape.run()
        self.replayed += 1
        return tape.outputs[0].clone()

    def _again(self, key: Key) -> bool:
        """Whether there was such a step before: recording takes as long as a few steps, too long for one."""
        if key in self._seen:
            return True
        if len(self._seen) >= TAPES:
            self._seen.clear()
        self._seen.add(key)
        return False

    def _record(self, key: Key, chunks: Sequence[Chunk], max_len: int) -> Tensor | None:
        if len(self._tapes) >= TAPES:
            del self._tapes[next(iter(self._tapes))]
        inputs = _Inputs(key[0], key[1], max_len, self._input_arena)
        inputs.fill(chunks, self.block_size)
        recording = Recording()
        try:
            with recording:
                hidden = self.model.forward(inputs.step, self.caches)
            self._tapes[key] = inputs, recording.tape([hidden], self._arena)
        except NotRecordable:
            self._tapes[key] = None
            return None
        return hidden
