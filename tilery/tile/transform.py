"""Rewrites a kernel's Python so that loops and branches can be staged.

Tracing runs the function once with symbolic values; a plain Python `for` or `if` would then fix one path. So every
`for` becomes a call of `loop(iterable, body, state, names)` and every `if` a call of `cond(condition, then, orelse,
state, names)`, where `body`, `then` and `orelse` are nested functions over the names they assign. Ordinary iterables
and ordinary conditions still behave as in Python. Line numbers stay those of the user's file.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from tilery.tile.errors import Loc, TraceError

RUNTIME = "__tile_runtime__"


class _Assigned(ast.NodeVisitor):
    """Names a block of statements binds, in order of first appearance, nested functions excluded."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.names.setdefault(node.id)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names.setdefault(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        return

    def _comprehension(self, node: ast.AST) -> None:
        return

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def _assigned(statements: list[ast.stmt]) -> list[str]:
    visitor = _Assigned()
    for statement in statements:
        visitor.visit(statement)
    return list(visitor.names)


class _Jumps(ast.NodeVisitor):
    """Whether a block leaves itself by return, break or continue."""

    def __init__(self) -> None:
        self.found = False
        self.depth = 0  # of loops inside the block, whose break and continue stay in it

    def visit_Return(self, node: ast.Return) -> None:
        self.found = True

    def visit_Break(self, node: ast.Break | ast.Continue) -> None:
        self.found = self.found or not self.depth

    visit_Continue = visit_Break

    def visit_For(self, node: ast.For | ast.While) -> None:
        self.depth += 1
        for statement in node.body:
            self.visit(statement)
        self.depth -= 1
        for statement in node.orelse:
            self.visit(statement)

    visit_While = visit_For

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return

    visit_Lambda = visit_FunctionDef  # type: ignore[assignment]


def _jumps(statements: list[ast.stmt]) -> bool:
    visitor = _Jumps()
    for statement in statements:
        visitor.visit(statement)
    return visitor.found


def _strings(names: list[str]) -> ast.Tuple:
    return ast.Tuple([ast.Constant(n) for n in names], ast.Load())


def _name(identifier: str, store: bool = False) -> ast.Name:
    return ast.Name(identifier, ast.Store() if store else ast.Load())


