"""The Graph IR: tensors, and the kernels that make them. `@tile.graph` turns a Python function of kernels into one.

Called with torch tensors, the function just runs. Traced, it gives a `Graph`: plain data, printed as readable Python
and parsed back (`graph_text.py`), executed in the reference interpreter, its edges derived from what each kernel reads
and writes (also through views, which share memory with the tensor they come from).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tilery.tile.builder import fail
from tilery.tile.dtypes import DType, f32, i32
from tilery.tile.errors import TraceError
from tilery.tile.ir import TensorType, TileType, Type
from tilery.tile.signature import Parameter, Signature, Specialisation
from tilery.tile.size import Dim, Size, _Unit, as_size

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel
    from tilery.tile.page import Page


class CallRecorder(Protocol):
    """Takes kernels' calls in their place."""

    def call(self, kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


RECORDER: ContextVar[CallRecorder | None] = ContextVar("tile_recorder", default=None)
"""The graph trace, or recording of C calls (`targets.cpu.tape`), in progress; kernels called meanwhile go there."""


# --- data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """A use of a variable by name."""

    name: str

    def __str__(self) -> str:
        return self.name


Argument = Ref | Size | int | float | bool | None


@dataclass(frozen=True)
class Variable:
    """A tensor or a runtime scalar; `inout`: a parameter that the graph writes."""

    name: str
    type: Type
    inout: bool = False


@dataclass(frozen=True)
class Call:
    """One kernel. `kernel`: its full name; `arguments`: by the kernel's parameter names; `writes`: those it changes."""

    kernel: str
    key: Specialisation
    arguments: tuple[tuple[str, Argument], ...]
    writes: tuple[str, ...] = ()
    results: tuple[Variable, ...] = ()

    def reads(self) -> list[str]:
        """Names of the variables it takes, changed ones included."""
        return [a.name for _, a in self.arguments if isinstance(a, Ref)]

    def changes(self) -> list[str]:
        """Names of the variables it writes: results, and arguments changed in place."""
        taken = dict(self.arguments)
        return [v.name for v in self.results] + [str(taken[name]) for name in self.writes]


@dataclass(frozen=True)
class View:
    """Another reading of a tensor's memory; costs nothing."""

    source: str
    result: Variable


Node = Call | View
Edge = tuple[int, int, str, str]


@dataclass(frozen=True)
class Graph:
    """Calls in program order."""

    name: str
    params: tuple[Variable, ...]
    nodes: tuple[Node, ...]
    returns: tuple[str, ...]
    dims: tuple[Dim, ...] = ()

    def __str__(self) -> str:
        from tilery.tile.graph_text import print_graph

        return print_graph(self)

    def roots(self) -> dict[str, str]:
        """The variable whose memory each view shows."""
        roots: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, View):
                roots[node.result.name] = roots.get(node.source, node.source)
        return roots

    def edges(self) -> list[Edge]:
        """(from, to, kind, tensor): node `to` must follow node `from`. RAW: reads what it wrote; WAR: overwrites what
        it read; WAW: overwrites what it wrote. Two views of one tensor count as overlapping."""
        roots = self.roots()
        wrote: dict[str, int] = {}
        read: dict[str, list[int]] = {}
        found: dict[Edge, None] = {}
        for number, node in enumerate(self.nodes):
            if not isinstance(node, Call):
                continue
            for name in dict.fromkeys(roots.get(n, n) for n in node.reads()):
                if name in wrote:
                    found.setdefault((wrote[name], number, "RAW", name))
            for name in dict.fromkeys(roots.get(n, n) for n in node.changes()):
                if name in wrote:
                    found.setdefault((wrote[name], number, "WAW", name))
                for reader in read.get(name, []):
                    if reader != wrote.get(name):
                        found.setdefault((reader, number, "WAR", name))
                wrote[name], read[name] = number, []
            for name in (roots.get(n, n) for n in node.reads()):
                if wrote.get(name) != number:
                    read.setdefault(name, []).append(number)
        return list(found)

    def check(self) -> None:
        """Raises `TraceError` unless every variable is defined once, before its use."""
        known = {v.name for v in self.params}
        for node in self.nodes:
            used = [node.source] if isinstance(node, View) else node.reads()
            made = [node.result] if isinstance(node, View) else list(node.results)
            for name in used:
                if name not in known:
                    raise TraceError(f"graph {self.name!r}: {name!r} is used before anything makes it")
            for variable in made:
                if variable.name in known:
                    raise TraceError(f"graph {self.name!r}: {variable.name!r} is made twice")
                known.add(variable.name)
        for name in self.returns:
            if name not in known:
                raise TraceError(f"graph {self.name!r}: it returns {name!r}, which nothing makes")


