"""What a launch needs to know about an emitted kernel: its arguments, what to allocate, the grid. Plain, serialisable.

A `Spec` is what the source is specialised on besides dtypes and the sizes of tiles: which tensors are strided, which
need 64-bit offsets, and what is known to be divisible by 16, which lets Triton use wide loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilery.tile.dtypes import BY_NAME, DType
from tilery.tile.ir import Kernel, TensorType, Value, walk
from tilery.tile.size import Size, _Unit

POINTERS = {
    "b1": "*i1", "i8": "*i8", "u8": "*u8", "i16": "*i16", "i32": "*i32", "i64": "*i64", "f16": "*fp16",
    "bf16": "*bf16", "f32": "*fp32", "f64": "*fp64", "e4m3": "*fp8e4nv", "e5m2": "*fp8e5",
}  # fmt: skip
"""Triton's names of pointer types."""

LIMIT = 2**31
"""Offsets from here on need 64 bits."""


@dataclass(frozen=True)
class Spec:
    """`strided`: tensors whose leading strides are passed; the others are contiguous. `wide`: tensors with 64-bit
    offsets. `unaligned`: tensors (outputs never are) whose address is not a multiple of 16 bytes. `divisible`: dims,
    and strides as "x.0", known to be multiples of 16.
    """

    strided: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    unaligned: frozenset[str] = frozenset()
    divisible: frozenset[str] = frozenset()

    def __str__(self) -> str:
        parts = [f"{n} {', '.join(sorted(v))}" for n, v in vars(self).items() if v]
        return "; ".join(parts) or "contiguous, aligned"


def spec_of(kernel: Kernel, arguments: Mapping[str, Any], env: Mapping[str, int]) -> Spec:
    """The `Spec` of a call. `arguments`: by parameter name; `env`: all dimensions."""
    strided, wide, unaligned, divisible = set(), set(), set(), {n for n, v in env.items() if v % 16 == 0}
    viewed = {op.tensor.id for op in walk(kernel.body) if op.name == "view"}
    for param in kernel.params:
        name, tensor = param.value.name, arguments.get(param.value.name)
        if not isinstance(tensor, Tensor):
            continue
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        if reach * (tensor.element_size() if param.value.id in viewed else 1) >= LIMIT:
            wide.add(name)
        if tensor.data_ptr() % 16:
            unaligned.add(name)
        if not tensor.is_contiguous():
            strided.add(name)
            divisible |= {f"{name}.{axis}" for axis, s in enumerate(tensor.stride()[:-1]) if s % 16 == 0}
    for output in kernel.outputs:
        count = 1
        for dim in output.value.tensor.dims:
            count *= dim.evaluate(env)
        if count * (output.value.tensor.dtype.bytes if output.value.id in viewed else 1) >= LIMIT:
            wide.add(output.value.name)
    return Spec(frozenset(strided), frozenset(wide), frozenset(unaligned), frozenset(divisible))


@dataclass(frozen=True)
class Argument:
    """One parameter of the emitted function. `kind`: "tensor", "stride", "dim" or "scalar"; `source`: the tensor, dim
    or parameter it comes from; `axis`: of a stride; `type`: Triton's; `divisible`: a multiple of 16.
    """

    kind: str
    name: str
    source: str
    type: str
    axis: int = 0
    divisible: bool = False


@dataclass(frozen=True)
class Allocation:
    """A tensor the launch makes: `source`: its name in the IR; `shape`: Python expressions over the dimensions."""

    name: str
    source: str
    dtype: str
    shape: tuple[str, ...]
    init: float | int | None


