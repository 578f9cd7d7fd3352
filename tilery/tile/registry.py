"""Every kernel by name: a kernel registers itself when it is decorated.

A kernel's full name is its module's and its own (`tilery.ops.kernels.norm.rms_norm_quant`); its short name works
wherever it is unique.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from tilery.tile.errors import TileError

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel

_KERNELS: dict[str, Kernel] = {}


def add(kernel: Kernel) -> None:
    """Registers a kernel under its full name; a later one of the same name (a reloaded module) takes its place."""
    _KERNELS[kernel.full_name] = kernel


def discover(package: str) -> None:
    """Imports every module of `package`, so that its kernels register."""
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(getattr(found, "__path__", [])):
        importlib.import_module(f"{package}.{module.name}")


def kernels(prefix: str = "") -> list[Kernel]:
    """The registered kernels whose full name starts with `prefix`, by name."""
    return [kernel for name, kernel in sorted(_KERNELS.items()) if name.startswith(prefix)]


def find(name: str, prefix: str = "") -> Kernel:
    """The kernel of that full or short name. Raises `TileError` if there is none, or several."""
    if name in _KERNELS:
        return _KERNELS[name]
    found = [k for k in kernels(prefix) if k.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise TileError(f"several kernels are named {name!r}; say which: {', '.join(k.full_name for k in found)}")
    known = ", ".join(sorted({k.name for k in kernels(prefix)}))
    raise TileError(f"no kernel is named {name!r}; expected one of {known or '(none is loaded)'}")