# --- tracing ----------------------------------------------------------------------------------------------------


class Symbol:
    """Stands for a tensor or a scalar while a graph is traced. It can be passed on, returned and viewed."""

    def __init__(self, variable: Variable) -> None:
        self.variable = variable

    @property
    def dtype(self) -> DType:
        return self.variable.type.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.variable.type.dims if isinstance(self.variable.type, TensorType) else ()

    def __repr__(self) -> str:
        return f"{self.variable.name}: {self.variable.type}"

    def _refuse(self, *args: Any) -> Any:
        raise fail(
            f"{self.variable.name!r} has no value while the graph is traced: pass it to kernels and graphs, or use "
            "tile.view; computing with it belongs in a kernel"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __getitem__ = _refuse
    __setitem__ = __bool__ = __iter__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __matmul__ = _refuse


class Recorder:
    """Collects the nodes of one trace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []
        self.names: set[str] = set()

    def variable(self, wanted: str, type: Type, inout: bool = False) -> Variable:
        name, number = wanted, 1
        while name in self.names:
            name, number = f"{wanted}_{number}", number + 1
        self.names.add(name)
        return Variable(name, type, inout)

    def call(self, kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Records a kernel's call; gives symbols for what it returns. Raises `TraceError` at the user's line."""
        bound = kernel.signature.bind(args, kwargs)
        sizes = match(kernel.signature, bound)
        key, arguments = specialise(kernel.signature, bound)
        ir = kernel.trace(key)
        results = []
        for value in ir.returns:
            dims = tuple(substitute(d, sizes, f"{kernel.name}: {value.name}") for d in value.tensor.dims)
            results.append(self.variable(value.name, TensorType(value.tensor.dtype, dims)))
        writes = tuple(p.value.name for p in ir.params if p.inout)
        self.nodes.append(Call(kernel.full_name, key, arguments, writes, tuple(results)))
        symbols = tuple(map(Symbol, results))
        return None if not symbols else symbols[0] if len(symbols) == 1 else symbols


def specialise(
    signature: Signature, bound: Mapping[str, Any]
) -> tuple[Specialisation, tuple[tuple[str, Argument], ...]]:
    """The key of a call with symbols, and its arguments that are not static."""
    dtypes: list[tuple[str, DType | None]] = []
    statics: list[tuple[str, Any]] = []
    arguments: list[tuple[str, Argument]] = []
    for p in signature.parameters:
        value = bound[p.name]
        what = f"{signature.name}: {p.name}"
        if p.kind == "static":
            statics.append((p.name, value))
            continue
        if p.spec is None:
            arguments.append((p.name, _scalar(p, value, what)))
            continue
        dtype = None if value is None else value.dtype
        if (dtype is None and not p.spec.optional) or (dtype is not None and dtype not in p.spec.dtypes):
            raise fail(f"{what} must be {p.spec}, got {value!r}")
        dtypes.append((p.name, dtype))
        arguments.append((p.name, None if value is None else Ref(value.variable.name)))
    return Specialisation(tuple(dtypes), tuple(statics)), tuple(arguments)


def _scalar(p: Parameter, value: Any, what: str) -> Argument:
    if isinstance(value, Symbol):
        if value.shape or value.dtype != (f32 if p.kind == "float" else i32):
            raise fail(f"{what} must be a Python {p.kind}, got {value!r}")
        return Ref(value.variable.name)
    if p.kind == "int" and isinstance(value, (Dim, Size)):
        return as_size(value)
    if not isinstance(value, (int, float)) or (p.kind == "int" and not isinstance(value, int)):
        raise fail(f"{what} must be a Python {p.kind}, got {value!r}")
    return value


def match(signature: Signature, bound: Mapping[str, Any]) -> dict[str, Size]:
    """The caller's size for each dimension of a callee. Raises `TraceError` where shapes do not fit."""
    sizes: dict[str, Size] = {}
    said: dict[str, str] = {}
    later: list[tuple[str, Size, Size]] = []
    for p in signature.parameters:
        value = bound[p.name]
        if p.spec is None or value is None:
            continue
        if not isinstance(value, Symbol):
            raise fail(f"{signature.name}: {p.name} must be a tensor of the graph, got {type(value).__name__}")
        if len(value.shape) != len(p.spec.dims):
            raise fail(
                f"{signature.name}: {p.name} must have {len(p.spec.dims)} dimensions {list(p.spec.dims)}, got {value!r}"
            )
        for axis, (wanted, given) in enumerate(zip(p.spec.dims, value.shape)):
            where = f"{signature.name}: {p.name}.shape[{axis}]"
            dim = next(iter(wanted.dims)) if len(wanted.dims) == 1 else None
            if dim is None or wanted != dim.size:
                later.append((where, wanted, given))
            elif dim.name not in sizes:
                if given.factor % dim.multiple_of:
                    raise fail(f"{where} must be a multiple of {dim.multiple_of}, which {given} is not known to be; "
                               f"declare its Dim with multiple_of={dim.multiple_of}")  # fmt: skip
                sizes[dim.name], said[dim.name] = given, where
            elif sizes[dim.name] != given:
                raise fail(f"{where} is {dim.name} = {given}, but {said[dim.name]} says {dim.name} = {sizes[dim.name]}")
    for where, wanted, given in later:
        unknown = [d for d in wanted.dims if d.name not in sizes]
        if len(unknown) == 1 and len(wanted.dims) == 1 and wanted.factor:
            # One dimension with a factor, such as 2 * I: divide the given size.
            scale = wanted.factor // unknown[0].multiple_of
            sizes[unknown[0].name] = given // scale if scale else given
        if (unknown and unknown[0].name not in sizes) or substitute(wanted, sizes, where) != given:
            raise fail(f"{where} must be {wanted}, got {given}")
    return sizes


def substitute(size: Size, sizes: Mapping[str, Size], where: str) -> Size:
    """A callee's size in the caller's dimensions."""
    total = Size()
    for atoms, factor in size.terms:
        product = as_size(factor)
        for atom in atoms:
            if isinstance(atom, _Unit):
                if atom.dim.name not in sizes:
                    raise fail(f"{where}: no tensor of the call has the dimension {atom.dim.name}")
                product = product * (sizes[atom.dim.name] // atom.dim.multiple_of)
            else:
                product = product * (substitute(atom.size, sizes, where) // atom.divisor)
        total = total + product
    return total


def view(x: Any, dtype: DType, shape: Sequence[Any], strides: Sequence[Any] | None = None, offset: Any = 0) -> Any:
    """The same memory as other elements, in a graph (strides and offset counted in elements of `dtype`)."""
    if strides is None:
        steps: list[Any] = [1]
        for s in reversed(list(shape)[1:]):
            steps.insert(0, steps[0] * s)
        strides = steps
    if isinstance(x, torch.Tensor):
        count = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        raw = x.as_strided((count,), (1,)).view(torch.uint8)
        flat = raw[: raw.shape[0] // dtype.bytes * dtype.bytes].view(dtype.torch)
        return flat.as_strided(list(shape), list(strides), flat.storage_offset() + offset)
    recorder = RECORDER.get()
    if not isinstance(recorder, Recorder) or not isinstance(x, Symbol):
        raise fail(f"tile.view takes a torch tensor, or a tensor of the graph being traced; got {type(x).__name__}")
    kind = TensorType(dtype, tuple(map(as_size, shape)), tuple(map(as_size, strides)), as_size(offset))
    variable = recorder.variable(re.sub(r"_\d+$", "", x.variable.name), kind)
    recorder.nodes.append(View(x.variable.name, variable))
    return Symbol(variable)


class GraphFunction:
    """A graph: call it with tensors. `trace` gives its IR for a specialisation."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.signature = Signature(function)
        self.name = function.__name__
        self._traces: dict[Specialisation, Graph] = {}
        functools.update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"<tile graph {self.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the kernels in order; inside another graph's trace, adds its kernels to that graph."""
        bound = self.signature.bind(args, kwargs)
        if isinstance(RECORDER.get(), Recorder):
            match(self.signature, bound)
            specialise(self.signature, bound)
        else:
            self.signature.specialise(bound)
            self.signature.bind_dims(bound)
        return self.function(**bound)

    def trace(self, key: Specialisation | None = None, **statics: Any) -> Graph:
        """The graph for dtypes and static values, traced once. Without a key: the first dtype of each annotation,
        optional tensors absent, static values as given or by default."""
        key = self._key(statics) if key is None else key
        if key not in self._traces:
            self._traces[key] = self._trace(key)
        return self._traces[key]

    def _key(self, statics: Mapping[str, Any]) -> Specialisation:
        tensors = [(p.name, None if p.spec.optional else p.spec.dtypes[0]) for p in self.signature.parameters if p.spec]
        values = [(p.name, statics.get(p.name, p.default)) for p in self.signature.parameters if p.kind == "static"]
        missing = [name for name, value in values if value is inspect.Parameter.empty]
        if missing:
            raise TraceError(
                f"graph {self.name!r}: the static parameter {missing[0]!r} needs a value: trace({missing[0]}=...)"
            )
        return Specialisation(tuple(tensors), tuple(values))

    def _trace(self, key: Specialisation) -> Graph:
        recorder = Recorder(self.name)
        dtypes, statics = dict(key.dtypes), dict(key.statics)
        params: list[Variable] = []
        arguments: dict[str, Any] = {}
        for p in self.signature.parameters:
            if p.kind == "static":
                arguments[p.name] = statics[p.name]
                continue
            kind: Type = TileType(f32 if p.kind == "float" else i32)
            if p.spec is not None:
                dtype = dtypes[p.name]
                if dtype is None:
                    arguments[p.name] = None
                    continue
                kind = TensorType(dtype, p.spec.dims)
            params.append(recorder.variable(p.name, kind, p.spec is not None and p.spec.inout))
            arguments[p.name] = Symbol(params[-1])
        token = RECORDER.set(recorder)
        try:
            returned = self.function(**arguments)
        finally:
            RECORDER.reset(token)
        items = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        for item in items:
            if not isinstance(item, Symbol):
                raise TraceError(
                    f"graph {self.name!r} returns {type(item).__name__}; a graph returns tensors of its kernels"
                )
        writable = {v.name for v in params if v.inout}
        made = Graph(
            self.name, tuple(params), tuple(recorder.nodes), tuple(i.variable.name for i in items), self.signature.dims
        )
        made.check()
        _check_writes(made, writable)
        return made

    def page(self, **known: Any) -> Page:
        """Pictures of the graph as one HTML page: `.save(path)`. Dimensions, static values and dtypes by name; optional
        tensors are absent unless given (`bias=True` or a dtype)."""
        from tilery.tile.page import graph_page

        return graph_page(self, known)

    def interpret(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the traced graph in the reference interpreter."""
        bound = self.signature.bind(args, kwargs)
        key = self.signature.specialise(bound)
        self.signature.bind_dims(bound)
        out = interpret_graph(self.trace(key), bound)
        return None if not out else out[0] if len(out) == 1 else out


def _check_writes(graph: Graph, writable: set[str]) -> None:
    roots, params = graph.roots(), {v.name for v in graph.params}
    for node in graph.nodes:
        for name in node.changes() if isinstance(node, Call) else ():
            root = roots.get(name, name)
            if root in params and root not in writable:
                assert isinstance(node, Call)
                short = node.kernel.rsplit(".", 1)[-1]
                raise TraceError(f"graph {graph.name!r}: {short} writes the parameter {root!r}; annotate it InOut[...]")


def graph(function: Callable[..., Any]) -> GraphFunction:
    """Decorator: a Python function of tensors that calls kernels and other graphs."""
    return GraphFunction(function)


# --- reference --------------------------------------------------------------------------------------------------


def interpret_graph(
    graph: Graph, arguments: Mapping[str, Any], kernels: Mapping[str, Kernel] | None = None
) -> tuple[torch.Tensor, ...]:
    """Runs a graph on named arguments in the reference interpreter. `kernels` by full name; default: the registry."""
    from tilery.tile import registry

    values: dict[str, Any] = {v.name: arguments[v.name] for v in graph.params}
    env = _bind(graph, values)

    def value(argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return values[argument.name]
        return argument.evaluate(env) if isinstance(argument, Size) else argument

    for node in graph.nodes:
        if isinstance(node, View):
            kind = node.result.type
            assert isinstance(kind, TensorType)
            assert kind.strides is not None
            dims, strides = ([s.evaluate(env) for s in part] for part in (kind.dims, kind.strides))
            values[node.result.name] = view(values[node.source], kind.dtype, dims, strides, kind.offset.evaluate(env))
            continue
        kernel = registry.find(node.kernel) if kernels is None else kernels[node.kernel]
        out = kernel.interpret(**{name: value(a) for name, a in node.arguments}, **dict(node.key.statics))
        for variable, tensor in zip(node.results, out if isinstance(out, tuple) else (out,)):
            values[variable.name] = tensor
    return tuple(values[name] for name in graph.returns)


def _bind(graph: Graph, values: Mapping[str, Any]) -> dict[str, int]:
    """Values of the dimensions that a parameter has by themselves."""
    env: dict[str, int] = {}
    for v in graph.params:
        if isinstance(v.type, TensorType):
            for size, actual in zip(v.type.dims, values[v.name].shape):
                for dim in size.dims:
                    if size == dim.size:
                        env[dim.name] = actual
    return env
