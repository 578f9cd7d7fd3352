"""The passes in order: from a traced kernel to what a target emits, every stage kept, printable and runnable."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tilery.tile import passes, plugins
from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel
from tilery.tile.passes.bind import block_labels
from tilery.tile.schedule import Schedule, default_schedule

CLEAN = (("simplify", passes.simplify), ("cse", passes.cse), ("hoist", passes.hoist), ("dce", passes.dce))
TARGETS = ("cpu", "triton", "ascend")
"""The built-in ones; `plugins.py` has those of other packages."""
PADDED = ("triton", "ascend")
"""Targets that take tiles of powers of two, with masks."""


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

    @property
    def source(self) -> str:
        """The target's text, for contiguous and aligned tensors."""
        from tilery.tile.show import source_of

        return source_of(self)

    def print(self) -> None:
        """Prints the target's text."""
        print(self.source)


def lower(kernel: Kernel, env: Mapping[str, int], target: str, schedule: Schedule | None = None) -> Lowered:
    """Lowers a traced kernel for "cpu", "triton", "ascend" or a plug-in's target. `env`: the dimensions, at
    least `kernel.tile_dims`. A schedule may leave anything open; the default fills it. For "ascend", blocks are halved
    until they fit a core.
    """
    extra = plugins.load().targets
    if target not in TARGETS and target not in extra:
        raise LoweringError(f"no target {target!r}; there are: {', '.join([*TARGETS, *extra])}")
    like = extra[target].like if target in extra else target
    missing = [d.name for d in kernel.tile_dims if d.name not in env]
    if missing:
        raise LoweringError(f"lowering {kernel.name!r} needs the dimension {missing[0]!r}, which shapes its tiles")
    default = default_schedule(kernel, env, like)
    full = schedule.over(default) if schedule is not None else default
    if target == "ascend":
        from tilery.tile.targets.ascend.fit import fit

        full = fit(kernel, full, lambda chosen: _stages(kernel, env, target, like, chosen).kernel)
    return _stages(kernel, env, target, like, full)


def _stages(kernel: Kernel, env: Mapping[str, int], target: str, like: str, full: Schedule) -> Lowered:
    """Every pass, with a schedule that leaves nothing open."""
    stages: list[tuple[str, Kernel]] = [("trace", kernel)]
    seconds: list[tuple[str, float]] = []

    def bound(traced: Kernel) -> Kernel:
        dead = {*block_labels(kernel)} - {*block_labels(traced)}  # loops that did nothing
        return passes.bind(traced, env, {label: n for label, n in full.blocks.items() if label not in dead})

    def apply(mark: str, steps: Sequence[plugins.Step]) -> None:
        """Runs passes; what they leave is the stage `mark`."""
        for name, function in plugins.arrange(steps, target):
            start = time.perf_counter()
            new = function(stages[-1][1])
            seconds.append((name, time.perf_counter() - start))
            if new != stages[-1][1]:
                stages.append((name, new))
        stages.append((mark, replace(stages[-1][1], stage=mark)))

    apply("bound", [*CLEAN, ("widen", passes.widen), ("bound", bound), *CLEAN])
    if like in PADDED:
        apply("padded", [("padded", passes.pad), *CLEAN])
    return Lowered(tuple(stages), full, target, tuple(seconds))
