"""The functions on tiles: reductions, scans, products, rearrangements, and memory made by a kernel.

Names are NumPy's and torch's; reductions over 16-bit floats are done and returned in f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilery.tile import ops as _ops
from tilery.tile.builder import check_dtype, current, fail
from tilery.tile.dtypes import DType, b1, f32, i32
from tilery.tile.ir import Output, Size, TensorType, TileType, Value
from tilery.tile.lang import Number, TensorRef, Tile, _binary, _extent, _mask, _unary, full
from tilery.tile.size import as_size


def _reduction(kind: str, x: Any, axis: int | None, keepdims: bool) -> Tile:
    builder = current()
    if not isinstance(x, Tile):
        raise fail(f"{kind} needs a tile, got {type(x).__name__}")
    value = x.value
    if value.tile.dtype.is_float and value.tile.dtype.bits < 32:
        value = builder.cast(value, f32)
    if kind in ("sum", "prod") and not value.tile.dtype.is_float and value.tile.dtype.bits < 32:
        value = builder.cast(value, i32)  # sums of bytes and bools would wrap or make no sense
    rank = len(value.tile.shape)
    if axis is None:
        if kind.startswith("arg") and rank > 1:
            raise fail(f"{kind} of a {rank}-D tile needs an axis")
        axes = list(range(rank))[::-1]
    else:
        if not -rank <= axis < rank:
            raise fail(f"{kind} over axis {axis} of {x}: it has {rank} axes")
        axes = [axis % rank]
    shape = list(value.tile.shape)
    for at in axes:
        value = builder.pure("reduce", value, kind=kind, axis=at)[0]
        shape[at] = as_size(1)
    return Tile(value).reshape(*shape) if keepdims else Tile(value)


def sum(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    """Sum over one axis (None: all): 16-bit floats in f32, bools and integers below 32 bits in i32; wider ones wrap."""
    return _reduction("sum", x, axis, keepdims)


def max(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    """Largest element; -inf (or the smallest integer) of none."""
    return _reduction("max", x, axis, keepdims)


def min(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    return _reduction("min", x, axis, keepdims)


amax, amin = max, min


def prod(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    return _reduction("prod", x, axis, keepdims)


def argmax(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    """i32 position of the largest element; the lowest position wins a tie."""
    return _reduction("argmax", x, axis, keepdims)


def argmin(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    return _reduction("argmin", x, axis, keepdims)


def any(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    return _reduction("any", x, axis, keepdims)


def all(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    return _reduction("all", x, axis, keepdims)


def count_of(extent: Any) -> Any:
    """How many elements an extent has: a size, or this iteration's count for a block."""
    extent = _extent(extent)
    if isinstance(extent, Size):
        return extent
    return Tile(current().op("count", (), (TileType(i32),), label=extent.label)[0])


def mean(x: Tile, axis: int | None = None, keepdims: bool = False) -> Tile:
    """Arithmetic mean in f32 over one axis (None: all)."""
    total = sum(x, axis, keepdims)
    extents = list(x.shape) if axis is None else [x.shape[axis]]
    for extent in extents:
        count = count_of(extent)
        if isinstance(count, Size) and count.const is not None:
            total = total * (1.0 / count.const)
        else:
            total = total / Tile(current().cast(_as_value(count), f32))
    return total


def _as_value(x: Any) -> Value:
    operand = current().operand(x)
    return operand if isinstance(operand, Value) else full([], operand, i32).value


def _scan(kind: str, x: Tile, axis: int, reverse: bool) -> Tile:
    builder = current()
    value = x.value
    if x.dtype.is_float and x.dtype.bits < 32:
        value = builder.cast(value, f32)
    elif x.dtype.bits < 32 and (kind != "max" or x.dtype == b1):
        value = builder.cast(value, i32)
    return Tile(builder.pure("scan", value, kind=kind, axis=axis % len(x.shape), reverse=reverse)[0])


def cumsum(x: Tile, axis: int = -1, reverse: bool = False) -> Tile:
    """Inclusive running sum; 16-bit floats in f32, bools and integers below 32 bits in i32; wider ones wrap."""
    return _scan("sum", x, axis, reverse)


def cumprod(x: Tile, axis: int = -1, reverse: bool = False) -> Tile:
    return _scan("prod", x, axis, reverse)


