"""`tilery kernels list`: the operators, their implementations, which one is chosen here and why."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tilery.cli.errors import CliError

if TYPE_CHECKING:
    from tilery.ops.registry import OperatorInfo


def list_kernels(
    explain: Annotated[
        str | None,
        typer.Option(metavar="OPERATOR", help="Show one operator's contract and why each implementation is in or out."),
    ] = None,
) -> None:
    """List the operators and what runs them on this machine."""
    from tilery.ops.registry import list_operators

    operators = list_operators()
    if explain is not None:
        known = {operator.name: operator for operator in operators}
        if explain not in known:
            raise CliError(f"--explain {explain}: no such operator; expected one of {', '.join(sorted(known))}.")
        print_operator(known[explain])
        return
    print_table(operators)


def print_table(operators: list[OperatorInfo]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("operator", "implementation", "target", "chosen", "why"):
        table.add_column(heading, overflow="fold")
    for operator in operators:
        for position, implementation in enumerate(operator.implementations):
            table.add_row(
                operator.name if position == 0 else "",
                implementation.name,
                str(implementation.target),
                "yes" if implementation.chosen else "",
                implementation.reason,
                style=None if implementation.available else "dim",
            )
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("One operator in full: tilery kernels list --explain OPERATOR")


def print_operator(operator: OperatorInfo) -> None:
    print(operator.name)
    print()
    print(operator.contract.strip())
    print()
    for implementation in operator.implementations:
        state = "chosen" if implementation.chosen else "available" if implementation.available else "not available"
        print(f"  {implementation.name} ({implementation.target}): {state}")
        print(f"      {implementation.reason}")
