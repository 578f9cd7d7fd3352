"""The schedule: how a kernel runs, apart from what it computes. Immutable, serialisable, addressed by label.

rms_norm.schedule["row"]                      the block size of the loop labelled "row"
Schedule(blocks={"row": 4}, warps=8)          what an author or the tuner gives
default_schedule(kernel, env, "triton")       always exists; says why in `reasons`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Block, Kernel, Size, TileType, walk
from tilery.tile.passes.bind import block_labels
from tilery.tile.passes.pad import power_of_two
from tilery.tile.size import as_size


@dataclass(frozen=True)
class Schedule:
    """`blocks`: size per block label; what is missing is filled from the default. `warps`, `stages`: per program (GPU).
    `persistent`: programs loop over tiles, `persistent` per multiprocessor (0: one program per tile).
    `pdl`: launch overlaps the previous kernel's end. `evict`: eviction policy ("first", "last") per tensor name.
    `registers`: the most that a thread may take (GPU), so that more programs fit; what does not fit is spilled.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    warps: int | None = None
    stages: int | None = None
    persistent: int = 0
    pdl: bool = False
    evict: Mapping[str, str] = field(default_factory=dict)
    registers: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for label, size in self.blocks.items():
            if not isinstance(size, int) or size < 1:
                raise LoweringError(f"schedule: the block size of {label!r} must be a positive int, got {size!r}")
        if self.warps is not None and self.warps not in (1, 2, 4, 8, 16, 32):
            raise LoweringError(f"schedule: warps must be 1, 2, 4, 8, 16 or 32, got {self.warps}")
        if self.registers is not None and not (16 <= self.registers <= 255):
            raise LoweringError(f"schedule: registers must be 16 to 255, got {self.registers}")
        for name, policy in self.evict.items():
            if policy not in ("first", "last"):
                raise LoweringError(
                    f"schedule: the eviction policy of {name!r} must be 'first' or 'last', got {policy!r}"
                )

    def __getitem__(self, label: str) -> int:
        if label not in self.blocks:
            raise KeyError(f"no block loop {label!r} in this schedule; it has {', '.join(self.blocks) or 'none'}")
        return self.blocks[label]

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """One line; `from_json` reads it back."""
        return json.dumps(
            {
                "blocks": dict(sorted(self.blocks.items())), "warps": self.warps, "stages": self.stages,
                "persistent": self.persistent, "pdl": self.pdl, "evict": dict(sorted(self.evict.items())),
                "registers": self.registers,
            }
        )  # fmt: skip

    @staticmethod
    def from_json(text: str) -> Schedule:
        return Schedule(**json.loads(text))

    def over(self, default: Schedule) -> Schedule:
        """This schedule with what it leaves open taken from `default`."""
        reasons = {**default.reasons, **dict.fromkeys(self.blocks, "given"), **self.reasons}
        return replace(
            self, blocks={**default.blocks, **self.blocks}, reasons=reasons,
            warps=self.warps or default.warps, stages=self.stages or default.stages,
            registers=self.registers or default.registers,
        )  # fmt: skip


TRITON_TILE = 8192
"""Elements of the largest tile of a program that the default aims at: 32 to 64 registers a thread at 4 to 8 warps."""

CPU_TILE = 4096
"""The same for CPU: 16 KiB of f32, half of a first-level cache."""

ASCEND_TILE = 4096
"""The same for Ascend: 16 KiB of f32, a twelfth of a vector core's buffer."""


def default_schedule(kernel: Kernel, env: Mapping[str, int], target: str) -> Schedule:
    """A correct schedule for any kernel: block sizes from the largest tile each block takes part in.

    `kernel` is the traced one; `env` binds at least `kernel.tile_dims`, and dynamic dimensions where they are known.
    """
    budget = {"cpu": CPU_TILE, "ascend": ASCEND_TILE}.get(target, TRITON_TILE)
    labels = block_labels(kernel)
    static = {d.name: env[d.name] for d in kernel.tile_dims}
    # C++ loops run to the real count, so a block may be longer than a small range: the same code serves all sizes, and
    # a new number of tokens compiles nothing.
    limits = _limits(kernel, static if target == "cpu" else env)
    shapes: set[tuple[Any, ...]] = set()
    dots: dict[str, int] = {}
    for op in walk(kernel.body):
        for value in (*op.results, *(p for r in op.regions for p in r.params)):
            if isinstance(value.type, TileType) and value.type.shape:
                shapes.add(tuple(e.label if isinstance(e, Block) else _known(e, static) for e in value.type.shape))
        if op.name == "dot":
            a, b = op.operands[0].tile, op.operands[1].tile  # type: ignore[union-attr]
            inner = 32 if a.dtype.bits == 8 else 16
            for extent, least in ((a.shape[0], 16), (a.shape[1], inner), (b.shape[1], 16)):
                if isinstance(extent, Block):
                    dots[extent.label] = max(dots.get(extent.label, 0), least)
    blocks: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for label in labels:
        others = 1
        for shape in shapes:
            if label in shape:
                elements = 1
                for e in shape:
                    if isinstance(e, int):
                        elements *= power_of_two(e)
                    elif e != label:
                        elements *= blocks.get(e, dots.get(e, 1))
                others = max(others, elements)
        size = max(1, budget // others)
        size = 1 << (size.bit_length() - 1)
        why = f"largest tile has {others} elements per unit of {label}, the budget is {budget}"
        if label in dots:
            wanted = 64 if target != "cpu" else 32
            size = max(dots[label], min(size, wanted))
            why += f"; a dot wants at least {dots[label]}"
        if (limit := limits.get(label)) is not None:
            top = max(power_of_two(limit), dots.get(label, 1) if target != "cpu" else 1)
            if size > top:
                size, why = top, why + f"; the range has {limit}"
        if label not in dots:
            size = min(size, 1024 if target != "cpu" else 4096)
        blocks[label], reasons[label] = size, why
    largest = 1
    for shape in shapes:
        elements = 1
        for e in shape:
            elements *= power_of_two(e) if isinstance(e, int) else blocks[e]
        largest = max(largest, elements)
    warps = min(16, max(1, power_of_two(largest) // (32 * 32)))
    if dots:
        warps = max(4, min(warps, 8))
    reasons["warps"] = f"the largest tile has {largest} elements; 32 of them per thread"
    return Schedule(blocks, warps, 2 if not dots else 3, reasons=reasons)


def _known(size: Size, env: Mapping[str, int]) -> int:
    value = size.bind(env).const
    return 1 if value is None else value


def _limits(kernel: Kernel, env: Mapping[str, int]) -> dict[str, int | None]:
    """The length of each block loop's range, where the dimensions tell."""
    sizes: dict[int, Size] = {}
    out: dict[str, int | None] = {}

    def known(operand: Any) -> int | None:
        if hasattr(operand, "id"):
            size = sizes.get(operand.id)
            return None if size is None else size.bind(env).const
        return int(operand)

    for op in walk(kernel.body):
        if op.name == "size":
            sizes[op.result.id] = op.attr("size")
        elif op.name == "parallel":
            for number, (kind, label) in enumerate(op.attr("axes")):
                start, stop = known(op.operands[2 * number]), known(op.operands[2 * number + 1])
                if kind == "block":
                    out[label] = None if start is None or stop is None else max(stop - start, 0)
        elif op.name == "for" and op.attr("kind") == "blocks":
            start, stop = known(op.operands[0]), known(op.operands[1])
            out[op.attr("label")] = None if start is None or stop is None else max(stop - start, 0)
    return out


_ = (as_size,)
