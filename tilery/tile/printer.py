"""Prints the Tile IR as readable Python (the grammar stands in `text.py`), after numbering it canonically."""

from __future__ import annotations

import keyword
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilery.tile.dtypes import DType
from tilery.tile.errors import Loc, TileError
from tilery.tile.ir import Block, Kernel, Op, Operand, Param, Region, Span, TileType, Type, Value
from tilery.tile.size import Dim, Size

EXTENTS = ("shape", "extent", "size")
"""Attributes that hold extents: printed bare, where a number means a `Size`."""
AXES = {"block": "block", "scalar": "index"}
"""How the kinds of `parallel` axes are written."""
WRITES = ("store", "atomic")
MEMORY = ("load", *WRITES)
_INDENT = "    "


# --- canonical form ---------------------------------------------------------------------------------------------


def canonical(kernel: Kernel) -> Kernel:
    """The same kernel with ids 1, 2, ... in order of appearance, unique names, attributes in order, one NaN object.

    Raises `TileError` where an operation uses a value that nothing defines: the pass before broke the kernel.
    """
    return _Canonical().kernel(kernel)


class _Canonical:
    def __init__(self) -> None:
        self.values: dict[int, Value] = {}
        self.names: set[str] = set()

    def define(self, value: Value) -> Value:
        base = value.name if value.name.isidentifier() and not keyword.iskeyword(value.name) else "v"
        name, number = base, 1
        while name in self.names:
            name, number = f"{base}_{number}", number + 1
        self.names.add(name)
        self.values[value.id] = Value(len(self.values) + 1, value.type, name)
        return self.values[value.id]

    def use(self, operand: Operand) -> Operand:
        if not isinstance(operand, Value):
            return math.nan if operand != operand else operand
        if operand.id not in self.values:
            raise TileError(f"value {operand.name!r} (id {operand.id}) is used where nothing defines it")
        return self.values[operand.id]

    def region(self, region: Region) -> Region:
        params = tuple(map(self.define, region.params))
        body = tuple(map(self.op, region.body))
        return Region(params, body, tuple(map(self.use, region.yields)))

    def op(self, op: Op) -> Op:
        attrs = {k: math.nan if v != v else v for k, v in op.attrs}
        if op.name in MEMORY:
            attrs.setdefault("masked", False)
        operands = tuple(map(self.use, op.operands))
        regions = tuple(map(self.region, op.regions))
        return Op(op.name, operands, tuple(sorted(attrs.items())), tuple(map(self.define, op.results)), regions, op.loc)

    def kernel(self, kernel: Kernel) -> Kernel:
        params = tuple(replace(p, value=self.define(p.value)) for p in kernel.params)
        outputs = tuple(replace(o, value=self.define(o.value)) for o in kernel.outputs)
        body = tuple(map(self.op, kernel.body))
        returns = tuple(self.values[v.id] for v in kernel.returns)
        return replace(kernel, params=params, outputs=outputs, body=body, returns=returns)


# --- print ------------------------------------------------------------------------------------------------------


def print_kernel(kernel: Kernel, source: bool = True) -> str:
    """`kernel` as Python text; with `source`, the user's line is a comment beside the first operation it made."""
    return _Printer(source).kernel(canonical(kernel))


def show_type(type: Type) -> str:
    """`f32[B.row, H]`, `Tensor[T, H, bf16]`, `Tensor[S, 4, f32, strides(164, 1), offset(128)]`."""
    if isinstance(type, TileType):
        return str(type)
    parts = [*map(str, type.dims), type.dtype.name]
    if type.strides is not None:
        parts.append(f"strides({', '.join(map(str, type.strides))})")
    if type.offset.terms:
        parts.append(f"offset({type.offset})")
    return f"Tensor[{', '.join(parts)}]"


def show_dim(dim: Dim) -> str:
    """`H = Dim("H", multiple_of=128)`."""
    facts = {"min": (dim.min, 0), "max": (dim.max, None), "multiple_of": (dim.multiple_of, 1)}
    given = [f"{name}={value}" for name, (value, default) in facts.items() if value != default]
    return f"{dim.name} = Dim({', '.join([_quote(dim.name), *given])})"


def _quote(text: str) -> str:
    return repr(text) if '"' in text or "\\" in text else f'"{text}"'


