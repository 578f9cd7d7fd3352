"""The page of one kernel: source, stages, memory, roofline, cost, schedule, lanes, emitted code."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tilery.tile.errors import LaunchError, LoweringError
from tilery.tile.explain import Explanation, explain
from tilery.tile.ir import walk
from tilery.tile.lowering import Lowered, lower
from tilery.tile.page import html, svg
from tilery.tile.page.diff import stage_table
from tilery.tile.page.estimate import Estimate, estimate
from tilery.tile.page.html import Page, Section
from tilery.tile.page.memory import memory_map
from tilery.tile.page.trace import LABEL, trace_of

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel


@dataclass(frozen=True)
class Subject:
    """A call of a kernel, lowered and counted. `lanes`: None where the number of programs is not known before."""

    kernel: Kernel
    env: Mapping[str, int]
    about: Explanation
    lowered: Mapping[str, Lowered]
    code: Mapping[str, str]
    lanes: Estimate | None
    notes: tuple[str, ...]


def arguments_for(kernel: Kernel, case: str = "", known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments by name of a declared case or benchmark (the first, if neither is named), or of described sizes
    (`known`: dimensions, static values, scalars and dtypes by name). Benchmarks' and described tensors have no data.
    Raises `LaunchError`."""
    from tilery.tile.binaries import arguments_of

    if known:
        return _described(kernel, known)
    names = [*kernel.cases, *kernel.benches]
    case = case or next(iter([*kernel.benches, *kernel.cases]), "")
    if not case:
        raise LaunchError(f"{kernel.name} declares no case: give its dimensions, {_dims(kernel)}")
    if case in kernel.benches:
        return arguments_of(kernel, case)
    if case not in kernel.cases:
        raise LaunchError(f"{kernel.name} has no case {case!r}; it has {', '.join(names)}")
    return kernel.signature.bind((), kernel.arguments(case))


def _dims(kernel: Kernel) -> str:
    return ", ".join(f"{d.name}={max(64, d.multiple_of)}" for d in kernel.signature.dims)


def _described(kernel: Kernel, known: Mapping[str, Any]) -> dict[str, Any]:
    scalars = {p.name for p in kernel.signature.parameters if p.spec is None and p.kind != "static"}
    key, env = kernel.assume(**{n: v for n, v in known.items() if n not in scalars})
    dtypes, statics = dict(key.dtypes), dict(key.statics)
    bound: dict[str, Any] = {}
    for p in kernel.signature.parameters:
        if p.kind == "static":
            bound[p.name] = statics[p.name]
        elif p.spec is None:
            default = 1 if p.default is inspect.Parameter.empty else p.default
            bound[p.name] = known.get(p.name, default)
        elif (dtype := dtypes[p.name]) is None:
            bound[p.name] = None
        else:
            missing = [d.name for size in p.spec.dims for d in size.dims if d.name not in env]
            if missing:
                raise LaunchError(f"{kernel.name}: the dimension {missing[0]} needs a value: {_dims(kernel)}")
            shape = [size.evaluate(env) for size in p.spec.dims]
            bound[p.name] = torch.empty(shape, dtype=dtype.torch, device="meta")
    return bound


def subject(
    kernel: Kernel, bound: Mapping[str, Any], binary: bool = True, means: Mapping[str, float] | None = None,
    compiled: tuple[int, int] = (0, 0),
) -> Subject:  # fmt: skip
    """`bound`: arguments by name; their data is read for the lengths of loops, where they have any, or `means` tells.
    `binary`: compile for Hopper, where Triton is installed, for registers and shared memory; `compiled` has both, if
    they are known anyway."""
    about = explain(kernel, bound, binary=binary, means=means)
    key, env = kernel.specialise(bound)
    ir = kernel.trace(key)
    lowered = {t: lower(ir, env, t, kernel.schedule_for(env, t)) for t in ("cpu", "triton")}
    code: dict[str, str] = {}
    notes: list[str] = []
    lanes = None
    for target, low in lowered.items():
        try:
            code[target] = low.source
        except LoweringError as error:
            notes.append(f"{target}: {error.message}")
    if "triton" in code:
        from tilery.tile.targets.triton import emit, spec_of

        low = lowered["triton"]
        emitted = emit(low.kernel, low.schedule, spec_of(low.kernel, bound, env))
        code["triton"] = emitted.source
        programs = emitted.plan.grid_size(env, bound)
        if programs < 2**31 - 1:
            found = about.binary
            registers, shared = (found["registers"], found["shared_bytes"]) if found else compiled
            lanes = estimate(low, env, about.work, programs, registers, shared)
    return Subject(kernel, env, about, lowered, code, lanes, tuple(notes))


