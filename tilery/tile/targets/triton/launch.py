"""Runs a compiled kernel: allocates the outputs, computes the grid, launches; one small Python function per kernel.

That function is generated from the `Plan`, so that a launch does nothing a hand-written call would not do: read the
arguments, make the outputs, hand addresses and integers to the driver. It works under CUDA graph capture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tilery.tile.dtypes import BY_NAME
from tilery.tile.errors import LaunchError
from tilery.tile.ir import Kernel
from tilery.tile.schedule import Schedule
from tilery.tile.targets.triton import native
from tilery.tile.targets.triton.build import HOPPER, Binary, BinaryReport, build, cached, report_of
from tilery.tile.targets.triton.emit import emit
from tilery.tile.targets.triton.plan import Plan, Spec, filled

Launch = Callable[[Mapping[str, Any], Mapping[str, int]], tuple[Tensor, ...]]
_KINDS = {"i32": "i", "i64": "l", "fp32": "f"}


class TritonExecutable:
    """A compiled kernel. `launch(arguments, env)`: arguments by parameter name, dimensions by name, both checked by the
    caller; returns the outputs. Outputs and workspaces that `arguments` has by name are used as they are, the others
    allocated. The binary is loaded per device at its first launch there.
    """

    def __init__(self, binary: Binary) -> None:
        self.binary = binary
        self.plan = binary.plan
        self.kernels: dict[int, Any] = {}
        self.registers = self.spills = -1
        self.scope = _scope(self)
        exec(compile(launch_source(self.plan), f"<launch of {self.plan.name}>", "exec"), self.scope)
        self.launch: Launch = self.scope["launch"]

    def __repr__(self) -> str:
        return f"<triton kernel {self.plan.name}, {self.plan.warps} warps, {self.binary.shared} B shared>"

    @property
    def source(self) -> str:
        """The emitted source."""
        return (self.binary.folder / "kernel.py").read_text()

    def report(self) -> BinaryReport:
        """Registers, spills, shared memory and instructions; needs no GPU."""
        return report_of(self.binary)

    def load(self, device: int) -> Any:
        """Loads the binary on a device. Raises `LaunchError` with what the driver says."""
        plan = self.plan
        kinds = "".join("p" if a.kind == "tensor" else _KINDS[a.type] for a in plan.arguments)
        try:
            with torch.cuda.device(device):
                kernel, self.registers, self.spills = native.load().load(
                    self.binary.cubin, self.binary.symbol, device, plan.warps, self.binary.shared, int(plan.pdl), kinds
                )
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"{plan.name} cannot be loaded on cuda:{device}: {error}") from None
        self.kernels[device] = kernel
        return kernel


def compile_kernel(
    kernel: Kernel, schedule: Schedule, spec: Spec | None = None, arch: int | None = None, name: str | None = None
) -> TritonExecutable:
    """Emits, compiles (or finds) and wraps a padded kernel.

    `arch`: 90 and so on; None: that of the current GPU, or Hopper without one. `name`: `find_cached(name)` finds the
    result in a later process without tracing and lowering again, so it must say everything the result depends on.
    """
    if arch is None:
        arch = current_arch()
    binary = build(emit(kernel, schedule, spec), arch)
    if name is not None:
        folder = native.cache_folder() / "names"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.{os.getpid()}"
        temporary.write_text(json.dumps(binary.key))
        os.replace(temporary, folder / f"{name}.json")
    return TritonExecutable(binary)


def find_cached(name: str) -> TritonExecutable | None:
    """What `compile_kernel(..., name=name)` made, in this process or an earlier one; None if it is not there."""
    try:
        key = json.loads((native.cache_folder() / "names" / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    binary = cached(key)
    return None if binary is None else TritonExecutable(binary)


def current_arch() -> int:
    """The architecture of the current GPU, 90 where there is none."""
    if not torch.cuda.is_available():
        return HOPPER
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def launch_source(plan: Plan) -> str:
    """The generated launch function."""
    lines = ["def launch(arguments, env):"]
    lines += [f"    {local} = arguments[{source!r}]" for local, source in (*plan.tensors, *plan.scalars)]
    lines += [f"    {local} = env[{source!r}]" for local, source in plan.dims]
    first = plan.tensors[0][0] if plan.tensors else None
    lines.append(f"    _index = {first}.get_device()" if first else "    _index = _current_device()")
    lines.append("    if _index < 0: _not_cuda()")
    lines.append("    if _index != _current_device():")
    lines.append("        with _device(_index): return launch(arguments, env)")
    where = f"{first}.device" if first else "_torch_device('cuda', _index)"
    if plan.allocations:
        lines.append(f"    _where = {where}")
    for item in plan.allocations:
        shape = "".join(f"{s}, " for s in item.shape)
        lines.append(f"    {item.name} = arguments.get({item.source!r})")
        lines.append(f"    if {item.name} is None:")
        lines.append(f"        {item.name} = _empty(({shape}), dtype=_dtypes[{item.dtype!r}], device=_where)")
        if item.init is not None:
            lines.append(f"        _filled({item.name}, {item.init!r})" if item.init else f"        _zero({item.name})")
    lines.append(f"    _grid = {plan.grid}")
    if plan.persistent:
        lines.append(f"    _grid = min(_grid, {plan.persistent} * _processors(_index))")
    passed = []
    for a in plan.arguments:
        if a.kind == "tensor":
            passed.append(f"{a.name}.data_ptr()")
        elif a.kind == "stride":
            passed.append(f"{_local(plan, a.source)}.stride({a.axis})")
        elif a.kind == "scalar" and a.type != "i32":
            passed.append(f"arguments[{a.source!r}]")
        else:
            passed.append(a.name)
    lines.append(f"    _run(_kernels.get(_index) or _load(_index), _grid, _stream(_index), {', '.join(passed)})")
    lines.append(f"    return ({''.join(f'{name}, ' for name in plan.returns)})")
    return "\n".join(lines) + "\n"


def _local(plan: Plan, tensor: str) -> str:
    return next(a.name for a in plan.arguments if a.kind == "tensor" and a.source == tensor)


def _scope(executable: TritonExecutable) -> dict[str, Any]:
    """What generated launches use."""
    plan = executable.plan

    def not_cuda() -> None:
        raise LaunchError(
            f"{plan.name}: the Triton target needs CUDA tensors; move them with .cuda(), or take the CPU target"
        )

    def run(*args: Any) -> None:  # the first launch connects to the driver, later ones go straight to it
        scope["_run"] = native.load().launch
        scope["_run"](*args)

    processors: dict[int, int] = {}

    def count(device: int) -> int:
        if device not in processors:
            processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
        return processors[device]

    scope: dict[str, Any] = {
        "_current_device": getattr(torch._C, "_cuda_getDevice", lambda: 0), "_not_cuda": not_cuda,
        "_device": torch.cuda.device, "_torch_device": torch.device, "_empty": torch.empty,
        "_dtypes": {name: dtype.torch for name, dtype in BY_NAME.items()}, "_filled": filled,
        "_zero": torch.Tensor.zero_, "_processors": count, "_kernels": executable.kernels, "_load": executable.load,
        "_stream": getattr(torch._C, "_cuda_getCurrentRawStream", None), "_run": run, "min": min, "max": max,
    }  # fmt: skip
    return scope