@dataclass(frozen=True)
class Plan:
    """`grid`: the number of tiles as a Python expression over dims and integer parameters (`dims`, `scalars`: what it
    and the allocations read, as (local name, source name)). `persistent`: programs per multiprocessor; 0: one per tile.
    """

    name: str
    arguments: tuple[Argument, ...]
    allocations: tuple[Allocation, ...]
    returns: tuple[str, ...]
    grid: str
    dims: tuple[tuple[str, str], ...]
    scalars: tuple[tuple[str, str], ...]
    warps: int
    stages: int
    pdl: bool = False
    persistent: int = 0
    tensors: tuple[tuple[str, str], ...] = field(default=())
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Triton's compile options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "launch_pdl": self.pdl, **limit}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        data = json.loads(text)
        data["arguments"] = tuple(Argument(**a) for a in data["arguments"])
        data["allocations"] = tuple(Allocation(**{**a, "shape": tuple(a["shape"])}) for a in data["allocations"])
        for name in ("dims", "scalars", "tensors"):
            data[name] = tuple((a, b) for a, b in data[name])
        return Plan(**{**data, "returns": tuple(data["returns"])})

    @property
    def signature(self) -> dict[str, str]:
        """Triton's signature: type by parameter name."""
        return {a.name: a.type for a in self.arguments}

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """Triton's attributes: which parameters are multiples of 16."""
        return {(i,): [["tt.divisibility", 16]] for i, a in enumerate(self.arguments) if a.divisible}

    def grid_size(self, env: Mapping[str, int], arguments: Mapping[str, Any]) -> int:
        """The number of tiles."""
        scope = {local: env[source] for local, source in self.dims}
        scope.update({local: arguments[source] for local, source in self.scalars})
        return max(int(eval(self.grid, {"max": max, "min": min}, scope)), 0)

    def allocate(self, env: Mapping[str, int], device: torch.device | str) -> dict[str, Tensor]:
        """The outputs and workspaces by local name; without an init their content is whatever memory held."""
        scope = {local: env[source] for local, source in self.dims}
        made = {}
        for item in self.allocations:
            dtype: DType = BY_NAME[item.dtype]
            shape = [int(eval(s, {}, scope)) for s in item.shape]
            made[item.name] = torch.empty(shape, dtype=dtype.torch, device=device)
            if item.init is not None:
                filled(made[item.name], item.init)
        return made


def filled(tensor: Tensor, value: float) -> Tensor:
    """`tensor` with every element set; 8-bit floats through their bytes, which every torch build can fill."""
    if tensor.element_size() == 1 and tensor.is_floating_point():
        byte = torch.tensor([value], dtype=torch.float32).to(tensor.dtype).view(torch.uint8).item()
        tensor.view(torch.uint8).fill_(byte)
    else:
        tensor.fill_(value)
    return tensor


def expression(size: Size, name_of: Callable[[str], str], wide: bool = False) -> str:
    """A size as Python arithmetic, valid on the host and in Triton. `wide`: in 64 bits (Triton only)."""

    def atom(item: Any, coefficient: int) -> tuple[str, int]:
        if isinstance(item, _Unit):
            text, factor = name_of(item.dim.name), item.dim.multiple_of
            if wide:
                text = f"{text}.to(tl.int64)"
            if factor == 1:
                return text, coefficient
            return (
                (text, coefficient // factor) if coefficient % factor == 0 else (f"({text} // {factor})", coefficient)
            )
        text, by = f"({expression(item.size, name_of, wide)})", item.divisor
        if any(c < 0 for _, c in item.size.terms):  # Triton divides toward zero, a size downward
            text = f"({text} - ({text} % {by} + {by}) % {by})"
        return f"({text} // {by})", coefficient

    parts = []
    for atoms, coefficient in size.terms:
        factors = []
        for item in atoms:
            text, coefficient = atom(item, coefficient)
            factors.append(text)
        if coefficient != 1 or not factors:
            factors.append(str(coefficient))
        parts.append(" * ".join(factors))
    return " + ".join(parts) if parts else "0"


def contiguous_strides(kind: TensorType) -> tuple[Size, ...]:
    """Row-major strides of a tensor in elements."""
    strides: list[Size] = [Size.make({(): 1})]
    for dim in reversed(kind.dims[1:]):
        strides.insert(0, strides[0] * dim)
    return tuple(strides[: len(kind.dims)])


def is_tensor(value: Value) -> bool:
    return isinstance(value.type, TensorType)
