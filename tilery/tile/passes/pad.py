"""Gives every tile a static power-of-two shape, as Triton wants, and makes every mask explicit.

A lane beyond an extent's real size holds what its producer left there. Memory operations are masked, and a reduction,
scan, sort, histogram or product first replaces such lanes by a value that does no harm. Masks that can be told to hold
everywhere are left out.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, prod
from typing import Any

from tilery.tile.dtypes import b1, i32
from tilery.tile.errors import LoweringError
from tilery.tile.ir import Block, Extent, Kernel, Op, Operand, Region, Span, TileType, Value, next_id, walk
from tilery.tile.ops import OPS
from tilery.tile.size import Size, as_size

_KEEPS_ZERO = {"cast", "neg", "abs", "transpose", "reshape", "join", "split", "relu"}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def pad(kernel: Kernel) -> Kernel:
    """The padded form of a bound kernel. Raises `LoweringError` for a shape that cannot be padded."""
    return _Pad(kernel).run()


class _Pad:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.blocks = dict(kernel.blocks)
        self.next = next_id(kernel)
        self.bounds: dict[str, tuple[Value, Operand]] = {}  # block label -> (index, stop)
        self.exact: set[str] = set()  # block labels whose range the block size divides
        self.sizes: dict[int, Size] = {}
        self.ranges: dict[int, tuple[int, int] | None] = {}  # scalar id -> inclusive range, where known
        self.zero: set[int] = set()  # tiles whose padding lanes are all zero
        self.values: dict[int, Value] = {}
        self.caps: dict[Extent, int] = {}
        self.out: list[Op] = []
        self.loc: Any = None
        self._capacities()

    # --- capacities -------------------------------------------------------------------------------------------

    def _capacities(self) -> None:
        for label, size in self.blocks.items():
            if size != power_of_two(size):
                raise LoweringError(
                    f"kernel {self.kernel.name!r}: the block size of {label!r} must be a power of two here, got {size}"
                )
            self.caps[Block(label)] = size
        for op in walk(self.kernel.body):
            if op.name == "dot":
                a, b = (o.tile for o in op.operands[:2] if isinstance(o, Value))
                inner = 32 if a.dtype.bits == 8 else 16
                for extent, least in ((a.shape[0], 16), (a.shape[1], inner), (b.shape[1], 16)):
                    if self.cap(extent) < least:
                        if extent == as_size(1):
                            raise LoweringError(
                                "dot with an extent of 1: write tile.sum(a[:, :, None] * b[None, :, :], axis=1), or "
                                "use a block of several rows",
                                op.loc,
                            )
                        self.caps[extent] = least
                        if isinstance(extent, Block):  # iterations must not overlap
                            self.blocks[extent.label] = least

    def cap(self, extent: Extent) -> int:
        if extent not in self.caps:
            assert isinstance(extent, Size)
            if extent.const is None:
                raise LoweringError(f"kernel {self.kernel.name!r}: the size {extent} is not bound; give its dimensions")
            self.caps[extent] = power_of_two(extent.const)
        return self.caps[extent]

    def ragged(self, extent: Extent) -> bool:
        """Whether lanes of this extent may be padding."""
        if isinstance(extent, Block):
            return extent.label not in self.exact
        return extent.const != self.cap(extent)

    def type(self, kind: TileType) -> TileType:
        return TileType(kind.dtype, tuple(as_size(self.cap(e)) for e in kind.shape))

    # --- emitting ---------------------------------------------------------------------------------------------

    def emit(self, name: str, operands: tuple[Operand, ...], kind: TileType, **attrs: Any) -> Value:
        value = Value(self.next, kind, f"p{self.next}")
        self.next += 1
        self.out.append(Op(name, operands, tuple(sorted(attrs.items())), (value,), (), self.loc))
        return value

    def lanes(self, start: Operand, size: int) -> Value:
        return self.emit("arange", (start,), TileType(i32, (as_size(size),)), extent=as_size(size))

    def place(self, vector: Value, axis: int, shape: tuple[Size, ...]) -> Value:
        """A vector along one axis, spread over `shape`."""
        own = tuple(vector.tile.shape[0] if a == axis else as_size(1) for a in range(len(shape)))
        if own != vector.tile.shape:
            vector = self.emit("reshape", (vector,), TileType(vector.tile.dtype, own), shape=own)
        if own != shape:
            vector = self.emit("broadcast", (vector,), TileType(vector.tile.dtype, shape), shape=shape)
        return vector

    def both(self, a: Value | None, b: Value | None) -> Value | None:
        if a is None or b is None:
            return a if b is None else b
        return self.emit("bit_and", (a, b), a.tile)

    def extent_mask(self, extent: Extent) -> Value | None:
        """b1 [cap]: which lanes are real."""
        if not self.ragged(extent):
            return None
        cap = self.cap(extent)
        kind = TileType(b1, (as_size(cap),))
        if isinstance(extent, Block):
            index, stop = self.bounds[extent.label]
            return self.emit("lt", (self.lanes(index, cap), stop), kind)
        assert extent.const is not None
        return self.emit("lt", (self.lanes(0, cap), extent.const), kind)

    def shape_mask(self, extents: tuple[Extent, ...], only: int | None = None) -> Value | None:
        """The real lanes of a tile (or along one axis), spread over its padded shape."""
        shape = tuple(as_size(self.cap(e)) for e in extents)
        mask: Value | None = None
        for axis, extent in enumerate(extents):
            if only is None or axis == only:
                vector = self.extent_mask(extent)
                if vector is not None:
                    mask = self.both(mask, self.place(vector, axis, shape))
        return mask

    def filled(self, operand: Operand, axis: int | None, fill: float | int) -> Operand:
        """`operand` with its padding lanes (along one axis, or all) replaced by `fill`."""
        if not isinstance(operand, Value):
            return operand
        extents = self.original(operand)
        if fill == 0 and operand.id in self.zero:
            return operand
        mask = self.shape_mask(extents, axis)
        if mask is None:
            return operand
        kind = operand.tile
        value = float(fill) if kind.dtype.is_float else bool(fill) if kind.dtype == b1 else int(fill)
        return self.emit("where", (mask, operand, value), kind, dtype=kind.dtype)

    # --- the walk ---------------------------------------------------------------------------------------------

    def run(self) -> Kernel:
        self.original_types: dict[int, TileType] = {}
        for param in self.kernel.params:
            self.values[param.value.id] = param.value
        self._check_grid()
        body = self.body(self.kernel.body)
        return replace(self.kernel, body=body, blocks=(), stage="padded")

    def _check_grid(self) -> None:
        outside = walk(tuple(op for op in self.kernel.body if op.name != "parallel"))
        for op in outside:
            if op.name in ("store", "atomic"):
                raise LoweringError(
                    f"kernel {self.kernel.name!r} writes {op.tensor.name!r} outside tile.parallel, which a GPU would "
                    "do once per program; write it inside, give tile.empty an init, or use a kernel of its own",
                    op.loc,
                )

    def original(self, operand: Value) -> tuple[Extent, ...]:
        return self.original_types[operand.id].shape if operand.id in self.original_types else operand.tile.shape

    def define(self, value: Value) -> Value:
        if isinstance(value.type, TileType):
            self.original_types[value.id] = value.type
            new = replace(value, type=self.type(value.type))
        else:
            new = value
        self.values[value.id] = new
        return new

    def use(self, operand: Operand) -> Operand:
        return self.values.get(operand.id, operand) if isinstance(operand, Value) else operand

    def body(self, body: tuple[Op, ...]) -> tuple[Op, ...]:
        outer, self.out = self.out, []
        for op in body:
            self.loc = op.loc
            getattr(self, f"op_{op.name}", self.pure)(op)
        out, self.out = tuple(self.out), outer
        return out

    def region(self, region: Region, extra: tuple[Op, ...] = ()) -> Region:
        params = tuple(self.define(p) for p in region.params)
        body = self.body(region.body)
        return Region(params, (*extra, *body), tuple(map(self.use, region.yields)))

    def op_parallel(self, op: Op) -> None:
        operands = tuple(map(self.use, op.operands))
        steps = []
        for number, (kind, label) in enumerate(op.attr("axes")):
            index = op.regions[0].params[number]
            start, stop = operands[2 * number], operands[2 * number + 1]
            step = self.blocks[label] if kind == "block" else 1
            self._enter(label if kind == "block" else None, index, start, stop, step)
            if kind == "block":
                steps.append((label, step))
        region = self.region(op.regions[0])
        attrs = (("axes", op.attr("axes")), ("steps", tuple(steps)))
        self.out.append(Op("parallel", operands, attrs, (), (region,), op.loc))

    def op_for(self, op: Op) -> None:
        operands = tuple(map(self.use, op.operands))
        region, label = op.regions[0], op.attr("label")
        step = operands[2]
        if op.attr("kind") == "blocks":
            step = self.blocks[label]
            self._enter(label, region.params[0], operands[0], operands[1], step)
        else:
            self._enter(None, region.params[0], operands[0], operands[1], step)
        inner = self.region(region)
        results = tuple(map(self.define, op.results))
        attrs = (("kind", "range"), ("label", label))
        self.out.append(Op("for", (*operands[:2], step, *operands[3:]), attrs, results, (inner,), op.loc))

    def _enter(self, label: str | None, index: Value, start: Operand, stop: Operand, step: Operand) -> None:
        low, high = self.range(start), self.range(stop)
        self.ranges[index.id] = None
        if low is not None and low[0] >= 0 and isinstance(step, int) and step > 0:
            top = high[1] - 1 if high is not None else 2**31
            if high is not None and low[0] == low[1]:
                top = low[0] + max(0, -(-(high[1] - low[0]) // step) - 1) * step
            self.ranges[index.id] = (low[0], max(top, low[0]))
        if label is not None:
            self.bounds[label] = (index, stop)
            size = self.size_of(stop)
            block = self.blocks[label]
            if block == 1 or (start == 0 and size is not None and size.factor % block == 0):
                self.exact.add(label)

    def op_if(self, op: Op) -> None:
        regions = tuple(self.region(r) for r in op.regions)
        operands = tuple(map(self.use, op.operands))
        results = tuple(map(self.define, op.results))
        self.out.append(replace(op, operands=operands, regions=regions, results=results))

    # --- what is known about scalars --------------------------------------------------------------------------

    def size_of(self, operand: Operand) -> Size | None:
        return self.sizes.get(operand.id) if isinstance(operand, Value) else as_size(int(operand))

    def range(self, operand: Operand) -> tuple[int, int] | None:
        """Inclusive range of an integer scalar or tile, where known."""
        if isinstance(operand, Value):
            return self.ranges.get(operand.id)
        return (int(operand), int(operand))

    def _track(self, op: Op) -> None:
        """Ranges of integer results, from those of the operands."""
        if len(op.results) != 1 or not isinstance(op.result.type, TileType) or not op.result.tile.dtype.is_int:
            return
        known = [self.range(o) for o in op.operands]
        result: tuple[int, int] | None = None
        if op.name == "arange" and known[0] is not None:
            result = (known[0][0], known[0][1] + self.cap(op.attr("extent")) - 1)
        elif op.name in ("cast", "reshape", "broadcast", "transpose", "full") and known[0] is not None:
            result = known[0]
        elif len(known) == 2 and known[0] is not None and known[1] is not None:
            (a, b), (c, d) = known[0], known[1]
            if op.name == "add":
                result = (a + c, b + d)
            elif op.name == "sub":
                result = (a - d, b - c)
            elif op.name == "mul":
                ends = [a * c, a * d, b * c, b * d]
                result = (min(ends), max(ends))
            elif op.name == "floordiv" and a >= 0 and c > 0:
                result = (a // d, b // c)
            elif op.name == "mod" and a >= 0 and c > 0:
                result = (0, min(b, d - 1))
        elif op.name == "mod" and known[1] is not None and known[0] is None:
            result = None
        kind = op.result.tile.dtype
        top = kind.highest if kind.bits != 32 else 2**31  # which a size may have as its bound
        if result is not None and not (kind.lowest <= result[0] and result[1] <= top):
            result = None  # it may wrap
        self.ranges[op.result.id] = result

    # --- memory -----------------------------------------------------------------------------------------------

    def op_view(self, op: Op) -> None:
        self.values[op.result.id] = op.result
        self.out.append(replace(op, operands=tuple(map(self.use, op.operands))))

    def _access(self, op: Op, extents: tuple[Extent, ...]) -> tuple[tuple[Operand, ...], tuple[Any, ...], Value | None]:
        """(index operands, padded index kinds, mask) of a memory operation whose tile has `extents`."""
        shape = tuple(as_size(self.cap(e)) for e in extents)
        mask = self.shape_mask(extents)
        kinds: list[Any] = []
        operands: list[Operand] = []
        axis, placed = 0, False
        for (kind, operand), dim in zip(op.index, op.tensor.tensor.dims):
            operand = self.use(operand)
            operands.append(operand)
            if isinstance(kind, Span):
                cap = self.cap(kind.extent)
                kinds.append(Span(as_size(cap), kind.step))
                vector = self._span_mask(kind, operand, dim, cap)
                if vector is not None:
                    mask = self.both(mask, self.place(vector, axis, shape))
                axis += 1
            else:
                kinds.append(kind)
                if kind == "gather" and not placed:
                    assert isinstance(operand, Value)
                    axis, placed = axis + len(operand.tile.shape), True
        if op.where is not None:
            where = self.use(op.where)
            assert isinstance(where, Value)
            mask = self.both(mask, where)
        return tuple(operands), tuple(kinds), mask

    def _span_mask(self, span: Span, start: Operand, dim: Size, cap: int) -> Value | None:
        """b1 [cap]: the part of a span inside the tensor; None where that is surely all that is real."""
        low = self.range(start)
        inside = False
        if isinstance(span.extent, Block):
            index, stop = self.bounds[span.extent.label]
            size, top = self.size_of(stop), self.range(stop)
            rest = dim - size if size is not None else None
            inside = rest is not None and rest.const is not None and rest.const >= 0
            inside = inside or (top is not None and dim.const is not None and top[1] <= dim.const)
            own = isinstance(start, Value) and start.id == index.id and span.step == 1
            inside = inside and own and low is not None and low[0] >= 0
        else:
            length = span.extent
            if isinstance(start, int) and start >= 0 and span.step == 1:
                rest = dim - (length + start)
                inside = rest.const is not None and rest.const >= 0
            if not inside and low is not None and dim.const is not None and length.const is not None:
                inside = low[0] >= 0 and low[1] + (length.const - 1) * span.step < dim.const
        if inside:
            return None
        positions = self.lanes(0, cap)
        kind = TileType(i32, (as_size(cap),))
        if span.step != 1:
            positions = self.emit("mul", (positions, span.step), kind)
        if start != 0:
            positions = self.emit("add", (positions, start), kind)
        limit: Operand = dim.const if dim.const is not None else self.emit("size", (), TileType(i32), size=dim)
        mask = self.emit("lt", (positions, limit), TileType(b1, kind.shape))
        if low is None or low[0] < 0:
            mask = self.both(mask, self.emit("ge", (positions, 0), TileType(b1, kind.shape))) or mask
        return mask

    def op_load(self, op: Op) -> None:
        operands, kinds, mask = self._access(op, op.result.tile.shape)
        result = self.define(op.result)
        attrs = {**dict(op.attrs), "index": kinds, "masked": mask is not None, "unchecked": True}
        all_operands = (self.use(op.tensor), *operands, *((mask,) if mask is not None else ()))
        self.out.append(Op("load", all_operands, tuple(sorted(attrs.items())), (result,), (), op.loc))
        if op.attr("other") == 0:
            self.zero.add(result.id)

    def op_store(self, op: Op) -> None:
        stored = op.stored
        assert isinstance(stored, Value)
        operands, kinds, mask = self._access(op, self.original(stored))
        attrs = {**dict(op.attrs), "index": kinds, "masked": mask is not None, "unchecked": True}
        all_operands = (self.use(op.tensor), *operands, self.use(stored), *((mask,) if mask is not None else ()))
        results = tuple(map(self.define, op.results))
        self.out.append(Op(op.name, all_operands, tuple(sorted(attrs.items())), results, (), op.loc))

    op_atomic = op_store

    # --- values -----------------------------------------------------------------------------------------------

    def op_tap(self, op: Op) -> None:
        return  # taps show real lanes only; they live in the earlier stages

    def op_count(self, op: Op) -> None:
        label = op.attr("label")
        index, stop = self.bounds[label]
        kind = TileType(i32)
        left = self.emit("sub", (stop, self.use(index)), kind)
        result = self.define(op.result)
        self.out.append(Op("minimum", (left, self.blocks[label]), (), (result,), (), op.loc))

    def pure(self, op: Op) -> None:
        operands = tuple(map(self.use, op.operands))
        attrs = dict(op.attrs)
        if op.name == "size":
            self.sizes[op.result.id] = op.attr("size")
            value = op.attr("size").const
            self.ranges[op.result.id] = (value, value) if value is not None else (0, 2**31)
        if "shape" in attrs:
            if op.name == "reshape":
                assert isinstance(op.operands[0], Value)
                self._check_reshape(op, self.original(op.operands[0]), attrs["shape"])
            attrs["shape"] = tuple(as_size(self.cap(e)) for e in attrs["shape"])
        if "extent" in attrs:
            attrs["extent"] = as_size(self.cap(attrs["extent"]))
        if op.name in ("reduce", "scan", "sort"):
            fill = OPS[op.name].fill
            first = operands[0]
            if fill is not None and isinstance(first, Value) and (op.name != "scan" or attrs["reverse"]):
                value = fill(attrs, first.tile.dtype)
                operands = (self.filled(first, attrs["axis"], value), *operands[1:])
        elif op.name == "dot":
            a, b = operands[0], operands[1]
            operands = (self.filled(a, 1, 0), self.filled(b, 0, 0), *operands[2:])
        elif op.name == "take":
            operands = (operands[0], self.filled(operands[1], None, 0))
        elif op.name == "histogram":
            where = operands[1]
            assert isinstance(where, Value)
            operands = (operands[0], self.both(self.shape_mask(self.original(where)), where) or where)
            attrs["bins"] = self.cap(as_size(attrs["bins"]))
        elif op.name == "split" and operands and isinstance(operands[0], Value):
            pass
        results = tuple(map(self.define, op.results))
        self.out.append(replace(op, operands=operands, attrs=tuple(sorted(attrs.items())), results=results))
        self._track(op)
        sources = [o for o in operands if isinstance(o, Value) and o.tile.shape]
        zeros = [o.id in self.zero or not any(map(self.ragged, self.original(o))) for o in sources]
        if op.name in _KEEPS_ZERO or op.name == "mul":
            if sources and all(zeros) and all(map(self._finite, operands)):
                self.zero.update(r.id for r in results)
        elif op.name == "full" and op.operands[0] == 0:
            self.zero.update(r.id for r in results)

    @staticmethod
    def _finite(operand: Operand) -> bool:
        """Whether 0 times an operand is 0: not of a scalar that may be infinite. (Padding of a tile is looked at.)"""
        if isinstance(operand, Value):
            return bool(operand.tile.shape) or not operand.tile.dtype.is_float
        return isfinite(operand)

    def _check_reshape(self, op: Op, old: tuple[Extent, ...], new: tuple[Extent, ...]) -> None:
        """Padding must stay at the end: in each group of axes that split or merge, only the first may be padded."""
        for group_old, group_new in _groups([*old], [*new]):
            caps_old, caps_new = prod(map(self.cap, group_old)), prod(map(self.cap, group_new))
            inner = [e for e in (*group_old[1:], *group_new[1:]) if self.ragged(e)]
            if (len(group_old) > 1 or len(group_new) > 1) and (inner or caps_old != caps_new):
                shown = inner[0] if inner else group_old[0]
                raise LoweringError(
                    f"reshape {list(old)} to {list(new)}: the extent {shown} is padded to {self.cap(shown)} here, "
                    "which a split or merge cannot carry; keep inner axes powers of two, or index the tensor in the "
                    "shape you need",
                    op.loc,
                )


def _groups(old: list[Extent], new: list[Extent]) -> list[tuple[list[Extent], list[Extent]]]:
    """Pairs of runs of axes with equal element counts, ones dropped."""
    one = as_size(1)
    old, new = [e for e in old if e != one], [e for e in new if e != one]
    groups = []
    while old or new:
        left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while left and right and left != right and not (isinstance(left[0], Block) and left == right):
            a, b = _count(left), _count(right)
            if a is None or b is None or a == b:
                break
            if a < b and old:
                left.append(old.pop(0))
            elif b < a and new:
                right.append(new.pop(0))
            else:
                break
        groups.append((left, right))
    return groups


def _count(extents: list[Extent]) -> int | None:
    total = 1
    for e in extents:
        if isinstance(e, Block) or e.const is None:
            return None
        total *= e.const
    return total
