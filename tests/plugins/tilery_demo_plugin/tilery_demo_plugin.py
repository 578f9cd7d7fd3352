"""A plug-in for Tilery's tile language: an operation, a pass and a target."""

import math
from dataclasses import replace

import torch

from tilery import tile
from tilery.tile import OpDef
from tilery.tile.errors import TraceError
from tilery.tile.ir import Kernel, Op, Value, rewrite, walk
from tilery.tile.lowering import Lowered
from tilery.tile.plugins import Pass, Target


def infer_squareplus(types, attrs):
    """The type rule: what comes in is what goes out."""
    if not types[0].dtype.is_float or types[0].dtype.is_fp8:
        raise TraceError(f"squareplus of {types[0].dtype}: cast with .to(f32) first")
    return (types[0],)


SQUAREPLUS = OpDef(
    "squareplus",
    infer=infer_squareplus,
    reference=lambda x: (x + torch.sqrt(x * x + 4.0)) / 2.0,
    flops=7,
    triton="(({0} + tl.sqrt_rn({0} * {0} + 4.0)) * 0.5)",
    cpp="(({0} + std::sqrt({0} * {0} + 4.0f)) * 0.5f)",
    elementwise=True,
)


def squareplus(x):
    """(x + sqrt(x^2 + 4)) / 2 of a tile, a smooth ReLU: what kernels call."""
    return tile.elementwise("squareplus", x)


def reciprocal(kernel: Kernel) -> Kernel:
    """Division by a power of two becomes multiplication, which is as exact and several times faster."""

    def visit(op: Op) -> tuple[Op, ...] | None:
        if op.name != "div" or isinstance(op.operands[1], Value):
            return None
        divisor = float(op.operands[1])
        if abs(math.frexp(divisor)[0]) != 0.5 or not 2.0**-100 < abs(divisor) < 2.0**100:
            return None
        return (replace(op, name="mul", operands=(op.operands[0], 1.0 / divisor)),)

    return replace(kernel, body=rewrite(kernel.body, visit))


RECIPROCAL = Pass("reciprocal", reciprocal, after="simplify")


def emit_pseudo(lowered: Lowered) -> str:
    """The kernel in words: what a program reads, computes and writes."""
    kernel = lowered.kernel
    blocks = ", ".join(f"{label} = {size}" for label, size in kernel.blocks) or "none"
    lines = [
        f"# {kernel.name}: blocks {blocks}",
        f"def {kernel.name}({', '.join(p.value.name for p in kernel.params)}):",
    ]
    for op in walk(kernel.body):
        names = ", ".join(value.name for value in op.results)
        if op.name == "parallel":
            lines.append(f"    # every combination of {', '.join(label for _, label in op.attr('axes'))}, in any order")
        elif op.name == "for":
            lines.append(f"    # again for each {op.attr('label')}")
        elif op.name == "load":
            lines.append(f"    {names} = {op.tensor.name}[...]  # {op.result.type}")
        elif op.name == "store":
            lines.append(f"    {op.tensor.name}[...] = {getattr(op.stored, 'name', op.stored)}")
        elif names:
            operands = ", ".join(str(getattr(o, "name", o)) for o in op.operands)
            lines.append(f"    {names} = {op.name}({operands})")
    return "\n".join(lines) + "\n"


PSEUDO = Target("pseudo", emit_pseudo, like="cpu", about="readable text, for people")
