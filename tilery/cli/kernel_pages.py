"""Pictures of kernels and graphs: `tilery kernels show --html`, `tilery kernels profile`; the table of plug-ins."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilery.cli import kernels
from tilery.cli.errors import CliError

if TYPE_CHECKING:
    from tilery.tile.graph import GraphFunction
    from tilery.tile.page import Page


def known_graphs() -> dict[str, GraphFunction]:
    """The graphs of this package's kernel modules, by name."""
    from tilery.tile.graph import GraphFunction

    kernels.known_kernels()  # imports the modules
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(kernels.KERNELS + ".")]
    return {v.name: v for module in modules for v in vars(module).values() if isinstance(v, GraphFunction)}


def make_page(name: str, case: str | None, known: Mapping[str, Any], binary: bool = True) -> Page:
    """The page of a kernel (for a case, a benchmark or described sizes) or a graph (described). Raises `CliError`."""
    from tilery.tile.errors import TileError
    from tilery.tile.page import arguments_for, graph_page, kernel_page

    graph = known_graphs().get(name)
    dims = "".join(f" --dim {shlex.quote(f'{n}={v!r}')}" for n, v in known.items())
    command = f"tilery kernels show {name}{f' --case {case}' if case else ''}{dims} --html FILE"
    try:
        if graph is not None:
            if case:
                raise CliError(f"--case {case}: {name} is a graph; describe its sizes with --dim.")
            return graph_page(graph, known, command)
        kernel = kernels.find_kernel(name)
        return kernel_page(kernel, arguments_for(kernel, case or "", known), binary, command)
    except TileError as error:
        raise CliError(str(error)) from None


def write_page(name: str, file: Path, case: str | None, known: Mapping[str, Any]) -> None:
    """Writes the page and says where."""
    page = make_page(name, case, known)
    _write(file, page.html)
    print(f"{file}: {len(page.html) // 1024} KiB, opens in any browser")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(f"{file} cannot be written: {error.strerror}.") from None


def profile_kernel(
    name: Annotated[str, typer.Argument(metavar="KERNEL", help="A kernel's or a graph's name.")],
    trace: Annotated[Path, typer.Option(metavar="FILE", help="The trace to write, JSON that Perfetto opens.")],
    dim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A dimension or static value: --dim T=64. Repeatable."),
    ] = None,
    case: Annotated[
        str | None, typer.Option(metavar="NAME", help="Sizes of a declared case or benchmark (the first benchmark).")
    ] = None,
) -> None:
    """Write a trace with one lane per multiprocessor, estimated by the cost model: no GPU is needed, none is used."""
    if dim and case:
        raise CliError("--dim and --case both choose the sizes; give one of them.")
    page = make_page(name, case, kernels._assignments(dim or []), binary=False)
    if page.trace is None:
        raise CliError(f"{name}: there is no program to place: the grid is empty, or its size is read from memory.")
    _write(trace, json.dumps(page.trace))
    launches = page.trace["otherData"]["launches"]
    total = sum(launch["seconds"] for launch in launches)
    programs = sum(launch["programs"] for launch in launches)
    print(f"{trace}: {programs} programs, {total * 1e6:.2f} us, estimated, not measured; opens in Perfetto")


def print_plugins() -> None:
    """What other packages add to the tile language, if anything."""
    from tilery.tile import plugins

    rows = plugins.describe()
    if rows:
        heads = ("distribution", "version", "kind", "adds", "state")
        print()
        kernels._print_rows(heads, [(tuple(str(row[h]) for h in heads), row["state"] == "loaded") for row in rows])
