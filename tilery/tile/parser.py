"""Parses the Tile IR from the text that `printer.py` writes; what does not fit is a `ParseError` with its line."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

from tilery.tile.dtypes import BY_NAME, DType
from tilery.tile.errors import ParseError, TraceError
from tilery.tile.ir import (
    Block,
    Extent,
    Kernel,
    Op,
    Operand,
    Output,
    Param,
    Region,
    Span,
    TensorType,
    TileType,
    Type,
    Value,
)
from tilery.tile.printer import AXES, EXTENTS, MEMORY, WRITES, canonical
from tilery.tile.size import Dim, Size, parse_size


def parse_kernel(text: str) -> Kernel:
    """The kernel that `print_kernel` wrote. Raises `ParseError` with the line and what was expected there."""
    tree = parse_module(text)
    dims, rest = parse_dims(tree)
    if len(rest) != 1 or not isinstance(rest[0], ast.FunctionDef):
        raise wrong(rest[0] if rest else None, "one function decorated with @kernel(stage=...)")
    return canonical(_Parser(dims).kernel(rest[0]))


def wrong(node: ast.AST | None, expected: str) -> ParseError:
    """The error for a node that is not what the grammar wants."""
    if node is None:
        return ParseError(f"expected {expected}, but the text ends")
    got = ast.unparse(node).strip().splitlines()
    return ParseError(f"line {getattr(node, 'lineno', '?')}: expected {expected}, got {got[0] if got else 'nothing'}")


def parse_module(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ParseError(f"line {error.lineno}: expected Python, got {(error.text or '').strip()}") from None


def parse_dims(tree: ast.Module) -> tuple[dict[str, Dim], list[ast.stmt]]:
    """The `T = Dim("T", ...)` lines at the head, and the statements after them."""
    dims: dict[str, Dim] = {}
    for number, node in enumerate(tree.body):
        if not isinstance(node, ast.Assign):
            return dims, tree.body[number:]
        call = node.value
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Dim" and call.args):
            raise wrong(node, 'a dimension such as T = Dim("T")')
        try:
            facts = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            dim = Dim(ast.literal_eval(call.args[0]), **facts)
        except (ValueError, TypeError, TraceError):
            raise wrong(node, "Dim(name, min=..., max=..., multiple_of=...)") from None
        dims[dim.name] = dim
    return dims, []


class Types:
    """Reads sizes, types and attribute values over known dimensions."""

    def __init__(self, dims: dict[str, Dim]) -> None:
        self.dims = dims

    def size(self, node: ast.expr) -> Size:
        try:
            return parse_size(node, self.dims)
        except TraceError:
            known = ", ".join(self.dims) or "no dimension"
            raise wrong(node, f"a size made of numbers and {known}") from None

    def extent(self, node: ast.expr) -> Extent:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "B":
            return Block(node.attr)
        return self.size(node)

    def dtype(self, node: ast.expr) -> DType:
        if not isinstance(node, ast.Name) or node.id not in BY_NAME:
            raise wrong(node, f"a dtype ({', '.join(BY_NAME)})")
        return BY_NAME[node.id]

    def type(self, node: ast.expr) -> Type:
        """A tile's, scalar's or tensor's type."""
        if not isinstance(node, ast.Subscript):
            return TileType(self.dtype(node))
        items = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        if isinstance(node.value, ast.Name) and node.value.id in ("Tensor", "InOut"):
            return self.tensor(node, items)
        return TileType(self.dtype(node.value), tuple(map(self.extent, items)))

    def tensor(self, node: ast.expr, items: list[ast.expr]) -> TensorType:
        extra: dict[str, tuple[Size, ...]] = {}
        while items and isinstance(items[-1], ast.Call):
            call = items.pop()
            assert isinstance(call, ast.Call)
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            if name not in ("strides", "offset"):
                raise wrong(call, "strides(...) or offset(...)")
            extra[name] = tuple(map(self.size, call.args))
        if not items:
            raise wrong(node, "Tensor[dims..., dtype]")
        *dims, dtype = items
        sizes = tuple(map(self.size, dims))
        return TensorType(self.dtype(dtype), sizes, extra.get("strides"), extra.get("offset", (Size(),))[0])

    def tiles(self, node: ast.expr) -> tuple[TileType, ...]:
        types = tuple(self.type(n) for n in node.elts) if isinstance(node, ast.Tuple) else ()
        if not types or not all(isinstance(t, TileType) for t in types):
            raise wrong(node, "a tuple of tile types such as (f32[8], i32)")
        return types  # type: ignore[return-value]

    def literal(self, node: ast.expr, extents: bool = False) -> Any:
        """The inverse of `show_literal`."""
        if isinstance(node, ast.Tuple):
            return tuple(self.literal(n, extents) for n in node.elts)
        if isinstance(node, ast.Dict):
            keys = [self.literal(k) for k in node.keys if k is not None]
            return dict(zip(keys, (self.literal(v, extents) for v in node.values)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
            if node.func.id == "Size":
                return self.size(node.args[0])
            if node.func.id == "float" and isinstance(node.args[0], ast.Constant):
                value = float(str(node.args[0].value))
                return math.nan if value != value else value
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bool, type(None))):
            return node.value
        if isinstance(node, ast.Attribute) or (extents and not (isinstance(node, ast.Name) and node.id in BY_NAME)):
            return self.extent(node)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return -node.operand.value  # type: ignore[operator]
        if isinstance(node, (ast.Name, ast.Subscript)):
            return self.type(node) if isinstance(node, ast.Subscript) else self.dtype(node)
        raise wrong(node, "a literal, a dtype, a size or a tuple of them")


