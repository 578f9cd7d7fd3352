"""Loops and branches: what `transform.py` calls while a kernel is traced, and the loop objects users write.

`parallel` is the grid; `range` is sequential and carries the names its body rebinds; a plain Python `range` unrolls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilery.tile.builder import Builder, current, fail
from tilery.tile.dtypes import b1, f32, i32, promote
from tilery.tile.errors import TraceError
from tilery.tile.ir import Block, Operand, Region, TileType, Value
from tilery.tile.lang import BlockIndex, TensorRef, Tile, full

State = tuple[Any, ...]


class Unavailable:
    """Stands for a name that has no value here; any use raises with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.__dict__["_text"] = f"{name!r} {reason}"

    def _raise(self, *args: Any, **kwargs: Any) -> Any:
        raise fail(self.__dict__["_text"])

    def __getattr__(self, name: str) -> Any:
        return self._raise()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _raise
    __getitem__ = __setitem__ = __call__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __iter__ = _raise


@dataclass(frozen=True)
class Blocks:
    """A range cut into blocks whose size the schedule gives: `tile.blocks(T, "row")`, `tile.blocks(lo, hi, "kv")`."""

    start: Any
    stop: Any
    label: str | None

    def __iter__(self) -> Any:
        raise fail(_NO_JUMP)


_NO_JUMP = (
    "a tile loop must be a `for` statement without break, continue and return: bound it by a computed stop, or guard "
    "its body with `if`"
)


def blocks(*bounds: Any, label: str | None = None) -> Blocks:
    """`blocks(stop, label)` or `blocks(start, stop, label)`: iterate by blocks; the last one may be ragged."""
    items = list(bounds)
    if items and isinstance(items[-1], str):
        label = items.pop()
    if len(items) not in (1, 2):
        raise TraceError("tile.blocks takes (stop, label) or (start, stop, label)")
    return Blocks(items[0] if len(items) == 2 else 0, items[-1], label)


@dataclass(frozen=True)
class ParallelLoop:
    axes: tuple[Any, ...]
    label: str | None

    def __iter__(self) -> Any:
        raise fail(_NO_JUMP)


def parallel(*axes: Any, label: str | None = None) -> ParallelLoop:
    """The grid: an iteration per index of each axis (a size gives scalars, `tile.blocks` blocks), in any order."""
    if not axes:
        raise TraceError("tile.parallel needs at least one axis")
    return ParallelLoop(axes, label)


@dataclass(frozen=True)
class RangeLoop:
    start: Any
    stop: Any
    step: Any
    label: str | None
    blocks: Blocks | None = None

    def __iter__(self) -> Any:
        raise fail(_NO_JUMP)


def range(*bounds: Any, label: str | None = None) -> RangeLoop:
    """A sequential loop whose bounds may be computed: `range(n)`, `range(lo, hi, step)`, `range(tile.blocks(n, "kv"))`.

    Names that the body rebinds are carried from one iteration to the next and must keep their dtype and shape.
    """
    if len(bounds) == 1 and isinstance(bounds[0], Blocks):
        return RangeLoop(0, 0, 1, label, bounds[0])
    if not 1 <= len(bounds) <= 3:
        raise TraceError("tile.range takes (stop), (start, stop) or (start, stop, step)")
    start, stop, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return RangeLoop(start, stop, step, label)


