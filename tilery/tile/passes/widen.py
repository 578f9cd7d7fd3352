"""Arithmetic on bf16 and f16 becomes f32 arithmetic with a rounding after each operation, which is its meaning.

After this pass a target sees 16-bit floats only in loads, stores, casts, selects, data movement and dot.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tilery.tile.dtypes import DType, f32
from tilery.tile.ir import Kernel, Op, TileType, Value, next_id, rewrite
from tilery.tile.ops import OPS

_AS_IS = {"where", "cast", "bitcast"}


def _narrow(dtype: DType) -> bool:
    return dtype.is_float and dtype.bits == 16


def widen(kernel: Kernel) -> Kernel:
    """Inserts the casts."""
    counter = next_id(kernel)

    def visit(op: Op) -> tuple[Op, ...] | None:
        nonlocal counter
        if op.name not in OPS or not OPS[op.name].elementwise or op.name in _AS_IS:
            return None
        narrow = next((o.tile.dtype for o in op.operands if isinstance(o, Value) and _narrow(o.tile.dtype)), None)
        if narrow is None:
            return None
        before: list[Op] = []
        operands = []
        for operand in op.operands:
            if isinstance(operand, Value) and _narrow(operand.tile.dtype):
                wide = Value(counter, TileType(f32, operand.tile.shape), f"{operand.name}_f32_{counter}")
                counter += 1
                before.append(Op("cast", (operand,), (("dtype", f32),), (wide,), (), op.loc))
                operand = wide
            elif not isinstance(operand, Value):  # a number has the dtype of the tiles it meets
                operand = torch.tensor(operand, dtype=narrow.torch).item()
            operands.append(operand)
        result = op.result
        if not _narrow(result.tile.dtype):
            return (*before, replace(op, operands=tuple(operands)))
        inner = Value(counter, TileType(f32, result.tile.shape), f"{result.name}_f32_{counter}")
        counter += 1
        middle = replace(op, operands=tuple(operands), results=(inner,))
        after = Op("cast", (inner,), (("dtype", result.tile.dtype),), (result,), (), op.loc)
        return (*before, middle, after)

    return replace(kernel, body=rewrite(kernel.body, visit))
