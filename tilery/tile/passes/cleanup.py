"""Simplify, common subexpressions, loop-invariant code, dead code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from tilery.tile.ir import Kernel, Op, Operand, Region, TileType, Value, operands_of, substitute, walk
from tilery.tile.ops import OPS
from tilery.tile.size import as_size

_STRUCTURE = {"parallel", "for", "if", "store", "atomic", "tap", "load", "view"}
_IDENTITY = {("sub", 0), ("mul", 1), ("div", 1), ("floordiv", 1), ("shl", 0), ("shr", 0), ("bit_or", 0)}


def is_pure(op: Op) -> bool:
    """Whether an operation only computes a value (no memory, no control, no effect)."""
    return op.name not in _STRUCTURE and not OPS[op.name].effect


def simplify(kernel: Kernel) -> Kernel:
    """Folds constants and removes operations that change nothing."""
    constants: dict[int, int | float | bool] = {}
    mapping: dict[int, Operand] = {}

    def literal(operand: Operand) -> Any:
        return constants.get(operand.id) if isinstance(operand, Value) else operand

    def visit_body(body: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(new for op in body if (new := visit(op)) is not None)

    def swap(operand: Operand) -> Operand:
        while isinstance(operand, Value) and operand.id in mapping:
            operand = mapping[operand.id]
        return operand

    def visit(op: Op) -> Op | None:
        operands = tuple(map(swap, op.operands))
        regions = tuple(
            replace(r, body=visit_body(r.body), yields=tuple(swap(y) for y in r.yields)) for r in op.regions
        )
        op = replace(op, operands=operands, regions=regions)
        if op.name in ("load", "store", "atomic"):
            count = len(op.attr("index"))
            index = tuple(_inline(o, constants) for o in operands[1 : 1 + count])
            return replace(op, operands=(operands[0], *index, *operands[1 + count :]))
        if op.name in ("parallel", "for"):
            bounds = 2 * len(op.attr("axes")) if op.name == "parallel" else 3
            return replace(op, operands=(*(_inline(o, constants) for o in operands[:bounds]), *operands[bounds:]))
        if len(op.results) != 1 or not is_pure(op):
            return op
        result = op.result
        if op.name == "size" and (value := op.attr("size").const) is not None:
            constants[result.id] = value
            return Op("full", (value,), (("dtype", result.tile.dtype), ("shape", ())), op.results, (), op.loc)
        if op.name == "full" and not op.attr("shape") and not isinstance(operands[0], Value):
            constants[result.id] = operands[0]
            return op
        source = operands[0] if operands else None
        same = isinstance(source, Value) and source.type == result.type
        if op.name in ("cast", "reshape", "broadcast") and same and source is not None:
            mapping[result.id] = source
            return None
        definition = OPS[op.name]
        if definition.elementwise and not result.tile.shape:
            values = [literal(o) for o in operands]
            if all(v is not None for v in values) and op.name not in ("bitcast",):
                folded = _fold(op, values)
                constants[result.id] = folded
                return Op("full", (folded,), (("dtype", result.tile.dtype), ("shape", ())), op.results, (), op.loc)
        if op.name == "where" and (known := literal(operands[0])) is not None:
            taken = operands[1] if known else operands[2]
            if isinstance(taken, Value) and taken.type == result.type:
                mapping[result.id] = taken
                return None
            attrs = (("dtype", result.tile.dtype), ("shape", result.tile.shape))
            if not isinstance(taken, Value) or not taken.tile.shape:
                return Op("full", (taken,), attrs, op.results, (), op.loc)
        if definition.elementwise and len(operands) == 2:
            left, right = operands
            whole = op.name == "add" and result.tile.dtype.is_int  # not for floats: -0.0 + 0.0 is 0.0
            if whole and isinstance(left, Value) and literal(right) == 0 and left.type == result.type:
                mapping[result.id] = left
                return None
            identity = (op.name, literal(right)) in _IDENTITY and not _negative_zero(literal(right))
            if isinstance(left, Value) and identity and left.type == result.type:
                mapping[result.id] = left
                return None
            flipped = op.name == "mul" and (op.name, literal(left)) in _IDENTITY
            if flipped and isinstance(right, Value) and right.type == result.type:
                mapping[result.id] = right
                return None
        if definition.elementwise and op.name != "bitcast":
            inlined = tuple(_inline(o, constants) for o in operands)
            if any(isinstance(o, Value) for o in inlined):
                return replace(op, operands=inlined)
        return op

    return replace(kernel, body=visit_body(kernel.body))


def _negative_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0 and math.copysign(1, value) < 0  # -0.0 - -0.0 is 0.0


def _inline(operand: Operand, constants: dict[int, int | float | bool]) -> Operand:
    return constants.get(operand.id, operand) if isinstance(operand, Value) else operand


def _fold(op: Op, values: list[Any]) -> int | float | bool:
    """The value of a scalar operation on constants."""
    dtype = next((o.tile.dtype for o in op.operands if isinstance(o, Value)), None)
    if op.name == "where":
        return values[1] if values[0] else values[2]
    if dtype is None:
        dtype = op.result.tile.dtype
    attrs = {"dtype": op.attr("dtype")} if op.name == "cast" else {}
    tensors = [torch.tensor(v, dtype=dtype.torch) for v in values]
    return OPS[op.name].reference(*tensors, **attrs).item()


def cse(kernel: Kernel) -> Kernel:
    """Computes equal expressions once; loads of tensors that nobody writes count as expressions."""
    written = {out.value.id for out in kernel.outputs} | {p.value.id for p in kernel.params if p.inout}
    for op in walk(kernel.body):
        if op.name == "view" and op.tensor.id in written:
            written.add(op.result.id)
    mapping: dict[int, Operand] = {}

    def swap(operand: Operand) -> Operand:
        return mapping.get(operand.id, operand) if isinstance(operand, Value) else operand

    def visit(body: tuple[Op, ...], outer: dict[Any, tuple[Value, ...]]) -> tuple[Op, ...]:
        seen = dict(outer)
        out: list[Op] = []
        for op in body:
            op = replace(op, operands=tuple(map(swap, op.operands)))
            if op.regions:
                regions = []
                for region in op.regions:
                    inner = visit(region.body, seen)
                    regions.append(replace(region, body=inner, yields=tuple(map(swap, region.yields))))
                out.append(replace(op, regions=tuple(regions)))
                continue
            if is_pure(op) or op.name == "view" or (op.name == "load" and op.tensor.id not in written):
                key = (op.name, tuple(map(_key, op.operands)), op.attrs, tuple(r.type for r in op.results))
                if key in seen:
                    mapping.update({r.id: known for r, known in zip(op.results, seen[key])})
                    continue
                seen[key] = op.results
            out.append(op)
        return tuple(out)

    return replace(kernel, body=visit(kernel.body, {}))


def _key(operand: Operand) -> Any:
    return operand.id if isinstance(operand, Value) else (type(operand).__name__, operand, str(operand))


def hoist(kernel: Kernel) -> Kernel:
    """Moves computations that a sequential loop repeats unchanged before the loop (never out of the grid)."""

    def visit(body: tuple[Op, ...]) -> tuple[Op, ...]:
        out: list[Op] = []
        for op in body:
            op = replace(op, regions=tuple(replace(r, body=visit(r.body)) for r in op.regions))
            if op.name == "for":
                region = op.regions[0]
                inside = {v.id for v in region.params}
                kept: list[Op] = []
                for inner in region.body:
                    free = all(v.id not in inside for v in operands_of(inner))
                    if free and _may_hoist(inner) and not _uses_block(inner, op.attr("label")):
                        out.append(inner)
                        continue
                    inside |= {v.id for v in inner.results}
                    kept.append(inner)
                op = replace(op, regions=(replace(region, body=tuple(kept)),))
            out.append(op)
        return tuple(out)

    return replace(kernel, body=visit(kernel.body))


def _may_hoist(op: Op) -> bool:
    """Whether an operation may run although the loop around it does not: not `take`, whose index may be outside."""
    return is_pure(op) and op.name != "take"


def _uses_block(op: Op, label: str) -> bool:
    """Whether an operation's meaning depends on the current iteration of block loop `label`."""
    if op.name == "count":
        return bool(op.attr("label") == label)
    return any(getattr(e, "label", None) == label for r in op.results for e in getattr(r.type, "shape", ()))


