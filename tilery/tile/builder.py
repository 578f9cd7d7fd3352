"""Builds Tile IR while a kernel's Python source runs once: the current place to put operations, and their lines.

One `Builder` per trace, found through a context variable, so that traces may nest (a kernel called while another is
traced) and run in several threads.
"""

from __future__ import annotations

import keyword
import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tilery.tile.dtypes import DType, b1, f32, i32, i64, promote
from tilery.tile.errors import Loc, TraceError
from tilery.tile.ir import Block, Op, Operand, Output, Region, TensorType, TileType, Type, Value
from tilery.tile.ops import OPS
from tilery.tile.size import Dim, Size, as_size

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_CURRENT: ContextVar[Builder | None] = ContextVar("tile_builder", default=None)


def current() -> Builder:
    """The trace in progress. Raises `TraceError` outside a kernel."""
    builder = _CURRENT.get()
    if builder is None:
        raise TraceError("this works only inside a function decorated with @tile.kernel")
    return builder


def tracing() -> bool:
    """Whether a kernel is being traced."""
    return _CURRENT.get() is not None


def user_loc() -> Loc:
    """The innermost line that is not the tile package's own."""
    frame = sys._getframe(1)
    library = _PACKAGE + "lib.py"
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) and not name.startswith("<") and name != library:
            break
        frame = frame.f_back
    return Loc(frame.f_code.co_filename, frame.f_lineno)


def located(error: TraceError) -> TraceError:
    """An error raised without a place, at the innermost line of its traceback that is not the tile package's own."""
    found, step = error.loc, error.__traceback__
    while error.loc is None and step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_PACKAGE, "<")):
            found = Loc(name, step.tb_lineno)
        step = step.tb_next
    return TraceError(error.message, found)


def fail(message: str) -> TraceError:
    """A `TraceError` at the user's line."""
    return TraceError(message, user_loc())


def check_dtype(dtype: Any) -> DType:
    """`dtype` if it is one of ours; a torch dtype or a string is a `TraceError`."""
    if not isinstance(dtype, DType):
        raise fail(f"expected a dtype of the tile language such as tile.f32, got {dtype!r}")
    return dtype


