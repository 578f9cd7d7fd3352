"""The reference target: runs Tile IR of any stage with torch, exactly, on any device.

Every program of the grid runs in turn, every operation as its table entry defines it. That makes it the meaning of the
language: `verify` runs each stage of a lowering here, and `sanitize` watches its memory accesses (`Monitor`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilery.tile.dtypes import DType, i32
from tilery.tile.errors import SanitizeError
from tilery.tile.ir import Extent, Kernel, Op, Operand, Region, Span, TensorType, Value
from tilery.tile.ops import OPS, cast
from tilery.tile.size import Size

DEFAULT_BLOCK = 16
"""Block size where no schedule is bound yet; results must not depend on it."""


class Monitor:
    """Watches a run; the sanitizer overrides these."""

    def program(self, indices: tuple[int, ...]) -> None:
        """A program of the grid starts."""

    def load(self, op: Op, offsets: Tensor, mask: Tensor) -> None:
        """A load reads storage elements `offsets` where `mask` holds."""

    def store(self, op: Op, offsets: Tensor, mask: Tensor) -> None:
        """A store writes storage elements `offsets` where `mask` holds."""

    def atomic(self, op: Op, offsets: Tensor, mask: Tensor) -> None:
        """An atomic changes storage elements `offsets` where `mask` holds."""

    def result(self, op: Op, value: Tensor) -> None:
        """An operation gave a value."""

    def tap(self, name: str, value: Tensor) -> None:
        """`tile.tap(name, value)` was reached."""


def poison(dtype: DType) -> float | int | bool:
    """What unwritten memory holds: NaN, or a value nobody computes."""
    if dtype.is_float:
        return float("nan")
    return {8: 0x5A, 16: 0x5A5A, 32: 0x5A5A5A5A, 64: 0x5A5A5A5A5A5A5A5A}[dtype.bits] if dtype.kind != "b" else True


def allocate(kernel: Kernel, env: Mapping[str, int], device: torch.device | str = "cpu") -> list[Tensor]:
    """The kernel's outputs and workspaces, filled with their `init` or poisoned."""
    tensors = []
    for out in kernel.outputs:
        kind = out.value.tensor
        shape = [d.evaluate(env) for d in kind.dims]
        fill = poison(kind.dtype) if out.init is None else out.init
        if kind.dtype.is_fp8:
            tensors.append(torch.full(shape, fill, dtype=torch.float32, device=device).to(kind.dtype.torch))
        else:
            tensors.append(torch.full(shape, fill, dtype=kind.dtype.torch, device=device))
    return tensors


def run(
    kernel: Kernel, arguments: Mapping[str, Any], env: Mapping[str, int], monitor: Monitor | None = None
) -> tuple[Tensor, ...]:
    """Runs `kernel` on named arguments (tensors and scalars by parameter name) with dimensions `env`.

    InOut tensors change in place. Returns the returned outputs. Raises `SanitizeError` for an access outside a tensor.
    """
    device = next((a.device for a in arguments.values() if isinstance(a, Tensor)), torch.device("cpu"))
    machine = _Machine(kernel, env, device, monitor or Monitor())
    for param in kernel.params:
        value = arguments[param.value.name]
        if isinstance(param.value.type, TensorType):
            machine.memory[param.value.id] = _Memory.of(value)
        else:
            machine.values[param.value.id] = torch.tensor(value, dtype=param.value.tile.dtype.torch, device=device)
    outputs = allocate(kernel, env, device)
    for out, tensor in zip(kernel.outputs, outputs):
        machine.memory[out.value.id] = _Memory.of(tensor)
    machine.body(kernel.body)
    by_id = {out.value.id: tensor for out, tensor in zip(kernel.outputs, outputs)}
    return tuple(by_id[value.id] for value in kernel.returns)


