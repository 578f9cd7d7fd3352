"""Without a compiler: the reference interpreter with blocks as large as memory allows, so that each operation is one
torch operator over many rows; loads and stores of plain windows are slices instead of element-wise gathers. Results are
the reference's. A kernel with a scalar grid still runs one program at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tilery.tile import interpret
from tilery.tile.ir import Block, Kernel, Op, Span, TensorType, TileType, walk

BUDGET = 1 << 18
"""Elements of the largest tile: 1 MiB of f32, which stays in a second-level cache."""


def large_blocks(kernel: Kernel) -> tuple[tuple[str, int], ...]:
    """Block sizes for whole-range tiles, from the bound kernel's tile shapes; a later label sees the earlier ones."""
    chosen: dict[str, int] = {}
    for label, _ in kernel.blocks:
        others = 1
        for op in walk(kernel.body):
            for value in (*op.results, *(p for r in op.regions for p in r.params)):
                if isinstance(value.type, TileType) and Block(label) in value.type.shape:
                    size = 1
                    for extent in value.type.shape:
                        size *= chosen.get(extent.label, 1) if isinstance(extent, Block) else extent.const or 1
                    others = max(others, size)
        chosen[label] = max(1, BUDGET // others)
    return tuple(chosen.items())


class _Machine(interpret._Machine):
    """The interpreter's machine with slices for plain windows."""

    def window(self, op: Op) -> Tensor | None:
        """The part of memory a load or store covers, as a view; None unless it is a plain window inside the tensor."""
        memory = self.memory[op.tensor.id]
        if op.where is not None or not memory.flat.numel():
            return None
        offset, shape, strides = memory.offset, [], []
        for (kind, operand), dim, stride in zip(op.index, memory.dims, memory.strides):
            if kind == "gather":
                return None
            start = self.integer(operand)
            extent, step = (self.extent(kind.extent), kind.step) if isinstance(kind, Span) else (1, 1)
            if start < 0 or extent < 1 or start + (extent - 1) * step >= dim:
                return None
            offset += start * stride
            if isinstance(kind, Span):
                shape.append(extent)
                strides.append(stride * step)
        return memory.flat.as_strided(shape, strides, offset + memory.flat.storage_offset())

    def op_load(self, op: Op) -> None:
        window = self.window(op)
        if window is None:
            super().op_load(op)
        else:
            self.values[op.result.id] = window.clone()

    def op_store(self, op: Op) -> None:
        window = self.window(op)
        value = self.materialise(op.stored)
        if window is None or window.shape != value.shape:
            super().op_store(op)
        else:
            window.copy_(value)


def fallback_launch(
    kernel: Kernel, env: Mapping[str, int]
) -> Callable[[Sequence[Any], Mapping[str, int]], tuple[Tensor, ...]]:
    """A launch function with the native one's interface."""
    large = replace(kernel, blocks=large_blocks(kernel))
    allocations = [
        (out.value, out.init if out.init is not None else None, out.value.tensor.dtype.torch) for out in kernel.outputs
    ]
    del env

    def launch(arguments: Sequence[Any], env: Mapping[str, int]) -> tuple[Tensor, ...]:
        machine = _Machine(large, env, torch.device("cpu"), interpret.Monitor())
        for param, value in zip(large.params, arguments):
            if isinstance(param.value.type, TensorType):
                machine.memory[param.value.id] = interpret._Memory.of(value)
            else:
                dtype = param.value.tile.dtype.torch
                machine.values[param.value.id] = torch.tensor(value, dtype=dtype)
        made: dict[int, Tensor] = {}
        for value, init, dtype in allocations:
            shape = [d.evaluate(env) for d in value.tensor.dims]
            tensor = torch.empty(shape, dtype=dtype) if init is None else torch.full(shape, init).to(dtype)
            made[value.id] = tensor
            machine.memory[value.id] = interpret._Memory.of(tensor)
        machine.body(large.body)
        return tuple(made[value.id] for value in large.returns)

    return launch
