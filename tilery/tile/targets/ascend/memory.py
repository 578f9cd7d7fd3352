"""How much of a core's memory a kernel needs: a bound from the tiles that live at once.

Counted as if every value of the IR had a buffer of its own while it lives; the compiler fuses elementwise operations
and may need less. The last axis is padded to 32 bytes. int8 counts twice, because triton-ascend documents that it takes
more room. Not counted: positions and masks that only address memory (they become the extents of a copy) and tiles that
go from memory to a product, which lie in L1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel, Op, Size, TileType, Value, operands_of, walk
from tilery.tile.targets.ascend.capabilities import KIB, Capabilities

_MOVES = {"transpose", "reshape"}
_MEMORY = {"load", "store", "atomic"}


@dataclass(frozen=True)
class Footprint:
    """Bytes of the unified buffer and of L1 at their worst, and the operations where that is."""

    unified: int = 0
    unified_at: Op | None = None
    l1: int = 0
    l1_at: Op | None = None

    def worst(self, other: Footprint) -> Footprint:
        """The larger of each."""
        a, b = (other if other.unified > self.unified else self), (other if other.l1 > self.l1 else self)
        return Footprint(a.unified, a.unified_at, b.l1, b.l1_at)


def tile_bytes(kind: TileType, align: int) -> int:
    """Bytes of a padded tile on chip; scalars take none."""
    if not kind.shape:
        return 0
    sizes = [e.const for e in kind.shape if isinstance(e, Size) and e.const is not None]
    assert len(sizes) == len(kind.shape), f"{kind} is not padded"
    width = 2 if kind.dtype.name == "i8" else kind.dtype.bytes
    last = -(-sizes[-1] * width // align) * align
    return prod(sizes[:-1]) * last


def footprint(kernel: Kernel, record: Capabilities) -> Footprint:
    """The bound for a padded kernel."""
    return _Liveness(kernel, record).body(kernel.body, (), 0, 0)


def products_fit(kernel: Kernel, record: Capabilities) -> None:
    """Raises `LoweringError` for a product whose operands or sums exceed a cube core's buffers."""
    for op in walk(kernel.body):
        if op.name != "dot":
            continue
        a, b = op.operands[0], op.operands[1]
        assert isinstance(a, Value)
        assert isinstance(b, Value)
        for kind, limit, where in (
            (a.tile, record.l0a, "L0A"), (b.tile, record.l0b, "L0B"), (op.result.tile, record.l0c, "L0C"),
        ):  # fmt: skip
            need = prod(e.const or 1 for e in kind.shape if isinstance(e, Size)) * kind.dtype.bytes
            if need > limit:
                raise LoweringError(
                    f"ascend: dot needs {need // KIB} KiB of {where} for {kind}, a cube core has {limit // KIB}; take "
                    "smaller blocks in the schedule",
                    op.loc,
                )


def fits(found: Footprint, record: Capabilities) -> bool:
    """Whether the tiles fit, with the default double buffering or without."""
    return found.unified <= record.unified and found.l1 <= record.l1


def doubled(found: Footprint, record: Capabilities) -> bool:
    """Whether they fit with the default double buffering."""
    return max(found.unified * record.buffers - record.unified, found.l1 * record.buffers - record.l1) <= 0


def require(found: Footprint, record: Capabilities) -> None:
    """Raises `LoweringError` at the operation where a core's memory does not suffice."""
    for need, limit, op, where in (
        (found.unified, record.unified, found.unified_at, "the unified buffer"),
        (found.l1, record.l1, found.l1_at, "L1"),
    ):
        if need > limit:
            raise LoweringError(
                f"ascend: the tiles that live here take {need // KIB} KiB of {where}, a core has {limit // KIB}; its "
                "blocks are as small as they get, so split the row among iterations of a tile.range loop",
                op.loc if op is not None else None,
            )