def cummax(x: Tile, axis: int = -1, reverse: bool = False) -> Tile:
    return _scan("max", x, axis, reverse)


def sort(x: Tile, descending: bool = False) -> Tile:
    """Sorted values along the last axis (meant for up to a few thousand; use a selection for more)."""
    return Tile(current().pure("sort", x.value, axis=x.ndim - 1, descending=descending)[0])


def take(x: Tile, index: Tile, axis: int = -1) -> Tile:
    """Elements of a tile along one axis: out[..., i, ...] = x[..., index[..., i, ...], ...]."""
    return Tile(current().pure("take", x.value, index.value, axis=axis % x.ndim)[0])


def histogram(x: Tile, bins: int, where: Any = None) -> Tile:
    """i32 [bins]: how often each of 0 .. bins-1 occurs in a 1-D integer tile, where the mask holds."""
    builder = current()
    mask = _mask(builder, where, x.shape)
    if mask is None:
        mask = full(list(x.shape), True, b1).value
    return Tile(builder.pure("histogram", x.value, mask, bins=bins)[0])


def join(a: Tile, b: Tile) -> Tile:
    """Two tiles [...] -> [..., 2]; `join(a, b).reshape(..., 2n)` interleaves them."""
    return Tile(current().pure("join", a.value, b.value)[0])


def split(x: Tile) -> tuple[Tile, Tile]:
    """[..., 2] -> its two halves; `split(x.reshape(..., n // 2, 2))` de-interleaves."""
    a, b = current().pure("split", x.value)
    return Tile(a), Tile(b)


def dot(a: Tile, b: Tile, acc: Tile | None = None, precision: str = "ieee") -> Tile:
    """[M, K] x [K, N] -> f32 [M, N] (i32 for i8 operands), added to `acc`. Products and sums are those of f32.

    `precision`: "tf32" lets f32 operands be cut to 11 bits; "fp8" lets a GPU sum up to 128 products of FP8 operands in
    its FP8 units, at twice the rate (on Hopper in about 14 bits: an error of 2^-13 of the largest product each).
    """
    if precision not in ("ieee", "tf32", "fp8"):
        raise fail(f"dot: precision must be 'ieee', 'tf32' or 'fp8', got {precision!r}")
    operands = (a.value, b.value) if acc is None else (a.value, b.value, acc.value)
    return Tile(current().pure("dot", *operands, precision=precision)[0])


def tap(name: str, x: Tile) -> Tile:
    """Names an intermediate so that verify, sanitize and the interpreter can show it; costs nothing elsewhere."""
    current().op("tap", (x.value,), (), tap=name)
    return x


def empty(shape: Sequence[Any], dtype: DType, init: Number | None = None, name: str = "") -> TensorRef:
    """Memory the launch allocates: an output if the kernel returns it, workspace if not.

    Every element must be written, unless `init` fills it first.
    """
    builder = current()
    if builder.in_parallel:
        raise fail(
            "tile.empty makes memory and belongs before the loops; for a value on chip use tile.full or tile.zeros"
        )
    value = builder.value(TensorType(check_dtype(dtype), tuple(as_size(s) for s in shape)), name)
    builder.outputs.append(Output(value, init))
    builder.inout.add(value.id)
    return TensorRef(value)


def _export_unary() -> dict[str, Any]:
    def make(name: str) -> Any:
        def function(x: Any) -> Tile:
            return _unary(name, x)

        function.__name__ = function.__qualname__ = name
        function.__doc__ = f"Elementwise `{name}` (torch's meaning)."
        return function

    names = [row[0] for row in _ops._UNARY] + ["isnan", "isfinite"]
    return {name: make(name) for name in names}


def _export_binary() -> dict[str, Any]:
    def make(name: str) -> Any:
        def function(a: Any, b: Any) -> Tile:
            return _binary(name, a, b)

        function.__name__ = function.__qualname__ = name
        function.__doc__ = f"Elementwise `{name}` (torch's meaning)."
        return function

    return {name: make(name) for name in ("pow", "fmod", "atan2", "hypot", "copysign", "floordiv", "mod")}


ELEMENTWISE = {**_export_unary(), **_export_binary()}
"""Elementwise functions by name; the package exports them."""
