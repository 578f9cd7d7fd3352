"""The passes in order: from a traced kernel to what a target emits, every stage kept, printable and runnable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tilery.tile import passes
from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel
from tilery.tile.passes.bind import block_labels
from tilery.tile.schedule import Schedule, default_schedule

CLEAN = (("simplify", passes.simplify), ("cse", passes.cse), ("hoist", passes.hoist), ("dce", passes.dce))
TARGETS = ("cpu", "triton")


@dataclass(frozen=True)
class Lowered:
    """`stages`: (name, kernel after that pass), the traced one first; `seconds`: time of each pass."""

    stages: tuple[tuple[str, Kernel], ...]
    schedule: Schedule
    target: str
    seconds: tuple[tuple[str, float], ...]

    @property
    def kernel(self) -> Kernel:
        """What the target emits."""
        return self.stages[-1][1]

    def stage(self, name: str) -> Kernel:
        """The last stage of a name ("trace", "bound", "padded" or a pass's). Raises `LoweringError`."""
        for stage, kernel in reversed(self.stages):
            if stage == name:
                return kernel
        raise LoweringError(f"no stage {name!r}; there are: {', '.join(dict.fromkeys(n for n, _ in self.stages))}")


def lower(kernel: Kernel, env: Mapping[str, int], target: str, schedule: Schedule | None = None) -> Lowered:
    """Lowers a traced kernel for "cpu" or "triton". `env`: the dimensions, at least `kernel.tile_dims`.

    A schedule may leave anything open; the default fills it.
    """
    if target not in TARGETS:
        raise LoweringError(f"no target {target!r}; there are: {', '.join(TARGETS)}")
    missing = [d.name for d in kernel.tile_dims if d.name not in env]
    if missing:
        raise LoweringError(f"lowering {kernel.name!r} needs the dimension {missing[0]!r}, which shapes its tiles")
    default = default_schedule(kernel, env, target)
    full = schedule.over(default) if schedule is not None else default
    stages: list[tuple[str, Kernel]] = [("trace", kernel)]
    seconds: list[tuple[str, float]] = []

    def apply(name: str, function: object, *args: object) -> None:
        start = time.perf_counter()
        new: Kernel = function(stages[-1][1], *args)  # type: ignore[operator]
        seconds.append((name, time.perf_counter() - start))
        if new != stages[-1][1]:
            stages.append((name, new))

    for name, function in CLEAN:
        apply(name, function)
    apply("widen", passes.widen)
    dead = {*block_labels(kernel)} - {*block_labels(stages[-1][1])}  # loops that did nothing
    apply("bound", passes.bind, env, {label: n for label, n in full.blocks.items() if label not in dead})
    for name, function in CLEAN:
        apply(name, function)
    stages.append(("bound", replace(stages[-1][1], stage="bound")))
    if target == "triton":
        apply("padded", passes.pad)
        for name, function in CLEAN:
            apply(name, function)
        stages.append(("padded", replace(stages[-1][1], stage="padded")))
    return Lowered(tuple(stages), full, target, tuple(seconds))
