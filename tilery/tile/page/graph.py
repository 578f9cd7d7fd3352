"""The page of a graph: nodes and edges, what each kernel costs, and the launches one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tilery.tile import registry
from tilery.tile.errors import LaunchError
from tilery.tile.graph import Call, Graph, Ref, View
from tilery.tile.ir import TensorType
from tilery.tile.page import html, svg
from tilery.tile.page.html import Page, Section
from tilery.tile.page.kernel import Subject, lanes_body, source_lines, subject
from tilery.tile.page.trace import LABEL, trace_of
from tilery.tile.printer import show_type
from tilery.tile.signature import Specialisation
from tilery.tile.size import Size

if TYPE_CHECKING:
    from tilery.tile.graph import GraphFunction

EDGES = {
    "RAW": "It reads what the other writes.",
    "WAR": "It overwrites what the other reads.",
    "WAW": "It overwrites what the other writes.",
}


def graph_page(function: GraphFunction, known: Mapping[str, Any], made_by: str = "") -> Page:
    """`known`: all dimensions; static values; dtypes of tensors (True: the first allowed; a number: the mean of what an
    integer tensor holds, such as lengths), of which optional ones are absent by default. Raises `LaunchError` for a
    name it does not have or a dimension without a value."""
    made = function.trace(_key(function, known))
    env = {d.name: known[d.name] for d in made.dims if d.name in known}
    wanted = {d.name for v in made.params if isinstance(v.type, TensorType) for size in v.type.dims for d in size.dims}
    if wanted - set(env):
        raise LaunchError(
            f"graph {function.name}: the dimension {sorted(wanted - set(env))[0]} needs a value; it has "
            f"{', '.join(d.name for d in made.dims)}"
        )
    calls = {n: _subject(node, made, env, known) for n, node in enumerate(made.nodes) if isinstance(node, Call)}
    dims = ", ".join(f"{n} = {v}" for n, v in env.items())
    doc = " ".join((inspect.getdoc(function.function) or "").split())
    sections = [
        Section("graph", "Graph", _picture(made, calls)),
        Section("cost", "Cost", _cost(calls)),
        Section("source", "Source", html.source(source_lines(function.function))),
        Section("ir", "Graph IR", html.code(str(made))),
    ]
    lanes = [c.lanes for c in calls.values() if c.lanes is not None and c.lanes.placed]
    trace = None
    if lanes and len(lanes) == len(calls):
        names = tuple(f"{n}: {c.kernel.name}" for n, c in calls.items())
        trace = trace_of(lanes, names)
        open_loops = sorted({label for c in calls.values() for label in c.about.work.open})
        words = html.note("Launches one after the other; programmatic dependent launch would overlap their ends.")
        sections.insert(2, Section("lanes", "Lanes", lanes_body(lanes, names, open_loops) + words))
    for number, call in calls.items():
        body = html.code(str(call.lowered["triton"].stages[0][1]))
        sections.append(Section(f"node{number}", f"Node {number}: {call.kernel.name}", body))
    text = html.document(f"graph {function.name}", f"{dims}. {doc}", sections, made_by or f"{function.name}.page(...)")
    return Page(function.name, text, trace)


def _key(function: GraphFunction, known: Mapping[str, Any]) -> Specialisation:
    dims = [d.name for d in function.signature.dims]
    names = [p.name for p in function.signature.parameters]
    unknown = [n for n in known if n not in dims and n not in names]
    if unknown:
        raise LaunchError(
            f"graph {function.name}: no dimension or parameter {unknown[0]!r}; it has {', '.join([*dims, *names])}"
        )
    dtypes, statics = [], []
    for p in function.signature.parameters:
        if p.spec is not None:
            given = known.get(p.name, None if p.spec.optional else True)
            dtypes.append((p.name, p.spec.dtypes[0] if isinstance(given, (int, float)) and given else given or None))
        elif p.kind == "static":
            value = known.get(p.name, p.default)
            if value is inspect.Parameter.empty:
                raise LaunchError(f"graph {function.name}: the static parameter {p.name!r} needs a value")
            statics.append((p.name, value))
    return Specialisation(tuple(dtypes), tuple(statics))


def _subject(call: Call, graph: Graph, env: Mapping[str, int], known: Mapping[str, Any]) -> Subject:
    """A node as a call of its kernel on tensors without data."""
    kernel = registry.find(call.kernel)
    types = {v.name: v.type for v in graph.params}
    for node in graph.nodes:
        for variable in (node.result,) if isinstance(node, View) else node.results:
            types[variable.name] = variable.type
    bound: dict[str, Any] = dict(call.key.statics)
    means: dict[str, float] = {}
    for name, argument in call.arguments:
        if isinstance(argument, Ref):
            kind = types[argument.name]
            if isinstance(kind, TensorType):
                shape = [size.evaluate(env) for size in kind.dims]
                bound[name] = torch.empty(shape, dtype=kind.dtype.torch, device="meta")
                mean = known.get(argument.name)
                if isinstance(mean, (int, float)) and not isinstance(mean, bool):
                    means[name] = float(mean)
            else:
                bound[name] = known.get(argument.name, 1)
        else:
            bound[name] = argument.evaluate(env) if isinstance(argument, Size) else argument
    return subject(kernel, kernel.signature.bind((), bound), binary=False, means=means)


def _picture(graph: Graph, calls: Mapping[int, Subject]) -> str:
    nodes: list[svg.Node] = []
    made: dict[str, int] = {}
    place: dict[int, int] = {}
    roots = graph.roots()
    for v in graph.params:
        if isinstance(v.type, TensorType):
            made[v.name] = len(nodes)
            nodes.append(svg.Node(v.name, "tensor", (f"{v.name}: {show_type(v.type)}",)))
    edges = graph.edges()
    for number, node in enumerate(graph.nodes):
        place[number] = len(nodes)
        if isinstance(node, View):
            after = ((made[node.source], node.source, "RAW"),)
            nodes.append(svg.Node(node.result.name, "view", (f"{node.result.name} = view({node.source})",), after))
            made[node.result.name] = place[number]
            continue
        about = calls[number].about
        lines = [f"{number}: {calls[number].kernel.name}"]
        lines.append(f"{svg.amount(about.work.bytes, 'B')}, {svg.amount(about.work.flops, 'FLOP')}")
        lines.append(f"at least {about.floor * 1e6:.2f} us, {about.bound}")
        before: dict[tuple[int, str, str], None] = {}
        for name in node.reads():
            if name in made:  # scalars are no nodes
                before[made[name], name, "RAW"] = None
        for start, end, kind, name in edges:
            if end == number and (kind != "RAW" or (place[start], name, kind) not in before):
                direct = any(at == place[start] and k == "RAW" for at, _, k in before)
                if kind != "RAW" or not direct:
                    before[place[start], name, kind] = None
        nodes.append(svg.Node(lines[0], "kernel", tuple(lines), tuple(before), f"node{number}"))
        for variable in node.results:
            made[variable.name] = place[number]
        for name in node.changes():  # later readers of what is changed in place come after this node
            for other in [n for n in made if roots.get(n, n) == roots.get(name, name)]:
                made[other] = place[number]
    types = {v.name: v.type for v in graph.params}
    for node in graph.nodes:
        types |= {v.name: v.type for v in ((node.result,) if isinstance(node, View) else node.results)}
    for name in graph.returns:
        words = f"{name}: {show_type(types[name])}"
        nodes.append(svg.Node(f"return {name}", "tensor", (words,), ((made[name], name, "RAW"),)))
    words = (
        "Rounded: tensors that come in and go out. Boxes: kernels, with what each costs. Broken lines: views, and the "
        "order that memory written twice imposes."
    )
    return html.note(words) + svg.graph(nodes, EDGES)


def _cost(calls: Mapping[int, Subject]) -> str:
    total = sum(c.about.floor for c in calls.values()) or 1.0
    rows: list[list[Any]] = []
    for number, call in calls.items():
        about, lanes = call.about, call.lanes
        rows.append(
            [
                html.Raw(f'<a href="#node{number}">{number}: {call.kernel.name}</a>'), about.work.bytes,
                int(about.work.flops), about.bound, lanes.programs if lanes else "", round(about.floor * 1e6, 2),
                round(lanes.seconds * 1e6, 2) if lanes else "", html.bar(about.floor / total),
            ]
        )  # fmt: skip
    heads = ("kernel", "bytes", "FLOP", "bound by", "programs", "at least, us", f"us, {LABEL}", "")
    open_ = sorted({label for c in calls.values() for label in c.about.work.open})
    words = f"Loops whose length depends on data are counted once: {', '.join(open_)}." if open_ else ""
    return html.table(heads, rows) + (html.note(words) if words else "")
