"""Binds a schedule's block sizes and the sizes that shape tiles; what stays symbolic is decided at each launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel, Op, Operand, Region, Span, TensorType, TileType, Value
from tilery.tile.size import Size


def block_labels(kernel: Kernel) -> list[str]:
    """The labels of all block loops, outer first."""
    from tilery.tile.ir import walk

    labels = []
    for op in walk(kernel.body):
        if op.name == "parallel":
            labels += [label for kind, label in op.attr("axes") if kind == "block"]
        elif op.name == "for" and op.attr("kind") == "blocks":
            labels.append(op.attr("label"))
    return labels


def bind(kernel: Kernel, env: Mapping[str, int], blocks: Mapping[str, int]) -> Kernel:
    """`env`: values of `kernel.tile_dims`; `blocks`: size per label. Raises `LoweringError` for a missing label."""
    labels = block_labels(kernel)
    missing = [label for label in labels if label not in blocks]
    if missing:
        raise LoweringError(f"the schedule of {kernel.name!r} has no block size for {missing[0]!r}")
    unknown = [label for label in blocks if label not in labels]
    if unknown:
        known = ", ".join(labels) or "none"
        raise LoweringError(f"the schedule of {kernel.name!r} names {unknown[0]!r}; its block loops are: {known}")
    static = {d.name: env[d.name] for d in kernel.tile_dims}

    def fix(item: Any) -> Any:
        if isinstance(item, Size):
            return item.bind(static)
        if isinstance(item, Span):
            return Span(fix(item.extent), item.step)
        if isinstance(item, tuple):
            return tuple(fix(i) for i in item)
        return item

    def fix_type(kind: TileType | TensorType) -> TileType | TensorType:
        if isinstance(kind, TileType):
            return TileType(kind.dtype, fix(kind.shape))
        return TensorType(kind.dtype, fix(kind.dims), fix(kind.strides), fix(kind.offset))

    def value(v: Value) -> Value:
        return replace(v, type=fix_type(v.type))

    def operand(o: Operand) -> Operand:
        return value(o) if isinstance(o, Value) else o

    def op(o: Op) -> Op:
        regions = tuple(
            Region(tuple(map(value, r.params)), tuple(map(op, r.body)), tuple(map(operand, r.yields)))
            for r in o.regions
        )
        return replace(
            o, operands=tuple(map(operand, o.operands)), attrs=tuple((k, fix(v)) for k, v in o.attrs),
            results=tuple(map(value, o.results)), regions=regions,
        )  # fmt: skip

    return replace(
        kernel,
        params=tuple(replace(p, value=value(p.value)) for p in kernel.params),
        outputs=tuple(replace(out, value=value(out.value)) for out in kernel.outputs),
        body=tuple(map(op, kernel.body)),
        returns=tuple(map(value, kernel.returns)),
        blocks=tuple((label, blocks[label]) for label in labels),
        stage="bound",
    )