class _Parser(Types):
    def __init__(self, dims: dict[str, Dim]) -> None:
        super().__init__(dims)
        self.scope: dict[str, Value] = {}

    def define(self, name: str, type: Type, node: ast.AST) -> Value:
        if name in self.scope:
            raise wrong(node, f"a name that is not defined yet ({name!r} is)")
        self.scope[name] = Value(len(self.scope) + 1, type, name)
        return self.scope[name]

    def kernel(self, node: ast.FunctionDef) -> Kernel:
        marks = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "kernel"]
        if len(marks) != 1:
            raise wrong(node, "the decorator @kernel(stage=...)")
        facts = {str(k.arg): self.literal(k.value) for k in marks[0].keywords}
        params = []
        for argument in node.args.args:
            if argument.annotation is None:
                raise wrong(argument, "a parameter with a type")
            value = self.define(argument.arg, self.type(argument.annotation), argument)
            params.append(Param(value, ast.unparse(argument.annotation).startswith("InOut[")))
        outputs: list[Output] = []
        returns: tuple[Value, ...] = ()
        ops: list[Op] = []
        for statement in node.body:
            if isinstance(statement, ast.Return):
                returned = statement.value
                names = list(returned.elts) if isinstance(returned, ast.Tuple) else [returned] if returned else []
                returns = tuple(self.value(n) for n in names)
            elif isinstance(statement, ast.AnnAssign) and self.called(statement.value) == "empty":
                outputs.append(self.output(statement))
            else:
                ops += self.statement(statement)
        return Kernel(
            node.name, tuple(params), tuple(outputs), tuple(ops), returns, tuple(self.dims.values()),
            tuple(facts.get("blocks", {}).items()), str(facts.get("stage", "trace")),
        )  # fmt: skip

    def output(self, node: ast.AnnAssign) -> Output:
        assert isinstance(node.value, ast.Call)
        facts = {str(k.arg): self.literal(k.value) for k in node.value.keywords}
        return Output(self.define(self.name(node.target), self.type(node.annotation), node), facts.get("init"))

    # --- pieces -----------------------------------------------------------------------------------------------

    @staticmethod
    def called(node: ast.expr | None) -> str:
        return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""

    def name(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            raise wrong(node, "a name")
        return node.id

    def names(self, node: ast.expr) -> list[str]:
        return [self.name(n) for n in node.elts] if isinstance(node, ast.Tuple) else [self.name(node)]

    def value(self, node: ast.expr) -> Value:
        name = self.name(node)
        if name not in self.scope:
            raise wrong(node, "a value that is defined above")
        return self.scope[name]

    def operand(self, node: ast.expr) -> Operand:
        if isinstance(node, ast.Name):
            return self.value(node)
        value = self.literal(node)
        if not isinstance(value, (bool, int, float)):
            raise wrong(node, "a value or a number")
        return value

    def operands(self, node: ast.expr | None) -> tuple[Operand, ...]:
        if node is None:
            return ()
        return tuple(map(self.operand, node.elts)) if isinstance(node, ast.Tuple) else (self.operand(node),)

    def attrs(self, call: ast.Call, *skipped: str) -> dict[str, Any]:
        return {str(k.arg): self.literal(k.value, k.arg in EXTENTS) for k in call.keywords if str(k.arg) not in skipped}

    @staticmethod
    def given(call: ast.Call, name: str) -> ast.expr | None:
        return next((k.value for k in call.keywords if k.arg == name), None)

    # --- statements -------------------------------------------------------------------------------------------

    def body(self, statements: Sequence[ast.stmt]) -> tuple[tuple[Op, ...], tuple[Operand, ...]]:
        ops: list[Op] = []
        yields: tuple[Operand, ...] = ()
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield):
                yields = self.operands(statement.value.value)
            else:
                ops += self.statement(statement)
        return tuple(ops), yields

    def statement(self, node: ast.stmt) -> list[Op]:
        if isinstance(node, ast.Pass):
            return []
        if isinstance(node, ast.For):
            return [self.parallel(node) if self.called(node.iter) == "parallel" else self.loop(node)]
        if isinstance(node, ast.If):
            return [self.branch(node)]
        call = node.value if isinstance(node, (ast.AnnAssign, ast.Assign, ast.Expr)) else None
        if not isinstance(call, ast.Call) or not self.called(call):
            raise wrong(node, "an operation such as v: f32[8] = add(a, b)")
        name = self.called(call)
        operands, attrs = self.arguments(name, call)
        results: tuple[Value, ...] = ()
        if isinstance(node, ast.AnnAssign):
            results = (self.define(self.name(node.target), self.type(node.annotation), node),)
        elif isinstance(node, ast.Assign):
            types = self.given(call, "types")
            if types is None:
                raise wrong(node, "types=(...) where several values are assigned")
            names, tiles = self.names(node.targets[0]), self.tiles(types)
            if len(names) != len(tiles):
                raise wrong(node, f"types=(...) of the {len(names)} results")
            results = tuple(self.define(n, t, node) for n, t in zip(names, tiles))
        return [Op(name, operands, tuple(sorted(attrs.items())), results)]

    def arguments(self, name: str, call: ast.Call) -> tuple[tuple[Operand, ...], dict[str, Any]]:
        if name == "size" and len(call.args) == 1:
            return (), {"size": self.size(call.args[0]), **self.attrs(call)}
        if name not in MEMORY:
            return tuple(map(self.operand, call.args)), self.attrs(call, "types")
        if len(call.args) != (3 if name in WRITES else 2) or not isinstance(call.args[1], ast.List):
            raise wrong(call, f"{name}(tensor, [index...]{', value' if name in WRITES else ''})")
        index = [self.index(n) for n in call.args[1].elts]
        mask = self.given(call, "where")
        operands = [self.value(call.args[0]), *(o for _, o in index), *map(self.operand, call.args[2:])]
        operands += [self.operand(mask)] if mask is not None else []
        attrs = {**self.attrs(call, "where"), "index": tuple(k for k, _ in index), "masked": mask is not None}
        return tuple(operands), attrs

    def index(self, node: ast.expr) -> tuple[Any, Operand]:
        name = self.called(node)
        args = node.args if isinstance(node, ast.Call) else []
        if name in ("at", "gather") and len(args) == 1:
            return name, self.operand(args[0])
        if name == "span" and len(args) in (2, 3):
            step = self.literal(args[2]) if len(args) == 3 else 1
            return Span(self.extent(args[1]), step), self.operand(args[0])
        raise wrong(node, "at(i), gather(tile) or span(start, extent)")

    def parallel(self, node: ast.For) -> Op:
        call = node.iter
        assert isinstance(call, ast.Call)
        kinds = {text: kind for kind, text in AXES.items()}
        axes: list[tuple[str, str]] = []
        operands: list[Operand] = []
        for axis in call.args:
            if not isinstance(axis, ast.Call) or self.called(axis) not in kinds or len(axis.args) != 3:
                raise wrong(axis, "block(start, stop, label) or index(start, stop, label)")
            axes.append((kinds[self.called(axis)], str(self.literal(axis.args[2]))))
            operands += [self.operand(axis.args[0]), self.operand(axis.args[1])]
        params = tuple(self.define(n, TileType(BY_NAME["i32"]), node) for n in self.names(node.target))
        body, yields = self.body(node.body)
        attrs = {**self.attrs(call), "axes": tuple(axes)}
        return Op("parallel", tuple(operands), tuple(sorted(attrs.items())), (), (Region(params, body, yields),))

    def results(self, call: ast.Call, node: ast.AST) -> tuple[list[str], tuple[TileType, ...]]:
        out, types = self.given(call, "out"), self.given(call, "types")
        if out is None or types is None:
            return [], ()
        names, tiles = self.names(out), self.tiles(types)
        if len(names) != len(tiles):
            raise wrong(node, f"as many types as names in out ({len(names)})")
        return names, tiles

    def loop(self, node: ast.For) -> Op:
        call = node.iter
        if not isinstance(call, ast.Call) or self.called(call) != "loop" or len(call.args) != 3:
            raise wrong(node, "for ... in parallel(...) or for ... in loop(start, stop, step, ...)")
        names, types = self.results(call, node)
        operands = (*map(self.operand, call.args), *self.operands(self.given(call, "init")))
        targets = self.names(node.target)
        if len(targets) != 1 + len(types):
            raise wrong(node, f"{1 + len(types)} loop names: the index and one per carried value")
        params = tuple(self.define(n, t, node) for n, t in zip(targets, (TileType(BY_NAME["i32"]), *types)))
        body, yields = self.body(node.body)
        attrs = self.attrs(call, "init", "out", "types")
        results = tuple(self.define(n, t, node) for n, t in zip(names, types))
        return Op("for", operands, tuple(sorted(attrs.items())), results, (Region(params, body, yields),))

    def branch(self, node: ast.If) -> Op:
        test, attrs = node.test, {}
        names: list[str] = []
        types: tuple[TileType, ...] = ()
        if isinstance(test, ast.Call) and self.called(test) == "cond" and len(test.args) == 1:
            names, types = self.results(test, node)
            attrs, test = self.attrs(test, "out", "types"), test.args[0]
        condition = self.operand(test)
        regions = tuple(Region((), *self.body(part)) for part in (node.body, node.orelse))
        results = tuple(self.define(n, t, node) for n, t in zip(names, types))
        return Op("if", (condition,), tuple(sorted(attrs.items())), results, regions)
