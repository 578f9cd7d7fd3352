"""Operations over a whole tile: reductions, scans, sort, histogram, matrix products, and the grid."""

from __future__ import annotations

from tilery.tile.dtypes import DType, b1, f32, i8, i32
from tilery.tile.ir import Op, Operand, Span, Value
from tilery.tile.targets.cpu.element import Buffer, Fused, Scalar, is_low, literal, register_type
from tilery.tile.targets.cpu.emit import SIMD, Emitter
from tilery.tile.targets.cpu.nest import Affine, Ext, Nest

_COMBINE = {
    "sum": "{0} + {1}", "prod": "{0} * {1}", "max": "t_max({1}, {0})", "min": "t_min({1}, {0})",
    "any": "{0} | {1}", "all": "{0} & {1}",
}  # fmt: skip
_CLAUSE = {"sum": "+", "prod": "*", "max": "max", "min": "min", "any": "|", "all": "&"}


def _identity(kind: str, dtype: DType) -> str:
    value = {"sum": 0, "prod": 1, "max": dtype.lowest, "min": dtype.highest, "any": 0, "all": 1}[kind]
    return literal(value, dtype)


class KernelEmitter(Emitter):
    """The emitter with all operations."""

    def result(self, op: Op) -> Buffer | str:
        """Where a result goes: scratch, or a C++ variable for a scalar."""
        value = op.result
        if not value.tile.shape:
            name = self.name(value.name)
            self.put(f"{register_type(value.tile.dtype)} {name};")
            self.reps[value.id] = Scalar(name)
            return name
        buffer = self.targets.get(value.id) or self.buffer(value.name, value.tile.dtype, self.shape(value))
        return buffer

    def op_reduce(self, op: Op) -> None:
        source, kind, axis = op.operands[0], op.attr("kind"), op.attr("axis")
        assert isinstance(source, Value)
        shape = self.shape(source)
        out = self.result(op)
        if kind.startswith("arg"):
            self.reduce_arg(op, source, shape, axis, kind[3:], out)
        else:
            self.reduce_to(op, source, shape, axis, kind, out)
        if isinstance(out, Buffer):
            self.reps[op.result.id] = out

    def set_all(self, op: Op, out: Buffer | str, text: str) -> None:
        if isinstance(out, str):
            self.put(f"{out} = {text};")
        else:
            self.loops(op, out.shape, lambda nest, index: nest.lines[-1].append(f"{out.at(index)} = {text};"))

    def reduce_to(self, op: Op, source: Value, shape: list[Ext], axis: int, kind: str, out: Buffer | str) -> None:
        dtype = source.tile.dtype
        ctype = "int32_t" if dtype == b1 else register_type(dtype)
        identity = _identity(kind, dtype)
        if shape[axis].const == 0:
            self.set_all(op, out, identity)
        elif all(e.const == 1 for e in shape[axis + 1 :]):

            def prepare(nest: Nest) -> None:
                level = sum(loop.axis < axis for loop in nest.loops)
                nest.lines[level].append(f"{ctype} acc_ = {identity};")
                outer = [i for at, i in enumerate(nest.index) if at != axis]
                place = out if isinstance(out, str) else out.at(outer)
                acc = f"round_{dtype.name}(acc_)" if is_low(dtype) else "acc_"
                nest.after[level].append(f"{place} = {acc};")
                if nest.loops and nest.loops[-1].axis == axis:
                    nest.pragmas = (f"#pragma omp simd reduction({_CLAUSE[kind]} : acc_)",)

            def add(nest: Nest, index: list[Affine]) -> None:
                got = self.element(nest, source, index, dtype)
                nest.lines[-1].append(f"acc_ = {_COMBINE[kind].format('acc_', got.text)};")

            self.loops(op, shape, add, SIMD, prepare, unroll=0)
        else:
            self.set_all(op, out, identity)
            assert isinstance(out, Buffer)

            def accumulate(nest: Nest, index: list[Affine]) -> None:
                got = self.element(nest, source, index, dtype)
                place = out.at([i for at, i in enumerate(index) if at != axis])
                nest.lines[-1].append(f"{place} = {_COMBINE[kind].format(place, got.text)};")

            self.loops(op, shape, accumulate, unroll=0)

    def reduce_arg(self, op: Op, source: Value, shape: list[Ext], axis: int, kind: str, out: Buffer | str) -> None:
        """First the extreme value, then the least position that holds it."""
        dtype = source.tile.dtype
        if shape[axis].const == 0:
            self.set_all(op, out, "0")
            return
        if isinstance(out, str):
            best: Buffer | str = self.name("best")
            self.put(f"{register_type(dtype)} {best};")
        else:
            best = self.buffer("best", dtype, out.shape)
        self.reduce_to(op, source, shape, axis, kind, best)
        self.set_all(op, out, "INT32_MAX")

        def find(nest: Nest, index: list[Affine]) -> None:
            got = self.element(nest, source, index, dtype)
            rest = [i for at, i in enumerate(index) if at != axis]
            extreme = best if isinstance(best, str) else best.at(rest)
            place = out if isinstance(out, str) else out.at(rest)
            here = f"{got.text} == {extreme} ? (int32_t)({index[axis].text}) : INT32_MAX"
            nest.lines[-1].append(f"{place} = std::min({place}, {here});")

        self.loops(op, shape, find, ())

        def settle(nest: Nest, index: list[Affine]) -> None:
            place = out if isinstance(out, str) else out.at(index)
            nest.lines[-1].append(f"{place} = {place} == INT32_MAX ? 0 : {place};")

        self.loops(op, [] if isinstance(out, str) else out.shape, settle)

    def op_scan(self, op: Op) -> None:
        source, kind, axis = op.operands[0], op.attr("kind"), op.attr("axis")
        assert isinstance(source, Value)
        dtype, shape = source.tile.dtype, self.shape(source)
        out = self.targets.get(op.result.id) or self.buffer(op.result.name, dtype, shape)
        order = [a for a in range(len(shape)) if a != axis] + [axis]
        ctype = register_type(dtype)

        def prepare(nest: Nest) -> None:
            level = sum(loop.axis < len(shape) - 1 for loop in nest.loops)
            nest.lines[level].append(f"{ctype} acc_ = {_identity(kind, dtype)};")

        def step(nest: Nest, moved: list[Affine]) -> None:
            index = [Affine()] * len(shape)
            for at, a in enumerate(order):
                index[a] = moved[at]
            if op.attr("reverse"):
                extent = shape[axis]
                if extent.const is not None:
                    index[axis] = index[axis] * -1 + Affine((), extent.const - 1)
                else:
                    index[axis] = nest.opaque(f"{extent.text} - 1 - ({index[axis].text})", nest.level(index[axis]))
            got = self.element(nest, source, index, dtype)
            nest.lines[-1].append(f"acc_ = {_COMBINE[kind].format('acc_', got.text)};")
            nest.lines[-1].append(f"{out.at(index)} = acc_;")

        self.loops(op, [shape[a] for a in order], step, (), prepare, unroll=0)
        self.reps[op.result.id] = out

    def op_sort(self, op: Op) -> None:
        source = op.operands[0]
        assert isinstance(source, Value)
        shape = self.shape(source)
        out = self.targets.get(op.result.id) or self.buffer(op.result.name, source.tile.dtype, shape)
        self.fill(op, out, source)
        order = "true" if op.attr("descending") else "false"

        def row(nest: Nest, index: list[Affine]) -> None:
            nest.lines[-1].append(f"t_sort(&{out.at([*index, Affine()])}, {shape[-1].text}, {order});")

        self.loops(op, shape[:-1], row, (), unroll=0)
        self.reps[op.result.id] = out

    def op_histogram(self, op: Op) -> None:
        source, where = op.operands
        assert isinstance(source, Value)
        bins = op.attr("bins")
        out = self.buffer(op.result.name, i32, self.shape(op.result))
        self.fill(op, out, 0)

        def count(nest: Nest, index: list[Affine]) -> None:
            got = self.element(nest, source, index, source.tile.dtype)
            mask = self.element(nest, where, index, b1)
            inside = f"(uint64_t){got.text} < {bins}"
            guard = inside if mask.text == "true" else f"{mask.text} && {inside}"
            nest.lines[-1].append(f"if ({guard}) {out.name}[{got.text}]++;")

        self.loops(op, self.shape(source), count, ())
        self.reps[op.result.id] = out

    # --- matrix product ---------------------------------------------------------------------------------------

    def op_dot(self, op: Op) -> None:
        a, b = op.operands[:2]
        assert isinstance(a, Value)
        assert isinstance(b, Value)
        (m, k), n = self.shape(a), self.shape(b)[1]
        a_pointer, a_row = self.rows(op, a)
        flipped = self.reps[b.id]
        if isinstance(flipped, Fused) and flipped.op.name == "transpose":
            inner = flipped.op.operands[0]
            assert isinstance(inner, Value)
            name, (b_pointer, b_row) = "t_dot_nt", self.rows(op, inner)
        else:
            name, (b_pointer, b_row) = "t_dot_nn", self.rows(op, b)
        out = self.targets.get(op.result.id) or self.buffer(op.result.name, op.result.tile.dtype, self.shape(op.result))
        self.fill(op, out, op.operands[2] if len(op.operands) > 2 else (0 if a.tile.dtype == i8 else 0.0))
        self.comment(op)
        self.put(
            f"{name}({m.text}, {n.text}, {k.text}, {a_pointer}, {a_row}, {b_pointer}, {b_row}, "
            f"{out.name}, {out.strides[0]});"
        )
        self.reps[op.result.id] = out

    def rows(self, op: Op, value: Value) -> tuple[str, str]:
        """(pointer, elements between rows) of a 2-D tile whose rows are contiguous: in place where it lies so."""
        rep = self.reps[value.id]
        if isinstance(rep, Fused) and rep.op.name == "load":
            direct = self.direct(rep.op, value)
            if direct is not None:
                return direct
        buffer = self.as_buffer(value, op)
        return buffer.name, str(buffer.strides[0])

    def direct(self, op: Op, value: Value) -> tuple[str, str] | None:
        """The same for a load that needs no conversion, mask or gather."""
        memory = self.memory[op.tensor.id]
        if memory.dtype not in (f32, i8) or op.where is not None:
            return None
        parts, strides = [memory.name], []
        for (kind, operand), dim, stride in zip(op.index, memory.dims, memory.strides):
            if kind == "gather" or (isinstance(kind, Span) and not self.proven(op, kind, operand, dim)):
                return None
            start = self.scalar(operand)
            if start != "0":
                parts.append(f"(int64_t){start} * {stride}")
            if isinstance(kind, Span):
                strides.append(stride if kind.step == 1 else f"{stride} * {kind.step}")
        if len(strides) != 2 or strides[1] != "1":
            return None
        return " + ".join(parts), strides[0]

    # --- the grid ---------------------------------------------------------------------------------------------

    def op_parallel(self, op: Op) -> None:
        """Programs `first` to `last` of the grid, the last axis fastest; with `last` below 0 only their number."""
        axes = op.attr("axes")
        steps = dict(op.attr("steps", {}) or {})
        starts, stops, sizes, totals = [], [], [], []
        for number, (kind, label) in enumerate(axes):
            starts.append(self.scalar(op.operands[2 * number]))
            stops.append(self.scalar(op.operands[2 * number + 1]))
            sizes.append(self.blocks[label] if kind == "block" else int(steps.get(label, 1)))
            total = self.name(f"programs_{label}")
            span = stops[-1] if starts[-1] == "0" else f"{stops[-1]} - {starts[-1]}"
            self.put(f"const int64_t {total} = std::max<int64_t>(0, t_cdiv({span}, {sizes[-1]}));")
            totals.append(total)
        self.put(f"if (last < 0) return {' * '.join(totals)};")
        if self.effects_outside:
            self.put(f"last = {' * '.join(totals)};")
        self.put("for (int64_t program = first; program < last; program++) {")
        saved = self.enter()
        rest = "program"
        for number in reversed(range(len(axes))):
            param = op.regions[0].params[number]
            name = self.name(param.name)
            place = rest if number == 0 else f"{rest} % {totals[number]}"
            scaled = f"({place}) * {sizes[number]}" if sizes[number] != 1 else place
            text = scaled if starts[number] == "0" else f"{starts[number]} + {scaled}"
            self.put(f"const int32_t {name} = (int32_t)({text});")
            self.reps[param.id] = Scalar(name)
            if number and len(axes) > 1:
                fresh = self.name("rest")
                self.put(f"const int64_t {fresh} = {rest} / {totals[number]};")
                rest = fresh
        for number, (kind, label) in enumerate(axes):
            param = op.regions[0].params[number]
            if kind == "block":
                rep = self.reps[param.id]
                assert isinstance(rep, Scalar)
                bounds: tuple[Operand, Operand] = (op.operands[2 * number], op.operands[2 * number + 1])
                self.block_count(label, param, *bounds, rep.text, stops[number], sizes[number])
        self.body(op.regions[0].body)
        self.leave(saved)
        self.put("}")
