"""The Tile IR as text: readable Python that `ast.parse` accepts, printed and parsed back at every stage.

    T = Dim("T")

    @kernel(stage="bound", blocks={"row": 16})
    def double(x: Tensor[T, 8, f32]):
        y: Tensor[T, 8, f32] = empty()
        v: i32 = size(T)
        for row in parallel(block(0, v, "row")):
            v_1: f32[B.row, 8] = load(x, [span(row, B.row), span(0, 8)], other=0)
            v_2: f32[B.row, 8] = mul(v_1, 2.0)  # double.py:7: y[t, :] = x[t, :] * 2.0
            store(y, [span(row, B.row), span(0, 8)], v_2)
        return y

An assignment is one operation: operands, then attributes by name. A `for` in `loop` carries values: `init` enters,
`yield` gives the next iteration's, `out` names what is left. Types of what an annotation cannot say stand in `types`.
`parse_kernel(print_kernel(k)) == canonical(k)`: ids are numbered anew in order of appearance, names are made unique.
"""

from __future__ import annotations

import difflib

from tilery.tile.ir import Kernel
from tilery.tile.parser import parse_kernel
from tilery.tile.printer import canonical, print_kernel

__all__ = ["canonical", "diff_stages", "parse_kernel", "print_kernel"]


def diff_stages(a: Kernel, b: Kernel) -> str:
    """What a pass changed: the unified diff of two stages, without source comments; empty if they are equal."""
    before, after = (print_kernel(k, source=False).splitlines() for k in (a, b))
    names = [f"{k.name} ({k.stage})" for k in (a, b)]
    return "\n".join(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))
