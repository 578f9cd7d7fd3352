"""What emitting keeps: names, lines, expressions waiting to be written in place, broadcasts that may stay implicit.

Triton broadcasts operands of elementwise operations and masks by itself, so a broadcast is written out only where the
consumer needs the whole shape.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

from tilery.tile.ir import Kernel, Op, Operand, Value, operands_of, walk
from tilery.tile.ops import OPS
from tilery.tile.schedule import Schedule
from tilery.tile.size import Size
from tilery.tile.targets.triton.plan import Argument, Spec, expression
from tilery.tile.targets.triton.text import bare, is_atom, is_name, literal
from tilery.tile.targets.triton.values import HELPERS, extent

INLINE = 72
"""A value used once is written in place up to this many characters."""

_CHEAP = {"reshape", "broadcast", "transpose", "arange", "size"}
_RESERVED = {"tl", "triton", "libdevice", "float", "gdc_wait", "gdc_launch_dependents", *HELPERS}


@dataclass
class Memory:
    """A tensor in the kernel: a pointer, strides (a size, or a parameter's name), whether offsets need 64 bits."""

    pointer: str
    strides: tuple[Size | str, ...]
    wide: bool
    root: str


class Writer:
    def __init__(self, kernel: Kernel, schedule: Schedule, spec: Spec) -> None:
        self.kernel, self.schedule, self.spec = kernel, schedule, spec
        self.taken: set[str] = set(_RESERVED)
        self.function = self.name(kernel.name)
        self.names: dict[int, str] = {}
        self.owner: dict[str, int] = {}
        self.pending: dict[int, str] = {}
        self.thin: dict[int, str] = {}
        self.thin_shape: dict[int, list[int]] = {}
        self.becomes: dict[int, str] = {}
        self.uses, self.home, self.inline = _uses(kernel)
        self.used = {v.id for op in walk(kernel.body) for v in operands_of(op)}
        self.carried: set[str] = set()
        self.memory: dict[int, Memory] = {}
        self.lanes: dict[int, str] = {}
        self.helpers: set[str] = set()
        self.lines: list[tuple[int, str, str]] = []
        self.indent = 1
        self.loc = ""
        self.arguments: list[Argument] = []
        self.dims = {d.name: self.name(d.name) for d in kernel.dims}
        self.runtime: dict[str, str] = {}

    # --- names and lines --------------------------------------------------------------------------------------

    def name(self, wanted: str) -> str:
        base = re.sub(r"\W", "_", wanted) or "v"
        if base[0].isdigit() or keyword.iskeyword(base):
            base = f"_{base}"
        name, number = base, 1
        while name in self.taken:
            name, number = f"{base}_{number}", number + 1
        self.taken.add(name)
        return name

    def define(self, value: Value) -> str:
        """The name of a new value: its own, or that of the carried variable it is the next value of."""
        carried = self.becomes.pop(value.id, None)
        if carried is not None and not self.mentioned(carried):
            self.names[value.id] = carried
            return carried
        name = self.names[value.id] = self.name(value.name or "v")
        self.owner[name] = value.id
        return name

    def mentioned(self, name: str) -> bool:
        """Whether an expression that is yet to be written needs the current value of a variable."""
        word = re.compile(rf"\b{name}\b")
        return any(word.search(text) for text in (*self.pending.values(), *self.thin.values()))

    def line(self, code: str, op: Op | None = None) -> None:
        text = ""
        if op is not None and op.loc is not None and (op.loc.text() or "") != self.loc:
            self.loc = text = op.loc.text() or ""
        self.lines.append((self.indent, code, text))

    def dim(self, name: str) -> str:
        self.runtime[name] = self.dims.setdefault(name, name)
        return self.runtime[name]

    def size(self, size: Size, wide: bool = False) -> str:
        return expression(size, self.dim, wide)

    def lanes_of(self, n: int) -> str:
        """The name of 0 .. n-1."""
        if n not in self.lanes:
            self.lanes[n] = self.name(f"i{n}")
        return self.lanes[n]

    # --- operands ---------------------------------------------------------------------------------------------

    def use(self, operand: Operand, named: bool = False, thin: bool = False) -> str:
        """The source of an operand. `named`: as a name, because it is needed more than once; `thin`: a broadcast may
        be left to Triton.
        """
        if not isinstance(operand, Value):
            return literal(operand)
        if operand.id in self.thin:
            text = self.thin[operand.id]
            if self.uses[operand.id] == 1:
                del self.thin[operand.id]
            if not thin:
                text = f"tl.broadcast_to({text}, {[extent(e) for e in operand.tile.shape]})"
        elif operand.id in self.pending:
            text = self.pending.pop(operand.id)
        else:
            return self.names[operand.id]
        if not named or is_name(text):
            return text
        name = self.name(operand.name or "v")
        self.line(f"{name} = {text}")
        if not thin:
            self.names[operand.id] = name
        return name

    def value(self, op: Op, text: str) -> None:
        """Binds an operation's result to an expression: in place if it is used once, else as a statement."""
        result, text = op.result, bare(text)
        if result.id in self.becomes or result.id not in self.inline or len(text) > INLINE:
            if is_name(text) and result.id not in self.becomes and text not in self.carried:
                self.names[result.id] = text
            else:
                self.line(f"{self.define(result)} = {text}", op)
        else:
            self.pending[result.id] = text

    def broadcast(self, op: Op) -> None:
        """A broadcast costs nothing until a consumer needs the whole shape."""
        source, result = op.operands[0], op.result
        assert isinstance(source, Value)
        text = self.use(source, thin=True)
        if (self.uses[result.id] > 1 and not is_atom(text)) or len(text) > INLINE:
            name = self.name(source.name or "v")
            self.line(f"{name} = {text}", op)
            text = name
        self.thin[result.id] = text
        self.thin_shape[result.id] = self.thin_shape.get(source.id) or [extent(e) for e in source.tile.shape]

    def thin_enough(self, op: Op) -> bool:
        """Whether the operands of an elementwise operation reach its shape without their broadcasts."""
        shape = [extent(e) for e in op.result.tile.shape]
        reached = [1] * len(shape)
        for operand in op.operands:
            if isinstance(operand, Value) and operand.tile.shape:
                if operand.id in self.thin:
                    own = self.thin_shape[operand.id]
                else:
                    own = [extent(e) for e in operand.tile.shape]
                reached = [max(a, b) for a, b in zip(reached, own)]
        return reached == shape

    def carries_into(self, body: tuple[Op, ...], carried: tuple[Value, ...], yields: tuple[Operand, ...]) -> None:
        """Finds values that may take a carried variable's name at once: nothing reads the variable after them."""
        made = {r.id: at for at, op in enumerate(body) for r in op.results}
        last: dict[int, int] = {}
        for at, op in enumerate(body):
            for inner in walk((op,)):
                for operand in operands_of(inner):
                    last[operand.id] = at
        for param, result in zip(carried, yields):
            if not isinstance(result, Value) or result.id not in made or body[made[result.id]].name in ("for", "if"):
                continue
            if body[made[result.id]].name == "broadcast" or len(body[made[result.id]].results) > 1:
                continue
            shared = sum(y is param or y is result for y in yields) > 1 or param in yields
            if not shared and last.get(param.id, -1) <= made[result.id] and param.id in self.names:
                self.becomes[result.id] = self.names[param.id]


def _uses(kernel: Kernel) -> tuple[dict[int, int], dict[int, int], set[int]]:
    """(how often each value is read, the body it is made in, the values to write in place): those that are cheap and
    that one operation of the same body reads once.
    """
    readers: dict[int, list[int]] = {}
    home: dict[int, int] = {}
    cheap: set[int] = set()

    def visit(body: tuple[Op, ...]) -> None:
        for op in body:
            for operand in op.operands:
                if isinstance(operand, Value):
                    readers.setdefault(operand.id, []).append(id(body))
            for result in op.results:
                home[result.id] = id(body)
            if op.name in _CHEAP or (op.name in OPS and OPS[op.name].elementwise):
                cheap.update(r.id for r in op.results)
            for region in op.regions:
                visit(region.body)
                home.update((p.id, id(region.body)) for p in region.params)
                for operand in region.yields:
                    if isinstance(operand, Value):
                        readers.setdefault(operand.id, []).append(-1)

    visit(kernel.body)
    uses = {v: len(r) for v, r in readers.items()}
    return uses, home, {v for v in cheap if readers.get(v) == [home[v]]}