class _Memory:
    """A tensor as flat storage with sizes, strides and an offset; 8-bit floats are moved as bytes."""

    def __init__(self, flat: Tensor, dims: list[int], strides: list[int], offset: int) -> None:
        self.flat, self.dims, self.strides, self.offset = flat, dims, strides, offset

    @staticmethod
    def of(tensor: Tensor) -> _Memory:
        offset = int(tensor.storage_offset())
        end = offset + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        flat = tensor.as_strided((0 if tensor.numel() == 0 else end,), (1,), 0)
        return _Memory(flat, list(tensor.shape), list(tensor.stride()), offset)

    def view(self, kind: TensorType, env: Mapping[str, int]) -> _Memory:
        assert kind.strides is not None
        step = 1
        for size, stride in zip(reversed(self.dims), reversed(self.strides)):
            if size > 1 and stride != step:
                raise SanitizeError(f"a viewed tensor must be contiguous, got strides {self.strides} for {self.dims}")
            step *= size
        old, new = self.flat.element_size(), kind.dtype.bytes
        if (self.offset * old) % new:
            raise SanitizeError(f"view as {kind.dtype}: the tensor does not start on a multiple of {new} bytes")
        raw = self.flat.view(torch.uint8)
        flat = raw[: raw.shape[0] // new * new].view(kind.dtype.torch)
        dims, strides = [d.evaluate(env) for d in kind.dims], [s.evaluate(env) for s in kind.strides]
        return _Memory(flat, dims, strides, self.offset * old // new + kind.offset.evaluate(env))

    def read(self, offsets: Tensor) -> Tensor:
        if self.flat.element_size() == 1 and self.flat.is_floating_point():
            return self.flat.view(torch.uint8)[offsets].view(self.flat.dtype)
        return self.flat[offsets]

    def write(self, offsets: Tensor, values: Tensor) -> None:
        if self.flat.element_size() == 1 and self.flat.is_floating_point():
            self.flat.view(torch.uint8)[offsets] = values.contiguous().view(torch.uint8)
        else:
            self.flat[offsets] = values


class _Machine:
    def __init__(self, kernel: Kernel, env: Mapping[str, int], device: torch.device, monitor: Monitor) -> None:
        self.kernel, self.env, self.device, self.monitor = kernel, env, device, monitor
        self.blocks = dict(kernel.blocks)
        self.counts: dict[str, int] = {}
        self.values: dict[int, Tensor] = {}
        self.memory: dict[int, _Memory] = {}

    # --- operands ---------------------------------------------------------------------------------------------

    def get(self, operand: Operand) -> Tensor | int | float | bool:
        return self.values[operand.id] if isinstance(operand, Value) else operand

    def integer(self, operand: Operand) -> int:
        return int(self.values[operand.id]) if isinstance(operand, Value) else int(operand)

    def extent(self, extent: Extent) -> int:
        return extent.evaluate(self.env) if isinstance(extent, Size) else self.counts[extent.label]

    # --- structure --------------------------------------------------------------------------------------------

    def body(self, body: tuple[Op, ...]) -> None:
        for op in body:
            handler = getattr(self, f"op_{op.name}", None)
            if handler is not None:
                handler(op)
            else:
                self.pure(op)
            for result in op.results:
                if result.id in self.values:
                    self.monitor.result(op, self.values[result.id])

    def region(self, region: Region, params: list[Tensor]) -> list[Tensor]:
        for value, tensor in zip(region.params, params):
            self.values[value.id] = tensor
        self.body(region.body)
        return [self.materialise(y) for y in region.yields]

    def materialise(self, operand: Operand) -> Tensor:
        value = self.get(operand)
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, device=self.device, dtype=torch.float64 if isinstance(value, float) else None)

    def scalar(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int32, device=self.device)

    def op_parallel(self, op: Op) -> None:
        ranges = []
        for number, (kind, label) in enumerate(op.attr("axes")):
            start, stop = self.integer(op.operands[2 * number]), self.integer(op.operands[2 * number + 1])
            step = self.blocks.get(label, DEFAULT_BLOCK) if kind == "block" else 1
            step = dict(op.attr("steps", ())).get(label, step)  # padded stages carry their steps
            ranges.append([(i, stop) for i in range(start, stop, step)])
        for point in itertools.product(*ranges):
            self.monitor.program(tuple(i for i, _ in point))
            for (kind, label), (i, stop) in zip(op.attr("axes"), point):
                if kind == "block":
                    self.counts[label] = min(self.blocks.get(label, DEFAULT_BLOCK), stop - i)
            self.region(op.regions[0], [self.scalar(i) for i, _ in point])

    def op_for(self, op: Op) -> None:
        start, stop, step = (self.integer(o) for o in op.operands[:3])
        label, by_block = op.attr("label"), op.attr("kind") == "blocks"
        if by_block:
            step = self.blocks.get(label, DEFAULT_BLOCK)
        state = [self.materialise(o) for o in op.operands[3:]]
        for i in range(start, stop, step):
            if by_block:
                self.counts[label] = min(step, stop - i)
            state = self.region(op.regions[0], [self.scalar(i), *state])
        for result, tensor in zip(op.results, state):
            self.values[result.id] = tensor

    def op_if(self, op: Op) -> None:
        taken = op.regions[0] if bool(self.get(op.operands[0])) else op.regions[1]
        for result, tensor in zip(op.results, self.region(taken, [])):
            self.values[result.id] = tensor.to(result.tile.dtype.torch)

    # --- memory -----------------------------------------------------------------------------------------------

    def op_view(self, op: Op) -> None:
        self.memory[op.result.id] = self.memory[op.tensor.id].view(op.result.tensor, self.env)

    def addresses(self, op: Op, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(storage offsets, mask) of a memory operation, both of `shape`."""
        memory = self.memory[op.tensor.id]
        gathers = [self.values[o.id] for k, o in op.index if k == "gather" and isinstance(o, Value)]
        joint = len(gathers[0].shape) if gathers else 0
        rank, axis = len(shape), 0
        offsets = torch.full((), memory.offset, dtype=torch.int64, device=self.device)
        mask = torch.ones((), dtype=torch.bool, device=self.device)
        strict = torch.ones((), dtype=torch.bool, device=self.device)
        placed = -1
        for (kind, operand), dim, stride in zip(op.index, memory.dims, memory.strides):
            if isinstance(kind, Span):
                lanes = torch.arange(self.extent(kind.extent), device=self.device)
                positions = (self.integer(operand) + kind.step * lanes).view(
                    [-1 if a == axis else 1 for a in range(rank)]
                )
                inside = (positions >= 0) & (positions < dim)
                if op.attr("unchecked"):
                    strict = strict & inside
                else:
                    mask = mask & inside
                axis += 1
            elif kind == "gather":
                assert isinstance(operand, Value)
                if placed < 0:
                    placed, axis = axis, axis + joint
                index = self.values[operand.id].long()
                positions = index.view([*[1] * placed, *index.shape, *[1] * (rank - placed - joint)])
                strict = strict & (positions >= 0) & (positions < dim)
            else:
                positions = torch.tensor(self.integer(operand), device=self.device)
                strict = strict & (positions >= 0) & (positions < dim)
            offsets = offsets + positions * stride
        if op.where is not None:
            mask = mask & self.materialise(op.where)
        mask = mask.expand(shape)
        bad = mask & ~strict.expand(shape)
        if bool(bad.any()):
            where = [int(i) for i in bad.nonzero()[0]]
            wrong = self.describe(op, memory)
            raise SanitizeError(f"{op.name} outside the tensor {op.tensor.name!r} at element {where}: {wrong}", op.loc)
        return offsets.expand(shape), mask

    def describe(self, op: Op, memory: _Memory) -> str:
        parts = []
        for (_, operand), dim in zip(op.index, memory.dims):
            value = self.get(operand)
            if isinstance(value, Tensor) and value.numel() > 1:
                parts.append(f"{int(value.min())}..{int(value.max())} of {dim}")
            else:
                parts.append(f"{int(value) if not isinstance(value, Tensor) or value.numel() else 'none'} of {dim}")
        return "indices " + ", ".join(parts) + "; mask the access with where=, or fix the index"

    def op_load(self, op: Op) -> None:
        kind = op.result.tile
        shape = tuple(self.extent(e) for e in kind.shape)
        offsets, mask = self.addresses(op, shape)
        self.monitor.load(op, offsets, mask)
        memory = self.memory[op.tensor.id]
        if memory.flat.numel() == 0:
            values = torch.zeros(shape, device=self.device).to(kind.dtype.torch)
        else:
            values = memory.read(torch.where(mask, offsets, 0))
        if not bool(mask.all()):
            other = cast(self.materialise(op.attr("other")), kind.dtype)
            values = _select(mask, values, other)
        self.values[op.result.id] = values

    def op_store(self, op: Op) -> None:
        value = self.materialise(op.stored)
        offsets, mask = self.addresses(op, tuple(value.shape))
        self.monitor.store(op, offsets, mask)
        self.memory[op.tensor.id].write(offsets[mask], _pick(value, mask))

    def op_atomic(self, op: Op) -> None:
        value = self.materialise(op.stored)
        offsets, mask = self.addresses(op, tuple(value.shape))
        self.monitor.atomic(op, offsets, mask)
        memory = self.memory[op.tensor.id]
        old = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        flat_old, where = old.view(-1), mask.reshape(-1)
        places, values = offsets.reshape(-1)[where], value.reshape(-1)[where]
        if places.numel() == places.unique().numel():
            before = memory.read(places)
            flat_old[where] = before
            memory.write(places, _combine(op.attr("kind"), before, values))
        else:
            got = []
            for place, item in zip(places, values):
                before = memory.read(place[None])
                got.append(before)
                memory.write(place[None], _combine(op.attr("kind"), before, item[None]))
            flat_old[where] = torch.cat(got)
        self.values[op.result.id] = old

    # --- values -----------------------------------------------------------------------------------------------

    def op_size(self, op: Op) -> None:
        self.values[op.result.id] = self.scalar(op.attr("size").evaluate(self.env))

    def op_count(self, op: Op) -> None:
        self.values[op.result.id] = self.scalar(self.counts[op.attr("label")])

    def op_arange(self, op: Op) -> None:
        length = self.extent(op.attr("extent"))
        start = self.integer(op.operands[0])
        self.values[op.result.id] = torch.arange(start, start + length, dtype=torch.int32, device=self.device)

    def op_full(self, op: Op) -> None:
        shape = [self.extent(e) for e in op.attr("shape")]
        dtype = op.result.tile.dtype
        self.values[op.result.id] = cast(self.materialise(op.operands[0]), dtype).expand(shape).clone()

    def op_tap(self, op: Op) -> None:
        self.monitor.tap(op.attr("tap"), self.materialise(op.operands[0]))

    def op_reshape(self, op: Op) -> None:
        source = self.materialise(op.operands[0])
        self.values[op.result.id] = source.reshape([self.extent(e) for e in op.attr("shape")])

    def op_broadcast(self, op: Op) -> None:
        source = self.materialise(op.operands[0])
        self.values[op.result.id] = source.expand([self.extent(e) for e in op.attr("shape")])

    def pure(self, op: Op) -> None:
        definition = OPS[op.name]
        args: list[Any] = [self.get(o) for o in op.operands]
        attrs = dict(op.attrs)
        if definition.elementwise:
            dtype = next((o.tile.dtype for o in op.operands if isinstance(o, Value)), i32)
            if op.name == "where":
                dtype = attrs.pop("dtype")
                if not isinstance(args[0], Tensor):
                    args[0] = torch.tensor(bool(args[0]), device=self.device)
            else:
                attrs = {k: v for k, v in attrs.items() if k == "dtype" and op.name in ("cast", "bitcast")}
            args = [
                a if isinstance(a, Tensor) else torch.tensor(a, dtype=dtype.torch, device=self.device) for a in args
            ]
        out = definition.reference(*args, **attrs)
        for result, tensor in zip(op.results, out if isinstance(out, tuple) else (out,)):
            self.values[result.id] = tensor


def _select(mask: Tensor, values: Tensor, other: Tensor) -> Tensor:
    if values.element_size() == 1 and values.is_floating_point():
        raw = torch.where(mask, values.view(torch.uint8), other.view(torch.uint8))
        return raw.view(values.dtype)
    return torch.where(mask, values, other)


def _pick(value: Tensor, mask: Tensor) -> Tensor:
    if value.element_size() == 1 and value.is_floating_point():
        return value.contiguous().view(torch.uint8)[mask].view(value.dtype)
    return value[mask]


def _combine(kind: str, old: Tensor, new: Tensor) -> Tensor:
    if kind == "add":
        return old + new
    if kind == "max":
        return torch.maximum(old, new)
    if kind == "min":
        return torch.minimum(old, new)
    return old | new if kind == "or" else new
