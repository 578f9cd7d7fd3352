"""What a kernel author handles: `Tile` values, `TensorRef` memory, and the elementwise functions.

Arithmetic follows Python and NumPy: operators broadcast from the last axis, Python numbers take the tile's dtype,
`bf16 + f32` is f32. Integers divide as in C, toward zero. Shapes are symbolic; nobody writes a mask for a ragged end.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilery.tile.builder import Builder, check_dtype, current, fail
from tilery.tile.dtypes import DType, b1, f32, i32
from tilery.tile.ir import Block, Extent, Operand, Span, TensorType, TileType, Value
from tilery.tile.size import Size, as_size

Number = int | float | bool


class Tile:
    """A value on chip: a typed array of symbolic shape; rank 0 is a scalar. Slicing a tensor makes one."""

    __slots__ = ("value",)
    __array_priority__ = 1000

    def __init__(self, value: Value) -> None:
        self.value = value

    @property
    def dtype(self) -> DType:
        return self.value.tile.dtype

    @property
    def shape(self) -> tuple[Extent, ...]:
        return self.value.tile.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return str(self.value.type)

    def __bool__(self) -> bool:
        raise fail(
            "the truth of a tile is not known while tracing; use `if` on a scalar condition as a statement, "
            "tile.where(...) for elements, and & | ~ instead of and, or, not"
        )

    def __iter__(self) -> Any:
        raise fail("a tile cannot be iterated; loop with tile.range or slice the tensor")

    __hash__ = None  # type: ignore[assignment]

    def to(self, dtype: DType) -> Tile:
        """Cast. To FP8 it saturates, float to integer truncates; round first with `tile.round`."""
        return Tile(current().cast(self.value, check_dtype(dtype)))

    def bitcast(self, dtype: DType) -> Tile:
        """The same bits as another dtype of equal width."""
        return Tile(current().pure("bitcast", self.value, dtype=check_dtype(dtype))[0])

    def reshape(self, *shape: Any) -> Tile:
        """Row-major reshape; `-1` is not known symbolically, so write all sizes."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        extents = tuple(_extent(s) for s in sizes)
        return self if extents == self.shape else Tile(current().pure("reshape", self.value, shape=extents)[0])

    def broadcast_to(self, *shape: Any) -> Tile:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        target = tuple(_extent(s) for s in sizes)
        if not self.shape:
            return full(list(target), self, self.dtype)
        return Tile(current().broadcast(self.value, target))

    def transpose(self, *perm: int) -> Tile:
        return Tile(current().pure("transpose", self.value, perm=tuple(perm))[0])

    @property
    def T(self) -> Tile:
        """A 2-D tile transposed."""
        if self.ndim != 2:
            raise fail(f".T needs a 2-D tile, got {self}; use .transpose(...)")
        return self.transpose(1, 0)

    def __getitem__(self, index: Any) -> Tile:
        """Only `None` (a new axis of 1) and `:` (keep); elements of a tile have no address: slice the tensor."""
        items = index if isinstance(index, tuple) else (index,)
        shape: list[Extent] = []
        rest = list(self.shape)
        for item in items:
            if item is None:
                shape.append(as_size(1))
            elif item == slice(None) and rest:
                shape.append(rest.pop(0))
            else:
                raise fail(
                    "a tile takes only `:` and `None` as index; slice the tensor it came from, or use tile.split, "
                    "tile.take or a reduction"
                )
        return self.reshape(*shape, *rest)

    def __add__(self, other: Any) -> Tile:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Tile:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Tile:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Tile:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Tile:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Tile:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Tile:
        return _divide(self, other)

    def __rtruediv__(self, other: Any) -> Tile:
        return _divide(other, self)

    def __floordiv__(self, other: Any) -> Tile:
        return _binary("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Tile:
        return _binary("floordiv", other, self)

    def __mod__(self, other: Any) -> Tile:
        return _binary("mod", self, other)

    def __rmod__(self, other: Any) -> Tile:
        return _binary("mod", other, self)

    def __pow__(self, other: Any) -> Tile:
        return self * self if other == 2 else _binary("pow", self, other)

    def __neg__(self) -> Tile:
        return _unary("neg", self)

    def __abs__(self) -> Tile:
        return _unary("abs", self)

    def __invert__(self) -> Tile:
        return _unary("bit_not", self)

    def __and__(self, other: Any) -> Tile:
        return _binary("bit_and", self, other)

    def __rand__(self, other: Any) -> Tile:
        return _binary("bit_and", other, self)

    def __or__(self, other: Any) -> Tile:
        return _binary("bit_or", self, other)

    def __ror__(self, other: Any) -> Tile:
        return _binary("bit_or", other, self)

    def __xor__(self, other: Any) -> Tile:
        return _binary("bit_xor", self, other)

    def __rxor__(self, other: Any) -> Tile:
        return _binary("bit_xor", other, self)

    def __lshift__(self, other: Any) -> Tile:
        return _binary("shl", self, other)

    def __rlshift__(self, other: Any) -> Tile:
        return _binary("shl", other, self)

    def __rshift__(self, other: Any) -> Tile:
        return _binary("shr", self, other)

    def __eq__(self, other: Any) -> Tile:  # type: ignore[override]
        return _binary("eq", self, other)

    def __ne__(self, other: Any) -> Tile:  # type: ignore[override]
        return _binary("ne", self, other)

    def __lt__(self, other: Any) -> Tile:
        return _binary("lt", self, other)

    def __le__(self, other: Any) -> Tile:
        return _binary("le", self, other)

    def __gt__(self, other: Any) -> Tile:
        return _binary("gt", self, other)

    def __ge__(self, other: Any) -> Tile:
        return _binary("ge", self, other)


class BlockIndex(Tile):
    """The index of a block loop: in a tensor's index it selects the block's elements, in arithmetic it is the tile of
    their positions."""

    __slots__ = ("_positions", "label", "start")

    def __init__(self, label: str, start: Tile) -> None:
        self.label, self.start = label, start
        self._positions: Value | None = None

    @property
    def value(self) -> Value:  # type: ignore[override]
        """The positions; an `arange` the first time they are asked for in a scope."""
        return current().pure("arange", self.start.value, extent=Block(self.label))[0]

    @property
    def index(self) -> Tile:
        """i32 [block]: the positions."""
        return Tile(self.value)

    @property
    def extent(self) -> Block:
        return Block(self.label)

    @property
    def count(self) -> Tile:
        """How many positions this iteration has: the block size, fewer at the end."""
        return Tile(current().op("count", (), (TileType(i32),), label=self.label)[0])

    def __repr__(self) -> str:
        return f"block {self.label!r}"


@dataclass(frozen=True)
class SpanIndex:
    """`tile.span(start, size, step)` in a tensor's index."""

    start: Any
    extent: Extent
    step: int = 1


def span(start: Any, size: Any, step: int = 1) -> SpanIndex:
    """`size` elements from `start` (any scalar). Reads past the tensor's end give 0, writes there are dropped."""
    return SpanIndex(start, _extent(size), step)


class TensorRef:
    """Memory: a parameter or an output. `x[i, block, :]` reads a tile, `x[...] = tile` writes one."""

    __slots__ = ("value",)

    def __init__(self, value: Value) -> None:
        self.value = value

    @property
    def dtype(self) -> DType:
        return self.value.tensor.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.value.tensor.dims

    def __repr__(self) -> str:
        return str(self.value.type)

    def __bool__(self) -> bool:
        return True  # so that `if residual:` asks whether an optional tensor was given

    def view(
        self, dtype: DType, shape: Sequence[Any], strides: Sequence[Any] | None = None, offset: Any = 0
    ) -> TensorRef:
        """The same memory as other elements: dtype, shape, strides and offset counted in elements of `dtype`.

        Fields of packed rows: `cache.view(f32, [S, 4], strides=[656 // 4, 1], offset=512 // 4)`.
        """
        sizes = tuple(as_size(s) for s in shape)
        if strides is None:
            steps: list[Size] = [as_size(1)]
            for s in reversed(sizes[1:]):
                steps.insert(0, steps[0] * s)
            strides = steps
        if len(strides) != len(sizes):
            raise fail(f"view: {len(sizes)} dimensions but {len(strides)} strides")
        kind = TensorType(check_dtype(dtype), sizes, tuple(as_size(s) for s in strides), as_size(offset))
        builder = current()
        value = builder.op("view", (self.value,), (kind,))[0]
        if self.value.id in builder.inout:
            builder.inout.add(value.id)
        return TensorRef(value)

    def __getitem__(self, index: Any) -> Tile:
        return self.load(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.store(index, value)

    def load(self, index: Any, where: Any = None, other: Number = 0) -> Tile:
        """Reads `self[index]` where the mask holds, `other` elsewhere; masked-off gather indices are not followed."""
        builder = current()
        kinds, operands, shape = self._index(index)
        mask = _mask(builder, where, shape)
        operands = (self.value, *operands, *((mask,) if mask is not None else ()))
        if not isinstance(other, (int, float)):
            raise fail("load: `other` must be a Python number")
        kind = TileType(self.dtype, shape)
        out = builder.op("load", operands, (kind,), index=kinds, masked=mask is not None, other=other)
        return Tile(out[0])

    def store(self, index: Any, value: Any, where: Any = None) -> None:
        """Writes `value` (cast with .to first: dtypes must match) to `self[index]` where the mask holds."""
        self._write("store", index, value, where)

    def atomic_add(self, index: Any, value: Any, where: Any = None) -> Tile:
        """Adds atomically; returns the old values. The order among programs is not defined."""
        return self._write("atomic", index, value, where, kind="add")

    def atomic_max(self, index: Any, value: Any, where: Any = None) -> Tile:
        return self._write("atomic", index, value, where, kind="max")

    def atomic_min(self, index: Any, value: Any, where: Any = None) -> Tile:
        return self._write("atomic", index, value, where, kind="min")

    def atomic_or(self, index: Any, value: Any, where: Any = None) -> Tile:
        return self._write("atomic", index, value, where, kind="or")

    def atomic_xchg(self, index: Any, value: Any, where: Any = None) -> Tile:
        return self._write("atomic", index, value, where, kind="xchg")

    def _write(self, name: str, index: Any, value: Any, where: Any, **attrs: Any) -> Any:
        builder = current()
        if self.value.id not in builder.inout:
            raise fail("this parameter is read-only; annotate it InOut[...] instead of Tensor[...] to write to it")
        kinds, operands, shape = self._index(index)
        operand = builder.operand(value)
        if isinstance(operand, Value):
            if operand.tile.dtype != self.dtype:
                raise fail(f"storing {operand.tile.dtype} into a {self.dtype} tensor: write .to({self.dtype})")
            if operand.tile.shape:
                if len(operand.tile.shape) > len(shape):
                    raise fail(f"storing a tile {operand.tile} where the index selects {list(shape)}")
                try:
                    operand = builder.broadcast(operand, shape)
                except Exception:
                    raise fail(f"storing a tile {operand.tile} where the index selects {list(shape)}") from None
        else:
            operand = builder.literal(operand, self.dtype)
        if shape and not (isinstance(operand, Value) and operand.tile.shape):
            operand = full(list(shape), Tile(operand) if isinstance(operand, Value) else operand, self.dtype).value
        elif not isinstance(operand, Value):
            operand = full([], operand, self.dtype).value
        mask = _mask(builder, where, shape)
        all_operands = (self.value, *operands, operand, *((mask,) if mask is not None else ()))
        types = (TileType(self.dtype, shape),) if name == "atomic" else ()
        results = builder.op(name, all_operands, types, index=kinds, masked=mask is not None, **attrs)
        return Tile(results[0]) if results else None

    def _index(self, index: Any) -> tuple[tuple[Any, ...], tuple[Operand, ...], tuple[Extent, ...]]:
        """(kinds, operands, result shape) of an index expression."""
        builder = current()
        items = list(index) if isinstance(index, tuple) else [index]
        dims = self.shape
        if Ellipsis in [i for i in items if i is Ellipsis]:
            at = next(n for n, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(dims) - len(items) + 1)
        items += [slice(None)] * (len(dims) - len(items))
        if len(items) > len(dims):
            raise fail(f"{len(items)} indices for a tensor of {len(dims)} dimensions {list(dims)}")
        gathers = [i for i in items if isinstance(i, Tile) and not isinstance(i, BlockIndex) and i.shape]
        joint: tuple[Extent, ...] = ()
        gathered: list[Operand] = []
        if gathers:
            if builtins.any(not g.dtype.is_int for g in gathers):
                raise fail("a gather index must be a tile of integers")
            gathered = list(builder.broadcast_all(*(g.value for g in gathers)))
            first = gathered[0]
            assert isinstance(first, Value)
            joint = first.tile.shape
        kinds: list[Any] = []
        operands: list[Operand] = []
        shape: list[Extent] = []
        placed = False
        for item, dim in zip(items, dims):
            if isinstance(item, BlockIndex):
                kinds.append(Span(item.extent))
                operands.append(item.start.value)
                shape.append(item.extent)
            elif isinstance(item, Tile) and item.shape:
                kinds.append("gather")
                operands.append(gathered.pop(0))
                if not placed:
                    shape.extend(joint)
                    placed = True
            elif isinstance(item, SpanIndex):
                kinds.append(Span(item.extent, item.step))
                operands.append(builder.scalar(item.start))
                shape.append(item.extent)
            elif isinstance(item, slice):
                start, extent, step = _slice(item, dim)
                kinds.append(Span(extent, step))
                operands.append(builder.scalar(start))
                shape.append(extent)
            else:
                kinds.append("at")
                operands.append(builder.scalar(item))
        return tuple(kinds), tuple(operands), tuple(shape)


def _slice(item: slice, dim: Size) -> tuple[Any, Size, int]:
    """(start, extent, step) of a slice whose length can be told while tracing."""
    step = 1 if item.step is None else item.step
    start = 0 if item.start is None else item.start
    stop = dim if item.stop is None else item.stop
    if not isinstance(step, int) or step < 1:
        raise fail("a slice's step must be a positive Python int")
    if isinstance(start, Tile) or isinstance(stop, Tile):
        raise fail("a slice with a computed start: write tile.span(start, size) so that its size is known")
    start_size, stop_size = as_size(start), as_size(stop)
    if (start_size.const or 0) < 0 or (stop_size.const or 0) < 0:
        raise fail("negative slice bounds are not supported; write them from the dimension: x[H - 64 : H]")
    return start, (stop_size - start_size + (step - 1)) // step, step


def _mask(builder: Builder, where: Any, shape: tuple[Extent, ...]) -> Value | None:
    if where is None or where is True:
        return None
    operand = builder.operand(where)
    if not isinstance(operand, Value) or operand.tile.dtype != b1:
        raise fail("where must be a bool tile or scalar, for example `where=index >= 0`")
    if not operand.tile.shape:
        return full(list(shape), Tile(operand), b1).value if shape else operand
    return builder.broadcast(operand, shape)


def _extent(value: Any) -> Extent:
    if isinstance(value, BlockIndex):
        return value.extent
    return value if isinstance(value, Block) else as_size(value)


# --- functions on tiles -----------------------------------------------------------------------------------------


def _unary(name: str, x: Any) -> Tile:
    builder = current()
    operand = builder.operand(x)
    if not isinstance(operand, Value):
        operand = full([], operand, f32).value
    return Tile(builder.pure(name, operand)[0])


def _binary(name: str, a: Any, b: Any) -> Tile:
    builder = current()
    left, right = builder.operand(a), builder.operand(b)
    if not isinstance(left, Value) and not isinstance(right, Value):
        left = full([], left, f32 if isinstance(left, float) or isinstance(right, float) else i32).value
    return Tile(builder.pure(name, *builder.unify(left, right, name=name))[0])


def _divide(a: Any, b: Any) -> Tile:
    if not builtins.any(isinstance(x, float) or (isinstance(x, Tile) and x.dtype.is_float) for x in (a, b)):
        raise fail("/ of integers: write // (toward zero), or cast one side with .to(f32)")
    return _binary("div", a, b)


def elementwise(name: str, *args: Any) -> Tile:
    """Applies an elementwise operation of the table by name (also one added with `register`)."""
    return _unary(name, args[0]) if len(args) == 1 else _binary(name, *args)


def mul_rn(a: Any, b: Any) -> Tile:
    """a * b of f32 or f64, rounded before anything is added to it: on a GPU never part of a fused multiply-add. There
    f32 products below 2^-126 are 0."""
    return _binary("mul_rn", a, b)


def maximum(a: Any, b: Any) -> Tile:
    return _binary("maximum", a, b)


def minimum(a: Any, b: Any) -> Tile:
    return _binary("minimum", a, b)


def where(condition: Any, a: Any, b: Any) -> Tile:
    """`a` where the condition holds, `b` elsewhere; tiles, scalars or numbers."""
    builder = current()
    cond = builder.operand(condition)
    if not isinstance(cond, Value):
        raise fail("where: the condition is a Python constant; use a Python `if`")
    if cond.tile.dtype != b1:
        raise fail(f"where: the condition must be bool, got {cond.tile.dtype}; compare first, for example x > 0")
    left, right = builder.operand(a), builder.operand(b)
    if not isinstance(left, Value) and not isinstance(right, Value):
        dtype = f32 if isinstance(left, float) or isinstance(right, float) else i32
        left = full([], left, dtype).value
    if not (isinstance(left, Value) and isinstance(right, Value) and left.tile.dtype == right.tile.dtype):
        left, right = builder.unify(left, right, name="where")
    dtype = next(o.tile.dtype for o in (left, right) if isinstance(o, Value))
    return Tile(builder.pure("where", *builder.broadcast_all(cond, left, right), dtype=dtype)[0])


def full(shape: Any, value: Any, dtype: DType) -> Tile:
    """A tile filled with a number or a scalar."""
    builder = current()
    sizes = shape if isinstance(shape, (list, tuple)) else [shape]
    operand = builder.operand(value)
    check_dtype(dtype)
    operand = builder.cast(operand, dtype) if isinstance(operand, Value) else builder.literal(operand, dtype)
    if not sizes and isinstance(operand, Value):
        return Tile(operand)
    return Tile(builder.pure("full", operand, shape=tuple(_extent(s) for s in sizes), dtype=dtype)[0])


def zeros(shape: Any, dtype: DType) -> Tile:
    """A tile of zeros (a value on chip; memory is made with `tile.empty`)."""
    return full(shape, 0, dtype)


def arange(size: Any, start: Any = 0) -> Tile:
    """i32 [size]: start, start + 1, ..."""
    builder = current()
    return Tile(builder.pure("arange", builder.scalar(start), extent=_extent(size))[0])
