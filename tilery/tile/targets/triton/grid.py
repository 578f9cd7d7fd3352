"""The grid on the host: how many tiles there are, from the dimensions and the integer parameters alone."""

from __future__ import annotations

from collections.abc import Callable

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel, Operand, Value
from tilery.tile.targets.triton.plan import expression, is_tensor

_ARITHMETIC = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "floordiv": "int({0} / {1})",
    "mod": "({0} - int({0} / {1}) * {1})",
    "maximum": "max({0}, {1})", "minimum": "min({0}, {1})", "shl": "({0} << {1})", "shr": "({0} >> {1})",
    "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})", "eq": "({0} == {1})",
    "ne": "({0} != {1})", "where": "({1} if {0} else {2})", "full": "({0})", "cast": "int({0})",
}  # fmt: skip


def host_expressions(kernel: Kernel, dim: Callable[[str], str], names: dict[int, str]) -> dict[int, str]:
    """Python source of the integer scalars that stand before the grid, by value id; what needs memory is left out."""
    known = {
        p.value.id: names[p.value.id] for p in kernel.params if not is_tensor(p.value) and p.value.tile.dtype.is_int
    }

    def text(operand: Operand) -> str | None:
        return known.get(operand.id) if isinstance(operand, Value) else repr(operand)

    wanted = {o.id for op in kernel.body if op.name == "parallel" for o in op.operands if isinstance(o, Value)}
    for op in reversed(kernel.body):
        if any(r.id in wanted for r in op.results):
            wanted |= {o.id for o in op.operands if isinstance(o, Value)}
    for op in kernel.body:
        if not any(r.id in wanted for r in op.results):
            continue
        if op.name == "size":
            known[op.result.id] = f"({expression(op.attr('size'), dim)})"
        elif op.name in _ARITHMETIC and not op.result.tile.shape:
            parts = [text(o) for o in op.operands]
            if None not in parts:
                known[op.result.id] = _ARITHMETIC[op.name].format(*parts)
    return known


def tiles_on_host(kernel: Kernel, known: dict[int, str], persistent: bool) -> str:
    """The number of tiles as Python source. Raises `LoweringError` where only the device can tell.

    A persistent kernel finds its bounds on the device; there the host's number only keeps small grids small.
    """
    factors = []
    for op in kernel.body:
        if op.name != "parallel":
            continue
        steps = dict(op.attr("steps", ()))
        for number, (_, label) in enumerate(op.attr("axes")):
            bounds = []
            for operand in op.operands[2 * number : 2 * number + 2]:
                text = known.get(operand.id) if isinstance(operand, Value) else str(operand)
                if text is None:
                    if persistent:
                        return str(2**31 - 1)
                    raise LoweringError(
                        f"the bound of the parallel axis {label!r} is read from memory, which the launch cannot see; "
                        "loop over a dimension and guard the body with `if`, or schedule the kernel persistent",
                        op.loc,
                    )
                bounds.append(text)
            start, stop = bounds
            length, step = stop if start == "0" else f"({stop} - {start})", steps.get(label, 1)
            factors.append(f"max({length}, 0)" if step == 1 else f"max(-(-{length} // {step}), 0)")
    return " * ".join(factors)
