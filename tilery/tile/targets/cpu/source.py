"""The whole C++ file of a kernel, and what a caller must pass to it."""

from __future__ import annotations

from dataclasses import dataclass

from tilery.tile.ir import Kernel, Op, Span, TensorType, TileType, Value, walk
from tilery.tile.size import Dim, Size
from tilery.tile.targets.cpu.collect import KernelEmitter
from tilery.tile.targets.cpu.element import Memory, Scalar, stored_type
from tilery.tile.targets.cpu.plan import program_cost

HEADER = '#include "tile.h"\n'
SERIAL_NS = 15_000
"""Estimated work below which one thread does it all: waking another costs about half of it."""


@dataclass(frozen=True)
class Source:
    """`text`: C++ without the header line. `launch(pool, tensors..., dims..., strides..., ints..., floats...)` takes
    the tensors (parameters, then outputs), the dimensions `dims`, the leading strides of the tensors in `strided`, then
    the scalars by kind, in the kernel's order. `replay` takes the same as an array of 8-byte values."""

    name: str
    text: str
    dims: tuple[str, ...]
    strided: tuple[tuple[str, int], ...]
    ints: tuple[str, ...]
    floats: tuple[str, ...]


def free_dims(kernel: Kernel) -> list[Dim]:
    """The dimensions that are not bound, in order of name."""
    found: set[Dim] = set()

    def sizes(item: object) -> None:
        if isinstance(item, Size):
            found.update(item.dims)
        elif isinstance(item, Span):
            sizes(item.extent)
        elif isinstance(item, tuple):
            for one in item:
                sizes(one)
        elif isinstance(item, TensorType):
            sizes((item.dims, item.strides, item.offset))
        elif isinstance(item, TileType):
            sizes(item.shape)

    def op(o: Op) -> None:
        sizes(tuple(v for _, v in o.attrs))
        for value in (*o.results, *(v for v in o.operands if isinstance(v, Value))):
            sizes(value.type)

    for param in kernel.params:
        sizes(param.value.type)
    for out in kernel.outputs:
        sizes(out.value.type)
    for o in walk(kernel.body):
        op(o)
    return sorted(found, key=lambda d: d.name)


def emit(kernel: Kernel, symbol: str, strided: frozenset[str] = frozenset()) -> Source:
    """C++ of a bound kernel. `strided`: names of tensors that are not contiguous."""
    emitter = KernelEmitter(kernel)
    dims = free_dims(kernel)
    strides: list[tuple[str, int]] = []
    ints = [
        p.value.name for p in kernel.params if isinstance(p.value.type, TileType) and not p.value.tile.dtype.is_float
    ]
    floats = [p.value.name for p in kernel.params if isinstance(p.value.type, TileType) and p.value.tile.dtype.is_float]
    tensors = [
        v
        for v in (*(p.value for p in kernel.params), *(o.value for o in kernel.outputs))
        if isinstance(v.type, TensorType)
    ]
    for number, dim in enumerate(dims):
        emitter.names.add(f"d_{dim.name}")
        emitter.put(f"const int64_t d_{dim.name} = ints[{number}];")
    for number, value in enumerate(tensors):
        kind = value.tensor
        name, ctype = emitter.name(value.name), stored_type(kind.dtype)
        emitter.put(f"{ctype} *{name} = ({ctype} *)tensors[{number}];")
        texts: list[str] = []
        for axis in range(len(kind.dims)):
            if value.name in strided and axis + 1 < len(kind.dims):
                texts.append(emitter.name(f"{name}_stride{axis}"))
                emitter.put(f"const int64_t {texts[-1]} = ints[{len(dims) + len(strides)}];")
                strides.append((value.name, axis))
            else:
                size = Size.make({(): 1})
                for inner in kind.dims[axis + 1 :]:
                    size = size * inner
                texts.append(emitter.size_text(size))
        emitter.memory[value.id] = Memory(name, kind.dtype, kind.dims, tuple(texts))
    for number, wanted in enumerate(ints + floats):
        value = next(p.value for p in kernel.params if p.value.name == wanted)
        name = emitter.name(wanted)
        at = f"ints[{len(dims) + len(strides) + number}]" if number < len(ints) else f"scalars[{number - len(ints)}]"
        emitter.put(f"const {value.tile.dtype.cpp} {name} = ({value.tile.dtype.cpp}){at};")
        emitter.reps[value.id] = Scalar(name)
    head = emitter.lines
    emitter.lines = []
    emitter.body(emitter.kernel.body)
    arena = [f"    char *arena = t_arena({emitter.arena});"] if emitter.arena else []
    body = "\n".join([*head, *arena, *emitter.lines])
    cost = program_cost(kernel)
    serial = emitter.effects_outside
    text = f"""\
// {kernel.name}: programs `first` to `last` of the grid; their number if `last` is below 0.
extern "C" int64_t {symbol}(
    void *const *tensors, const int64_t *ints, const double *scalars, int64_t first, int64_t last
) {{
{body}
    return 0;
}}

{_launch(symbol, len(tensors), len(dims) + len(strides) + len(ints), len(floats), cost, serial)}"""
    return Source(symbol, text, tuple(d.name for d in dims), tuple(strides), tuple(ints), tuple(floats))


def _launch(symbol: str, tensors: int, ints: int, floats: int, cost: float, serial: bool) -> str:
    """The functions called from outside: pack the arguments and share the programs among threads if that pays."""
    params = [f"void *t{i}" for i in range(tensors)] + [f"int64_t n{i}" for i in range(ints)]
    params += [f"double s{i}" for i in range(floats)]

    def pack(kind: str, name: str, letter: str, count: int) -> str:
        return f"    {kind}{name}[] = {{{', '.join(f'{letter}{i}' for i in range(count)) or '0'}}};"

    share = f"n < 2 || pool == nullptr || n * {max(1, round(cost))} < {SERIAL_NS}"
    head = f"""\
extern "C" void {symbol}_launch({", ".join(["t_pool pool", *params])}) {{
{pack("void *const ", "tensors", "t", tensors)}
{pack("const int64_t ", "ints", "n", ints)}
{pack("const double ", "scalars", "s", floats)}"""
    passed = ["(t_pool)a[0]", *(f"(void *)a[{i + 1}]" for i in range(tensors))]
    passed += [f"a[{i + 1 + tensors}]" for i in range(ints)]
    passed += [f"t_bitcast<double>(a[{i + 1 + tensors + ints}])" for i in range(floats)]
    packed = f"""\
extern "C" void {symbol}_replay(const int64_t *a) {{
    {symbol}_launch({", ".join(passed)});
}}
"""
    if serial:  # writes outside of the grid happen once: one call does everything, whatever its `last`
        return f"{head}\n    {symbol}(tensors, ints, scalars, 0, INT64_MAX);\n}}\n{packed}"
    return f"""\
{head}
    const int64_t n = {symbol}(tensors, ints, scalars, 0, -1);
    if ({share}) {{
        {symbol}(tensors, ints, scalars, 0, n);
        return;
    }}
    struct Context {{
        void *const *tensors;
        const int64_t *ints;
        const double *scalars;
    }} context = {{tensors, ints, scalars}};
    pool([](const void *c, int64_t first, int64_t last) {{
        const Context &x = *(const Context *)c;
        {symbol}(x.tensors, x.ints, x.scalars, first, last);
    }}, &context, n);
}}
{packed}"""
