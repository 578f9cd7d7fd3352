"""The Tile IR: SSA over tiles, in plain frozen dataclasses.

A `Kernel` has parameters (tensors, scalars), outputs it allocates, and a body of `Op`s. An `Op` takes operands
(`Value`s or literals) and attributes and gives results; loops and branches hold `Region`s. A tile's shape is made of
*extents*: a `Size` (known once the dimensions are bound) or a `Block` (the part of a block loop's range that one
iteration handles: up to the schedule's block size, fewer at the end).

Operations by name (`ops.py` has the pure ones with their meaning):

    parallel(bounds...)           the grid; region parameters are the axes' indices (a block axis gives its start)
    for(start, stop, step, inits...)   sequential; region parameters: index, carried values; yields the next ones
    if(cond)                      two regions that yield the same types
    view(tensor)                  other dtype, dims, strides over the same memory
    load(tensor, index..., [where])    -> tile; outside the mask or past the tensor's end: `other`
    store(tensor, index..., value, [where])
    atomic(tensor, index..., value, [where])  -> the old value; kind add, max, min, or, xchg

An index has one entry per tensor dimension: "at" (a scalar), "gather" (a tile of ints; all gathers of one access are
broadcast together and stand where the first one stands) or a `Span` (start scalar, extent, step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tilery.tile.dtypes import DType
from tilery.tile.errors import Loc
from tilery.tile.size import Dim, Size


@dataclass(frozen=True)
class Block:
    """The extent of a tile made by the block loop `label`."""

    label: str

    def __str__(self) -> str:
        return f"B.{self.label}"

    __repr__ = __str__


Extent = Size | Block
ZERO = Size()


@dataclass(frozen=True)
class TileType:
    """A value on chip; rank 0 is a scalar."""

    dtype: DType
    shape: tuple[Extent, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.shape else self.dtype.name


@dataclass(frozen=True)
class TensorType:
    """A tensor in memory. `strides` (elements) None: the launch gives them, the last one is 1. `offset`: elements."""

    dtype: DType
    dims: tuple[Size, ...]
    strides: tuple[Size, ...] | None = None
    offset: Size = ZERO

    def __str__(self) -> str:
        return f"Tensor[{', '.join([*map(str, self.dims), self.dtype.name])}]"


Type = TileType | TensorType


@dataclass(frozen=True)
class Value:
    """One SSA value; identified by `id`, printed by `name`."""

    id: int
    type: Type
    name: str = ""

    @property
    def tile(self) -> TileType:
        assert isinstance(self.type, TileType), f"{self.name} is a tensor, not a tile"
        return self.type

    @property
    def tensor(self) -> TensorType:
        assert isinstance(self.type, TensorType), f"{self.name} is a tile, not a tensor"
        return self.type


Operand = Value | int | float | bool


@dataclass(frozen=True)
class Span:
    """An index entry: `extent` elements from a start (an operand), `step` apart."""

    extent: Extent
    step: int = 1


IndexKind = str | Span
"""`"at"`, `"gather"` or a `Span`."""


@dataclass(frozen=True)
class Region:
    """A straight line of operations with parameters; `yields` are its results."""

    params: tuple[Value, ...]
    body: tuple[Op, ...]
    yields: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Op:
    name: str
    operands: tuple[Operand, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    results: tuple[Value, ...] = ()
    regions: tuple[Region, ...] = ()
    loc: Loc | None = field(default=None, compare=False)

    def attr(self, name: str, default: Any = None) -> Any:
        for key, value in self.attrs:
            if key == name:
                return value
        return default

    @property
    def result(self) -> Value:
        return self.results[0]

    @property
    def tensor(self) -> Value:
        """The tensor a memory operation touches."""
        value = self.operands[0]
        assert isinstance(value, Value)
        return value

    @property
    def index(self) -> tuple[tuple[IndexKind, Operand], ...]:
        """(kind, operand) per tensor dimension of a memory operation."""
        kinds = self.attr("index")
        return tuple(zip(kinds, self.operands[1 : 1 + len(kinds)]))

    @property
    def stored(self) -> Operand:
        """The value a store or atomic writes."""
        return self.operands[1 + len(self.attr("index"))]

    @property
    def where(self) -> Operand | None:
        """The explicit mask of a memory operation."""
        return self.operands[-1] if self.attr("masked") else None


@dataclass(frozen=True)
class Param:
    """A parameter: a tensor (`inout`: the kernel writes it) or a runtime scalar."""

    value: Value
    inout: bool = False


@dataclass(frozen=True)
class Output:
    """A tensor the launch allocates. `init` None: every element must be written. Not returned: workspace."""

    value: Value
    init: float | int | None = None


@dataclass(frozen=True)
class Kernel:
    """One kernel at one stage. `blocks`: capacities of block extents once a schedule is bound. `sizes`: the sizes
    that shape tiles, bound to numbers once specialised."""

    name: str
    params: tuple[Param, ...]
    outputs: tuple[Output, ...]
    body: tuple[Op, ...]
    returns: tuple[Value, ...]
    dims: tuple[Dim, ...] = ()
    blocks: tuple[tuple[str, int], ...] = ()
    stage: str = "trace"

    def __str__(self) -> str:
        from tilery.tile.text import print_kernel

        return print_kernel(self)

    @property
    def tile_dims(self) -> frozenset[Dim]:
        """The dimensions that shape tiles: a binary is specialised on their values, on no others."""
        found: set[Dim] = set()
        for op in walk(self.body):
            for value in (*op.results, *(p for r in op.regions for p in r.params)):
                if isinstance(value.type, TileType):
                    for extent in value.type.shape:
                        if isinstance(extent, Size):
                            found |= extent.dims
        return frozenset(found)

    def bind_outputs(self, env: dict[str, int]) -> list[tuple[int, ...]]:
        """Shapes of the outputs with dimensions bound."""
        return [tuple(d.evaluate(env) for d in out.value.tensor.dims) for out in self.outputs]


def walk(body: tuple[Op, ...]) -> Iterator[Op]:
    """Every operation, outer before inner, in order."""
    for op in body:
        yield op
        for region in op.regions:
            yield from walk(region.body)


def operands_of(op: Op) -> Iterator[Value]:
    """The values an operation reads, those its regions yield included."""
    for operand in op.operands:
        if isinstance(operand, Value):
            yield operand
    for region in op.regions:
        for operand in region.yields:
            if isinstance(operand, Value):
                yield operand


def substitute(body: tuple[Op, ...], mapping: dict[int, Operand]) -> tuple[Op, ...]:
    """`body` with uses of values replaced, by id."""

    def swap(operand: Operand) -> Operand:
        while isinstance(operand, Value) and operand.id in mapping:
            operand = mapping[operand.id]
        return operand

    def visit(op: Op) -> Op:
        regions = tuple(
            replace(r, body=tuple(visit(o) for o in r.body), yields=tuple(map(swap, r.yields))) for r in op.regions
        )
        return replace(op, operands=tuple(map(swap, op.operands)), regions=regions)

    return tuple(visit(op) for op in body)


def rewrite(body: tuple[Op, ...], visit: Callable[[Op], tuple[Op, ...] | None]) -> tuple[Op, ...]:
    """Replaces operations bottom-up: `visit(op)` gives the operations to put in its place, or None to keep it."""
    out: list[Op] = []
    for op in body:
        if op.regions:
            op = replace(op, regions=tuple(replace(r, body=rewrite(r.body, visit)) for r in op.regions))
        new = visit(op)
        out.extend((op,) if new is None else new)
    return tuple(out)


def next_id(kernel: Kernel) -> int:
    """An id above all that are in use."""
    top = max([p.value.id for p in kernel.params] + [o.value.id for o in kernel.outputs], default=0)
    for op in walk(kernel.body):
        for value in (*op.results, *(p for r in op.regions for p in r.params)):
            top = max(top, value.id)
    return top + 1