def function(body: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a helper that kernels call and that has tile loops or computed branches of its own; it is inlined.

    A helper without them needs no decorator. Nested functions and methods do not work, as for kernels.
    """
    staged: list[Callable[..., Any]] = []

    @functools.wraps(body)
    def call(*args: Any, **kwargs: Any) -> Any:
        current()
        if not staged:
            from tilery.tile import control
            from tilery.tile.transform import stage

            staged.append(stage(body, control))
        return staged[0](*args, **kwargs)

    return call


# --- what the rewritten source calls ----------------------------------------------------------------------------


def _read(thunks: Sequence[Callable[[], Any]], names: Sequence[str]) -> State:
    values = []
    for thunk, name in zip(thunks, names):
        try:
            values.append(thunk())
        except NameError:
            values.append(Unavailable(name, "is used before it has a value"))
    return tuple(values)


def _lost(name: str, what: str) -> Unavailable:
    return Unavailable(name, f"is set only inside {what}; give it a value before, so that it can be carried out")


def loop(
    iterable: Any, body: Callable[..., State], thunks: Sequence[Callable[[], Any]], names: tuple[str, ...]
) -> State:
    """One `for` statement."""
    state = _read(thunks, names)
    if isinstance(iterable, Blocks):
        iterable = RangeLoop(0, 0, 1, iterable.label, iterable)
    if isinstance(iterable, ParallelLoop):
        return _parallel(iterable, body, state, names)
    if isinstance(iterable, RangeLoop):
        return _range(iterable, body, state, names)
    for item in iterable:
        state = body(item, *state)
    return state


def _axis_label(builder: Builder, axis: Any, index: int, label: str | None, single: bool) -> str:
    if isinstance(axis, Blocks):
        return builder.label(axis.label or (label if single else None), "block")
    return builder.label(label if single else None, "axis")


def _parallel(loop: ParallelLoop, body: Callable[..., State], state: State, names: tuple[str, ...]) -> State:
    builder = current()
    if builder.in_parallel:
        raise fail("tile.parallel inside tile.parallel; give one loop several axes: tile.parallel(B, tile.blocks(T))")
    if builder.parallel_done:
        raise fail("a kernel has one tile.parallel; write a second kernel and call both from a @tile.graph")
    operands: list[Operand] = []
    axes: list[tuple[str, str]] = []
    params: list[Value] = []
    items: list[Any] = []
    single = len(loop.axes) == 1
    for number, axis in enumerate(loop.axes):
        name = _axis_label(builder, axis, number, loop.label, single)
        start, stop = (axis.start, axis.stop) if isinstance(axis, Blocks) else (0, axis)
        bounds = (builder.scalar(start), builder.scalar(stop))
        operands += bounds
        axes.append(("block" if isinstance(axis, Blocks) else "scalar", name))
        params.append(builder.value(TileType(i32), name))
        if isinstance(axis, Blocks):
            builder.block_bounds[name] = bounds
            items.append(BlockIndex(name, Tile(params[-1])))
        else:
            items.append(Tile(params[-1]))
    builder.in_parallel = True
    with builder.body() as inner:
        after = body(items[0] if single else tuple(items), *state)
    builder.in_parallel, builder.parallel_done = False, True
    builder.op("parallel", tuple(operands), (), (Region(tuple(params), tuple(inner)),), axes=tuple(axes))
    lost = "is set only inside tile.parallel, whose iterations are independent; to write memory assign to a slice: "
    return tuple(a if a is b else Unavailable(n, f"{lost}{n}[...] = tile") for a, b, n in zip(after, state, names))


def _as_type(builder: Builder, value: Any, type: TileType, name: str, what: str) -> Operand:
    """`value` as a value of `type`; numbers and scalars are spread."""
    if isinstance(value, BlockIndex):
        value = value.index
    if isinstance(value, Tile):
        if value.value.tile == type:
            return value.value
        if not value.shape and value.dtype == type.dtype:
            return full(list(type.shape), value, type.dtype).value
        raise fail(
            f"{name!r} changes type in {what}: {type} became {value.value.tile}; make both equal with .to, reshape"
        )
    return full(list(type.shape), value, type.dtype).value


def _meet(a: Any, b: Any, name: str, what: str) -> TileType | None:
    """The common type of two values that one name has on two paths; None where they are not tiles or numbers."""
    kinds: list[TileType | None] = []
    for v in (a, b):
        if isinstance(v, Tile):
            kinds.append(v.value.tile)
        elif isinstance(v, bool):
            kinds.append(TileType(b1))
        elif isinstance(v, (int, float)):
            kinds.append(None)
        else:
            return None
    left, right = kinds
    if left is None and right is None:
        return TileType(f32 if isinstance(a, float) or isinstance(b, float) else i32)
    if left is None or right is None:
        known, number = (right, a) if left is None else (left, b)
        assert known is not None
        if isinstance(number, float) and not known.dtype.is_float:
            raise fail(f"{name!r} is the float {number} before {what} and {known} in it; start it with an integer")
        return known
    if left == right:
        return left
    if left.dtype == right.dtype and (not left.shape or not right.shape):
        return left if left.shape else right
    both = promote(left.dtype, right.dtype)
    hint = f"; cast to {both}" if both is not None and left.dtype != right.dtype else ""
    raise fail(f"{name!r} changes type in {what}: {left} became {right}{hint}")


def _range(loop: RangeLoop, body: Callable[..., State], state: State, names: tuple[str, ...]) -> State:
    builder = current()
    what = "the loop"
    step: Operand
    if loop.blocks is not None:
        start, stop, step = builder.scalar(loop.blocks.start), builder.scalar(loop.blocks.stop), 0
        label = builder.label(loop.blocks.label or loop.label, "block")
        builder.block_bounds[label] = (start, stop)
    else:
        start, stop, step = builder.scalar(loop.start), builder.scalar(loop.stop), builder.scalar(loop.step)
        label = builder.label(loop.label, "loop")

    def run(types: dict[int, TileType]) -> tuple[list[Any], list[Value], State, State]:
        index = builder.value(TileType(i32), label)
        item = BlockIndex(label, Tile(index)) if loop.blocks is not None else Tile(index)
        params = {at: builder.value(t, names[at]) for at, t in types.items()}
        entering = tuple(Tile(params[at]) if at in params else v for at, v in enumerate(state))
        with builder.body() as inner:
            after = body(item, *entering)
            yields = [
                _as_type(builder, after[at], t, names[at], what) if after[at] is not entering[at] else params[at]
                for at, t in types.items()
            ] if settled else []  # fmt: skip
        return [inner, yields], [index, *params.values()], entering, after

    def start_type(value: Any) -> TileType | None:
        if isinstance(value, Tile):
            return value.value.tile
        if isinstance(value, bool):
            return TileType(b1)
        return TileType(f32 if isinstance(value, float) else i32) if isinstance(value, (int, float)) else None

    # First run: which names does the body rebind, and to what type?
    settled = False
    candidates = {at: t for at, v in enumerate(state) if (t := start_type(v)) is not None}
    kept = (set(builder.labels), dict(builder.block_bounds))
    _, _, entering, after = run(candidates)
    builder.labels, builder.block_bounds = kept
    carried: dict[int, TileType] = {}
    for at in candidates:
        if after[at] is not entering[at]:
            met = _meet(state[at], after[at], names[at], what)
            if met is not None and Block(label) in met.shape:
                raise fail(
                    f"{names[at]!r} has the shape of one block of the loop {label!r} ({met}) and cannot be carried "
                    "from one iteration to the next; reduce it over the block, or use another name inside the loop"
                )
            if met is not None:
                carried[at] = met
    settled = True
    (inner, yields), params, entering, after = run(carried)
    inits = tuple(_as_type(builder, state[at], t, names[at], what) for at, t in carried.items())
    results = builder.op(
        "for", (start, stop, step, *inits), tuple(carried.values()),
        (Region(tuple(params), tuple(inner), tuple(yields)),),
        kind="blocks" if loop.blocks is not None else "range", label=label,
    )  # fmt: skip
    out = dict(zip(carried, results))
    final: list[Any] = []
    for at, name in enumerate(names):
        if at in out:
            builder.rename(out[at], name)
            final.append(Tile(out[at]))
        else:
            final.append(state[at] if after[at] is entering[at] else _lost(name, what))
    return tuple(final)


def cond(
    condition: Any, then: Callable[..., State], orelse: Callable[..., State],
    thunks: Sequence[Callable[[], Any]], names: tuple[str, ...],
) -> State:  # fmt: skip
    """One `if` statement."""
    state = _read(thunks, names)
    if not isinstance(condition, Tile):
        return then(*state) if condition else orelse(*state)
    if condition.shape:
        raise fail(f"`if` needs a scalar condition, got {condition}; use tile.where for elements, or tile.any(...)")
    builder = current()
    test = condition.value if condition.dtype == b1 else (condition != 0).value
    with builder.body() as left_body:
        left = then(*state)
    with builder.body() as right_body:
        right = orelse(*state)
    merged: dict[int, TileType] = {}
    final: list[Any] = []
    for at, (a, b, name) in enumerate(zip(left, right, names)):
        if a is b or (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b):
            final.append(a)
            continue
        met = _meet(a, b, name, "one branch")
        if met is None:
            final.append(_lost(name, "one branch of an `if` on a computed condition"))
        else:
            merged[at] = met
            final.append(None)
    yields = []
    for body, values in ((left_body, left), (right_body, right)):
        builder.bodies.append(body)
        yields.append(tuple(_as_type(builder, values[at], t, names[at], "one branch") for at, t in merged.items()))
        builder.bodies.pop()
    regions = (Region((), tuple(left_body), yields[0]), Region((), tuple(right_body), yields[1]))
    results = builder.op("if", (test,), tuple(merged.values()), regions)
    for at, result in zip(merged, results):
        builder.rename(result, names[at])
        final[at] = Tile(result)
    return tuple(final)


def select(condition: Any, then: Callable[[], Any], orelse: Callable[[], Any]) -> Any:
    """`a if c else b`."""
    if not isinstance(condition, Tile):
        return then() if condition else orelse()
    from tilery.tile.lang import where

    return where(condition, then(), orelse())


def hint(value: Any, name: str) -> None:
    """A name for printing, from an assignment."""
    if isinstance(value, (Tile, TensorRef)) and not isinstance(value, BlockIndex):
        current().rename(value.value, name)


def plain_iter(iterable: Any) -> Any:
    """A `for` that contains break, continue or return, or has an else."""
    if isinstance(iterable, (ParallelLoop, RangeLoop, Blocks)):
        raise fail(_NO_JUMP)
    return iterable


def plain_test(condition: Any) -> Any:
    """An `if` that contains break, continue or return."""
    if isinstance(condition, Tile):
        raise fail(
            "break, continue or return under an `if` on a computed condition; assign a name in both branches instead"
        )
    return condition


def plain_while(condition: Any) -> Any:
    if isinstance(condition, Tile):
        raise fail("`while` on a computed condition is not supported; use tile.range with a computed stop")
    return condition