def dce(kernel: Kernel) -> Kernel:
    """Removes operations whose results nobody uses."""
    body = kernel.body
    while True:
        used = {v.id for op in walk(body) for v in operands_of(op)}

        def visit(body: tuple[Op, ...], used: set[int] = used) -> tuple[Op, ...]:
            out: list[Op] = []
            for op in body:
                if op.regions:
                    op = replace(op, regions=tuple(replace(r, body=visit(r.body)) for r in op.regions))
                    empty = not any(_has_effect(o) for r in op.regions for o in walk(r.body))
                    if empty and op.name != "parallel" and not any(r.id in used for r in op.results):
                        continue
                    if op.name == "for":
                        op = _drop_dead_carries(op, used)
                elif not _has_effect(op) and not any(r.id in used for r in op.results):
                    continue
                out.append(op)
            return tuple(out)

        new = visit(body)
        if new == body:
            return replace(kernel, body=body)
        body = new


def _drop_dead_carries(op: Op, used: set[int]) -> Op:
    """Removes carried values that are neither used after the loop nor inside it."""
    region = op.regions[0]
    inside = {o.id for inner in walk(region.body) for o in operands_of(inner)}
    keep = []
    for at, result in enumerate(op.results):
        param = region.params[1 + at]
        others = {y.id for n, y in enumerate(region.yields) if n != at and isinstance(y, Value)}
        if result.id in used or param.id in inside or param.id in others:
            keep.append(at)
    if len(keep) == len(op.results):
        return op
    region = Region(
        (region.params[0], *(region.params[1 + at] for at in keep)),
        region.body,
        tuple(region.yields[at] for at in keep),
    )
    operands = (*op.operands[:3], *(op.operands[3 + at] for at in keep))
    return replace(op, operands=operands, results=tuple(op.results[at] for at in keep), regions=(region,))


def _has_effect(op: Op) -> bool:
    return op.name in ("store", "atomic", "tap") or (op.name in OPS and OPS[op.name].effect)


_ = (TileType, as_size, substitute)
