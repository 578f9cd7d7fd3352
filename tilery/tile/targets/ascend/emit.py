"""Triton source for triton-ascend: the Triton target's emitter under the capability record.

What differs from the text for a GPU: one program per core loops over the tiles, no eviction policies, no dependent
launches, atomics with the one order that triton-ascend knows, a head that says what a launch must give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tilery.tile.errors import LaunchError
from tilery.tile.interpret import allocate
from tilery.tile.ir import Kernel, Op, walk
from tilery.tile.lowering import Lowered
from tilery.tile.schedule import Schedule
from tilery.tile.targets.ascend.capabilities import A2, KIB, Capabilities
from tilery.tile.targets.ascend.check import check
from tilery.tile.targets.ascend.memory import Footprint, doubled, footprint, products_fit, require
from tilery.tile.targets.triton.emit import Emitted, Emitter
from tilery.tile.targets.triton.plan import Plan, Spec, spec_of

SIGNATURE = "# signature: "
"""Begins the line of a text that says its parameters' types, as JSON."""


def emit(kernel: Kernel, schedule: Schedule, spec: Spec | None = None, record: Capabilities = A2) -> Emitted:
    """Source and launch plan of a padded kernel. Raises `LoweringError` for what triton-ascend cannot express."""
    check(kernel, record)
    products_fit(kernel, record)
    found = footprint(kernel, record)
    require(found, record)
    plain = replace(schedule, persistent=1, pdl=False, evict={}, registers=None)
    return _Emitter(kernel, plain, spec or Spec(), found, record).run()


class _Emitter(Emitter):
    def __init__(
        self, kernel: Kernel, schedule: Schedule, spec: Spec, found: Footprint, record: Capabilities
    ) -> None:  # fmt: skip
        super().__init__(kernel, schedule, spec)
        self.found, self.record = found, record

    def head(self, plan: Plan) -> list[str]:
        cube = any(op.name == "dot" for op in walk(self.kernel.body))
        option = "" if doubled(self.found, self.record) else "; compile with multibuffer=False"
        core = "cube" if cube else "vector"
        return [
            f"# {self.kernel.name} for {self.record.device}: emitted by tilery.tile; edit the kernel, not this file.",
            f"# specialisation: {self.spec}",
            f"# blocks: {json.dumps(dict(sorted(self.schedule.blocks.items())))}",
            f"# grid: the smaller of {plan.grid} and the number of {core} cores ({self.record.programs(cube)})",
            f"# memory: at most {-(-self.found.unified // KIB)} KiB of the unified buffer, "
            f"{-(-self.found.l1 // KIB)} KiB of L1{option}",
            f"{SIGNATURE}{json.dumps(plan.signature)}",
        ]

    def order(self, op: Op, rank: int) -> str:
        return "acq_rel"


def emit_lowered(lowered: Lowered, spec: Spec | None = None) -> Emitted:
    """`emit` of what `kernel.lower("ascend", ...)` gives. Raises `LaunchError` for another target."""
    if lowered.target != "ascend":
        raise LaunchError(f"this takes a kernel lowered for 'ascend', this one is for {lowered.target!r}")
    return emit(lowered.kernel, lowered.schedule, spec)


def run_interpreted(lowered: Lowered, arguments: Mapping[str, Any], env: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Runs the text in plain Triton's interpreter on CPU arguments by name; InOut tensors change in place.

    This checks the text's numbers, not triton-ascend. Returns the outputs; raises `VerifyError` if it fails.
    """
    from tilery.tile.targets.triton.interp import run_emitted

    emitted = emit_lowered(lowered, spec_of(lowered.kernel, arguments, env))
    outputs = allocate(lowered.kernel, env)
    made = {allocation.name: tensor for allocation, tensor in zip(emitted.plan.allocations, outputs)}
    run_emitted(emitted, arguments, env, made)
    return tuple(made[name] for name in emitted.plan.returns)
