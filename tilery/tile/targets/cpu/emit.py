"""Statements: every operation that is not fused into another becomes a loop nest (or a call) over tiles in scratch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tilery.tile.dtypes import DType, b1
from tilery.tile.errors import Loc, LoweringError
from tilery.tile.ir import Kernel, Op, Operand, Value, walk
from tilery.tile.targets.cpu.element import (
    Buffer,
    Elements,
    Fused,
    Memory,
    Scalar,
    encode,
    is_low,
    literal,
    register_type,
    stored_type,
)  # fmt: skip
from tilery.tile.targets.cpu.nest import Affine, Ext, NeedSplit, Nest
from tilery.tile.targets.cpu.plan import fold_accumulators, is_fused, make_plan

SIMD = ("#pragma omp simd",)
_WORDS = """
alignas and asm auto bool break case catch char class const continue default delete do double else enum
explicit export extern false float for friend goto if inline int long mutable namespace new not operator or
private protected public register return short signed sizeof static struct switch template this throw true try
typedef typename union unsigned using virtual void volatile while xor first last program programs arena
tensors ints scalars std min max abs exp log sin cos tan pow floor ceil round y0 y1 yn j0 j1 jn index div
gamma
"""
_RESERVED = frozenset(_WORDS.split())
"""What a C++ variable must not be called: keywords, library functions, names of the frame."""
_TAKEN = re.compile(r"(i\d+|d_\w+|t_\w+|value_\w+|bits_\w+|round_\w+|[A-Z][A-Z0-9_]+)$")
"""The same for loop variables, dimensions, functions of tile.h and macros."""


class Emitter(Elements):
    """Emits one kernel's body; `source.py` puts the function around it."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__({}, dict(kernel.blocks))
        self.kernel = fold_accumulators(kernel)
        self.plan = make_plan(self.kernel)
        self.lines: list[str] = []
        self.depth = 1
        self.names: set[str] = set(_RESERVED)
        self.offset = 0
        self.arena = 0
        self.loc: Loc | None = None
        self.targets: dict[int, Buffer] = {}
        outside = walk(tuple(op for op in kernel.body if op.name != "parallel"))
        self.effects_outside = any(op.name in ("store", "atomic") for op in outside)

    # --- text -------------------------------------------------------------------------------------------------

    def put(self, *lines: str) -> None:
        self.lines += ["    " * self.depth + line for line in lines]

    def name(self, wanted: str) -> str:
        """A C++ name nothing else has; loop constants end in `_`, so these never do."""
        base = (wanted if wanted.isidentifier() and wanted.isascii() else "v").strip("_") or "v"
        if _TAKEN.match(base):
            base += "_v"
        name, number = base, 1
        while name in self.names:
            number += 1
            name = f"{base}_v{number}"
        self.names.add(name)
        return name

    def comment(self, op: Op) -> None:
        """The user's lines of what is about to be computed, where they are new."""
        seen = dict.fromkeys(o.loc for o in (*self.lines_used, op) if o.loc is not None)
        self.lines_used = []
        for loc in sorted(seen, key=lambda at: (at.file, at.line)):
            if loc != self.loc:
                text = loc.text().replace("\\", "\\\\")
                self.put(f"// {loc.file.rsplit('/', 1)[-1]}:{loc.line}: {text}".rstrip(": "))
                self.loc = loc

    # --- scratch ----------------------------------------------------------------------------------------------

    def buffer(self, name: str, dtype: DType, shape: Sequence[Ext]) -> Buffer:
        """Scratch for a tile; freed at the end of the region it is made in."""
        strides: list[int] = []
        size = 1
        for extent in reversed(shape):
            strides.insert(0, size)
            size *= max(1, extent.cap)
        kind = register_type(dtype)
        width = (
            8 if kind in ("double", "int64_t") else {"int8_t": 1, "uint8_t": 1, "bool": 1, "int16_t": 2}.get(kind, 4)
        )
        text = self.name(name)
        self.put(f"{kind} *{text} = ({kind} *)(arena + {self.offset});")
        self.offset += (size * width + 63) // 64 * 64
        self.arena = max(self.arena, self.offset)
        return Buffer(text, dtype, tuple(shape), tuple(strides))

    # --- loops ------------------------------------------------------------------------------------------------

    def loops(
        self, op: Op, shape: Sequence[Ext], body: Callable[[Nest, list[Affine]], None],
        pragmas: Sequence[str] = SIMD, prepare: Callable[[Nest], None] | None = None, unroll: int = 2,
    ) -> None:  # fmt: skip
        """A nest over `shape`, `body` called for each element of its innermost iteration."""
        if any(extent.const == 0 for extent in shape):
            return
        versions = [self._version(shape, body, False, pragmas, prepare, unroll)]
        inside = list(dict.fromkeys(versions[0][1]))
        if inside:
            versions.append(self._version(shape, body, True, pragmas, prepare, unroll))
        self.comment(op)
        if not inside:
            self.block(versions[0][0])
            return
        self.put(f"if ({' && '.join(inside)}) {{")
        self.block(versions[0][0], braces=False)
        self.put("} else {")
        self.block(versions[1][0], braces=False)
        self.put("}")

    def block(self, lines: list[str], braces: bool = True) -> None:
        """Lines in a scope of their own, if they declare anything."""
        braces = braces and any(not line.startswith((" ", "#", "for", "}")) and " = " in line for line in lines)
        inner = 1 if braces or self.lines[-1].endswith("{") else 0
        if braces:
            self.put("{")
        self.depth += inner
        self.put(*lines)
        self.depth -= inner
        if braces:
            self.put("}")

    def _version(
        self, shape: Sequence[Ext], body: Callable[[Nest, list[Affine]], None], checked: bool,
        pragmas: Sequence[str], prepare: Callable[[Nest], None] | None, unroll: int,
    ) -> tuple[list[str], list[str]]:  # fmt: skip
        splits: dict[int, list[int]] = {}
        while True:
            nest = Nest(shape, splits, checked, unroll)
            try:
                if prepare is not None:
                    prepare(nest)
                for point in nest.points():
                    body(nest, point)
            except NeedSplit as need:
                parts = splits.setdefault(need.axis, [])
                if need.size in parts:
                    raise LoweringError(f"cannot index a reshape of {[e.text for e in shape]}") from None
                parts.append(need.size)
                parts.sort(reverse=True)
                continue
            return nest.render(pragmas), nest.inside

    def keep(self, op: Op, value: Value, number: int = 0) -> None:
        """Computes a fusible tile into scratch."""
        shape = self.shape(value)
        buffer = self.targets.get(value.id) or self.buffer(value.name, value.tile.dtype, shape)
        self.reps[value.id] = Fused(op, number)

        def body(nest: Nest, index: list[Affine]) -> None:
            got = self.element(nest, value, index, value.tile.dtype)
            nest.lines[-1].append(f"{buffer.at(index)} = {got.text};")

        self.loops(op, shape, body)
        self.reps[value.id] = buffer

    def as_buffer(self, operand: Value, op: Op) -> Buffer:
        """A tile in scratch, put there if it is not."""
        rep = self.reps[operand.id]
        if isinstance(rep, Buffer):
            return rep
        buffer = self.buffer(operand.name, operand.tile.dtype, self.shape(operand))
        self.fill(op, buffer, operand)
        self.reps[operand.id] = buffer
        return buffer

    def fill(self, op: Op, buffer: Buffer, operand: Operand) -> None:
        """Writes a tile (or a scalar everywhere) into scratch."""
        if isinstance(operand, Value) and self.reps[operand.id] is buffer:
            return

        def body(nest: Nest, index: list[Affine]) -> None:
            ranked = isinstance(operand, Value) and operand.tile.shape
            got = self.element(nest, operand, index if ranked else (), buffer.dtype)
            nest.lines[-1].append(f"{buffer.at(index)} = {got.text};")

        self.loops(op, buffer.shape, body)

    def define(self, op: Op, value: Value, text: str) -> None:
        """A scalar result."""
        name = self.name(value.name)
        self.put(f"const {register_type(value.tile.dtype)} {name} = {text};")
        self.reps[value.id] = Scalar(name)

    # --- operations -------------------------------------------------------------------------------------------

    def body(self, ops: Sequence[Op]) -> None:
        for op in ops:
            handler = getattr(self, f"op_{op.name}", None)
            if is_fused(op):
                for number, value in enumerate(op.results):
                    if not value.tile.shape:
                        self.scalar_op(op, value, number)
                    elif value.id in self.plan.kept:
                        self.keep(op, value, number)
                    else:
                        self.reps[value.id] = Fused(op, number)
            elif handler is not None:
                handler(op)
            else:
                raise LoweringError(f"the CPU target has no emitter for the operation {op.name!r}", op.loc)

    def scalar_op(self, op: Op, value: Value, number: int) -> None:
        """A fusible operation on scalars: computed at once."""
        self.reps[value.id] = Fused(op, number)
        nest = Nest((), {}, True)
        got = self.element(nest, value, (), value.tile.dtype)
        self.comment(op)
        lines = nest.lines[0]
        if len(lines) <= 1 and (
            not lines or lines[0].startswith(f"const {register_type(value.tile.dtype)} {got.text} = ")
        ):
            self.define(op, value, lines[0].split(" = ", 1)[1].rstrip(";") if lines else got.text)
            return
        name = self.name(value.name)
        self.put(f"{register_type(value.tile.dtype)} {name};")
        self.put("{", *(f"    {line}" for line in lines), f"    {name} = {got.text};", "}")
        self.reps[value.id] = Scalar(name)

    def op_size(self, op: Op) -> None:
        size = op.attr("size")
        self.sizes[op.result.id] = size
        if size.const is not None:
            self.reps[op.result.id] = Scalar(str(size.const))
        else:
            self.define(op, op.result, f"(int32_t){self.size_text(size)}")

    def op_count(self, op: Op) -> None:
        self.define(op, op.result, f"(int32_t){self.counts[op.attr('label')].text}")

    def op_tap(self, op: Op) -> None:
        pass

    def op_view(self, op: Op) -> None:
        kind = op.result.tensor
        base = self.memory[op.tensor.id]
        assert kind.strides is not None
        name = self.name(op.result.name)
        ctype = stored_type(kind.dtype)
        offset = self.size_text(kind.offset)
        self.put(f"{ctype} *{name} = ({ctype} *){base.name}" + (f" + {offset};" if offset != "0" else ";"))
        self.memory[op.result.id] = Memory(name, kind.dtype, kind.dims, tuple(self.size_text(s) for s in kind.strides))

    def op_store(self, op: Op) -> None:
        memory = self.memory[op.tensor.id]

        def body(nest: Nest, index: list[Affine]) -> None:
            place, mask = self.place(nest, op, index)
            got = self.element(nest, op.stored, index, memory.dtype, raw=True)
            guard = f"if ({mask.text}) " if mask is not None else ""
            nest.lines[-1].append(f"{guard}{memory.name}[{place.text}] = {encode(memory.dtype, got.text)};")

        self.loops(op, self.accessed(op), body)

    def accessed(self, op: Op) -> list[Ext]:
        """The shape a store or atomic writes."""
        return self.shape(op.stored) if isinstance(op.stored, Value) else []

    def op_atomic(self, op: Op) -> None:
        memory, value = self.memory[op.tensor.id], op.result
        dtype, kind = memory.dtype, op.attr("kind")
        shape = self.accessed(op)
        wanted = value.id in self.plan.used
        scalar = not value.tile.shape
        out = None
        if wanted and not scalar:
            out = self.buffer(value.name, dtype, shape)
            self.reps[value.id] = out
        name = self.name(value.name) if wanted and scalar else ""
        if name:
            self.put(f"{register_type(dtype)} {name} = 0;")
        bits = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}[dtype.bytes]
        stored = stored_type(dtype)

        def body(nest: Nest, index: list[Affine]) -> None:
            place, mask = self.place(nest, op, index)
            got = self.element(nest, op.stored, index, dtype)
            pointer = f"({bits} *)&{memory.name}[{place.text}]"
            old = f"t_bitcast<{stored}>(old_)"
            old = f"value_{dtype.name}({old})" if is_low(dtype) else old
            new = {
                "add": f"{old} + {got.text}", "max": f"t_max({old}, {got.text})", "min": f"t_min({old}, {got.text})",
                "or": f"{old} | {got.text}", "xchg": got.text,
            }[kind]  # fmt: skip
            new = f"({register_type(dtype)})({new})"
            change = f"[&]({bits} old_) {{ return t_bitcast<{bits}>(({stored}){encode(dtype, new)}); }}"
            call = f"t_atomic<{bits}>({pointer}, {change})"
            result = f"t_bitcast<{stored}>({call})"
            result = f"value_{dtype.name}({result})" if is_low(dtype) else result
            if out is not None:
                zero = literal(0, dtype)
                call = f"{out.at(index)} = {mask.text} ? {result} : {zero}" if mask else f"{out.at(index)} = {result}"
                nest.lines[-1].append(f"{call};")
            else:
                call = f"{name} = {result}" if name else call
                nest.lines[-1].append(f"if ({mask.text}) {call};" if mask else f"{call};")

        self.loops(op, shape, body, pragmas=())
        if name:
            self.reps[value.id] = Scalar(name)

    # --- control ----------------------------------------------------------------------------------------------

    def enter(self) -> tuple[dict[int, object], int, Loc | None]:
        self.depth += 1
        return dict(self.reps), self.offset, self.loc

    def leave(self, saved: tuple[dict[int, object], int, Loc | None]) -> None:
        self.depth -= 1
        self.reps, self.offset, self.loc = saved  # type: ignore[assignment]

    def op_for(self, op: Op) -> None:
        region = op.regions[0]
        start, stop, step = (self.scalar(o) for o in op.operands[:3])
        label, blocks = op.attr("label"), op.attr("kind") == "blocks"
        index, *params = region.params
        scalars: list[tuple[Value, str]] = []
        tiles: list[tuple[Value, Buffer, Buffer, int]] = []
        changed = [not (isinstance(y, Value) and y.id == p.id) for p, y in zip(params, region.yields)]
        for number, (param, init, result) in enumerate(zip(params, op.operands[3:], op.results)):
            dtype = param.tile.dtype
            if not param.tile.shape:
                name = self.name(param.name)
                self.put(f"{register_type(dtype)} {name} = {self.scalar(init, dtype)};")
                self.reps[param.id] = self.reps[result.id] = Scalar(name)
                scalars.append((param, name))
            else:
                shape = self.shape(param)
                now = self.buffer(param.name, dtype, shape)
                self.fill(op, now, init)
                self.reps[param.id] = self.reps[result.id] = now
                if changed[number]:
                    tiles.append((param, now, self.buffer(f"{param.name}_next", dtype, shape), number))
        size = self.blocks.get(label) if blocks else None
        if blocks and size is None:
            raise LoweringError(f"the block loop {label!r} has no size: bind a schedule first", op.loc)
        step = str(size) if blocks else step
        name = self.name(index.name)
        forward = f"{name} < {stop}" if not step.startswith("-") else f"{name} > {stop}"
        if not step.lstrip("-").isdigit():
            forward = f"({step} > 0 ? {name} < {stop} : {name} > {stop})"
        self.comment(op)
        self.put(f"for (int32_t {name} = {start}; {forward}; {name} += {step}) {{")
        saved = self.enter()
        self.reps[index.id] = Scalar(name)
        if blocks:
            assert size is not None
            self.block_count(label, index, op.operands[0], op.operands[1], name, stop, size)
        defined = {v.id for o in region.body if not o.regions for v in o.results}
        once = [y.id for y in region.yields if isinstance(y, Value)]
        for _, _, spare, number in tiles:
            produced = region.yields[number]
            if isinstance(produced, Value) and produced.id in defined and once.count(produced.id) == 1:
                self.targets[produced.id] = spare
        self.body(region.body)
        for param, _, spare, number in tiles:
            produced = region.yields[number]
            rep = self.reps[produced.id] if isinstance(produced, Value) else None
            if not (isinstance(rep, Buffer) and rep.name == spare.name):
                self.fill(op, spare, produced)
            del param
        temporaries = []
        for param, name in scalars:
            produced = region.yields[params.index(param)]
            if isinstance(produced, Value) and produced.id == param.id:
                continue
            text = self.scalar(produced, param.tile.dtype)
            fresh = self.name(f"{name}_next")
            temporaries.append((name, fresh))
            self.put(f"const {register_type(param.tile.dtype)} {fresh} = {text};")
        for name, fresh in temporaries:
            self.put(f"{name} = {fresh};")
        for _, now, spare, _ in tiles:
            self.put(f"std::swap({now.name}, {spare.name});")
        self.leave(saved)
        self.put("}")

    def block_count(
        self, label: str, index: Value, start: Operand, stop: Operand, name: str, stop_text: str, size: int
    ) -> None:
        """Declares how many positions this iteration of a block loop has."""
        low, high = self.known(start), self.known(stop)
        self.bounds[label] = (low, high)
        self.starts[index.id] = label
        length = None if low is None or high is None else (high - low).const
        if size == 1 or (length is not None and length % size == 0):
            self.counts[label] = Ext(str(size), size, size)
        else:
            count = self.name(f"n_{label}")
            self.put(f"const int64_t {count} = std::min<int64_t>({size}, {stop_text} - {name});")
            self.counts[label] = Ext(count, None, size)

    def op_if(self, op: Op) -> None:
        for result in op.results:
            if result.tile.shape:
                self.reps[result.id] = self.buffer(result.name, result.tile.dtype, self.shape(result))
            else:
                name = self.name(result.name)
                self.put(f"{register_type(result.tile.dtype)} {name};")
                self.reps[result.id] = Scalar(name)
        self.comment(op)
        self.put(f"if ({self.scalar(op.operands[0], b1)}) {{")
        for number, region in enumerate(op.regions):
            if number and not region.body and not region.yields:
                break
            if number:
                self.put("} else {")
            saved = self.enter()
            self.body(region.body)
            for result, produced in zip(op.results, region.yields):
                rep = self.reps[result.id]
                if isinstance(rep, Buffer):
                    self.fill(op, rep, produced)
                else:
                    assert isinstance(rep, Scalar)
                    self.put(f"{rep.text} = {self.scalar(produced, result.tile.dtype)};")
            self.leave(saved)
        self.put("}")