def show_literal(value: Any, extents: bool = False) -> str:
    """A literal or an attribute's value. `extents`: sizes stand bare, not as `Size(...)`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, (DType, Block)):
        return str(value)
    if isinstance(value, Size):
        return str(value) if extents else f"Size({value})"
    if isinstance(value, TileType):
        return show_type(value)
    if isinstance(value, tuple):
        inner = ", ".join(show_literal(v, extents) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show_literal(k)}: {show_literal(v, extents)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    raise TileError(f"an attribute of type {type(value).__name__} has no text form: {value!r}")


class _Printer:
    def __init__(self, source: bool) -> None:
        self.source = source
        self.lines: list[str] = []
        self.last: Loc | None = None

    def kernel(self, kernel: Kernel) -> str:
        self.lines += [show_dim(d) for d in kernel.dims]
        if kernel.dims:
            self.lines.append("")
        blocks = f", blocks={show_literal(dict(kernel.blocks))}" if kernel.blocks else ""
        self.lines.append(f"@kernel(stage={_quote(kernel.stage)}{blocks})")
        self.lines.append(f"def {kernel.name}({', '.join(map(self.param, kernel.params))}):")
        for out in kernel.outputs:
            init = "" if out.init is None else f"init={show_literal(out.init)}"
            self.line(1, f"{out.value.name}: {show_type(out.value.type)} = empty({init})")
        self.body(kernel.body, 1)
        if kernel.returns:
            self.line(1, f"return {', '.join(v.name for v in kernel.returns)}")
        elif not kernel.outputs and not kernel.body:
            self.line(1, "pass")
        return "\n".join(self.lines) + "\n"

    def param(self, param: Param) -> str:
        text = show_type(param.value.type)
        return f"{param.value.name}: {text.replace('Tensor[', 'InOut[', 1) if param.inout else text}"

    def line(self, depth: int, text: str, loc: Loc | None = None) -> None:
        comment = ""
        if self.source and loc is not None and loc != self.last:
            self.last = loc
            code = loc.text()
            comment = f"  # {os.path.basename(loc.file)}:{loc.line}{': ' + code if code else ''}"
        self.lines.append(_INDENT * depth + text + comment)

    def body(self, body: Sequence[Op], depth: int, yields: Sequence[Operand] | None = None) -> None:
        for op in body:
            self.op(op, depth)
        if yields:
            self.line(depth, f"yield {self.operands(yields)}")
        elif yields is not None and not body:
            self.line(depth, "pass")

    def operand(self, operand: Operand) -> str:
        return operand.name if isinstance(operand, Value) else show_literal(operand)

    def operands(self, operands: Sequence[Operand]) -> str:
        return ", ".join(map(self.operand, operands))

    def attrs(self, op: Op, *skipped: str) -> list[str]:
        return [f"{k}={show_literal(v, k in EXTENTS)}" for k, v in op.attrs if k not in skipped]

    def carried(self, values: Sequence[Value]) -> list[str]:
        if not values:
            return []
        names = tuple(v.name for v in values)
        out = f"({', '.join(names)},)" if len(names) == 1 else f"({', '.join(names)})"
        return [f"out={out}", f"types={show_literal(tuple(v.tile for v in values))}"]

    def op(self, op: Op, depth: int) -> None:
        if op.name == "parallel":
            pairs = [op.operands[2 * n : 2 * n + 2] for n in range(len(op.attr("axes")))]
            axes = [f"{AXES[k]}({self.operands(p)}, {_quote(n)})" for (k, n), p in zip(op.attr("axes"), pairs)]
            target = self.operands(op.regions[0].params)
            head = f"for {target} in parallel({', '.join([*axes, *self.attrs(op, 'axes')])}):"
        elif op.name == "for":
            bounds, init = op.operands[:3], op.operands[3:]
            if tuple(p.type for p in op.regions[0].params[1:]) != tuple(r.type for r in op.results):
                raise TileError(f"the loop {op.attr('label')!r} carries other types than it gives", op.loc)
            parts = [self.operands(bounds), *self.attrs(op)]
            parts += [f"init=({self.operands(init)}{',' if len(init) == 1 else ''})"] if init else []
            target = self.operands(op.regions[0].params)
            head = f"for {target} in loop({', '.join([*parts, *self.carried(op.results)])}):"
        elif op.name == "if":
            parts = [self.operand(op.operands[0]), *self.attrs(op), *self.carried(op.results)]
            head = f"if {parts[0] if len(parts) == 1 else 'cond(' + ', '.join(parts) + ')'}:"
        else:
            return self.plain(op, depth)
        self.line(depth, head, op.loc)
        self.body(op.regions[0].body, depth + 1, op.regions[0].yields)
        if len(op.regions) > 1 and (op.regions[1].body or op.regions[1].yields):
            self.line(depth, "else:")
            self.body(op.regions[1].body, depth + 1, op.regions[1].yields)

    def plain(self, op: Op, depth: int) -> None:
        if op.name in MEMORY:
            count = len(op.attr("index"))
            parts = [op.tensor.name, f"[{', '.join(self.index(k, o) for k, o in op.index)}]"]
            parts += [self.operand(op.stored)] if op.name in WRITES else []
            parts += [f"where={self.operand(op.operands[-1])}"] if op.attr("masked") else []
            assert len(op.operands) == 1 + count + (op.name in WRITES) + bool(op.attr("masked")), op
            parts += self.attrs(op, "index", "masked")
        elif op.name == "size":
            parts = [str(op.attr("size")), *self.attrs(op, "size")]
        else:
            parts = [*map(self.operand, op.operands), *self.attrs(op)]
        target = ""
        if len(op.results) == 1:
            target = f"{op.result.name}: {show_type(op.result.type)} = "
        elif op.results:
            target = f"{self.operands(op.results)} = "
            parts.append(f"types={show_literal(tuple(r.tile for r in op.results))}")
        self.line(depth, f"{target}{op.name}({', '.join(parts)})", op.loc)

    def index(self, kind: Any, operand: Operand) -> str:
        if isinstance(kind, Span):
            step = f", {kind.step}" if kind.step != 1 else ""
            return f"span({self.operand(operand)}, {kind.extent}{step})"
        return f"{kind}({self.operand(operand)})"
