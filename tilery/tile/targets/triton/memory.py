"""Loads, stores and atomics: an address from a tensor's strides and an access's index, a mask, an eviction policy."""

from __future__ import annotations

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Op, Span, Value
from tilery.tile.size import Size
from tilery.tile.targets.triton.plan import LIMIT
from tilery.tile.targets.triton.text import atom, is_atom, literal, place
from tilery.tile.targets.triton.values import extent, filled
from tilery.tile.targets.triton.writer import Memory, Writer

_ATOMICS = {
    "add": "i32 i64 f16 bf16 f32 f64", "max": "i32 i64 f32", "min": "i32 i64 f32", "or": "i32 i64",
    "xchg": "i32 i64 f32 f64",
}  # fmt: skip


class MemoryWriter(Writer):
    def typed(self, number: int | float | bool, like: Value) -> str:
        """A literal as a value of a type, which a carried or merged variable must keep."""
        return filled(like.tile, number)

    def op_view(self, op: Op) -> None:
        source, kind = self.memory[op.tensor.id], op.result.tensor
        assert kind.strides is not None
        text = source.pointer
        if op.tensor.tensor.dtype != kind.dtype:
            text = f"{text}.to(tl.pointer_type({kind.dtype.triton}), bitcast=True)"
        if kind.offset.terms:
            text = f"{text} + {self.size(kind.offset, source.wide)}"
        name = source.pointer
        if text != name:
            name = self.define(op.result)
            self.line(f"{name} = {text}", op)
        self.memory[op.result.id] = Memory(name, kind.strides, source.wide, source.root)

    def pointer(self, op: Op, rank: int) -> str:
        """The address of each element: the scalar part first, so that Triton sees how the rest runs."""
        memory = self.memory[op.tensor.id]
        scalars: list[str] = []
        vectors: list[str] = []
        constant, axis, placed = 0, 0, -1
        joint = max((len(o.tile.shape) for k, o in op.index if k == "gather" and isinstance(o, Value)), default=0)
        for (kind, operand), stride in zip(op.index, memory.strides):
            number = stride.const if isinstance(stride, Size) else None
            step = 1
            if kind == "gather":
                assert isinstance(operand, Value)
                if placed < 0:
                    placed, axis = axis, axis + joint
                text = self.use(operand)
                bits = operand.tile.dtype.bits
                if bits < 32 or (memory.wide and bits < 64):
                    text = f"{atom(text)}.to(tl.int{64 if memory.wide else 32})"
                vectors.append(self.times(atom(text) + place(rank, placed, joint), stride, memory.wide))
                continue
            if isinstance(kind, Span):
                step, length = kind.step, extent(kind.extent)
                text = self.lanes_of(length)
                reach = (length - 1) * step * (LIMIT if number is None else number)
                if memory.wide and reach >= LIMIT:
                    text = f"{text}.to(tl.int64)"
                text += place(rank, axis)
                vectors.append(self.times(text if step == 1 else f"{text} * {step}", stride, memory.wide))
                axis += 1
            if not isinstance(operand, Value) and number is not None:
                constant += int(operand) * number
            elif operand != 0:
                text = self.use(operand)
                if memory.wide:
                    text = f"tl.cast({text}, tl.int64)"
                scalars.append(self.times(text, stride, memory.wide))
        if constant:
            scalars.append(str(constant))
        base = " + ".join([memory.pointer, *(s if is_atom(s) else f"({s})" for s in scalars)])
        if not vectors:
            return base
        offsets = " + ".join(vectors)
        return f"{base} + {offsets}" if len(vectors) == 1 and is_atom(offsets) else f"{base} + ({offsets})"

    def times(self, text: str, stride: Size | str, wide: bool) -> str:
        if isinstance(stride, str):
            return f"{atom(text)} * {stride}"
        if stride.const == 1:
            return text
        return f"{atom(text)} * {atom(self.size(stride, wide))}"

    def evict(self, op: Op) -> str:
        policy = self.schedule.evict.get(self.memory[op.tensor.id].root)
        return f', eviction_policy="evict_{policy}"' if policy else ""

    def op_load(self, op: Op) -> None:
        kind = op.result.tile
        text = self.pointer(op, len(kind.shape))
        if op.where is not None:
            other = op.attr("other")
            number = literal(float(other) if kind.dtype.is_float else int(other))
            text += f", mask={self.use(op.where, thin=True)}, other={number}"
        self.line(f"{self.define(op.result)} = tl.load({text}{self.evict(op)})", op)

    def op_store(self, op: Op) -> None:
        stored = op.stored
        assert isinstance(stored, Value)
        text = f"{self.pointer(op, len(stored.tile.shape))}, {self.use(stored)}"
        if op.where is not None:
            text += f", mask={self.use(op.where, thin=True)}"
        self.line(f"tl.store({text}{self.evict(op)})", op)

    def order(self, op: Op, rank: int) -> str:
        """A single counter orders memory between programs; a tile of sums does not have to."""
        return "relaxed" if rank else "acq_rel"

    def op_atomic(self, op: Op) -> None:
        kind, dtype = op.attr("kind"), op.result.tile.dtype
        if dtype.name not in _ATOMICS[kind].split():
            raise LoweringError(
                f"atomic {kind} on {dtype}: this target has it for {', '.join(_ATOMICS[kind].split())}; keep the "
                "counter in one of these",
                op.loc,
            )
        rank = len(op.result.tile.shape)
        stored = op.stored
        value = self.use(stored) if isinstance(stored, Value) else self.typed(stored, op.result)
        text = f"{self.pointer(op, rank)}, {value}"
        mask = "" if op.where is None else self.use(op.where, named=True)
        if mask:
            text += f", mask={mask}"
        text += f', sem="{self.order(op, rank)}"'
        call = f"tl.atomic_{kind}({text})"
        if op.result.id not in self.used:
            self.line(call, op)
            return
        name = self.define(op.result)
        self.line(f"{name} = {call}", op)
        if mask:
            self.line(f"{name} = tl.where({mask}, {name}, {literal(0.0 if dtype.is_float else 0)})")
