"""The pure operations: each one has a type rule, a meaning in torch, a cost and one emitter per target.

An operation is an `OpDef`; `register` adds one, also from outside this package. Emitters are format strings
(`"tl.exp({0})"`) for elementwise operations, filled with the operands' expressions; anything with a shape of its own is
emitted by the target's module under the operation's name.

Meanings that targets must share: arithmetic on bf16 and f16 is done in f32 and rounded after each operation; integers
wrap and divide toward zero, as in C (by zero: some value, without a trap); a cast to FP8 saturates; a cast from float
to integer truncates; `max` and `min` of NaN are NaN in none of the arguments' favour (do not rely on it); `round` is
to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilery.tile.dtypes import DType, b1, f32, i32
from tilery.tile.errors import TraceError
from tilery.tile.ir import Extent, Op, TileType
from tilery.tile.size import Size, as_size

Attrs = dict[str, Any]


@dataclass(frozen=True)
class OpDef:
    """`infer(types, attrs)`: result types, raising `TraceError`; a literal operand has type None.
    `reference(args, attrs)`: result tensors. `flops`: per element of the largest operand or result.
    `triton`, `cpp`: format strings for elementwise operations ("" where the target's module has its own emitter).
    `fill(attrs, dtype)`: what padding lanes must hold along `attrs["axis"]`; None: padding does no harm.
    """

    name: str
    infer: Callable[[Sequence[TileType | None], Attrs], tuple[TileType, ...]]
    reference: Callable[..., Any]
    flops: float = 1
    triton: str = ""
    cpp: str = ""
    elementwise: bool = False
    fill: Callable[[Attrs, DType], float | int] | None = None
    effect: bool = False


OPS: dict[str, OpDef] = {}


def register(op: OpDef) -> OpDef:
    """Adds an operation to the language. Raises `ValueError` if the name is taken."""
    if op.name in OPS:
        raise ValueError(f"the operation {op.name!r} exists already")
    OPS[op.name] = op
    return op


def flops_of(op: Op) -> float:
    """Floating-point operations per element."""
    return OPS[op.name].flops if op.name in OPS else 0


def _shape_of(types: Sequence[TileType | None]) -> tuple[Extent, ...]:
    """The common shape of elementwise operands: all equal, or scalars."""
    shape: tuple[Extent, ...] = ()
    for t in types:
        if t is not None and t.shape:
            if shape and t.shape != shape:
                raise TraceError(f"shapes differ: {list(shape)} and {list(t.shape)}")
            shape = t.shape
    return shape


def _operand_dtype(name: str, types: Sequence[TileType | None], allowed: str) -> DType:
    dtype = next(t.dtype for t in types if t is not None)
    kinds = {"float": "f", "int": "iub", "num": "fiu", "any": "fiub"}[allowed]
    if dtype.kind not in kinds or (dtype.is_fp8 and allowed != "any"):
        hint = "cast with .to(f32) first" if dtype.is_fp8 or allowed == "float" else f"it takes {allowed} operands"
        raise TraceError(f"{name} of {dtype}: {hint}")
    return dtype


def _elementwise(
    name: str, reference: Callable[..., Tensor], triton: str, cpp: str, allowed: str = "num", flops: float = 1,
    compare: bool = False,
) -> None:  # fmt: skip
    def infer(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
        dtype = _operand_dtype(name, types, allowed)
        return (TileType(b1 if compare else dtype, _shape_of(types)),)

    register(OpDef(name, infer, reference, flops, triton, cpp, elementwise=True))


def _trunc_div(a: Tensor, b: Any) -> Tensor:
    zero, minus = b == 0, (b == -1) & a.dtype.is_signed  # the least integer by -1 wraps; the processor would trap
    safe = torch.where(zero | minus, 1, b)
    return torch.where(zero, 0, torch.where(minus, -a, torch.div(a, safe, rounding_mode="trunc")))


def _trunc_mod(a: Tensor, b: Any) -> Tensor:
    safe = torch.where((b == 0) | ((b == -1) & a.dtype.is_signed), 1, b)
    return torch.fmod(a, safe)


_UNARY: tuple[tuple[Any, ...], ...] = (
    # name, torch, triton, C++, operands, flops
    ("neg", torch.neg, "-({0})", "-({0})", "num", 1),
    ("abs", torch.abs, "tl.abs({0})", "t_abs({0})", "num", 1),
    ("sign", torch.sign, "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))", "t_sign({0})", "float", 2),
    ("exp", torch.exp, "tl.exp({0})", "t_exp({0})", "float", 8),
    ("exp2", torch.exp2, "tl.exp2({0})", "t_exp2({0})", "float", 8),
    ("expm1", torch.expm1, "libdevice.expm1({0})", "std::expm1({0})", "float", 12),
    ("log", torch.log, "tl.log({0})", "t_log({0})", "float", 8),
    ("log2", torch.log2, "tl.log2({0})", "t_log2({0})", "float", 8),
    ("log10", torch.log10, "libdevice.log10({0})", "std::log10({0})", "float", 10),
    ("log1p", torch.log1p, "libdevice.log1p({0})", "std::log1p({0})", "float", 12),
    ("sqrt", torch.sqrt, "tl.sqrt_rn({0})", "std::sqrt({0})", "float", 4),
    ("rsqrt", torch.rsqrt, "tl.rsqrt({0})", "(1.0f / std::sqrt({0}))", "float", 4),
    ("reciprocal", torch.reciprocal, "1.0 / ({0})", "(1.0f / ({0}))", "float", 4),
    ("sin", torch.sin, "tl.sin({0})", "std::sin({0})", "float", 12),
    ("cos", torch.cos, "tl.cos({0})", "std::cos({0})", "float", 12),
    ("tan", torch.tan, "libdevice.tan({0})", "std::tan({0})", "float", 16),
    ("asin", torch.asin, "libdevice.asin({0})", "std::asin({0})", "float", 16),
    ("acos", torch.acos, "libdevice.acos({0})", "std::acos({0})", "float", 16),
    ("atan", torch.atan, "libdevice.atan({0})", "std::atan({0})", "float", 16),
    ("sinh", torch.sinh, "libdevice.sinh({0})", "std::sinh({0})", "float", 16),
    ("cosh", torch.cosh, "libdevice.cosh({0})", "std::cosh({0})", "float", 16),
    ("tanh", torch.tanh, "libdevice.tanh({0})", "t_tanh({0})", "float", 12),
    ("asinh", torch.asinh, "libdevice.asinh({0})", "std::asinh({0})", "float", 16),
    ("acosh", torch.acosh, "libdevice.acosh({0})", "std::acosh({0})", "float", 16),
    ("atanh", torch.atanh, "libdevice.atanh({0})", "std::atanh({0})", "float", 16),
    ("erf", torch.erf, "tl.erf({0})", "std::erf({0})", "float", 16),
    ("cbrt", lambda x: torch.sign(x) * torch.pow(torch.abs(x), 1 / 3), "libdevice.cbrt({0})", "std::cbrt({0})",
     "float", 16),
    ("sigmoid", torch.sigmoid, "tl.sigmoid({0})", "t_sigmoid({0})", "float", 10),
    ("floor", torch.floor, "tl.floor({0})", "std::floor({0})", "float", 1),
    ("ceil", torch.ceil, "tl.ceil({0})", "std::ceil({0})", "float", 1),
    ("trunc", torch.trunc, "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))", "std::trunc({0})", "float", 1),
    ("round", torch.round, "tl.where(tl.abs({0}) < 4194304.0, ({0} + 12582912.0) - 12582912.0, {0})",
     "std::nearbyint({0})", "float", 1),
    ("bit_not", torch.bitwise_not, "~({0})", "~({0})", "int", 1),
)  # fmt: skip

_BINARY: tuple[tuple[Any, ...], ...] = (
    ("add", torch.add, "({0} + {1})", "({0} + {1})", "num", 1),
    ("sub", torch.sub, "({0} - {1})", "({0} - {1})", "num", 1),
    ("mul", torch.mul, "({0} * {1})", "({0} * {1})", "num", 1),
    ("mul_rn", torch.mul, "libdevice.mul_rn({0}, {1})", "({0} * {1})", "float", 1),
    ("div", torch.div, "({0} / {1})", "({0} / {1})", "float", 4),
    ("floordiv", _trunc_div, "({0} // {1})", "t_div({0}, {1})", "int", 4),
    ("mod", _trunc_mod, "({0} % {1})", "t_mod({0}, {1})", "int", 4),
    ("maximum", torch.maximum, "tl.maximum({0}, {1})", "t_max({0}, {1})", "num", 1),
    ("minimum", torch.minimum, "tl.minimum({0}, {1})", "t_min({0}, {1})", "num", 1),
    ("pow", torch.pow, "libdevice.pow({0}, {1})", "std::pow({0}, {1})", "float", 16),
    ("fmod", torch.fmod, "libdevice.fmod({0}, {1})", "std::fmod({0}, {1})", "float", 8),
    ("atan2", torch.atan2, "libdevice.atan2({0}, {1})", "std::atan2({0}, {1})", "float", 16),
    ("hypot", torch.hypot, "libdevice.hypot({0}, {1})", "std::hypot({0}, {1})", "float", 8),
    ("copysign", torch.copysign, "libdevice.copysign({0}, {1})", "std::copysign({0}, {1})", "float", 1),
    ("bit_and", torch.bitwise_and, "({0} & {1})", "({0} & {1})", "int", 1),
    ("bit_or", torch.bitwise_or, "({0} | {1})", "({0} | {1})", "int", 1),
    ("bit_xor", torch.bitwise_xor, "({0} ^ {1})", "({0} ^ {1})", "int", 1),
    ("shl", torch.bitwise_left_shift, "({0} << {1})", "t_shl({0}, {1})", "int", 1),
    ("shr", torch.bitwise_right_shift, "({0} >> {1})", "({0} >> {1})", "int", 1),
)

_COMPARE: tuple[tuple[Any, ...], ...] = (
    ("eq", torch.eq, "({0} == {1})", "({0} == {1})"),
    ("ne", torch.ne, "({0} != {1})", "({0} != {1})"),
    ("lt", torch.lt, "({0} < {1})", "({0} < {1})"),
    ("le", torch.le, "({0} <= {1})", "({0} <= {1})"),
    ("gt", torch.gt, "({0} > {1})", "({0} > {1})"),
    ("ge", torch.ge, "({0} >= {1})", "({0} >= {1})"),
)

for _row in (*_UNARY, *_BINARY):
    _elementwise(*_row)
for _name, _torch, _triton, _cpp in _COMPARE:
    _elementwise(_name, _torch, _triton, _cpp, "any", 1, compare=True)
_elementwise("isnan", torch.isnan, "({0} != {0})", "t_isnan({0})", "float", 1, compare=True)
_elementwise("isfinite", torch.isfinite, "(tl.abs({0}) < float('inf'))", "t_isfinite({0})", "float", 1, compare=True)


# --- select, cast -----------------------------------------------------------------------------------------------


def _infer_where(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    dtype = attrs.get("dtype") or next(t.dtype for t in types[1:] if t is not None)
    return (TileType(dtype, _shape_of(types)),)


register(
    OpDef("where", _infer_where, lambda c, a, b: torch.where(c, a, b), 1,
          "tl.where({0}, {1}, {2})", "({0} ? {1} : {2})", elementwise=True)
)  # fmt: skip


def _infer_cast(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    assert types[0] is not None
    return (TileType(attrs["dtype"], types[0].shape),)


def cast(x: Tensor, dtype: DType) -> Tensor:
    """`x.to(dtype)` with FP8 saturating."""
    if dtype.is_fp8:
        limit = 448.0 if dtype.name == "e4m3" else 57344.0
        return x.float().clamp(-limit, limit).to(dtype.torch)
    if x.is_floating_point() and dtype.is_int and x.dtype.itemsize == 1:
        x = x.float()
    return x.to(dtype.torch)


register(OpDef("cast", _infer_cast, lambda x, dtype: cast(x, dtype), 1, elementwise=True))


def _infer_bitcast(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    if t.dtype.bits != attrs["dtype"].bits:
        raise TraceError(
            f"bitcast needs equal widths, got {t.dtype} and {attrs['dtype']}; to read memory as another dtype use "
            "tensor.view(dtype, shape, ...)"
        )
    return (TileType(attrs["dtype"], t.shape),)


register(OpDef("bitcast", _infer_bitcast, lambda x, dtype: x.contiguous().view(dtype.torch), 0, elementwise=True))


# --- creation, shape --------------------------------------------------------------------------------------------

register(OpDef("arange", lambda types, attrs: (TileType(i32, (attrs["extent"],)),), None, 1))  # type: ignore[arg-type]
register(OpDef("full", lambda types, attrs: (TileType(attrs["dtype"], attrs["shape"]),), None, 0))  # type: ignore[arg-type]
register(OpDef("size", lambda types, attrs: (TileType(i32),), None, 0))  # type: ignore[arg-type]
register(OpDef("count", lambda types, attrs: (TileType(i32),), None, 0))  # type: ignore[arg-type]
register(OpDef("tap", lambda types, attrs: (), None, 0, effect=True))  # type: ignore[arg-type]


def numel(shape: Sequence[Extent]) -> list[str | Size]:
    """A shape's element count: its block labels in order, and the products of the sizes before, between and after.

    A block stays where it is in the row-major order, or the result would depend on its size.
    """
    counts: list[str | Size] = [as_size(1)]
    for extent in shape:
        if isinstance(extent, Size):
            counts[-1] = as_size(counts[-1]) * extent  # type: ignore[arg-type]
        else:
            counts += [extent.label, as_size(1)]
    return counts


def _infer_reshape(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    if numel(t.shape) != numel(attrs["shape"]):
        hint = "" if len(numel(t.shape)) == 1 else "; they must be equal before, between and after blocks"
        raise TraceError(f"cannot reshape {list(t.shape)} to {list(attrs['shape'])}: the element counts differ{hint}")
    return (TileType(t.dtype, attrs["shape"]),)


def _infer_broadcast(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t, shape = types[0], attrs["shape"]
    assert t is not None
    one = as_size(1)
    if len(t.shape) != len(shape) or any(a != b and a != one for a, b in zip(t.shape, shape)):
        raise TraceError(f"cannot broadcast {list(t.shape)} to {list(shape)}")
    return (TileType(t.dtype, shape),)


def _infer_transpose(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t, perm = types[0], attrs["perm"]
    assert t is not None
    if sorted(perm) != list(range(len(t.shape))):
        raise TraceError(f"transpose needs a permutation of {len(t.shape)} axes, got {list(perm)}")
    return (TileType(t.dtype, tuple(t.shape[p] for p in perm)),)


register(OpDef("reshape", _infer_reshape, None, 0))  # type: ignore[arg-type]
register(OpDef("broadcast", _infer_broadcast, None, 0))  # type: ignore[arg-type]
register(OpDef("transpose", _infer_transpose, lambda x, perm: x.permute(perm), 0))


def _infer_join(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    a, b = types
    assert a is not None
    assert b is not None
    if a != b:
        raise TraceError(f"join needs two tiles of one type, got {a} and {b}")
    return (TileType(a.dtype, (*a.shape, as_size(2))),)


def _infer_split(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    if not t.shape or t.shape[-1] != as_size(2):
        raise TraceError(f"split needs a last axis of 2, got {t}; reshape to [..., 2] first")
    half = TileType(t.dtype, t.shape[:-1])
    return (half, half)


register(OpDef("join", _infer_join, lambda a, b: torch.stack((a, b), -1), 0))
register(OpDef("split", _infer_split, lambda x: (x[..., 0], x[..., 1]), 0))


# --- reductions, scans, search ----------------------------------------------------------------------------------

REDUCTIONS = ("sum", "max", "min", "prod", "argmax", "argmin", "any", "all")


def _axis(t: TileType, attrs: Attrs, what: str) -> int:
    axis = attrs["axis"]
    if not 0 <= axis < len(t.shape):
        raise TraceError(f"{what} over axis {axis} of {t}: it has {len(t.shape)} axes")
    return axis


def _infer_reduce(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    axis, kind = _axis(t, attrs, attrs["kind"]), attrs["kind"]
    if kind in ("any", "all") and t.dtype != b1:
        raise TraceError(f"{kind} needs a bool tile, got {t}")
    if kind not in ("any", "all") and (t.dtype == b1 or t.dtype.is_fp8):
        raise TraceError(f"{kind} of {t.dtype}: cast first, with .to(i32) or .to(f32)")
    dtype = i32 if kind.startswith("arg") else t.dtype
    return (TileType(dtype, t.shape[:axis] + t.shape[axis + 1 :]),)


def _reduce(x: Tensor, kind: str, axis: int) -> Tensor:
    if x.shape[axis] == 0 and kind in ("max", "min", "argmax", "argmin"):
        shape = [n for i, n in enumerate(x.shape) if i != axis]
        if kind.startswith("arg"):
            return torch.zeros(shape, dtype=torch.int32)
        info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        worst = (float("-inf"), float("inf")) if x.is_floating_point() else (info.min, info.max)
        return torch.full(shape, worst[kind == "min"], dtype=x.dtype)
    if kind == "sum":
        return x.sum(axis, dtype=x.dtype)
    if kind == "prod":
        return x.prod(axis, dtype=x.dtype)
    if kind in ("argmax", "argmin"):  # the lowest index wins, which torch does not promise
        best = x.amax(axis, keepdim=True) if kind == "argmax" else x.amin(axis, keepdim=True)
        return (x == best).int().argmax(axis).int()
    functions: dict[str, Callable[..., Tensor]] = {
        "max": torch.amax, "min": torch.amin, "any": torch.any, "all": torch.all,
    }  # fmt: skip
    return functions[kind](x, dim=axis)


def _reduce_fill(attrs: Attrs, dtype: DType) -> float | int:
    kind = attrs["kind"]
    if kind in ("max", "argmax"):
        return dtype.lowest
    if kind in ("min", "argmin"):
        return dtype.highest
    return {"sum": 0, "prod": 1, "any": 0, "all": 1}[kind]


register(OpDef("reduce", _infer_reduce, _reduce, 1, fill=_reduce_fill))


def _infer_scan(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    _axis(t, attrs, "a scan")
    if t.dtype == b1 or t.dtype.is_fp8:
        raise TraceError(f"a scan of {t.dtype}: cast first, with .to(i32) or .to(f32)")
    return (t,)


def _scan(x: Tensor, kind: str, axis: int, reverse: bool) -> Tensor:
    x = x.flip(axis) if reverse else x
    if kind == "max":
        out = x.cummax(axis).values if x.shape[axis] else x
    else:
        out = (torch.cumsum if kind == "sum" else torch.cumprod)(x, axis, dtype=x.dtype)
    return out.flip(axis) if reverse else out


def _scan_fill(attrs: Attrs, dtype: DType) -> float | int:
    return {"sum": 0, "prod": 1, "max": dtype.lowest}[attrs["kind"]]


register(OpDef("scan", _infer_scan, _scan, 1, fill=_scan_fill))


def _infer_sort(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    if attrs["axis"] != len(t.shape) - 1:
        raise TraceError("sort works along the last axis; transpose first")
    return (t,)


register(
    OpDef("sort", _infer_sort, lambda x, axis, descending: torch.sort(x, axis, descending).values, 8,
          fill=lambda attrs, dtype: dtype.lowest if attrs["descending"] else dtype.highest)
)  # fmt: skip


def _infer_take(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t, index = types
    assert t is not None
    assert index is not None
    axis = _axis(t, attrs, "take")
    if len(index.shape) != len(t.shape) or any(
        a != b for i, (a, b) in enumerate(zip(t.shape, index.shape)) if i != axis
    ):
        raise TraceError(f"take along axis {axis}: {index} does not match {t} on the other axes")
    return (TileType(t.dtype, index.shape),)


register(OpDef("take", _infer_take, lambda x, index, axis: torch.gather(x, axis, index.long()), 1))


def _infer_histogram(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    t = types[0]
    assert t is not None
    if len(t.shape) != 1 or not t.dtype.is_int:
        raise TraceError(f"histogram needs a 1-D tile of integers, got {t}")
    return (TileType(i32, (as_size(attrs["bins"]),)),)


def _histogram(x: Tensor, where: Tensor, bins: int) -> Tensor:
    inside = where & (x >= 0) & (x < bins)
    return torch.bincount(x[inside].long(), minlength=bins).int()


register(OpDef("histogram", _infer_histogram, _histogram, 1))


# --- matrix product ---------------------------------------------------------------------------------------------


def _infer_dot(types: Sequence[TileType | None], attrs: Attrs) -> tuple[TileType, ...]:
    a, b = types[:2]
    assert a is not None
    assert b is not None
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise TraceError(f"dot needs 2-D tiles [M, K] and [K, N], got {a} and {b}")
    if a.shape[1] != b.shape[0]:
        raise TraceError(f"dot: the inner extents differ: {a} and {b}; transpose one with .T?")
    if a.dtype != b.dtype or a.dtype.name not in ("f32", "f16", "bf16", "e4m3", "e5m2", "i8"):
        raise TraceError(f"dot takes two tiles of one of f32, f16, bf16, e4m3, e5m2, i8; got {a.dtype} and {b.dtype}")
    out = TileType(i32 if a.dtype.name == "i8" else f32, (a.shape[0], b.shape[1]))
    if len(types) == 3 and types[2] != out:
        raise TraceError(f"dot: the accumulator must be {out}, got {types[2]}")
    return (out,)


def _dot(a: Tensor, b: Tensor, acc: Tensor | None = None, precision: str = "ieee") -> Tensor:
    if a.dtype == torch.int8:
        out = (a.double() @ b.double()).to(torch.int32)  # exact: below 2^53
    else:
        out = a.float() @ b.float()
    return out if acc is None else acc + out


register(OpDef("dot", _infer_dot, _dot, 2))
