"""From a Python function to Tile IR, once per specialisation (dtypes, static values), for all sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tilery.tile import control, plugins
from tilery.tile.builder import Builder, located
from tilery.tile.dtypes import f32, i32
from tilery.tile.errors import Loc, TraceError
from tilery.tile.ir import Block, Kernel, Op, Operand, Param, Region, Span, TensorType, TileType, Value, walk
from tilery.tile.lang import TensorRef, Tile
from tilery.tile.signature import Signature, Specialisation
from tilery.tile.size import Dim, Size, _Quotient, as_size
from tilery.tile.transform import stage


def trace(function: Callable[..., Any], signature: Signature, key: Specialisation) -> Kernel:
    """Runs `function` with symbolic arguments. Raises `TraceError` at the user's line for what it cannot express."""
    plugins.load()
    try:
        return _trace(function, signature, key)
    except TraceError as error:
        if error.loc is not None:
            raise
        raise TraceError(error.message, defined_at(function)) from None


def defined_at(function: Callable[..., Any]) -> Loc:
    """The line of a function's `def`."""
    first = function.__code__.co_firstlineno
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError:
        lines = []
    below = (n for n, line in enumerate(lines) if line.lstrip().startswith("def "))
    return Loc(function.__code__.co_filename, first + next(below, 0))


def _trace(function: Callable[..., Any], signature: Signature, key: Specialisation) -> Kernel:
    builder = Builder(signature.name)
    dtypes, statics = dict(key.dtypes), dict(key.statics)
    arguments: dict[str, Any] = {}
    params: list[Param] = []
    for p in signature.parameters:
        if p.spec is not None:
            dtype = dtypes[p.name]
            if dtype is None:
                arguments[p.name] = None
                continue
            value = builder.value(TensorType(dtype, p.spec.dims), p.name)
            params.append(Param(value, p.spec.inout))
            if p.spec.inout:
                builder.inout.add(value.id)
            arguments[p.name] = TensorRef(value)
        elif p.kind == "static":
            arguments[p.name] = statics[p.name]
        else:
            value = builder.value(TileType(f32 if p.kind == "float" else i32), p.name)
            params.append(Param(value))
            arguments[p.name] = Tile(value)
    staged = stage(function, control)
    with builder.active():
        try:
            returned = staged(**arguments)
        except TraceError as error:
            if error.loc is None:
                raise located(error) from None
            raise
    if returned is None:
        returned = ()
    returns = []
    for item in returned if isinstance(returned, tuple) else (returned,):
        if isinstance(item, control.Unavailable):
            raise TraceError(item.__dict__["_text"])
        if not isinstance(item, TensorRef) or not any(o.value is item.value for o in builder.outputs):
            raise TraceError(
                f"kernel {signature.name!r} returns {type(item).__name__}; a kernel returns tensors made "
                "with tile.empty"
            )
        returns.append(item.value)
    if not builder.parallel_done:
        raise TraceError(f"kernel {signature.name!r} has no tile.parallel loop: add one (tile.parallel(1) runs once)")
    body = tuple(builder.bodies[0])
    kernel = Kernel(
        signature.name, tuple(params), tuple(builder.outputs), body, tuple(returns), signature.dims, (), "trace"
    )
    kernel = _named(kernel, builder.names)
    _check_dims(kernel)
    _check_written(kernel)
    if not any(op.name in ("store", "atomic") for op in walk(kernel.body)):
        raise TraceError(
            f"kernel {signature.name!r} writes nothing. `y = x` only renames a value; to write to memory assign to a "
            "slice: y[t, :] = x"
        )
    return kernel


def _named(kernel: Kernel, names: dict[int, str]) -> Kernel:
    """Gives every value a unique printable name."""
    taken: dict[str, int] = {}
    chosen: dict[int, Value] = {}

    def name(value: Value) -> Value:
        if value.id not in chosen:
            base = names.get(value.id, "v")
            number = taken.get(base, 0)
            taken[base] = number + 1
            text = base if number == 0 and value.id in names else f"{base}_{number}"
            while text in taken and text != base:
                number += 1
                text = f"{base}_{number}"
            taken.setdefault(text, 1)
            chosen[value.id] = replace(value, name=text)
        return chosen[value.id]

    def operand(o: Operand) -> Operand:
        return name(o) if isinstance(o, Value) else o

    def op(o: Op) -> Op:
        operands = tuple(map(operand, o.operands))
        regions = tuple(
            Region(tuple(map(name, r.params)), tuple(map(op, r.body)), tuple(map(operand, r.yields))) for r in o.regions
        )
        return replace(o, operands=operands, results=tuple(map(name, o.results)), regions=regions)

    params = tuple(replace(p, value=name(p.value)) for p in kernel.params)
    outputs = tuple(replace(o, value=name(o.value)) for o in kernel.outputs)
    body = tuple(map(op, kernel.body))
    return replace(kernel, params=params, outputs=outputs, body=body, returns=tuple(map(name, kernel.returns)))


