"""`tilery kernels`: the operators and what runs them here; the kernels of the tile language, shown and verified."""

from __future__ import annotations

import ast
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilery.cli import options
from tilery.cli.errors import CliError
from tilery.engine.config import Device

if TYPE_CHECKING:
    from tilery.ops.registry import OperatorInfo
    from tilery.tile import Kernel

KERNELS = "tilery.ops.kernels"
"""The package whose kernels the command knows."""


def list_kernels(
    explain: Annotated[
        str | None,
        typer.Option(metavar="OPERATOR", help="Show one operator's contract and why each implementation is in or out."),
    ] = None,
    device: options.DeviceOption = Device.AUTO,
) -> None:
    """List the operators and what runs them on this machine, and the kernels of the tile language."""
    from tilery.cli.kernel_pages import print_plugins
    from tilery.engine.runner import resolve_device
    from tilery.ops.registry import Platform, list_operators

    with options.as_flags():
        operators = list_operators(Platform.detect(resolve_device(device).type))
    if explain is not None:
        known = {operator.name: operator for operator in operators}
        if explain not in known:
            raise CliError(f"--explain {explain}: no such operator; expected one of {', '.join(sorted(known))}.")
        print_operator(known[explain])
        return
    print_table(operators)
    kernels = known_kernels()
    if kernels:
        print_kernels(kernels)
    print_plugins()


def known_kernels() -> list[Kernel]:
    """The tile kernels of this package, by name."""
    from tilery.tile import registry

    registry.discover(KERNELS)
    return registry.kernels(KERNELS + ".")


def find_kernel(name: str) -> Kernel:
    """The kernel of a name. Raises `CliError`."""
    from tilery.tile import registry
    from tilery.tile.errors import TileError

    known_kernels()
    try:
        return registry.find(name, KERNELS + ".")
    except TileError as error:
        raise CliError(f"{error.message}.") from None


def print_table(operators: list[OperatorInfo]) -> None:
    rows = []
    for operator in operators:
        for position, implementation in enumerate(operator.implementations):
            name = operator.name if position == 0 else ""
            chosen = "yes" if implementation.chosen else ""
            row = (name, implementation.name, str(implementation.target), chosen, implementation.reason)
            rows.append((row, implementation.available))
    _print_rows(("operator", "implementation", "target", "chosen", "why"), rows)
    print("One operator in full: tilery kernels list --explain OPERATOR")


def print_kernels(kernels: list[Kernel]) -> None:
    rows = []
    for kernel in kernels:
        module = kernel.full_name.removeprefix(KERNELS + ".").rpartition(".")[0]
        about = (kernel.__doc__ or "").strip().partition("\n")[0]
        rows.append(((kernel.name, module, "cpu, cuda", ", ".join(kernel.cases) or "none", about), True))
    print()
    _print_rows(("kernel", "module", "targets", "cases", "what"), rows)
    print("One kernel's stages: tilery kernels show KERNEL --stage trace|bound|padded|cpu|triton|ascend|ptx|sass")


def _print_rows(headings: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], bool]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row, available in rows:
        table.add_row(*row, style=None if available else "dim")
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(table)


def print_operator(operator: OperatorInfo) -> None:
    print(operator.name)
    print()
    print(operator.contract.strip())
    print()
    for implementation in operator.implementations:
        state = "chosen" if implementation.chosen else "available" if implementation.available else "not available"
        print(f"  {implementation.name} ({implementation.target}): {state}")
        print(f"      {implementation.reason}")


def show_kernel(
    name: Annotated[str, typer.Argument(metavar="KERNEL", help="A kernel's name, as `tilery kernels list` prints it.")],
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="trace, bound, padded, a pass's name, cpu, triton, ascend, ptx or sass. "
            "Default: the target's text, or trace.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="cpu, triton or ascend: its text, or --stage of the lowering for it."),
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A dimension or static value: --dim T=64. Repeatable."),
    ] = None,
    case: Annotated[str | None, typer.Option(metavar="NAME", help="Sizes of a declared case (the first).")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write pictures of a kernel or a graph: one page, no text here.")
    ] = None,
) -> None:
    """Show a kernel at one stage of its lowering, from the traced IR to machine code."""
    from tilery.tile.errors import TileError
    from tilery.tile.show import text_of

    if dim and case:
        raise CliError("--dim and --case both choose the sizes; give one of them.")
    if html is not None:
        from tilery.cli.kernel_pages import write_page

        return write_page(name, html, case, _assignments(dim or []))
    kernel = find_kernel(name)
    try:
        wanted = stage or target or "trace"
        print(text_of(kernel, wanted, case=case, known=_assignments(dim or []), target=target))
    except TileError as error:
        raise CliError(str(error)) from None


def _assignments(items: list[str]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        try:
            known[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            sign = ""
        if not sign or not name.isidentifier():
            raise CliError(f"--dim {item}: expected NAME=VALUE with a Python literal, as in --dim T=64.")
    return known


def verify_kernels(
    name: Annotated[str | None, typer.Argument(metavar="[KERNEL]", help="A kernel's name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every kernel that declares cases.")] = False,
) -> None:
    """Run every stage of a kernel's lowering on its cases and compare each with the reference."""
    if (name is None) == (not everything):
        raise CliError("kernels verify: name one kernel, or give --all.")
    from tilery.tile.verify_all import verify_all

    kernels = [k for k in known_kernels() if k.cases] if name is None else [find_kernel(name)]
    failed = []
    begin = time.perf_counter()
    for kernel, report, seconds in verify_all(kernels):
        if isinstance(report, str):
            failed.append(kernel.name)
            print(f"{kernel.name}: {report}")
            continue
        if not report.ok:
            failed.append(kernel.name)
        if name is not None or not report.ok:
            print(report)
        verdict = "ok" if report.ok else "WRONG"
        print(f"{kernel.name}: {verdict}, {len(kernel.cases)} cases, {len(report.rows)} stages, {seconds:.1f} s")
    if everything:
        print(f"{len(kernels)} kernels in {time.perf_counter() - begin:.0f} s")
    if failed:
        raise CliError(f"kernels verify: {len(failed)} of {len(kernels)} kernels failed: {', '.join(failed)}.")
