"""Launch plans: one small Python function per executable and exact shapes, with all that is constant worked out.

A plan takes the runtime arguments of a call in the signature's order, then the addresses of its tensors, then `out`.
It makes the outputs, hands addresses and scalars to compiled code, and returns what the call returns. Its source text
depends only on the executable, so it is compiled once; sizes, strides and dtypes are names bound per plan.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor

from tilery.tile.dtypes import BY_NAME, DType
from tilery.tile.errors import LaunchError
from tilery.tile.ir import Kernel as KernelIR
from tilery.tile.ir import walk
from tilery.tile.signature import Signature
from tilery.tile.size import Size, parse_size

Plan = Callable[..., Any]


@dataclass(frozen=True)
class OutputSpec:
    """A tensor the launch allocates. `place`: its position among what the kernel returns; None: workspace."""

    name: str
    dtype: DType
    dims: tuple[Size, ...]
    init: float | int | None
    place: int | None


@dataclass(frozen=True)
class Interface:
    """What a launch must know of a traced kernel: enough to start without tracing it again. `viewed`: parameters that
    the kernel reads as other elements or strides, and that must therefore be contiguous."""

    tile_dims: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    viewed: tuple[str, ...] = ()

    @staticmethod
    def of(ir: KernelIR) -> Interface:
        places = {value.id: at for at, value in enumerate(ir.returns)}
        outputs = tuple(
            OutputSpec(o.value.name, o.value.tensor.dtype, o.value.tensor.dims, o.init, places.get(o.value.id))
            for o in ir.outputs
        )
        viewed = {op.tensor.id for op in walk(ir.body) if op.name == "view"}
        names = tuple(p.value.name for p in ir.params if p.value.id in viewed)
        return Interface(tuple(sorted(d.name for d in ir.tile_dims)), outputs, names)

    @property
    def returned(self) -> tuple[OutputSpec, ...]:
        """The outputs the call returns, in order."""
        kept = [o for o in self.outputs if o.place is not None]
        return tuple(sorted(kept, key=lambda o: o.place or 0))

    def to_record(self) -> dict[str, Any]:
        outputs = [[o.name, o.dtype.name, [str(d) for d in o.dims], o.init, o.place] for o in self.outputs]
        viewed = list(self.viewed)
        return {"tile_dims": list(self.tile_dims), "outputs": json.loads(json.dumps(outputs)), "viewed": viewed}

    @staticmethod
    def from_record(record: Mapping[str, Any], signature: Signature) -> Interface:
        """Raises ValueError, KeyError, TypeError or TileError for a record that does not fit."""
        import ast

        dims = {d.name: d for d in signature.dims}
        outputs = []
        for name, dtype, shape, init, place in record["outputs"]:
            sizes = tuple(parse_size(ast.parse(s, mode="eval").body, dims) for s in shape)
            outputs.append(OutputSpec(name, BY_NAME[dtype], sizes, init, place))
        return Interface(tuple(record["tile_dims"]), tuple(outputs), tuple(record["viewed"]))


@dataclass(frozen=True)
class Call:
    """What a plan is made for. `runtime`: the non-static parameters in order; `tensors`: the tensors among them, None
    if absent; `env`: the dimensions."""

    kernel: str
    interface: Interface
    runtime: tuple[str, ...]
    tensors: Mapping[str, Tensor | None]
    env: Mapping[str, int]
    device: torch.device


class Executable(Protocol):
    """Compiled code. `statement(call, scope)`: Python that runs it, in terms of `v_NAME` (a scalar argument), `p_NAME`
    (the address of a tensor argument), `o_NUMBER` (an output tensor) and whatever it adds to `scope`; and lines to put
    first, which may return."""

    def statement(self, call: Call, scope: dict[str, Any]) -> tuple[str, list[str]]: ...


def make_plan(executable: Executable, call: Call) -> Plan:
    """The plan of an executable for exact shapes."""
    outputs = call.interface.outputs
    scope: dict[str, Any] = {"_refuse": functools.partial(check_out, call), "_fill": fill, "_device": call.device}
    statement, first = executable.statement(call, scope)
    heads = [f"v_{n}" for n in call.runtime] + [f"p_{n}" for n in call.tensors] + ["out"]
    lines = [f"def plan({', '.join(heads)}):", *(f"    {line}" for line in first)]
    made, given = [], []
    scope["_empty"] = _allocator(call.device)
    for number, spec in enumerate(outputs):
        shape = tuple(d.evaluate(call.env) for d in spec.dims)
        scope[f"s_{number}"], scope[f"t_{number}"] = shape, spec.dtype.torch
        scope[f"r_{number}"] = row_major(shape)
        allocate = f"o_{number} = _empty(s_{number}, r_{number}, t_{number})"
        made.append(allocate)
        if spec.place is None:
            given.append(allocate)
    numbers = [outputs.index(o) for o in call.interface.returned]
    returned = ", ".join(f"o_{n}" for n in numbers)
    lines += ["    if out is None:", *(f"        {line}" for line in [*made, "pass"])]
    lines.append("    else:")
    if len(numbers) == 1:
        lines.append(f"        {returned} = out[0] if type(out) is tuple and len(out) == 1 else out")
    elif numbers:
        lines.append(f"        if type(out) is not tuple or len(out) != {len(numbers)}: _refuse(out)")
        lines.append(f"        {returned} = out")
    for n in numbers:
        bad = (
            f"o_{n}.shape != s_{n} or o_{n}.dtype is not t_{n} or o_{n}.device != _device or not o_{n}.is_contiguous()"
        )
        lines.append(f"        if not isinstance(o_{n}, _Tensor) or {bad}: _refuse(out)")
    lines += [f"        {line}" for line in given] + ([] if numbers else ["        _refuse(out)"])
    scope["_Tensor"] = Tensor
    for number, spec in enumerate(outputs):
        if spec.init is not None:
            wide = spec.dtype.is_fp8
            lines.append(f"    _fill(o_{number}, {spec.init!r})" if wide else f"    o_{number}.fill_({spec.init!r})")
    lines.append(f"    {statement}")
    if returned:
        lines.append("    if out is not None: return out")
        lines.append(f"    return {returned}")
    exec(_compiled("\n".join(lines) + "\n"), scope)
    plan: Plan = scope["plan"]
    return plan


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> CodeType:
    return compile(text, "<launch plan>", "exec")


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _allocator(device: torch.device) -> Callable[[Any, Any, torch.dtype], Tensor]:
    """(shape, strides, dtype) -> memory. The entries that torch's own compiled code calls cost a third of
    `torch.empty`; they are private, so there is a public way too."""
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if found is not None:
        made: Callable[[Any, Any, torch.dtype], Tensor] = found
        return made
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def fill(tensor: Tensor, value: float | int) -> None:
    """`fill_`, for 8-bit floats too."""
    if tensor.element_size() == 1 and tensor.is_floating_point():
        tensor.copy_(torch.full((), value, dtype=torch.float32))
    else:
        tensor.fill_(value)


def check_out(call: Call, out: Any) -> None:
    """Raises `LaunchError` unless `out` is what the kernel returns."""
    given = out if isinstance(out, tuple) else (out,)
    wanted = call.interface.returned
    if len(given) != len(wanted):
        raise LaunchError(f"{call.kernel}: out= must have {len(wanted)} tensors, got {len(given)}")
    for spec, tensor in zip(wanted, given):
        shape = tuple(d.evaluate(call.env) for d in spec.dims)
        fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape and tensor.dtype == spec.dtype.torch
        if not fits or tensor.device != call.device or not tensor.is_contiguous():
            got = type(tensor).__name__
            if isinstance(tensor, Tensor):
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
            raise LaunchError(
                f"{call.kernel}: out= for {spec.name} must be a contiguous {spec.dtype.torch} tensor {list(shape)} on "
                f"{call.device}, got {got}"
            )


def unpack(out: tuple[Tensor, ...]) -> Any:
    """What a call returns: nothing, a tensor, or a tuple."""
    return None if not out else out[0] if len(out) == 1 else out
