"""The Graph IR as text: readable Python, printed and parsed back.

T, K = ...                                      (as in Tile IR)
norm = kernel("package.module.norm")

@graph
def layer(x: Tensor[T, K, bf16], cache: InOut[P, 656, u8], eps: f32):
    y, s = norm(x=x, eps=eps, pow2=static(True), types=(Tensor[T, K, e4m3], Tensor[T, f32]))
    rows: Tensor[P, 4, f32, strides(164, 1), offset(128)] = view(cache)
    write(y=y, cache=inout(cache))
    return y
"""

from __future__ import annotations

import ast
from typing import Any

from tilery.tile.dtypes import DType
from tilery.tile.graph import Argument, Call, Graph, Node, Ref, Variable, View
from tilery.tile.ir import TensorType
from tilery.tile.parser import Types, parse_dims, parse_module, wrong
from tilery.tile.printer import show_dim, show_literal, show_type
from tilery.tile.signature import Specialisation
from tilery.tile.size import Dim


def print_graph(graph: Graph) -> str:
    """`graph` as Python text. Raises `TileError` for a static value that has no text form."""
    short: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(node, Call) and node.kernel not in short:
            base = name = node.kernel.rsplit(".", 1)[-1]
            while name in short.values():
                name = f"{name}_{len(short)}" if name == base else f"{base}_{len(short)}"
            short[node.kernel] = name
    lines = [show_dim(d) for d in graph.dims]
    lines += [""] if lines else []
    lines += [f'{name} = kernel("{full}")' for full, name in short.items()]
    lines += [""] if short else []
    params = []
    for v in graph.params:
        text = show_type(v.type)
        params.append(f"{v.name}: {text.replace('Tensor[', 'InOut[', 1) if v.inout else text}")
    lines += ["@graph", f"def {graph.name}({', '.join(params)}):"]
    body = [_show(node, short) for node in graph.nodes]
    body += [f"return {', '.join(graph.returns)}"] if graph.returns else []
    return "\n".join([*lines, *(f"    {line}" for line in body or ["pass"])]) + "\n"


def _show(node: Node, short: dict[str, str]) -> str:
    if isinstance(node, View):
        return f"{node.result.name}: {show_type(node.result.type)} = view({node.source})"
    parts = []
    for name, argument in node.arguments:
        text = argument.name if isinstance(argument, Ref) else show_literal(argument)
        parts.append(f"{name}=inout({text})" if name in node.writes else f"{name}={text}")
    parts += [f"{name}=static({show_literal(value)})" for name, value in node.key.statics]
    target = ""
    if len(node.results) == 1:
        target = f"{node.results[0].name}: {show_type(node.results[0].type)} = "
    elif node.results:
        target = f"{', '.join(v.name for v in node.results)} = "
        parts.append(f"types=({', '.join(show_type(v.type) for v in node.results)})")
    return f"{target}{short[node.kernel]}({', '.join(parts)})"


def parse_graph(text: str) -> Graph:
    """The graph that `print_graph` wrote. Raises `ParseError` with the line and what was expected there."""
    tree = parse_module(text)
    kernels: dict[str, str] = {}
    rest: list[ast.stmt] = []
    for node in tree.body:
        call = node.value if isinstance(node, ast.Assign) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "kernel":
            assert isinstance(node, ast.Assign)
            kernels[ast.unparse(node.targets[0])] = str(ast.literal_eval(call.args[0]))
        else:
            rest.append(node)
    dims, functions = parse_dims(ast.Module(rest, []))
    if len(functions) != 1 or not isinstance(functions[0], ast.FunctionDef):
        raise wrong(functions[0] if functions else None, "one function decorated with @graph")
    return _Parser(dims, kernels).graph(functions[0])


class _Parser(Types):
    def __init__(self, dims: dict[str, Dim], kernels: dict[str, str]) -> None:
        super().__init__(dims)
        self.kernels = kernels
        self.known: dict[str, Variable] = {}

    def define(self, name: str, annotation: ast.expr) -> Variable:
        inout = ast.unparse(annotation).startswith("InOut[")
        self.known[name] = Variable(name, self.type(annotation), inout)
        return self.known[name]

    def use(self, node: ast.expr | None) -> Variable:
        if not isinstance(node, ast.Name) or node.id not in self.known:
            raise wrong(node, "a tensor that is defined above")
        return self.known[node.id]

    def graph(self, node: ast.FunctionDef) -> Graph:
        params = []
        for argument in node.args.args:
            if argument.annotation is None:
                raise wrong(argument, "a parameter with a type")
            params.append(self.define(argument.arg, argument.annotation))
        nodes: list[Node] = []
        returns: tuple[str, ...] = ()
        for statement in node.body:
            if isinstance(statement, ast.Return):
                value = statement.value
                items = value.elts if isinstance(value, ast.Tuple) else [value]
                returns = tuple(self.use(i).name for i in items)
            elif not isinstance(statement, ast.Pass):
                nodes.append(self.node(statement))
        return Graph(node.name, tuple(params), tuple(nodes), returns, tuple(self.dims.values()))

    def node(self, node: ast.stmt) -> Node:
        call = node.value if isinstance(node, (ast.AnnAssign, ast.Assign, ast.Expr)) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise wrong(node, "a kernel's call or view(tensor)")
        if call.func.id == "view" and isinstance(node, ast.AnnAssign) and len(call.args) == 1:
            source = self.use(call.args[0]).name
            return View(source, self.define(ast.unparse(node.target), node.annotation))
        if call.func.id not in self.kernels:
            raise wrong(node, f"one of the kernels {', '.join(self.kernels) or '(none is named)'}")
        dtypes: list[tuple[str, DType | None]] = []
        statics: list[tuple[str, Any]] = []
        arguments: list[tuple[str, Argument]] = []
        writes: list[str] = []
        types: list[ast.expr] = []
        for item in call.keywords:
            name, value = str(item.arg), item.value
            mark = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
            if name == "types" and isinstance(value, ast.Tuple):
                types = value.elts
            elif mark == "static" and isinstance(value, ast.Call):
                statics.append((name, self.literal(value.args[0])))
            else:
                if mark == "inout" and isinstance(value, ast.Call):
                    writes.append(name)
                    value = value.args[0]
                argument: Argument = Ref(self.use(value).name) if isinstance(value, ast.Name) else self.literal(value)
                arguments.append((name, argument))
                if argument is None:
                    dtypes.append((name, None))
                elif isinstance(argument, Ref) and isinstance(self.known[argument.name].type, TensorType):
                    dtypes.append((name, self.known[argument.name].type.dtype))
        results: tuple[Variable, ...] = ()
        if isinstance(node, ast.AnnAssign):
            results = (self.define(ast.unparse(node.target), node.annotation),)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = [ast.unparse(n) for n in node.targets[0].elts]
            if len(names) != len(types):
                raise wrong(node, f"types=(...) of the {len(names)} results")
            results = tuple(self.define(n, t) for n, t in zip(names, types))
        key = Specialisation(tuple(dtypes), tuple(statics))
        return Call(self.kernels[call.func.id], key, tuple(arguments), tuple(writes), results)
