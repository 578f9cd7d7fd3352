"""Triton source of the operations on values that are not plain elementwise templates.

Each function gets the operation, the source of its operands and the set of helpers the file needs, and gives an
expression.
"""

from __future__ import annotations

from collections.abc import Callable

from tilery.tile.dtypes import DType, bf16, f16, i32
from tilery.tile.errors import LoweringError
from tilery.tile.ir import Extent, Op, TileType, Value
from tilery.tile.size import Size
from tilery.tile.targets.triton.text import atom, convert, literal

HELPERS = {
    "_product": "@triton.jit\ndef _product(a, b):\n    return a * b\n",
    "_larger": "@triton.jit\ndef _larger(a, b):\n    return tl.maximum(a, b)\n",
}
"""Functions that emitted kernels call, by name."""

Make = Callable[[Op, list[str], set[str]], str]


def extent(value: Extent) -> int:
    """A padded extent as a number."""
    assert isinstance(value, Size)
    assert value.const is not None, f"the extent {value} is not padded"
    return value.const


def shape_of(kind: TileType) -> list[int]:
    return [extent(e) for e in kind.shape]


def tile_of(op: Op, at: int) -> TileType:
    operand = op.operands[at]
    assert isinstance(operand, Value), f"{op.name}: operand {at} is a literal"
    return operand.tile


def _back(text: str, computed: DType, wanted: DType, scalar: bool) -> str:
    return text if computed == wanted else convert(text, computed, wanted, scalar)


def _reduce(op: Op, args: list[str], helpers: set[str]) -> str:
    kind, axis, source = op.attr("kind"), op.attr("axis"), tile_of(op, 0)
    x, scalar = args[0], not op.result.tile.shape
    if kind in ("any", "all"):
        return f"(tl.{'max' if kind == 'any' else 'min'}({atom(x)}.to(tl.int32), axis={axis}) != 0)"
    if kind in ("argmax", "argmin"):
        return f"tl.{kind}({x}, axis={axis}, tie_break_left=True)"
    if kind == "prod":
        helpers.add("_product")
        return f"tl.reduce({x}, {axis}, _product)"
    text = f"tl.{kind}({x}, axis={axis})"
    if source.dtype.bits >= 32 or (kind == "sum" and source.dtype.is_float):
        return text
    return f"tl.cast({text}, {source.dtype.triton})" if scalar else f"{text}.to({source.dtype.triton})"


def _scan(op: Op, args: list[str], helpers: set[str]) -> str:
    kind, axis, reverse, dtype = op.attr("kind"), op.attr("axis"), op.attr("reverse"), op.result.tile.dtype
    tail = ", reverse=True" if reverse else ""
    if kind == "max":
        helpers.add("_larger")
        return f"tl.associative_scan({args[0]}, {axis}, _larger{tail})"
    text = f"tl.{'cumsum' if kind == 'sum' else 'cumprod'}({args[0]}, axis={axis}{tail})"
    return text if dtype.bits >= 32 or dtype.is_float else f"{text}.to({dtype.triton})"


def _sort(op: Op, args: list[str], helpers: set[str]) -> str:
    return f"tl.sort({args[0]}, descending=True)" if op.attr("descending") else f"tl.sort({args[0]})"


def _take(op: Op, args: list[str], helpers: set[str]) -> str:
    axis = op.attr("axis")
    length, index = extent(tile_of(op, 0).shape[axis]), args[1]
    if tile_of(op, 1).dtype.bits < 32:
        index = f"{atom(index)}.to(tl.int32)"
    # The mask keeps indices of padding lanes inside the tile; it changes no valid one.
    return f"tl.gather({args[0]}, {atom(index)} & {length - 1}, axis={axis})"


def _histogram(op: Op, args: list[str], helpers: set[str]) -> str:
    x, where, bins = atom(args[0]), args[1], op.attr("bins")
    if tile_of(op, 0).dtype != i32:
        x = f"{x}.to(tl.int32)"
    return f"tl.histogram({x}, {bins}, mask={atom(where)} & ({x} >= 0) & ({x} < {bins}))"


def _dot(op: Op, args: list[str], helpers: set[str]) -> str:
    a, b = tile_of(op, 0), tile_of(op, 1)
    m, k, n = extent(a.shape[0]), extent(a.shape[1]), extent(b.shape[1])
    least = 32 if a.dtype.bits == 8 else 16
    if k < least:
        raise LoweringError(
            f"dot of [{m}, {k}] and [{k}, {n}] {a.dtype}: Triton needs an inner extent of at least {least}; take a "
            "larger block in the schedule, or write tile.sum(a[:, :, None] * b[None, :, :], axis=1)",
            op.loc,
        )
    precision = op.attr("precision", "ieee")
    if a.dtype.is_fp8 and precision != "fp8":
        # Hopper adds FP8 products in about 14 bits. f16 holds every FP8 number, and its products are summed in f32.
        args = [*(convert(x, a.dtype, f16, False) for x in args[:2]), *args[2:]]
    text = ", ".join(args)
    if a.dtype.name == "f32":
        text += f', input_precision="{"tf32" if precision == "tf32" else "ieee"}"'
    elif a.dtype.name == "i8":
        text += ", out_dtype=tl.int32"
    elif a.dtype.is_fp8 and precision == "fp8" and (len(args) == 3 or k > 128):
        text += f", max_num_imprecise_acc={min(k, 128)}"  # what is summed over more goes to f32
    return f"tl.dot({text})"