class Builder:
    """Collects operations into nested bodies. `blocks` maps a block loop's label to its (start, stop) operands."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bodies: list[list[Op]] = [[]]
        self.outputs: list[Output] = []
        self.names: dict[int, str] = {}
        self.labels: set[str] = set()
        self.block_bounds: dict[str, tuple[Operand, Operand]] = {}
        self.parallel_done = False
        self.in_parallel = False
        self.inout: set[int] = set()
        self.tensors: set[int] = set()
        self._next = 0

    @contextmanager
    def active(self) -> Iterator[Builder]:
        token = _CURRENT.set(self)
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def value(self, type: Type, name: str = "") -> Value:
        self._next += 1
        if name:
            self.names[self._next] = name
        return Value(self._next, type, name)

    def rename(self, value: Value, name: str) -> None:
        self.names.setdefault(value.id, name)

    def label(self, wanted: str | None, kind: str) -> str:
        """A label no other loop has."""
        if wanted is not None:
            if not wanted.isidentifier() or keyword.iskeyword(wanted):
                raise fail(f"a label must be a Python identifier, got {wanted!r}")
            if wanted in self.labels:
                raise fail(
                    f"the label {wanted!r} names two loops; schedules and traces are addressed by it: rename one"
                )
            self.labels.add(wanted)
            return wanted
        number = 0
        while (fresh := f"{kind}{number}") in self.labels:
            number += 1
        self.labels.add(fresh)
        return fresh

    def op(
        self, name: str, operands: tuple[Operand, ...] = (), types: tuple[Type, ...] = (),
        regions: tuple[Region, ...] = (), **attrs: Any,
    ) -> tuple[Value, ...]:  # fmt: skip
        """Appends an operation whose result types are given."""
        results = tuple(self.value(t) for t in types)
        self.bodies[-1].append(Op(name, operands, tuple(sorted(attrs.items())), results, regions, user_loc()))
        return results

    def pure(self, name: str, *operands: Operand, **attrs: Any) -> tuple[Value, ...]:
        """Appends an operation of the table, its types inferred. Raises `TraceError` at the user's line."""
        types = [o.tile if isinstance(o, Value) else None for o in operands]
        try:
            inferred = OPS[name].infer(types, attrs)
        except TraceError as error:
            raise fail(error.message) from None
        return self.op(name, operands, inferred, **attrs)

    @contextmanager
    def body(self) -> Iterator[list[Op]]:
        """A nested body that collects operations until it is left."""
        self.bodies.append([])
        try:
            yield self.bodies[-1]
        finally:
            self.bodies.pop()

    # --- conversions ----------------------------------------------------------------------------------------

    def scalar(self, value: Any) -> Operand:
        """An index-like scalar (int, Dim, Size or scalar tile) as an operand."""
        from tilery.tile.lang import Tile

        if isinstance(value, Tile):
            if value.shape:
                raise fail(f"expected a scalar, got a tile {value}")
            return value.value
        if isinstance(value, (bool, int)):
            return int(value)
        if isinstance(value, (Dim, Size)):
            size = as_size(value)
            return size.const if size.const is not None else self.op("size", (), (TileType(i32),), size=size)[0]
        raise fail(f"expected an integer, a dimension or a scalar, got {type(value).__name__}")

    def operand(self, value: Any) -> Operand:
        """Anything arithmetic may take: a tile, a Python number, a size."""
        from tilery.tile.lang import BlockIndex, Tile

        if isinstance(value, Tile):
            return value.value
        if isinstance(value, BlockIndex):
            return value.index.value
        if isinstance(value, (int, float, bool)):
            return value
        if isinstance(value, (Dim, Size)):
            return self.scalar(value)
        raise fail(f"cannot compute with {type(value).__name__} {value!r} inside a kernel")

    def unify(self, *operands: Operand, name: str) -> tuple[Operand, ...]:
        """Common dtype and shape: casts and broadcasts inserted; scalars and literals stay as they are."""
        dtype: DType | None = None
        for operand in operands:
            if isinstance(operand, Value):
                both = operand.tile.dtype if dtype is None else promote(dtype, operand.tile.dtype)
                if both is None and not (name in ("where",) and dtype == operand.tile.dtype):
                    raise fail(
                        f"{name} of {dtype} and {operand.tile.dtype}: FP8 has no arithmetic; cast with .to(f32) first"
                    )
                dtype = both
        assert dtype is not None
        if dtype.kind in "iub" and any(isinstance(o, float) for o in operands):
            dtype = f32
        if dtype == b1 and any(isinstance(o, int) and not isinstance(o, bool) for o in operands):
            dtype = i32
        out = [self.cast(o, dtype) if isinstance(o, Value) else self.literal(o, dtype) for o in operands]
        return self.broadcast_all(*out)

    def literal(self, value: int | float | bool, dtype: DType) -> int | float | bool:
        if dtype.is_float:
            return float(value)
        if dtype.kind == "b":
            return bool(value)
        if not dtype.lowest <= int(value) <= dtype.highest:
            raise fail(f"the literal {value} does not fit in {dtype}; cast the tile to a wider type first")
        return int(value)

    def cast(self, value: Value, dtype: DType) -> Value:
        return value if value.tile.dtype == dtype else self.pure("cast", value, dtype=dtype)[0]

    def broadcast_all(self, *operands: Operand) -> tuple[Operand, ...]:
        """Tiles of rank > 0 broadcast to one shape, aligned at the last axis as in NumPy."""
        shapes = [o.tile.shape for o in operands if isinstance(o, Value) and o.tile.shape]
        if not shapes or all(s == shapes[0] for s in shapes):
            return operands
        rank, one = max(map(len, shapes)), as_size(1)
        target = []
        for axis in range(-rank, 0):
            extents = {s[axis] for s in shapes if len(s) >= -axis} - {one}
            if len(extents) > 1:
                shown = " and ".join(str(list(s)) for s in dict.fromkeys(shapes))
                raise fail(f"shapes {shown} do not broadcast: axis {axis} differs")
            target.append(extents.pop() if extents else one)
        return tuple(self.broadcast(o, tuple(target)) if isinstance(o, Value) and o.tile.shape else o for o in operands)

    def broadcast(self, value: Value, shape: tuple[Any, ...]) -> Value:
        if value.tile.shape == shape:
            return value
        missing = len(shape) - len(value.tile.shape)
        if missing > 0:
            value = self.pure("reshape", value, shape=(as_size(1),) * missing + value.tile.shape)[0]
        return value if value.tile.shape == shape else self.pure("broadcast", value, shape=shape)[0]

    def bounds_of(self, block: Block) -> tuple[Operand, Operand]:
        return self.block_bounds[block.label]

    def tensor_type(self, value: Value) -> TensorType:
        return value.tensor

    @staticmethod
    def wide(dtype: DType) -> bool:
        return dtype in (i32, i64)
