"""Makes a kernel fit a core: halves the largest block of its schedule until the tiles that live at once do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Block, Kernel, Value, walk
from tilery.tile.schedule import Schedule
from tilery.tile.targets.ascend.capabilities import A2, KIB, Capabilities
from tilery.tile.targets.ascend.check import check
from tilery.tile.targets.ascend.memory import fits, footprint, products_fit, require

DOT = 16
"""The smallest extent of a product, as on the other targets; 32 for its 8-bit inner one."""
ROWS = 2
"""The fewest rows of a gather: triton-ascend 3.2.0 cannot lower one of a single row."""


def fit(
    traced: Kernel, schedule: Schedule, lowered: Callable[[Schedule], Kernel], record: Capabilities = A2
) -> Schedule:
    """The schedule with blocks that fit; `lowered` gives the padded kernel of a schedule.

    Programs loop over tiles, one program per core. Raises `LoweringError` with the user's line if the target lacks an
    operation or no block size fits.
    """
    least = _least(traced)
    raised = {b: least[b] for b, n in schedule.blocks.items() if n < least.get(b, 1)}
    schedule = replace(
        schedule, persistent=1, pdl=False, evict={}, registers=None, blocks={**schedule.blocks, **raised},
        reasons={**schedule.reasons, **dict.fromkeys(raised, "the least that a product or a gather takes here")},
    )  # fmt: skip
    kernel = lowered(schedule)
    check(kernel, record)
    while True:
        found = footprint(kernel, record)
        wrong: LoweringError | None = None
        try:
            products_fit(kernel, record)
        except LoweringError as error:
            wrong = error
        if wrong is None and fits(found, record):
            return schedule
        larger = [b for b, n in schedule.blocks.items() if n > least.get(b, 1)]
        label = max(larger, key=schedule.blocks.__getitem__, default=None)
        if label is None:
            if wrong is not None:
                raise wrong
            require(found, record)
        assert label is not None
        before, room = schedule.blocks[label], record.unified // KIB
        size = max(before // 2, least.get(label, 1))
        why = str(wrong.message) if wrong is not None else f"the tiles took {found.unified // KIB} KiB of {room}"
        schedule = replace(
            schedule, blocks={**schedule.blocks, label: size},
            reasons={**schedule.reasons, label: f"halved from {before}: {why}"},
        )  # fmt: skip
        kernel = lowered(schedule)


def _least(traced: Kernel) -> dict[str, int]:
    """The smallest size of each block that a product or a gather has as an extent."""
    least: dict[str, int] = {}
    for op in walk(traced.body):
        if op.name in ("load", "store"):
            for kind, operand in op.index:
                for extent in operand.tile.shape if kind == "gather" and isinstance(operand, Value) else ():
                    if isinstance(extent, Block):
                        least[extent.label] = max(least.get(extent.label, 1), ROWS)
        if op.name == "dot":
            a, b = op.operands[:2]
            assert isinstance(a, Value)
            assert isinstance(b, Value)
            inner = 2 * DOT if a.tile.dtype.bits == 8 else DOT
            for extent, size in ((a.tile.shape[0], DOT), (a.tile.shape[1], inner), (b.tile.shape[1], DOT)):
                if isinstance(extent, Block):
                    least[extent.label] = max(least.get(extent.label, 1), size)
    return least