class _Stage(ast.NodeTransformer):
    def __init__(self) -> None:
        self.count = 0

    def _fresh(self, kind: str) -> str:
        self.count += 1
        return f"__tile_{kind}_{self.count}"

    def _runtime(self, function: str, *args: ast.expr) -> ast.Call:
        return ast.Call(ast.Attribute(_name(RUNTIME), function, ast.Load()), list(args), [])

    def _thunks(self, names: list[str]) -> ast.Tuple:
        """`(lambda: a, lambda: b)`: reads of names that may not be bound yet."""
        arguments = ast.arguments([], [], None, [], [], None, [])
        return ast.Tuple([ast.Lambda(arguments, _name(n)) for n in names], ast.Load())

    def _function(self, name: str, params: list[str], names: list[str], body: list[ast.stmt]) -> ast.FunctionDef:
        result = ast.Return(ast.Tuple([_name(n) for n in names], ast.Load()))
        arguments = ast.arguments([], [ast.arg(p) for p in params], None, [], [], None, [])
        node = ast.FunctionDef(name, arguments, [*body, result], [], None)
        if "type_params" in ast.FunctionDef._fields:
            node.type_params = []  # type: ignore[attr-defined]
        return node

    def _assign(self, names: list[str], call: ast.Call) -> ast.stmt:
        if not names:
            return ast.Expr(call)
        return ast.Assign([ast.Tuple([_name(n, True) for n in names], ast.Store())], call)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # nested helper functions run as plain Python; decorate them with @tile.function to stage

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_For(self, node: ast.For) -> Any:
        self.generic_visit(node)
        if _jumps(node.body) or node.orelse:
            # Left to Python; the loop object refuses to be iterated that way and says what to do.
            node.iter = _at(self._runtime("plain_iter", node.iter), node)
            return ast.fix_missing_locations(node)
        target = _assigned([ast.Assign([node.target], ast.Constant(None))])
        names = [n for n in _assigned(node.body) if n not in target]
        function, item = self._fresh("body"), self._fresh("item")
        bind = ast.Assign([node.target], _name(item))
        body = self._function(function, [item, *names], names, [bind, *node.body])
        labels = _strings(names)
        call = self._runtime("loop", node.iter, _name(function), self._thunks(names), labels)
        return [_at(body, node), _at(self._assign(names, call), node)]

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if _jumps(node.body) or _jumps(node.orelse):
            node.test = _at(self._runtime("plain_test", node.test), node)
            return ast.fix_missing_locations(node)
        names = _assigned([*node.body, *node.orelse])
        then, orelse = self._fresh("then"), self._fresh("else")
        functions = [
            self._function(then, names, names, node.body),
            self._function(orelse, names, names, node.orelse or [ast.Pass()]),
        ]
        labels = _strings(names)
        call = self._runtime("cond", node.test, _name(then), _name(orelse), self._thunks(names), labels)
        return [_at(f, node) for f in functions] + [_at(self._assign(names, call), node)]

    def visit_While(self, node: ast.While) -> Any:
        self.generic_visit(node)
        node.test = _at(self._runtime("plain_while", node.test), node)
        return ast.fix_missing_locations(node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        arguments = ast.arguments([], [], None, [], [], None, [])
        call = self._runtime("select", node.test, ast.Lambda(arguments, node.body), ast.Lambda(arguments, node.orelse))
        return _at(call, node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        names = _assigned([node])
        if not names or len(node.targets) != 1:
            return node
        hints = [_at(ast.Expr(self._runtime("hint", _name(n), ast.Constant(n))), node) for n in names]
        return [node, *hints]


def _at(node: Any, where: ast.AST) -> Any:
    """Gives new nodes the line of the statement they replace, deep ones that have none included."""
    child: Any
    for child in ast.walk(node):
        if "lineno" in getattr(child, "_attributes", ()) and not hasattr(child, "lineno"):
            ast.copy_location(child, where)
            # One line only: Python counts a call by attribute as standing where the attribute ends.
            child.end_lineno, child.end_col_offset = child.lineno, child.col_offset
    return node


def stage(function: Callable[..., Any], runtime: Any) -> Callable[..., Any]:
    """`function` with its loops and branches rewritten; `runtime` has loop, cond, select, hint and the plain_* hooks.

    Raises `TraceError` where the source cannot be read (a function typed into an interpreter, a lambda).
    """
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise TraceError(
            f"cannot read the source of {function.__name__!r}: define kernels in a file (or a notebook cell), with def"
        ) from None
    file = inspect.getsourcefile(function) or "<unknown>"
    tree = ast.parse(textwrap.dedent("".join(lines)))
    node = tree.body[0]
    if isinstance(node, ast.FunctionDef) and node.name != function.__name__:
        raise TraceError(
            f"the source of {function.__name__!r} in {file} has changed since it was imported; restart the process",
            Loc(file, first),
        )
    if not isinstance(node, ast.FunctionDef):
        raise TraceError("a kernel must be a plain `def` function", Loc(file, first))
    ast.increment_lineno(tree, first - 1)
    node.decorator_list = []
    node.returns = None
    for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        argument.annotation = None
    node.args.defaults = [ast.copy_location(ast.Constant(None), d) for d in node.args.defaults]
    node.args.kw_defaults = [d and ast.copy_location(ast.Constant(None), d) for d in node.args.kw_defaults]
    stager = _Stage()
    body: list[ast.stmt] = []
    for statement in node.body:
        new = stager.visit(statement)
        body.extend(new if isinstance(new, list) else [new])
    node.body = body
    free = list(function.__code__.co_freevars)
    factory = stager._function("__tile_factory__", free, [], [node])
    factory.body[-1] = ast.Return(_name(node.name))
    module = ast.Module([_at(factory, node)], [])
    ast.fix_missing_locations(module)
    namespace: dict[str, Any] = {**function.__globals__, RUNTIME: runtime}
    exec(compile(module, file, "exec"), namespace)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    staged: Callable[..., Any] = namespace["__tile_factory__"](*cells)
    staged.__defaults__, staged.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return staged
