"""One element of a tile as a C++ expression: fused operations are followed to the memory and scalars they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tilery.tile.dtypes import DType, i32
from tilery.tile.errors import LoweringError
from tilery.tile.ir import Block, Extent, Op, Operand, Span, Value
from tilery.tile.ops import OPS, cast
from tilery.tile.size import Size, as_size
from tilery.tile.targets.cpu.nest import Affine, E, Ext, Nest

# In registers and scratch a bool is a bool and every float up to 32 bits a float; in memory they are `stored`.
_STORED = {"b1": "uint8_t", "bf16": "uint16_t", "f16": "uint16_t", "e4m3": "uint8_t", "e5m2": "uint8_t"}
_TEMPLATES = {"shr": "t_shr({0}, {1})", "bit_not": "~{0}"}
_EXACT = {"neg", "abs", "sign", "maximum", "minimum", "where", "floor", "ceil", "trunc", "round", "copysign"}
"""Operations on 16-bit floats whose result needs no rounding."""


def register_type(dtype: DType) -> str:
    return "float" if dtype.name in ("bf16", "f16", "e4m3", "e5m2") else dtype.cpp


def stored_type(dtype: DType) -> str:
    return _STORED.get(dtype.name, dtype.cpp)


def is_low(dtype: DType) -> bool:
    """Whether values are held as the f32 of the same value."""
    return dtype.is_float and dtype.bits < 32


def decode(dtype: DType, text: str) -> str:
    """The register value of a stored one."""
    return f"value_{dtype.name}({text})" if is_low(dtype) else f"({text} != 0)" if dtype.kind == "b" else text


def encode(dtype: DType, text: str) -> str:
    """The stored value of a register one, rounded if it has to be."""
    return f"bits_{dtype.name}({text})" if is_low(dtype) else text


def literal(value: int | float | bool, dtype: DType) -> str:
    if dtype.kind == "b":
        return "true" if value else "false"
    if dtype.is_float:
        kind = "double" if dtype.bits == 64 else "float"
        number = float(value) if not is_low(dtype) else cast(torch.tensor(float(value)), dtype).item()
        if math.isnan(number):
            return f"std::numeric_limits<{kind}>::quiet_NaN()"
        if math.isinf(number):
            return f"{'-' if number < 0 else ''}std::numeric_limits<{kind}>::infinity()"
        return repr(number) + ("" if kind == "double" else "f")
    number = int(value)
    if dtype.bits == 64 or number == -(1 << 31):
        return f"({dtype.cpp})INT64_C({number})" if number != -(1 << 63) else "INT64_MIN"
    return str(number) if dtype == i32 else f"({dtype.cpp}){number}"


def convert(text: str, source: DType, target: DType, raw: bool = False) -> str:
    """A cast between register values; `raw`: the caller rounds to `target` itself."""
    if source == target:
        return text
    if target.kind == "b":
        return f"({text} != 0)"
    if is_low(target):
        wide = text if register_type(source) == "float" else f"(float){text}"
        return wide if raw else f"round_{target.name}({wide})"
    if source.is_float and target.is_int and target.bits < 32:
        return f"({target.cpp})(int32_t){text}"
    return text if register_type(source) == register_type(target) else f"({register_type(target)}){text}"


@dataclass(frozen=True)
class Scalar:
    """A C++ constant or literal."""

    text: str


@dataclass(frozen=True)
class Buffer:
    """A tile in scratch: pointer variable, extents, strides."""

    name: str
    dtype: DType
    shape: tuple[Ext, ...]
    strides: tuple[int, ...]

    def at(self, index: Sequence[Affine]) -> str:
        total = Affine()
        for one, stride in zip(index, self.strides):
            total = total + one * stride
        return f"{self.name}[{total.text}]"


@dataclass(frozen=True)
class Fused:
    """Result `number` of an operation that is computed where it is used."""

    op: Op
    number: int = 0


@dataclass(frozen=True)
class Memory:
    """A tensor: typed pointer variable, dims and strides as C++ (and dims as sizes, for proofs)."""

    name: str
    dtype: DType
    dims: tuple[Size, ...]
    strides: tuple[str, ...]


Rep = Scalar | Buffer | Fused


class Elements:
    """Looks values up and expands fused operations; the emitter adds statements to it."""

    def __init__(self, env: Mapping[str, int], blocks: Mapping[str, int]) -> None:
        self.env = env
        self.blocks = blocks
        self.reps: dict[int, Rep] = {}
        self.memory: dict[int, Memory] = {}
        self.counts: dict[str, Ext] = {}
        self.bounds: dict[str, tuple[Size | None, Size | None]] = {}
        self.sizes: dict[int, Size] = {}
        self.starts: dict[int, str] = {}
        self.lines_used: list[Op] = []

    # --- sizes ------------------------------------------------------------------------------------------------

    def size_text(self, size: Size) -> str:
        """A size in C++; dimensions are the variables `d_NAME`."""
        if size.const is not None:
            return str(size.const)
        terms = []
        for atoms, factor in size.terms:
            parts = [str(factor)] if factor != 1 or not atoms else []
            for atom in atoms:
                if hasattr(atom, "dim"):
                    by = atom.dim.multiple_of
                    parts.append(f"d_{atom.dim.name}" if by == 1 else f"(d_{atom.dim.name} / {by})")
                else:
                    parts.append(f"t_floordiv({self.size_text(atom.size)}, {atom.divisor})")
            terms.append(" * ".join(parts))
        return "(" + " + ".join(terms) + ")" if len(terms) > 1 else terms[0]

    def extent(self, extent: Extent) -> Ext:
        if isinstance(extent, Block):
            return self.counts[extent.label]
        if extent.const is None:
            raise LoweringError(
                f"the extent {extent} of a tile is not bound; lower the kernel with its dimensions first"
            )
        return Ext(str(extent.const), extent.const, extent.const)

    def shape(self, value: Value) -> list[Ext]:
        return [self.extent(e) for e in value.tile.shape]

    def known(self, operand: Operand) -> Size | None:
        """An operand as a size, where it is one."""
        return self.sizes.get(operand.id) if isinstance(operand, Value) else as_size(int(operand))

    # --- elements ---------------------------------------------------------------------------------------------

    def scalar(self, operand: Operand, dtype: DType = i32) -> str:
        if not isinstance(operand, Value):
            return literal(operand, dtype)
        rep = self.reps[operand.id]
        assert isinstance(rep, Scalar), f"{operand.name} is no scalar"
        return rep.text

    def element(self, nest: Nest, operand: Operand, index: Sequence[Affine], dtype: DType, raw: bool = False) -> E:
        """Element `index` of an operand. `raw`: a value that the caller will round to `dtype` may come unrounded."""
        if not isinstance(operand, Value):
            return E(literal(operand, dtype))
        rep = self.reps[operand.id]
        if isinstance(rep, Scalar):
            return E(rep.text)
        key = (operand.id, tuple(index), raw)
        if key not in nest.memo:
            if isinstance(rep, Buffer):
                nest.memo[key] = nest.let(register_type(rep.dtype), rep.at(index), nest.level(*index), _hint(operand))
            else:
                nest.memo[key] = self._fused(nest, rep, operand, tuple(index), raw)
        return nest.memo[key]

    def _fused(self, nest: Nest, rep: Fused, value: Value, index: tuple[Affine, ...], raw: bool) -> E:
        op = rep.op
        self.lines_used.append(op)
        handler: Callable[..., E] | None = getattr(self, f"at_{op.name}", None)
        if handler is not None:
            return handler(nest, op, value, index, raw, rep.number)
        return self._elementwise(nest, op, value, index)

    def _elementwise(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...]) -> E:
        dtype = next((o.tile.dtype for o in op.operands if isinstance(o, Value)), value.tile.dtype)
        parts = []
        for number, operand in enumerate(op.operands):
            kind = value.tile.dtype if op.name == "where" and number else dtype
            if isinstance(operand, Value):
                kind = operand.tile.dtype
            parts.append(self.element(nest, operand, index if _ranked(operand) else (), kind))
        template = _TEMPLATES.get(op.name) or OPS[op.name].cpp
        if op.name == "bit_not" and dtype.kind == "b":
            template = "!{0}"  # ~true is -2, which is true
        if not template:
            raise LoweringError(
                f"the operation {op.name!r} has no C++ form; give its OpDef a `cpp` format string", op.loc
            )
        text = template.format(*(p.text for p in parts))
        if is_low(value.tile.dtype) and op.name not in _EXACT:
            text = f"round_{value.tile.dtype.name}({text})"
        return nest.let(register_type(value.tile.dtype), text, max(p.level for p in parts), _hint(value))

    def at_cast(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        source = op.operands[0]
        assert isinstance(source, Value)
        inner = self.element(nest, source, index, source.tile.dtype)
        text = convert(inner.text, source.tile.dtype, value.tile.dtype, raw)
        if text == inner.text:
            return inner
        return nest.let(register_type(value.tile.dtype), text, inner.level, _hint(value))

    def at_bitcast(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        source = op.operands[0]
        assert isinstance(source, Value)
        inner = self.element(nest, source, index, source.tile.dtype)
        bits = encode(source.tile.dtype, inner.text)
        if source.tile.dtype.kind == "b":
            bits = f"(uint8_t){bits}"
        text = decode(value.tile.dtype, f"t_bitcast<{stored_type(value.tile.dtype)}>({bits})")
        return nest.let(register_type(value.tile.dtype), text, inner.level, _hint(value))

    def at_full(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        source, dtype = op.operands[0], value.tile.dtype
        if isinstance(source, Value):
            return E(convert(self.scalar(source), source.tile.dtype, dtype, raw))
        return E(literal(source, dtype) if not is_low(dtype) else f"round_{dtype.name}({literal(source, dtype)})")

    def at_arange(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        start = self.scalar(op.operands[0])
        where = index[0].text if start == "0" else f"{start} + {index[0].text}"
        return nest.let("int32_t", f"(int32_t)({where})", nest.level(index[0]), _hint(value))

    def at_broadcast(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        source = op.operands[0]
        assert isinstance(source, Value)
        one = as_size(1)
        inner = [Affine() if e == one else i for e, i in zip(source.tile.shape, index)]
        return self.element(nest, source, inner, value.tile.dtype, raw)

    def at_transpose(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        inner = [Affine()] * len(index)
        for at, axis in enumerate(op.attr("perm")):
            inner[axis] = index[at]
        return self.element(nest, op.operands[0], inner, value.tile.dtype, raw)

    def at_join(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        last = index[-1]
        if not last.terms:
            return self.element(nest, op.operands[last.const], index[:-1], value.tile.dtype, raw)
        a, b = (self.element(nest, o, index[:-1], value.tile.dtype, raw) for o in op.operands)
        level = max(a.level, b.level, nest.level(last))
        return nest.let(register_type(value.tile.dtype), f"({last.text} ? {b.text} : {a.text})", level, _hint(value))

    def at_split(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        return self.element(nest, op.operands[0], (*index, Affine((), number)), value.tile.dtype, raw)

    def at_take(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        source, where = op.operands
        assert isinstance(source, Value)
        assert isinstance(where, Value)
        axis = op.attr("axis")
        place = self.element(nest, where, index, where.tile.dtype)
        inner = list(index)
        inner[axis] = nest.opaque(f"(int64_t){place.text}", place.level)
        return self.element(nest, source, inner, value.tile.dtype, raw)

    def at_reshape(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        source = op.operands[0]
        assert isinstance(source, Value)
        inner = reshape_index(nest, self.shape(value), self.shape(source), value.tile.shape, source.tile.shape, index)
        return self.element(nest, source, inner, value.tile.dtype, raw)

    # --- memory -----------------------------------------------------------------------------------------------

    def at_load(self, nest: Nest, op: Op, value: Value, index: tuple[Affine, ...], raw: bool, number: int) -> E:
        place, mask = self.place(nest, op, index)
        memory = self.memory[op.tensor.id]
        read = decode(memory.dtype, f"{memory.name}[{place.text}]")
        level = place.level
        if mask is not None:
            other = literal(op.attr("other"), value.tile.dtype)
            if is_low(value.tile.dtype):
                other = f"round_{value.tile.dtype.name}({other})"
            read, level = f"{mask.text} ? {read} : {other}", max(level, mask.level)
        return nest.let(register_type(value.tile.dtype), read, level, _hint(value))

    def place(self, nest: Nest, op: Op, index: Sequence[Affine]) -> tuple[E, E | None]:
        """(offset in the tensor, mask) of element `index` of a memory operation."""
        memory = self.memory[op.tensor.id]
        gathers = [o for k, o in op.index if k == "gather" and isinstance(o, Value)]
        joint = len(gathers[0].tile.shape) if gathers else 0
        parts: list[E] = []
        masks: list[E] = []
        axis, gathered = 0, None
        for (kind, operand), dim, stride in zip(op.index, memory.dims, memory.strides):
            if isinstance(kind, Span):
                at = index[axis]
                axis += 1
                start = self.scalar(operand)
                level = nest.level(at)
                moved = at * kind.step
                text = moved.text if start == "0" else f"{start} + {moved.text}" if moved != Affine() else start
                if not self.proven(op, kind, operand, dim):
                    limit = self.size_text(dim)
                    count = self.extent(kind.extent).text
                    nest.inside.append(f"{start} >= 0 && {start} + ((int64_t){count} - 1) * {kind.step} < {limit}")
                    if nest.checked:
                        masks.append(nest.let("bool", f"(uint64_t)({text}) < (uint64_t){limit}", level, "in"))
                parts.append(E(_times(text, stride), level))
            elif kind == "gather":
                assert isinstance(operand, Value)
                if gathered is None:
                    gathered = index[axis : axis + joint]
                    axis += joint
                one = self.element(nest, operand, gathered, operand.tile.dtype)
                parts.append(E(_times(one.text, stride), one.level))
            else:
                parts.append(E(_times(self.scalar(operand), stride)))
        if op.where is not None:
            masks.append(self.element(nest, op.where, index if _ranked(op.where) else (), _BOOL))
        parts = [p for p in parts if p.text != "0"] or [E("0")]
        place = E(" + ".join(p.text for p in parts), max(p.level for p in parts))
        if not masks:
            return place, None
        return place, E(" && ".join(m.text for m in masks), max(m.level for m in masks))

    def proven(self, op: Op, kind: Span, operand: Operand, dim: Size) -> bool:
        """Whether a span surely lies inside a dimension."""
        if op.attr("unchecked"):
            return True
        if isinstance(kind.extent, Block):
            low, high = self.bounds[kind.extent.label]
            if not isinstance(operand, Value) or self.starts.get(operand.id) != kind.extent.label or kind.step != 1:
                return False
        else:
            low = self.known(operand)
            if kind.extent.const == 0:
                return True
            high = None if low is None else low + (kind.extent - 1) * kind.step + 1
        return low is not None and high is not None and _surely(low) and _surely(dim - high)


_BOOL = DType("b1", "b", 8, None, "", "bool")  # type: ignore[arg-type]


def _surely(size: Size) -> bool:
    """Whether a size is surely at least 0 (dimensions are)."""
    return all(factor >= 0 for _, factor in size.terms)


def _ranked(operand: Operand) -> bool:
    return isinstance(operand, Value) and bool(operand.tile.shape)


def _times(text: str, stride: str) -> str:
    if text == "0" or stride == "0":
        return "0"
    wide = f"({text})" if " " in text else text
    return f"(int64_t){wide}" if stride == "1" and wide == text and not text.startswith("i") else (
        wide if stride == "1" else f"(int64_t){wide} * {stride}"
    )  # fmt: skip


def _hint(value: Value) -> str:
    name = value.name if value.name.isidentifier() and value.name.isascii() else "v"
    return name.rstrip("0123456789_") or "v"  # no digit at its end, where a counter follows


def reshape_index(
    nest: Nest, target: Sequence[Ext], source: Sequence[Ext], target_extents: Sequence[Extent],
    source_extents: Sequence[Extent], index: Sequence[Affine],
) -> list[Affine]:  # fmt: skip
    """The index in `source` of element `index` of its row-major reshape to `target`."""
    inner = [Affine()] * len(source)
    a, b = 0, 0
    while a < len(target) or b < len(source):
        if a < len(target) and target[a].const == 1:
            a += 1
            continue
        if b < len(source) and source[b].const == 1:
            b += 1
            continue
        if a < len(target) and b < len(source) and target_extents[a] == source_extents[b]:
            inner[b] = index[a]
            a, b = a + 1, b + 1
            continue
        # The shortest group of axes with equal products on both sides.
        first_a, first_b, size_a, size_b = a, b, 1, 1
        known = True
        while a < len(target) or b < len(source):
            if a < len(target) and (size_a <= size_b or b == len(source)) and target[a].const is not None:
                size_a *= target[a].const or 0
                a += 1
            elif b < len(source) and source[b].const is not None:
                size_b *= source[b].const or 0
                b += 1
            else:
                known = False
                break
            if size_a == size_b and size_a != 1:
                break
        if not known or size_a != size_b:
            return _general(nest, target, source, index)
        line = Affine()
        for axis in range(first_a, a):
            line = line * (target[axis].const or 0) + index[axis]
        for axis in reversed(range(first_b, b)):
            size = source[axis].const or 1
            if axis == first_b:
                inner[axis] = line
            else:
                line, inner[axis] = nest.divmod(line, size)
    return inner


def _general(nest: Nest, target: Sequence[Ext], source: Sequence[Ext], index: Sequence[Affine]) -> list[Affine]:
    """Through the linear position, with divisions."""
    text = "0"
    for extent, one in zip(target, index):
        text = f"({text}) * {extent.text} + ({one.text})" if text != "0" else f"({one.text})"
    level = nest.level(*index)
    line = nest.opaque(text, level)
    inner = []
    for extent in reversed(source):
        inner.append(nest.opaque(f"{line.text} % {extent.text}", level))
        line = nest.opaque(f"{line.text} / {extent.text}", level)
    return inner[::-1]