def kernel_page(kernel: Kernel, bound: Mapping[str, Any], binary: bool = True, made_by: str = "") -> Page:
    """The page of a call. `made_by`: the command to print at its end."""
    made = subject(kernel, bound, binary)
    dims = ", ".join(f"{n} = {v}" for n, v in made.env.items())
    doc = " ".join((inspect.getdoc(kernel.function) or "").split())
    sections = [
        _overview(made), _source(made), _stages(made), _memory(made), _roofline(made), _cost(made), _schedule(made),
        _lanes(made), _code(made),
    ]  # fmt: skip
    text = html.document(kernel.name, f"{dims}. {doc}", sections, made_by or f"{kernel.name}.page(...)")
    trace = trace_of([made.lanes]) if made.lanes is not None and made.lanes.placed else None
    return Page(kernel.name, text, trace)


def _overview(made: Subject) -> Section:
    about, lanes = made.about, made.lanes
    items = [
        ("bytes", svg.amount(about.work.bytes, "B")), ("operations", svg.amount(about.work.flops, "FLOP")),
        ("FLOP per byte", f"{about.intensity:.3g}"),
        (f"at least, on {about.machine.name}", _micro(about.floor)),
        ("bound by", about.bound),
    ]  # fmt: skip
    if lanes is not None:
        items += [("programs", f"{lanes.programs:,}"), (LABEL, _micro(lanes.seconds))]
    if about.binary:
        items += [("registers a thread", str(about.binary["registers"]))]
        items += [("bytes spilled", str(about.binary["spilled_bytes"]))]
    notes = [*about.notes, *made.notes]
    notes += [f"The loop {label!r} depends on data and is counted once." for label in about.work.open]
    if about.work.averaged:
        notes.append(f"Loops whose length is loaded are counted with the mean of {', '.join(about.work.averaged)}.")
    return Section("overview", "Overview", html.facts(items) + "".join(map(html.note, notes)))


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def source_lines(function: Callable[..., Any]) -> list[tuple[str, str]]:
    """(number, text) of a function's lines."""
    lines, first = inspect.getsourcelines(function)
    return [(str(n), line.rstrip("\n")) for n, line in enumerate(lines, first)]


def _source(made: Subject) -> Section:
    lines = source_lines(made.kernel.function)
    own, file = {n for n, _ in lines}, made.kernel.function.__code__.co_filename
    called: dict[tuple[str, int], tuple[str, str]] = {}
    for op in walk(made.lowered["cpu"].stages[0][1].body):
        if op.loc is not None and not (op.loc.file == file and str(op.loc.line) in own):
            place = "" if op.loc.file == file else f"{os.path.basename(op.loc.file)}:"
            called[op.loc.file, op.loc.line] = (f"{place}{op.loc.line}", op.loc.text())
    body = html.note("Click a line to see, in the stages, what it became.") + html.source(lines)
    if called:
        table = html.source([line for _, line in sorted(called.items())])
        body += f"<details><summary>lines of the functions it calls: {len(called)}</summary>{table}</details>"
    return Section("source", "Source", body)


def _stages(made: Subject) -> Section:
    file = os.path.basename(made.kernel.function.__code__.co_filename)
    parts = [
        html.note(
            "Each stage beside the one before it: every stage is a program that the reference interpreter runs, which "
            "is how passes are verified. The numbers are lines of the source. Only passes that changed something "
            "have a stage."
        )
    ]
    for target, low in made.lowered.items():
        parts.append(f"<h3>for {target}</h3>" + html.stages(stage_table(low.stages, file)))
    return Section("stages", "Stages", "".join(parts))


def _memory(made: Subject) -> Section:
    low = made.lowered["triton"]
    found = memory_map(low.kernel, made.env, low.schedule.stages or 1)
    warps = low.schedule.warps or 4
    registers, shared = found.peak(False), found.peak(True)
    facts = [
        ("peak in registers, per program", svg.amount(registers, "B")),
        ("that is, per thread", f"{-(-registers // (128 * warps))} registers"),
        ("peak in shared memory", svg.amount(shared, "B")),
        ("warps", str(warps)),
    ]
    binary = made.about.binary
    if binary:
        facts.append(("compiled: registers a thread", str(binary["registers"])))
        facts.append(("compiled: shared memory", svg.amount(binary["shared_bytes"], "B")))
    words = (
        "Tiles of one program of the padded stage, each as high as its bytes, from the operation that makes it to its "
        "last use. An estimate: the compiler may fuse more or keep more; what it made stands beside it where Triton "
        "is installed."
    )
    pictures = "<h3>registers</h3>" + svg.memory(found, False) if registers else html.note("No tile needs registers.")
    if shared:
        pictures += "<h3>shared memory</h3>" + svg.memory(found, True)
    return Section("memory", "Memory of one program", html.note(words) + html.facts(facts) + pictures)