def _reshape(op: Op, args: list[str], helpers: set[str]) -> str:
    source, target = tile_of(op, 0), op.result.tile
    old, new = shape_of(source), shape_of(target)
    if not old:
        return f"tl.full({new}, {args[0]}, {target.dtype.triton})"
    if not new:
        # A tile of one element: a reduction gives the scalar.
        if source.dtype.name == "b1":
            return f"(tl.max({atom(args[0])}.to(tl.int32)) != 0)"
        if source.dtype.is_fp8:
            return f"tl.cast(tl.max({atom(args[0])}.to(tl.float32)), {source.dtype.triton})"
        return f"tl.cast(tl.max({args[0]}), {source.dtype.triton})"
    items = _new_axes(old, new)
    return f"tl.reshape({args[0]}, {new})" if items is None else f"{atom(args[0])}[{', '.join(items)}]"


def _new_axes(old: list[int], new: list[int]) -> list[str] | None:
    """The subscript that only adds axes of one element, where that is all a reshape does."""
    items, rest = [], list(old)
    for size in new:
        if rest and size == rest[0]:
            items.append(":")
            rest.pop(0)
        elif size == 1:
            items.append("None")
        else:
            return None
    return None if rest else items


def _transpose(op: Op, args: list[str], helpers: set[str]) -> str:
    perm = tuple(op.attr("perm"))
    if perm == (0,):
        return args[0]
    return f"tl.trans({args[0]})" if perm == (1, 0) else f"tl.permute({args[0]}, {perm})"


def filled(kind: TileType, number: float | int | bool) -> str:
    """A tile of one number; bf16 and FP8 through f32, as Triton's interpreter has no constants of theirs."""
    number = float(number) if kind.dtype.is_float else number
    if kind.dtype.is_fp8 or (kind.dtype.name == "bf16" and number != 0):
        return f"tl.cast(tl.full({shape_of(kind)}, {literal(number)}, tl.float32), {kind.dtype.triton})"
    return f"tl.full({shape_of(kind)}, {literal(number)}, {kind.dtype.triton})"


def _full(op: Op, args: list[str], helpers: set[str]) -> str:
    kind, operand = op.result.tile, op.operands[0]
    value = args[0]
    if isinstance(operand, Value) and operand.tile.dtype != kind.dtype:
        value = convert(value, operand.tile.dtype, kind.dtype, True)
    elif not isinstance(operand, Value):
        number = float(operand) if kind.dtype.is_float else bool(operand) if kind.dtype.kind == "b" else int(operand)
        return filled(kind, number)
    if not kind.shape and isinstance(operand, Value):
        return value
    return f"tl.full({shape_of(kind)}, {value}, {kind.dtype.triton})"


def _cast(op: Op, args: list[str], helpers: set[str]) -> str:
    source = tile_of(op, 0)
    return convert(args[0], source.dtype, op.result.tile.dtype, not source.shape)


def _bitcast(op: Op, args: list[str], helpers: set[str]) -> str:
    dtype = op.result.tile.dtype.triton
    if not tile_of(op, 0).shape:
        return f"tl.cast({args[0]}, {dtype}, bitcast=True)"
    return f"{atom(args[0])}.to({dtype}, bitcast=True)"


def _where(op: Op, args: list[str], helpers: set[str]) -> str:
    kind = op.result.tile
    if kind.dtype.name == "bf16":
        args = [a if isinstance(o, Value) else filled(TileType(bf16), o) for a, o in zip(args, op.operands)]
    text = f"tl.where({', '.join(args)})"
    if not isinstance(op.operands[1], Value) and not isinstance(op.operands[2], Value):
        text = f"tl.cast({text}, {kind.dtype.triton})"
    return text


VALUES: dict[str, Make] = {
    "reduce": _reduce, "scan": _scan, "sort": _sort, "take": _take, "histogram": _histogram, "dot": _dot,
    "reshape": _reshape, "transpose": _transpose, "full": _full, "cast": _cast, "bitcast": _bitcast, "where": _where,
    "join": lambda op, args, helpers: f"tl.join({args[0]}, {args[1]})",
    "split": lambda op, args, helpers: f"tl.split({args[0]})",
}  # fmt: skip
"""Emitters by operation."""
