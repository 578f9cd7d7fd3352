"""What the tiles of one program take while they live: an estimate from the last stage before code.

Counted as if each tile had its own registers from the operation that makes it to its last use. Broadcasts, constants
and positions cost nothing (they are computed where they are used), reshapes share their operand's registers, and
operands of a matrix product that are loaded lie in shared memory, once per pipeline stage. The compiler may fuse more,
or keep more: the registers of the binary are the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tilery.tile.ir import Block, Kernel, Op, Operand, TileType, Value
from tilery.tile.passes.pad import power_of_two

FREE = ("broadcast", "full", "arange")
SAME = ("reshape", "transpose", "bitcast")


@dataclass(frozen=True)
class Lifetime:
    """A tile from operation `start` until `end` (numbers in program order), where its place is free again. `line`: of
    the source, 0 if unknown."""

    name: str
    type: str
    bytes: int
    start: int
    end: int
    shared: bool
    line: int


@dataclass(frozen=True)
class MemoryMap:
    """`operations`: how many there are. The peaks are bytes per program."""

    tiles: tuple[Lifetime, ...]
    operations: int

    def peak(self, shared: bool) -> int:
        """The most bytes that live at once, in shared memory or in registers."""
        changes: dict[int, int] = {}
        for t in self.tiles:
            if t.shared == shared:
                changes[t.start] = changes.get(t.start, 0) + t.bytes
                changes[t.end] = changes.get(t.end, 0) - t.bytes
        now = best = 0
        for _, change in sorted(changes.items()):
            now += change
            best = max(best, now)
        return best

    def offsets(self, shared: bool) -> list[tuple[int, Lifetime]]:
        """A place for every tile, so that no two that live at once overlap: first fit, largest first."""
        placed: list[tuple[int, Lifetime]] = []
        for tile in sorted((t for t in self.tiles if t.shared == shared), key=lambda t: (-t.bytes, t.start)):
            at = 0
            for begin, other in sorted(placed, key=lambda p: p[0]):
                apart = other.end <= tile.start or tile.end <= other.start
                if not apart and begin < at + tile.bytes and at < begin + other.bytes:
                    at = begin + other.bytes
            placed.append((at, tile))
        return placed


def memory_map(kernel: Kernel, env: Mapping[str, int], stages: int) -> MemoryMap:
    """`kernel`: the padded stage; `stages`: buffers of a pipelined operand."""
    return _Map(kernel, env, stages).made()


class _Map:
    def __init__(self, kernel: Kernel, env: Mapping[str, int], stages: int) -> None:
        self.kernel, self.env, self.stages = kernel, env, max(1, stages)
        self.now = 0
        self.first: dict[int, tuple[int, Value, Op | None]] = {}
        self.last: dict[int, int] = {}
        self.alias: dict[int, int] = {}
        self.shared: set[int] = set()
        self.loaded: set[int] = set()

    def made(self) -> MemoryMap:
        self.body(self.kernel.body)
        tiles = []
        for id, (start, value, op) in self.first.items():
            size = self.bytes(value.tile)
            if id in self.alias or size == 0 or not value.tile.shape or (op is not None and op.name in FREE):
                continue
            shared = id in self.shared
            line = op.loc.line if op is not None and op.loc is not None else 0
            size *= self.stages if shared else 1
            end = max(self.last.get(id, start), start + 1)
            tiles.append(Lifetime(value.name, str(value.type), size, start, end, shared, line))
        return MemoryMap(tuple(tiles), self.now)

    def bytes(self, kind: TileType) -> int:
        count = 1
        for extent in kind.shape:
            size = dict(self.kernel.blocks)[extent.label] if isinstance(extent, Block) else extent.evaluate(self.env)
            count *= power_of_two(size) if size else 0
        return max(1, count * kind.dtype.bits // 8)

    def use(self, operand: Operand, used: set[int]) -> None:
        if isinstance(operand, Value) and isinstance(operand.type, TileType):
            id = operand.id
            while id in self.alias:
                id = self.alias[id]
            self.last[id] = self.now
            used.add(id)

    def body(self, body: tuple[Op, ...]) -> set[int]:
        """Ids of all tiles that the body uses."""
        used: set[int] = set()
        for op in body:
            self.now += 1
            for operand in op.operands:
                self.use(operand, used)
            begin = self.now
            for region in op.regions:
                for param in region.params:
                    if isinstance(param.type, TileType):
                        self.first[param.id] = (self.now, param, op)
                inside = self.body(region.body)
                self.now += 1
                for operand in region.yields:
                    self.use(operand, inside)
                if op.name == "for":  # what comes from outside is needed again by the next iteration
                    for id in inside:
                        if id not in self.first or self.first[id][0] <= begin:
                            self.last[id] = self.now
                used |= inside
            for result in op.results:
                if isinstance(result.type, TileType):
                    self.first[result.id] = (self.now, result, op)
            self.note(op)
        return used

    def note(self, op: Op) -> None:
        source = op.operands[0] if op.operands else None
        if op.name == "load":
            self.loaded.add(op.result.id)
        elif op.name in (*SAME, "broadcast") and isinstance(source, Value) and source.tile.shape:
            self.alias[op.result.id] = source.id
        elif op.name == "dot":
            for operand in op.operands[:2]:
                id = operand.id if isinstance(operand, Value) else -1
                while id in self.alias:
                    id = self.alias[id]
                if id in self.loaded:
                    self.shared.add(id)