def _roofline(made: Subject) -> Section:
    about, lanes = made.about, made.lanes
    points = []
    if about.floor > 0 and about.work.flops:
        points.append(svg.Point("at best", about.intensity, about.work.flops / about.floor))
        if lanes is not None:
            points.append(svg.Point("estimated", about.intensity, about.work.flops / lanes.seconds, True))
    words = (
        f"{about.machine.name}: memory allows {_micro(about.memory_time)}, arithmetic {_micro(about.arithmetic_time)}; "
        f"the call is bound by {about.bound}."
    )
    picture = svg.roofline(about.machine, list(about.work.matrix), points)
    return Section("roofline", "Roofline", html.note(words) + picture)


def _cost(made: Subject) -> Section:
    about = made.about
    work = about.work
    most = max([*work.read.values(), *work.written.values(), 1])
    rows: list[list[Any]] = [["reads", n, b, html.bar(b / most)] for n, b in work.read.items()]
    rows += [["writes", n, b, html.bar(b / most)] for n, b in work.written.items()]
    body = html.table(("", "tensor", "bytes", ""), rows)
    flops = [*((f"{d} products", n) for d, n in work.matrix.items()), ("all other", work.vector)]
    largest = max([n for _, n in flops] + [1.0])
    body += html.table(("operations", "FLOP", ""), [[n, int(v), html.bar(v / largest)] for n, v in flops])
    for target, passes in about.passes.items():
        merged: dict[str, float] = {}
        for name, seconds in passes:
            merged[name] = merged.get(name, 0.0) + seconds
        slowest = max(merged.values())
        table = html.table(
            ("pass", "ms", ""), [[n, round(s * 1e3, 2), html.bar(s / slowest)] for n, s in merged.items()]
        )
        total = sum(merged.values()) * 1e3
        body += f"<details><summary>passes for {target}: {total:.1f} ms</summary>{table}</details>"
    return Section("cost", "Cost", body)


def _schedule(made: Subject) -> Section:
    body = ""
    for target, schedule in made.about.schedules.items():
        rows = [[key, str(schedule.blocks.get(key, getattr(schedule, key, ""))), why]
                for key, why in schedule.reasons.items()]  # fmt: skip
        body += f"<h3>for {target}</h3>" + html.table(("", "chosen", "why"), rows) + html.code(schedule.to_json())
    return Section("schedule", "Schedule, and why", body)


def _lanes(made: Subject) -> Section:
    title = "Lanes"
    if made.lanes is None:
        return Section("lanes", title, html.note("The number of programs is read from memory: nothing to estimate."))
    if not made.lanes.placed:
        return Section("lanes", title, html.note("The grid is empty: no program runs."))
    return Section("lanes", title, lanes_body([made.lanes], (), made.about.work.open))


def lanes_body(estimates: list[Estimate], names: tuple[str, ...], open_loops: Sequence[str] = ()) -> str:
    """The lane picture of launches, with what it is and what it assumes."""
    last, device = estimates[-1], estimates[0].device
    total = sum(e.seconds for e in estimates)
    facts = [("in all", _micro(total)), ("programs", f"{sum(e.programs for e in estimates):,}")]
    if len(estimates) == 1:
        facts += [
            ("resident on a multiprocessor", f"{last.resident} (limit: {last.limit})"), ("waves", f"{last.waves:.2f}"),
            ("lanes busy", f"{last.busy:.0%}"), ("a program is bound by", last.bound),
        ]  # fmt: skip
    words = (
        f"{device.processors} multiprocessors of {device.machine.name}. Programs go, in order, to the first one that "
        "is free; each takes the longest of its share of the bytes, its share of the operations, and "
        f"{device.latency * 1e6:.1f} us of latency divided by the programs that are resident together, after a launch "
        f"of {device.launch * 1e6:.1f} us. No run stands behind this picture; how far such estimates are from measured "
        "times stands in docs/tile/pictures.md."
    )
    if open_loops:
        words += f" Too short: loops whose length depends on data count once ({', '.join(open_loops)})."
    picture = svg.lanes(trace_of(estimates, names))
    return f"<p>{html.badge(LABEL)}</p>{html.facts(facts)}{html.note(words)}{picture}"


def _code(made: Subject) -> Section:
    names = {"cpu": "C++ for the CPU", "triton": "Triton for the GPU"}
    body = "".join(
        f"<details><summary>{names.get(t, t)}: {len(text.splitlines())} lines</summary>{html.code(text)}</details>"
        for t, text in made.code.items()
    )
    return Section("code", "Emitted code", body)
