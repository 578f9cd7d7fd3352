"""What the C++ computes where: which tiles are kept in scratch memory and which are fused into the loops that use them.

A tile is fused (computed anew, element by element, where it is used) if one loop alone uses it, or if it is as cheap as
reading it back. Everything else is kept. Tiles read from a tensor that the kernel also writes are read at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tilery.tile.ir import Kernel, Op, TileType, Value, walk
from tilery.tile.ops import OPS

CHEAP = 3.0
"""Cost (about one vector instruction each) up to which recomputing beats keeping: a load and a conversion."""

FUSED = {
    "cast",
    "bitcast",
    "where",
    "load",
    "full",
    "arange",
    "broadcast",
    "reshape",
    "transpose",
    "join",
    "split",
    "take",
}
MOVES = {"full", "broadcast", "reshape", "transpose", "join", "split"}


def is_fused(op: Op) -> bool:
    """Whether an operation gives its result element by element."""
    return op.name in FUSED or (op.name in OPS and OPS[op.name].elementwise)


@dataclass
class Plan:
    """`kept`: ids of fusible tiles that get memory of their own. `written`: ids of tensors that are written to."""

    kept: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)


def roots_of(kernel: Kernel) -> dict[int, int]:
    """The tensor each view lies in, by id."""
    roots: dict[int, int] = {}
    for op in walk(kernel.body):
        if op.name == "view":
            roots[op.result.id] = roots.get(op.tensor.id, op.tensor.id)
    return roots


def make_plan(kernel: Kernel) -> Plan:
    plan = Plan()
    roots = roots_of(kernel)
    order: list[Op] = []
    home: dict[int, tuple[int, ...]] = {}
    definition: dict[int, Op] = {}
    uses: dict[int, list[tuple[Op, tuple[int, ...]]]] = {}

    def visit(body: tuple[Op, ...], path: tuple[int, ...]) -> None:
        for op in body:
            order.append(op)
            for value in op.results:
                home[value.id], definition[value.id] = path, op
            for operand in op.operands:
                if isinstance(operand, Value):
                    uses.setdefault(operand.id, []).append((op, path))
            if op.name in ("store", "atomic"):
                plan.written.add(roots.get(op.tensor.id, op.tensor.id))
            for region in op.regions:
                inner = (*path, id(op)) if op.name in ("for", "parallel") else path
                for value in region.params:
                    home[value.id] = inner
                visit(region.body, inner)
                for operand in region.yields:
                    if isinstance(operand, Value):
                        uses.setdefault(operand.id, []).append((op, inner))

    visit(kernel.body, ())
    plan.used = set(uses)
    cost: dict[int, float] = {}
    for op in order:
        price = _own_cost(op)
        if is_fused(op):
            price += sum(
                cost.get(o.id, 1.0) for o in op.operands if isinstance(o, Value) and o.type.__class__ is TileType
            )
        for value in op.results:
            cost[value.id] = price if is_fused(op) else 1.0
    sinks: dict[int, set[Any]] = {}
    for op in reversed(order):
        for value in op.results:
            found: set[Any] = set()
            looped = spread = False
            for user, path in uses.get(value.id, ()):
                looped = looped or len(path) > len(home[value.id])
                fused = is_fused(user) and not any(r.id in plan.kept for r in user.results)
                if fused and user.results and user.result.tile.shape:
                    for result in user.results:
                        found |= sinks.get(result.id, set())
                    spread = spread or _spreads(user, value)
                else:
                    found.add(id(user))
                if user.name == "take" and user.operands[0] == value:
                    spread = True
            if not is_fused(op) or not isinstance(value.type, TileType) or not value.tile.shape:
                continue
            price = cost[value.id]
            if (
                (len(found) > 1 and price > CHEAP)
                or (looped and price > 1)
                or (spread and price > CHEAP)
                or (op.name == "load" and roots.get(op.tensor.id, op.tensor.id) in plan.written)
            ):
                plan.kept.add(value.id)
                found = {("kept", value.id)}
            sinks[value.id] = found
    return plan


def _own_cost(op: Op) -> float:
    if op.name == "load":
        gather = any(kind == "gather" for kind, _ in op.index)
        dtype = op.result.tile.dtype
        width = 4.0 if dtype.is_fp8 or dtype.name == "f16" else 1.0 if dtype.is_float and dtype.bits == 16 else 0.0
        return 1.0 + width + (1.0 if op.attr("masked") else 0.0) + (2.0 if gather else 0.0)
    if op.name == "cast":
        target = op.attr("dtype")
        return 8.0 if target.is_fp8 else 3.0 if target.is_float and target.bits == 16 else 0.5
    if op.name in MOVES:
        return 0.0
    if op.name in ("arange", "take"):
        return 1.0
    return OPS[op.name].flops if op.name in OPS else 1.0


def _spreads(op: Op, value: Value) -> bool:
    """Whether `op` broadcasts `value` along an axis outside of one it has: each element is asked for often then."""
    if op.name != "broadcast":
        return False
    source, target = value.tile.shape, op.result.tile.shape
    wide = [i for i, e in enumerate(source) if getattr(e, "const", None) != 1]
    grown = [i for i, (a, b) in enumerate(zip(source, target)) if a != b]
    return bool(wide and grown and min(grown) < max(wide))


def fold_accumulators(kernel: Kernel) -> Kernel:
    """`x + dot(a, b)` becomes `dot(a, b, x)`, which adds into the result as it goes."""
    counts: dict[int, int] = {}
    for op in walk(kernel.body):
        for operand in (*op.operands, *(y for r in op.regions for y in r.yields)):
            if isinstance(operand, Value):
                counts[operand.id] = counts.get(operand.id, 0) + 1

    def region(body: tuple[Op, ...]) -> tuple[Op, ...]:
        dots: dict[int, Op] = {}
        gone: set[int] = set()
        out: list[Op] = []
        for op in body:
            if op.regions:
                op = replace(op, regions=tuple(replace(r, body=region(r.body)) for r in op.regions))
            if op.name == "dot" and len(op.operands) == 2 and counts.get(op.result.id) == 1:
                dots[op.result.id] = op
            if op.name == "add":
                for product, other in (op.operands, op.operands[::-1]):
                    if (
                        isinstance(product, Value)
                        and product.id in dots
                        and isinstance(other, Value)
                        and other.tile.shape
                    ):
                        dot = dots[product.id]
                        gone.add(id(dot))
                        op = replace(dot, operands=(*dot.operands, other), results=op.results, loc=op.loc)
                        break
            out.append(op)
        return tuple(op for op in out if id(op) not in gone)

    return replace(kernel, body=region(kernel.body))


def program_cost(kernel: Kernel) -> float:
    """Nanoseconds one program may take, roughly: what decides whether threads are worth waking."""
    blocks = dict(kernel.blocks)

    def elements(kind: Any) -> float:
        total = 1.0
        if isinstance(kind, TileType):
            for extent in kind.shape:
                size = getattr(extent, "const", None)
                total *= blocks.get(getattr(extent, "label", ""), 16) if size is None else size
        return total

    def body(ops: tuple[Op, ...]) -> float:
        total = 0.0
        for op in ops:
            if op.name == "for":
                start, stop, step = op.operands[:3]
                known = all(isinstance(o, int) for o in (start, stop, step)) and op.attr("kind") != "blocks"
                trips = len(range(int(start), int(stop), int(step) or 1)) if known else 8  # type: ignore[arg-type]
                total += trips * body(op.regions[0].body)
            elif op.regions:
                total += max(body(r.body) for r in op.regions)
            elif op.name == "dot":
                a, b = op.operands[:2]
                assert isinstance(a, Value)
                assert isinstance(b, Value)
                total += (
                    elements(a.type)
                    * elements(b.type)
                    / max(1.0, elements(TileType(a.tile.dtype, a.tile.shape[1:])))
                    / 8
                )
            else:
                types = [v.type for v in (*op.results, *op.operands) if isinstance(v, Value)]
                flops = OPS[op.name].flops if op.name in OPS else 2
                total += max(map(elements, types), default=1.0) * (1 + flops) / 16
        return total

    return body(kernel.body)
