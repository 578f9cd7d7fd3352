"""Compiled code of each target as the runtime handles it: made from IR, or from an entry of the cache without it."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilery.tile.ir import Kernel as KernelIR
from tilery.tile.lowering import lower
from tilery.tile.plans import Call
from tilery.tile.schedule import Schedule


class NativeCode:
    """Generated C++ for CPU. `record`: what a later process needs to load the library again."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        from tilery.tile.targets.cpu import build, executable
        from tilery.tile.targets.cpu.source import HEADER

        self.record = dict(record)
        library = build.build(HEADER + "\n" + record["text"], record["symbol"])
        self.function = getattr(library, f"{record['name']}_launch")
        self.replay = ctypes.cast(getattr(library, f"{record['name']}_replay"), ctypes.c_void_p).value or 0
        self.pool = executable._pool()
        self._typed = False

    @property
    def source(self) -> str:
        return str(self.record["text"])

    def statement(self, call: Call, scope: dict[str, Any]) -> tuple[str, list[str]]:
        record = self.record
        tensors = [f"p_{n}" for n, t in call.tensors.items() if t is not None]
        tensors += [f"o_{n}.data_ptr()" for n in range(len(call.interface.outputs))]
        constants = self._constants(call)
        for number, value in enumerate(constants):
            scope[f"c_{number}"] = value
        if not self._typed:
            integers = len(constants) + len(record["ints"])
            self.function.restype = None
            self.function.argtypes = [
                ctypes.c_void_p, *[ctypes.c_void_p] * len(tensors), *[ctypes.c_int64] * integers,
                *[ctypes.c_double] * len(record["floats"]),
            ]  # fmt: skip
            self._typed = True
        scope["_call"], scope["_pool"] = self.function, self.pool
        passed = ["_pool", *tensors, *(f"c_{n}" for n in range(len(constants)))]
        passed += [f"v_{n}" for n in (*record["ints"], *record["floats"])]
        return f"_call({', '.join(passed)})", []

    def _constants(self, call: Call) -> list[int]:
        """The dimensions and strides that a launch passes."""
        constants = [call.env[name] for name in self.record["dims"]]
        for name, axis in self.record["strided"]:
            tensor = call.tensors[name]
            assert tensor is not None
            constants.append(tensor.stride(axis))
        return constants

    def arguments(self, call: Call, tensors: Sequence[int], values: Mapping[str, Any]) -> tuple[list[int], range]:
        """What `replay` takes for a call, 8 bytes each (see `source.Source`), and which of them are addresses.

        `tensors`: the addresses of those present, then of the outputs; `values`: the runtime scalars by name."""
        integers = self._constants(call) + [int(values[name]) for name in self.record["ints"]]
        floats = [float(values[name]) for name in self.record["floats"]]
        bits = struct.unpack(f"={len(floats)}q", struct.pack(f"={len(floats)}d", *floats))
        return [self.pool, *tensors, *integers, *bits], range(1, 1 + len(tensors))


class Fallback:
    """Torch operators per tile, where there is no C++ compiler."""

    record: Mapping[str, Any] | None = None
    source = ""

    def __init__(self, bound: KernelIR, env: Mapping[str, int]) -> None:
        from tilery.tile.targets.cpu.fallback import fallback_launch

        self.params = [p.value.name for p in bound.params]
        self.run = fallback_launch(bound, env)
        self.returns = [next(n for n, o in enumerate(bound.outputs) if o.value.id == v.id) for v in bound.returns]

    def statement(self, call: Call, scope: dict[str, Any]) -> tuple[str, list[str]]:
        def copy(made: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> None:
            for source, target in zip(made, targets):
                target.copy_(source)

        scope["_run"], scope["_env"], scope["_copy"] = self.run, dict(call.env), copy
        arguments = "".join(f"v_{n}, " for n in self.params)
        targets = "".join(f"o_{n}, " for n in self.returns)
        return f"_copy(_run(({arguments}), _env), ({targets}))", []


def compile_native(ir: KernelIR, env: Mapping[str, int], schedule: Schedule | None, strided: frozenset[str]) -> Any:
    """CPU code of a traced kernel: C++, or torch operators without a compiler."""
    from tilery.tile.targets.cpu import build
    from tilery.tile.targets.cpu.source import emit

    bound = lower(ir, env, "cpu", schedule).kernel
    if build.compiler() is None:
        return Fallback(bound, env)
    symbol = re.sub(r"\W", "_", bound.name)
    source = emit(bound, f"k_{symbol}", strided)
    return NativeCode(
        {
            "symbol": symbol, "name": source.name, "text": source.text, "dims": list(source.dims),
            "strided": [list(s) for s in source.strided], "ints": list(source.ints), "floats": list(source.floats),
        }
    )  # fmt: skip


class TritonCode:
    """A compiled Triton kernel."""

    def __init__(self, executable: Any) -> None:
        self.executable = executable

    @property
    def source(self) -> str:
        return str(self.executable.source)

    def statement(self, call: Call, scope: dict[str, Any]) -> tuple[str, list[str]]:
        from tilery.tile.targets.triton import native

        plan = self.executable.plan
        index = call.device.index or 0
        outputs = {a.name: f"o_{n}.data_ptr()" for n, a in enumerate(plan.allocations)}
        passed = []
        for number, a in enumerate(plan.arguments):
            if a.kind == "tensor":
                passed.append(outputs.get(a.name) or f"p_{a.source}")
            elif a.kind == "scalar":
                passed.append(f"v_{a.source}")
            else:
                tensor = call.tensors.get(a.source)
                scope[f"c_{number}"] = call.env[a.source] if a.kind == "dim" else tensor.stride(a.axis)  # type: ignore
                passed.append(f"c_{number}")
        for local, source in plan.dims:
            scope[f"g_{local}"] = call.env[source]
        grid = plan.grid
        names = {local: f"g_{local}" for local, _ in plan.dims} | {
            local: f"v_{source}" for local, source in plan.scalars
        }
        grid = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), grid)
        if plan.persistent:
            processors = torch.cuda.get_device_properties(index).multi_processor_count
            grid = f"min({grid}, {plan.persistent * processors})"
        if not plan.scalars:
            scope["_grid"] = int(eval(grid, {"min": min, "max": max}, scope))
            grid = "_grid"
        scope["_kernel"] = self.executable.kernels.get(index) or self.executable.load(index)
        scope["_launch"], scope["_index"] = native.load().launch, index
        scope["_current"], scope["_stream"] = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        scope["_on"] = torch.cuda.device
        heads = [f"v_{n}" for n in call.runtime] + [f"p_{n}" for n in call.tensors] + ["out"]
        elsewhere = ["if _current() != _index:", f"    with _on(_index): return plan({', '.join(heads)})"]
        return f"_launch(_kernel, {grid}, _stream(_index), {', '.join(passed)})", elsewhere
