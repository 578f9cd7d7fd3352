"""From padded Tile IR to the source of one `@triton.jit` function, readable: the user's names, the user's lines.

One statement per value, except that a value used once is written where it is used. The grid is one-dimensional: the
program's number gives the indices of the parallel axes by division, the last axis running fastest.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel, Op, Operand, Value
from tilery.tile.ops import OPS
from tilery.tile.schedule import Schedule
from tilery.tile.size import Size
from tilery.tile.targets.triton.grid import host_expressions, tiles_on_host
from tilery.tile.targets.triton.memory import MemoryWriter
from tilery.tile.targets.triton.plan import (
    POINTERS,
    Allocation,
    Argument,
    Plan,
    Spec,
    contiguous_strides,
    expression,
    is_tensor,
)
from tilery.tile.targets.triton.text import atom, comment, is_atom
from tilery.tile.targets.triton.values import HELPERS, VALUES, extent
from tilery.tile.targets.triton.writer import Memory

WIDTH = 120
_CALL = re.compile(r"[\w.]+\(\{\d\}(, \{\d\})*\)")
"""A template that only calls a function."""


@dataclass(frozen=True)
class Emitted:
    """`source`: what to read; `code`: the same without comments, which is what a binary depends on."""

    plan: Plan
    source: str
    code: str


def emit(kernel: Kernel, schedule: Schedule, spec: Spec | None = None) -> Emitted:
    """Source and launch plan of a padded kernel. Raises `LoweringError` for what Triton cannot express."""
    if kernel.stage != "padded":
        raise LoweringError(f"the Triton target emits from the stage 'padded', got {kernel.stage!r}; use lower(...)")
    return Emitter(kernel, schedule, spec or Spec()).run()


class Emitter(MemoryWriter):
    """Writes one kernel; a target that restricts this one derives from it."""

    # --- the function -----------------------------------------------------------------------------------------

    def run(self) -> Emitted:
        kernel = self.kernel
        roots = [p.value for p in kernel.params if is_tensor(p.value)] + [o.value for o in kernel.outputs]
        tensors = [(self.declare(v), v.name) for v in roots]
        scalars = []
        for param in kernel.params:
            if not is_tensor(param.value):
                name = self.define(param.value)
                kind = "fp32" if param.value.tile.dtype.is_float else "i32"
                scalars.append(Argument("scalar", name, param.value.name, kind))
        if self.schedule.pdl:
            self.line("gdc_wait()")
        self.body(kernel.body)
        if self.schedule.pdl:
            self.line("gdc_launch_dependents()")
        arguments = [*self.arguments]
        multiples = {d.name: d.multiple_of for d in kernel.dims}
        for source, name in self.runtime.items():
            divisible = source in self.spec.divisible or multiples.get(source, 1) % 16 == 0
            arguments.append(Argument("dim", name, source, "i32", divisible=divisible))
        plan = self.plan(tuple(arguments + scalars), tuple(tensors))
        source, code = self.render(plan)
        return Emitted(plan, source, code)

    def declare(self, value: Value) -> str:
        """A tensor's parameters: its pointer, and its leading strides if they are not told by its shape."""
        kind, name = value.tensor, self.define(value)
        aligned = value.name not in self.spec.unaligned
        self.arguments.append(Argument("tensor", name, value.name, POINTERS[kind.dtype.name], divisible=aligned))
        wide = value.name in self.spec.wide
        strides: tuple[Size | str, ...] = contiguous_strides(kind) if kind.strides is None else kind.strides
        if value.name in self.spec.strided:
            names = []
            for axis in range(len(kind.dims) - 1):
                names.append(self.name(f"{name}_stride{axis}"))
                divisible = f"{value.name}.{axis}" in self.spec.divisible
                self.arguments.append(
                    Argument("stride", names[-1], value.name, "i64" if wide else "i32", axis, divisible)
                )
            strides = (*names, *strides[-1:])
        self.memory[value.id] = Memory(name, strides, wide, value.name)
        return name

    def plan(self, arguments: tuple[Argument, ...], tensors: tuple[tuple[str, str], ...]) -> Plan:
        host_dims: dict[str, str] = {}

        def dim(name: str) -> str:
            host_dims[name] = self.dims.setdefault(name, name)
            return host_dims[name]

        known = host_expressions(self.kernel, dim, self.names)
        grid = tiles_on_host(self.kernel, known, bool(self.schedule.persistent))
        allocations = tuple(
            Allocation(
                self.names[o.value.id], o.value.name, o.value.tensor.dtype.name,
                tuple(expression(d, dim) for d in o.value.tensor.dims), o.init,
            )
            for o in self.kernel.outputs
        )  # fmt: skip
        returns = tuple(self.names[v.id] for v in self.kernel.returns)
        scalars = tuple((a.name, a.source) for a in arguments if a.kind == "scalar" and a.type == "i32")
        made = {a.name for a in allocations}
        return Plan(
            self.function, arguments, allocations, returns, grid,
            tuple((local, name) for name, local in {**host_dims, **self.runtime}.items()), scalars,
            self.schedule.warps or 4, self.schedule.stages or 2, self.schedule.pdl, self.schedule.persistent,
            tuple(t for t in tensors if t[0] not in made), self.schedule.registers,
        )  # fmt: skip

    def head(self, plan: Plan) -> list[str]:
        """The comment that a text begins with."""
        return [
            f"# {self.kernel.name}: emitted by tilery.tile; edit the kernel, not this file.",
            f"# specialisation: {self.spec}",
            f"# schedule: {self.schedule.to_json()}",
        ]

    def render(self, plan: Plan) -> tuple[str, str]:
        body = ["", "import triton", "import triton.language as tl"]
        text = "\n".join(code for _, code, _ in self.lines)
        if "libdevice." in text:
            body.append("from triton.language.extra import libdevice")
        if self.schedule.pdl:
            body.append("from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
        for helper in sorted(self.helpers):
            body += ["", "", *HELPERS[helper].rstrip().split("\n")]
        body += ["", "", "@triton.jit", f"def {self.function}({', '.join(a.name for a in plan.arguments)}):"]
        body += [f"    {name} = tl.arange(0, {n})" for n, name in sorted(self.lanes.items())]
        source, code = [*self.head(plan), *body], [*body]
        for indent, line, remark in self.lines:
            line = "    " * indent + line
            code.append(line)
            room = WIDTH - len(line) - 4
            source.append(f"{line}  # {comment(remark, room)}" if remark and room > 12 else line)
        return "\n".join(source) + "\n", "\n".join(code) + "\n"

    # --- structure --------------------------------------------------------------------------------------------

    def body(self, body: tuple[Op, ...]) -> None:
        for op in body:
            handler = getattr(self, f"op_{op.name}", None)
            if handler is not None:
                handler(op)
            else:
                self.pure(op)

    def op_parallel(self, op: Op) -> None:
        axes, steps, region = op.attr("axes"), dict(op.attr("steps", ())), op.regions[0]
        counts = []
        for number, (_, label) in enumerate(axes):
            start, stop = op.operands[2 * number], op.operands[2 * number + 1]
            counts.append(self.count(start, stop, steps.get(label, 1)))
        first = 0 if self.schedule.persistent else 1
        names = list(counts)
        for number in range(first, len(axes)):
            if len(axes) > 1 and not is_atom(counts[number]):
                names[number] = self.name(f"{axes[number][1]}_count")
                self.line(f"{names[number]} = {counts[number]}")
        current = "tl.program_id(0)"
        if self.schedule.persistent:
            current = self.name("tile_id")
            total = " * ".join(map(atom, names))
            self.line(f"for {current} in tl.range(tl.program_id(0), {total}, tl.num_programs(0)):", op)
            self.indent += 1
        elif len(axes) > 1:
            current = self.name("program_id")
            self.line(f"{current} = tl.program_id(0)", op)
        for number in reversed(range(len(axes))):
            index, label = region.params[number], axes[number][1]
            start, step = op.operands[2 * number], steps.get(label, 1)
            text = current
            if number:
                text = f"{current} % {atom(names[number])}"
            if step != 1:
                text = f"{atom(text)} * {step}"
            if start != 0:
                text = f"{self.use(start, True)} + {atom(text)}"
            self.line(f"{self.define(index)} = {text}", op)
            if number > 1:
                following = self.name("program_id")
                self.line(f"{following} = {current} // {atom(names[number])}")
                current = following
            elif number == 1:
                current = f"({current} // {atom(names[number])})"
        self.body(region.body)
        if self.schedule.persistent:
            self.indent -= 1

    def count(self, start: Operand, stop: Operand, step: int) -> str:
        """How many steps an axis has."""
        if not isinstance(start, Value) and not isinstance(stop, Value):
            return str(max(-(-(int(stop) - int(start)) // step), 0))
        length = self.use(stop, True) if start == 0 else f"{self.use(stop, True)} - {self.use(start, True)}"
        if step == 1:
            return length if start == 0 else f"tl.maximum({length}, 0)"
        return f"tl.cdiv({length}, {step})"

    def op_for(self, op: Op) -> None:
        region = op.regions[0]
        carried = region.params[1:]
        bounds = [self.use(o) for o in op.operands[:3]]
        for param, init in zip(carried, op.operands[3:]):
            self.enter(param, init, op)
        index = self.define(region.params[0])
        self.line(f"for {index} in tl.range({', '.join(bounds[: 3 if bounds[2] != '1' else 2])}):", op)
        self.carries_into(region.body, carried, region.yields)
        before = len(self.lines)
        self.indent += 1
        self.body(region.body)
        self.carry(carried, region.yields)
        if len(self.lines) == before:
            self.line("pass")
        self.indent -= 1
        for result, param in zip(op.results, carried):
            self.names[result.id] = self.names[param.id]

    def enter(self, param: Value, init: Operand, op: Op) -> None:
        """A carried variable before its loop; it takes over the name of a first value that nothing else reads."""
        if isinstance(init, Value):
            known = self.names.get(init.id, "")
            alone = self.uses[init.id] == 1 and self.home.get(init.id) == self.home[op.results[0].id]
            if known and alone and self.owner.get(known) == init.id:
                self.names[param.id], self.owner[known] = known, param.id
                self.carried.add(known)
                return
        text = self.use(init) if isinstance(init, Value) else self.typed(init, param)
        self.line(f"{self.define(param)} = {text}", op)
        self.carried.add(self.names[param.id])

    def carry(self, params: tuple[Value, ...], yields: tuple[Operand, ...]) -> None:
        """Assigns the next values of carried variables; one that another still needs is kept aside first."""
        moves = []
        for param, result in zip(params, yields):
            text = self.use(result) if isinstance(result, Value) else self.typed(result, param)
            if text != self.names[param.id]:
                moves.append((self.names[param.id], text))
        for at, (target, _) in enumerate(moves):
            if any(text == target for _, text in moves[at + 1 :]):
                kept = self.name(target)
                self.line(f"{kept} = {target}")
                moves = [(t, kept if later > at and text == target else text) for later, (t, text) in enumerate(moves)]
        for target, text in moves:
            self.line(f"{target} = {text}")

    def op_if(self, op: Op) -> None:
        results = [self.define(r) for r in op.results]
        self.line(f"if {self.use(op.operands[0])}:", op)
        for number, region in enumerate(op.regions):
            if number and not region.body and not results:
                break
            if number:
                self.line("else:")
            before = len(self.lines)
            self.indent += 1
            self.body(region.body)
            for name, result, operand in zip(results, op.results, region.yields):
                text = self.use(operand) if isinstance(operand, Value) else self.typed(operand, result)
                self.line(f"{name} = {text}")
            if len(self.lines) == before:
                self.line("pass")
            self.indent -= 1

    # --- values -----------------------------------------------------------------------------------------------

    def op_tap(self, op: Op) -> None:
        """Taps are read where the interpreter runs an earlier stage."""

    def op_size(self, op: Op) -> None:
        self.value(op, self.size(op.attr("size")))

    def op_arange(self, op: Op) -> None:
        lanes = self.lanes_of(extent(op.attr("extent")))
        self.value(op, lanes if op.operands[0] == 0 else f"{atom(self.use(op.operands[0]))} + {lanes}")

    def pure(self, op: Op) -> None:
        definition = OPS[op.name]
        if op.name == "broadcast":
            return self.broadcast(op)
        if op.name in VALUES:
            named, thin = op.name == "histogram", op.name == "where" and self.thin_enough(op)
            text = VALUES[op.name](op, [self.use(o, named, thin) for o in op.operands], self.helpers)
        elif definition.triton:
            text = self.template(definition.triton, op)
        else:
            raise LoweringError(
                f"the operation {op.name!r} has no Triton form; give its OpDef a `triton` template, or take the CPU "
                "target",
                op.loc,
            )
        if len(op.results) == 1:
            self.value(op, text)
        else:
            self.line(f"{', '.join(map(self.define, op.results))} = {text}", op)

    def template(self, template: str, op: Op) -> str:
        """An elementwise template filled in; an operand it names twice becomes a variable."""
        fields = [f for _, f, _, _ in string.Formatter().parse(template) if f is not None]
        call, thin = _CALL.fullmatch(template), self.thin_enough(op)
        args = []
        for number, operand in enumerate(op.operands):
            text = self.use(operand, fields.count(str(number)) > 1, thin)
            args.append(text if call else atom(text))
        return template.format(*args)