def _check_dims(kernel: Kernel) -> None:
    """Raises `TraceError` for a dimension that no tensor parameter binds."""

    def check(sizes: Iterable[Any], loc: Loc | None) -> None:
        for size in sizes:
            for dim in size.dims if isinstance(size, Size) else ():
                if dim not in kernel.dims:
                    raise TraceError(
                        f"kernel {kernel.name!r} uses the dimension {dim}, but no tensor parameter has it; its "
                        f"dimensions are {', '.join(d.name for d in kernel.dims) or 'none'}",
                        loc,
                    )

    for output in kernel.outputs:
        check(output.value.tensor.dims, None)
    for op in walk(kernel.body):
        check([op.attr("size")], op.loc)
        for value in op.results:
            tensor = value.type if isinstance(value.type, TensorType) else None
            check(tensor.dims if tensor else value.tile.shape, op.loc)


def _check_written(kernel: Kernel) -> None:
    """Raises `TraceError` for an output with elements that provably no store reaches."""
    dims = {d.name: d for d in kernel.dims}
    axes: dict[int, tuple[Operand, Operand | Dim | Size]] = {}  # loop index id -> (start, stop) as far as known
    sizes: dict[int, Size] = {}
    roots: dict[int, int] = {}
    stores: dict[int, list[tuple[Op, bool]]] = {}
    blocks: dict[str, tuple[Any, Any]] = {}

    def known(o: Operand) -> Any:
        if isinstance(o, Value):
            return sizes.get(o.id)
        return as_size(int(o))

    def visit(body: tuple[Op, ...]) -> None:
        for op in body:
            if op.name == "size":
                sizes[op.result.id] = op.attr("size")
            elif op.name == "view":
                roots[op.result.id] = roots.get(op.tensor.id, op.tensor.id)
            elif op.name == "parallel":
                for number, (kind, label) in enumerate(op.attr("axes")):
                    bounds = (known(op.operands[2 * number]), known(op.operands[2 * number + 1]))
                    if kind == "block":
                        blocks[label] = bounds
                    axes[op.regions[0].params[number].id] = bounds
            elif op.name == "for":
                bounds = (known(op.operands[0]), known(op.operands[1]))
                if op.attr("kind") == "blocks":
                    blocks[op.attr("label")] = bounds
                if op.operands[2] in (0, 1):
                    axes[op.regions[0].params[0].id] = bounds
            elif op.name in ("store", "atomic"):
                root = roots.get(op.tensor.id, op.tensor.id)
                stores.setdefault(root, []).append((op, root != op.tensor.id))
            for region in op.regions:
                visit(region.body)

    visit(kernel.body)
    zero = as_size(0)

    def interval(kind: Any, operand: Operand, dim: Size) -> tuple[Size, Size] | None:
        """The part of a dimension that an index entry reaches over all iterations; None: not known."""
        if isinstance(kind, Span):
            if isinstance(kind.extent, Block):
                start, stop = blocks[kind.extent.label]
                return None if start is None or stop is None else (start, stop)
            start = known(operand)
            return None if start is None or kind.step != 1 else (start, start + kind.extent)
        if kind == "at":
            if isinstance(operand, Value):
                bounds = axes.get(operand.id)
                return None if bounds is None or None in bounds else bounds  # type: ignore[return-value]
            return as_size(int(operand)), as_size(int(operand) + 1)
        return None

    for output in kernel.outputs:
        if output.init is not None:
            continue
        loc = None
        written = stores.get(output.value.id, [])
        name = output.value.name
        if not written:
            raise TraceError(f"output {name!r} is never written; assign to a slice of it: {name}[...] = tile", loc)
        gaps: list[tuple[Op, dict[int, tuple[Size, Size]]]] = []
        for op, viewed in written:
            partial: dict[int, tuple[Size, Size]] = {}
            for axis, ((kind, operand), dim) in enumerate(zip(op.index, op.tensor.tensor.dims)):
                reach = interval(kind, operand, dim)
                if reach is not None and not (reach[0] == zero and _covers(reach[1], dim)):
                    partial[axis] = reach
            if not partial or viewed:
                gaps = []
                break
            gaps.append((op, partial))
        if not gaps:
            continue
        shared = set.intersection(*(set(p) for _, p in gaps))
        for axis in shared:
            dim = output.value.tensor.dims[axis]
            total = zero
            for piece in {p[axis] for _, p in gaps}:
                total = total + (piece[1] - piece[0])
            missing = dim - total
            if (missing.const or 0) > 0 or (missing.const is None and _positive(missing)):
                reached = ", ".join(f"{a} to {b}" for a, b in dict.fromkeys(p[axis] for _, p in gaps))
                raise TraceError(
                    f"output {name!r} {list(output.value.tensor.dims)} is written only at {reached} of axis "
                    f"{axis}, whose size is {dim}; write the rest, or give tile.empty an init",
                    gaps[0][0].loc,
                )
    del dims


def _covers(stop: Size, dim: Size) -> bool:
    rest = stop - dim
    return (rest.const is not None and rest.const >= 0) or _positive(rest)


def _positive(size: Size) -> bool:
    """Whether a size is surely above 0 for dimensions from 1 (or their `min`) on: it must grow with each of them."""
    if any(c < 0 for atoms, c in size.terms if atoms):
        return False
    if any(isinstance(a, _Quotient) and any(c < 0 for _, c in a.size.terms) for atoms, _ in size.terms for a in atoms):
        return False
    least = {d.name: -(-max(d.min, 1) // d.multiple_of) * d.multiple_of for d in size.dims}
    return size.evaluate(least) > 0
