"""The operators as kernels of the tile language: one file per subject, each with its maths, contracts and references.

A kernel's contract is its docstring; its reference is a torch function of the same parameters; its cases are small
arguments that `verify` runs at every stage of a lowering, its benches the sizes that matter. `all_kernels` lists them.
Imports `tilery.tile` and the torch references of `tilery.ops`, nothing else of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilery.tile import registry

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel


def all_kernels() -> list[Kernel]:
    """Every kernel of this package, by full name; imports all its modules."""
    registry.discover(__name__)
    return registry.kernels(f"{__name__}.")
