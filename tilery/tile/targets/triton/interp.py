"""Runs emitted source in Triton's interpreter, on CPU tensors: the numbers a kernel gives, without a GPU.

The interpreter is chosen when triton is imported, so it lives in a process of its own, started at the first use and
kept. `worker.py` is what runs there.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilery.tile.dtypes import BY_NAME, BY_TORCH
from tilery.tile.errors import LaunchError, VerifyError
from tilery.tile.interpret import allocate
from tilery.tile.lowering import Lowered
from tilery.tile.schedule import Schedule
from tilery.tile.targets.triton.emit import Emitted, emit
from tilery.tile.targets.triton.plan import Spec, spec_of

PROCESSORS = 2
"""Multiprocessors a persistent kernel sees in the interpreter."""


def run_interpreted(
    lowered: Lowered, arguments: Mapping[str, Any], env: Mapping[str, int], spec: Spec | None = None
) -> tuple[Tensor, ...]:
    """Runs a kernel lowered for "triton" on CPU arguments by name; InOut tensors change in place. Returns the outputs.

    Unwritten elements of outputs hold NaN or a pattern, as in `tilery.tile.interpret`. Raises `VerifyError` with the
    interpreter's message and the source if it fails.
    """
    if lowered.target != "triton":
        raise LaunchError(f"run_interpreted takes a kernel lowered for 'triton', this one is for {lowered.target!r}")
    kernel = lowered.kernel
    schedule: Schedule = replace(lowered.schedule, pdl=False)  # the interpreter has no dependent launches
    emitted = emit(kernel, schedule, spec if spec is not None else spec_of(kernel, arguments, env))
    outputs = allocate(kernel, env)
    made = {allocation.name: tensor for allocation, tensor in zip(emitted.plan.allocations, outputs)}
    run_emitted(emitted, arguments, env, made)
    return tuple(made[name] for name in emitted.plan.returns)


def run_emitted(
    emitted: Emitted, arguments: Mapping[str, Any], env: Mapping[str, int], made: Mapping[str, Tensor]
) -> None:
    """Runs emitted source on arguments by parameter name and allocated tensors by local name, in place."""
    plan = emitted.plan
    local = {a.source: a.name for a in plan.arguments if a.kind == "tensor"}
    tensors = {local[name]: value for name, value in arguments.items() if name in local and isinstance(value, Tensor)}
    tensors.update(made)
    passed: list[Any] = []
    for a in plan.arguments:
        if a.kind == "tensor":
            passed.append(tensors[a.name])
        elif a.kind == "stride":
            passed.append(tensors[local[a.source]].stride(a.axis))
        elif a.kind == "dim":
            passed.append(env[a.source])
        else:
            passed.append(arguments[a.source])
    grid = plan.grid_size(env, arguments)
    if plan.persistent:
        grid = min(grid, plan.persistent * PROCESSORS)
    if grid == 0:
        return
    answer = _worker().ask((emitted.source, plan.name, grid, [pack(p) for p in passed]))
    if isinstance(answer, str):
        raise VerifyError(f"Triton's interpreter fails on {plan.name!r}: {answer}\n{emitted.source}")
    for before, packed in zip(passed, answer):
        if isinstance(before, Tensor) and before.numel():
            after = unpack(packed)
            if before.element_size() == 1:
                before, after = before.view(torch.uint8), after.view(torch.uint8)
            before.copy_(after)


@dataclass(frozen=True)
class Packed:
    """A tensor on its way between processes; pickling torch's own fails for 8-bit floats."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    data: bytes


def pack(value: Any) -> Any:
    """A tensor as bytes, anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride())) if value.numel() else 0
    flat = value.detach().as_strided((reach,), (1,), value.storage_offset()).view(torch.uint8)
    name = BY_TORCH[value.dtype].name
    return Packed(name, tuple(value.shape), tuple(value.stride()), flat.numpy().tobytes())


def unpack(value: Any) -> Any:
    """The reverse of `pack`."""
    if not isinstance(value, Packed):
        return value
    dtype = BY_NAME[value.dtype].torch
    if not value.data:
        return torch.empty(value.shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).as_strided(value.shape, value.strides)


class _Worker:
    """The process that runs the interpreter; one question at a time."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[4])
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tilery.tile.targets.triton.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
        self.lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.lock:
            try:
                pickle.dump(question, self.process.stdin)
                self.process.stdin.flush()
                return pickle.load(self.process.stdout)
            except (EOFError, BrokenPipeError):
                code = self.process.wait(10)
                raise LaunchError(
                    f"Triton's interpreter ended with status {code}; a kernel that reads outside a tensor does that. "
                    "Run the earlier stages with sanitize=True, and check that triton and numpy < 2.4 are installed"
                ) from None

    def close(self) -> None:
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()


_RUNNING: list[_Worker] = []


def _worker() -> _Worker:
    if not _RUNNING or _RUNNING[-1].process.poll() is not None:
        _RUNNING[:] = [_Worker()]
    return _RUNNING[-1]