class _Liveness:
    def __init__(self, kernel: Kernel, record: Capabilities) -> None:
        self.record = record
        self.readers: dict[int, list[tuple[Op, int]]] = {}
        self.maker: dict[int, Op] = {}
        self.yielded: set[int] = set()
        for op in walk(kernel.body):
            for at, operand in enumerate(op.operands):
                if isinstance(operand, Value):
                    self.readers.setdefault(operand.id, []).append((op, at))
            self.maker.update((r.id, op) for r in op.results)
            for region in op.regions:
                self.yielded.update(v.id for v in region.yields if isinstance(v, Value))
        self.addresses: dict[int, bool] = {}
        self.in_l1: dict[int, bool] = {}

    def size(self, value: Value) -> tuple[int, int]:
        """(bytes of the unified buffer, bytes of L1) of a value."""
        if not isinstance(value.type, TileType) or not value.type.shape or self.address(value):
            return 0, 0
        need = tile_bytes(value.type, self.record.align)
        return (0, need) if self.cube(value) else (need, 0)

    def address(self, value: Value) -> bool:
        """Whether a value only says where memory is read or written, and is itself no memory's content."""
        if value.id not in self.addresses:
            self.addresses[value.id] = False
            op = self.maker.get(value.id)
            pure = op is not None and op.name not in _MEMORY and not op.regions and value.id not in self.yielded
            made = pure and all(self.counted(o) for o in operands_of(op))  # type: ignore[arg-type]
            self.addresses[value.id] = made and all(
                self.addressing(reader, at) for reader, at in self.readers.get(value.id, [])
            )
        return self.addresses[value.id]

    def counted(self, value: Value) -> bool:
        """Whether a value is computed from sizes, loop indices and scalars alone."""
        op = self.maker.get(value.id)
        if not isinstance(value.type, TileType) or not value.type.shape:
            return True
        return op is not None and op.name not in _MEMORY and not op.regions and all(map(self.counted, operands_of(op)))

    def addressing(self, reader: Op, at: int) -> bool:
        if reader.name in _MEMORY:
            if reader.where is not None and at == len(reader.operands) - 1:
                return True
            entries = len(reader.index)
            return 1 <= at <= entries and reader.index[at - 1][0] != "gather"
        return not reader.regions and bool(reader.results) and all(map(self.address, reader.results))

    def cube(self, value: Value) -> bool:
        """Whether a tile goes from memory to products without passing a vector core."""
        if value.id not in self.in_l1:
            op = self.maker.get(value.id)
            readers = self.readers.get(value.id, [])
            from_memory = op is not None and (
                op.name == "load" or (op.name in _MOVES and all(map(self.loaded, operands_of(op))))
            )
            self.in_l1[value.id] = (
                from_memory
                and value.id not in self.yielded
                and bool(readers)
                and all(
                    (r.name == "dot" and at < 2) or (r.name in _MOVES and all(map(self.cube, r.results)))
                    for r, at in readers
                )
            )
        return self.in_l1[value.id]

    def loaded(self, value: Value) -> bool:
        op = self.maker.get(value.id)
        return op is not None and (op.name == "load" or (op.name in _MOVES and all(map(self.loaded, operands_of(op)))))

    def body(self, body: tuple[Op, ...], yields: Iterable[object], unified: int, l1: int) -> Footprint:
        """The worst of a straight line of operations, with so much live around it."""
        last: dict[int, int] = {}
        for at, op in enumerate(body):
            for inner in walk((op,)):
                last.update((operand.id, at) for operand in operands_of(inner))
                for region in inner.regions:
                    last.update((v.id, at) for v in region.yields if isinstance(v, Value))
        last.update((v.id, len(body)) for v in yields if isinstance(v, Value))
        live: dict[int, tuple[int, int]] = {}
        worst = Footprint()

        def total(of: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
            return unified + sum(u for u, _ in of.values()), l1 + sum(c for _, c in of.values())

        for at, op in enumerate(body):
            if op.regions:
                handed = {o.id for o in op.operands if isinstance(o, Value) and last.get(o.id) == at}
                kept = {v: n for v, n in live.items() if not (op.name == "for" and v in handed)}
                for region in op.regions:
                    inside = {**kept, **{p.id: self.size(p) for p in region.params}}
                    worst = worst.worst(self.body(region.body, region.yields, *total(inside)))
            made = {r.id: self.size(r) for r in op.results}
            need, cube = total({**live, **made}) if not op.regions else (0, 0)
            worst = worst.worst(Footprint(need, op, cube, op))
            live.update(made)
            live = {v: n for v, n in live.items() if last.get(v, -1) > at}
        return worst
