"""What a call costs and why: bytes, operations, roofline position, schedule, registers, time of each pass."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tilery.tile.ir import Block, Extent, Op, Operand, TensorType, TileType, Value
from tilery.tile.ir import Kernel as KernelIR
from tilery.tile.ops import OPS

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel
    from tilery.tile.schedule import Schedule


@dataclass(frozen=True)
class Machine:
    """What a roofline needs. `copy`: bytes per second, read plus write, of a copy. `matrix`: FLOP per second of matrix
    products by operand dtype. `vector`: FLOP per second of all other arithmetic, in f32."""

    name: str
    copy: float
    matrix: Mapping[str, float]
    vector: float


H100 = Machine(
    "H100 SXM", 3.0e12, {"bf16": 795e12, "f16": 795e12, "e4m3": 1430e12, "e5m2": 1430e12, "i8": 1430e12, "f32": 60e12},
    60e12,
)  # fmt: skip
"""Copy, bf16 and FP8 rates as measured; f32 is nine tenths of the data sheet's 67 TFLOP/s."""


def measure_copy(megabytes: int = 64) -> float:
    """Bytes per second, read plus write, of this CPU copying memory; takes about 0.1 s."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


@dataclass(frozen=True)
class Work:
    """`read`, `written`: bytes by tensor, each touched byte once. `matrix`: FLOPs of matrix products by dtype.
    `vector`: all other FLOPs. `open`: loops whose trip count depends on data, counted once, by label. `averaged`:
    integer tensors whose mean stands for the scalars loaded from them."""

    read: Mapping[str, int]
    written: Mapping[str, int]
    matrix: Mapping[str, float]
    vector: float
    open: tuple[str, ...]
    averaged: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def flops(self) -> float:
        return sum(self.matrix.values()) + self.vector


def count(kernel: KernelIR, env: Mapping[str, int], known: Mapping[str, float] | None = None) -> Work:
    """The work of a traced kernel with all dimensions bound. `known`: values of integer parameters, and means of
    integer tensors, by name."""
    return _Counter(kernel, env, known or {}).work()


class _Counter:
    def __init__(self, kernel: KernelIR, env: Mapping[str, int], given: Mapping[str, float]) -> None:
        self.kernel, self.env, self.given = kernel, env, given
        self.averaged: dict[str, None] = {}
        self.known: dict[int, float] = {}
        self.average: dict[str, float] = {}  # a block's mean length
        self.read: dict[int, float] = {}
        self.written: dict[int, float] = {}
        self.matrix: dict[str, float] = {}
        self.vector = 0.0
        self.open: list[str] = []
        self.roots: dict[int, Value] = {}
        for p in kernel.params:
            if isinstance(p.value.type, TensorType):
                self.roots[p.value.id] = p.value
            elif p.value.name in given:
                self.known[p.value.id] = given[p.value.name]
        for o in kernel.outputs:
            self.roots[o.value.id] = o.value

    def work(self) -> Work:
        self.body(self.kernel.body, 1.0)
        names = {v.id: v.name for v in self.roots.values()}
        sizes = {v.id: self.size_of(v) for v in self.roots.values()}
        fills = {o.value.id for o in self.kernel.outputs if o.init is not None}
        read = {names[i]: int(min(n, sizes[i])) for i, n in self.read.items()}
        written = {names[i]: int(min(n, sizes[i])) for i, n in self.written.items()}
        for i in fills:
            written[names[i]] = int(sizes[i])
        return Work(read, written, self.matrix, self.vector, tuple(self.open), tuple(self.averaged))

    def size_of(self, value: Value) -> float:
        total = value.tensor.dtype.bytes
        for dim in value.tensor.dims:
            total *= dim.evaluate(self.env)
        return total

    def number(self, operand: Operand) -> float | None:
        return self.known.get(operand.id) if isinstance(operand, Value) else float(operand)

    def extent(self, extent: Extent) -> float:
        return self.average.get(extent.label, 1.0) if isinstance(extent, Block) else extent.evaluate(self.env)

    def elements(self, kind: Any) -> float:
        total = 1.0
        if isinstance(kind, TileType):
            for extent in kind.shape:
                total *= self.extent(extent)
        return total

    def trips(self, start: Operand, stop: Operand, step: float, label: str, block: bool) -> float:
        """How often a loop runs; a block loop counts as one pass over its whole range."""
        a, b = self.number(start), self.number(stop)
        if a is None or b is None:
            self.open.append(label)
            if block:
                self.average[label] = 1.0
            return 1.0
        if block:
            self.average[label] = max(b - a, 0.0)
            return 1.0
        return max(0.0, -(-(b - a) // step))

    def body(self, body: tuple[Op, ...], times: float) -> None:
        for op in body:
            if op.name == "size":
                self.known[op.result.id] = op.attr("size").evaluate(self.env)
            elif op.name == "view":
                self.roots[op.result.id] = self.roots[op.tensor.id]
            elif op.name == "parallel":
                inner = times
                for n, (kind, label) in enumerate(op.attr("axes")):
                    inner *= self.trips(op.operands[2 * n], op.operands[2 * n + 1], 1, label, kind == "block")
                self.body(op.regions[0].body, inner)
            elif op.name == "for":
                step = self.number(op.operands[2]) or 1
                trips = self.trips(op.operands[0], op.operands[1], step, op.attr("label"), op.attr("kind") == "blocks")
                self.body(op.regions[0].body, times * trips)
            elif op.name == "if":  # the longer branch
                start = (self.vector, dict(self.matrix))
                results = []
                for region in op.regions:
                    self.vector, self.matrix = start[0], dict(start[1])
                    self.body(region.body, times)
                    results.append((self.vector, self.matrix))
                self.vector, self.matrix = max(results, key=lambda r: r[0] + sum(r[1].values()))
            else:
                self.leaf(op, times)

    def leaf(self, op: Op, times: float) -> None:
        if op.name in ("load", "store", "atomic"):
            root = self.roots[op.tensor.id]
            kind = op.result.type if op.name == "load" else op.stored.type if isinstance(op.stored, Value) else None
            touched = self.elements(kind) * times * op.tensor.tensor.dtype.bytes
            if op.name == "load" and not op.result.tile.shape and root.name in self.given:
                self.known[op.result.id] = self.given[root.name]
                self.averaged[root.name] = None
            if op.name != "store":
                self.read[root.id] = self.read.get(root.id, 0.0) + touched
            if op.name != "load":
                self.written[root.id] = self.written.get(root.id, 0.0) + touched
        elif op.name == "dot":
            a, b = op.operands[:2]
            assert isinstance(a, Value)
            assert isinstance(b, Value)
            m, k = (self.extent(e) for e in a.tile.shape)
            flops = 2 * m * k * self.extent(b.tile.shape[1]) * times
            self.matrix[a.tile.dtype.name] = self.matrix.get(a.tile.dtype.name, 0.0) + flops
        elif op.name in OPS:
            for result in op.results:
                if op.name in ("add", "sub", "mul", "floordiv", "mod"):  # arithmetic on constants is folded
                    numbers = [self.number(o) for o in op.operands]
                    if not result.tile.shape and None not in numbers and result.tile.dtype.is_int:
                        self.fold(op, [n for n in numbers if n is not None])
            kinds = [v.type for v in (*op.results, *op.operands) if isinstance(v, Value)]
            if any(isinstance(k, TileType) and k.dtype.is_float for k in kinds):
                self.vector += OPS[op.name].flops * max(map(self.elements, kinds), default=1.0) * times

    def fold(self, op: Op, numbers: list[float]) -> None:
        a, b = numbers
        if op.name in ("floordiv", "mod") and b == 0:
            return
        quotient = float(int(a / b)) if op.name in ("floordiv", "mod") else 0.0
        values = {"add": a + b, "sub": a - b, "mul": a * b, "floordiv": quotient, "mod": a - quotient * b}
        self.known[op.result.id] = values[op.name]


@dataclass(frozen=True)
class Explanation:
    """Printable; `to_json()` has the same content. Times in seconds, `bound` is "memory" or "arithmetic"."""

    kernel: str
    env: Mapping[str, int]
    work: Work
    machine: Machine
    schedules: Mapping[str, Schedule]
    passes: Mapping[str, tuple[tuple[str, float], ...]]
    binary: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cpu_copy: float | None = None

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.work.flops / max(1, self.work.bytes)

    @property
    def memory_time(self) -> float:
        return self.work.bytes / self.machine.copy

    @property
    def arithmetic_time(self) -> float:
        """Matrix and vector units work side by side."""
        rates = self.machine.matrix
        matrix = sum(n / rates.get(d, self.machine.vector) for d, n in self.work.matrix.items())
        return max(matrix, self.work.vector / self.machine.vector)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_time >= self.arithmetic_time else "arithmetic"

    @property
    def floor(self) -> float:
        """The least time the machine's roofline allows."""
        return max(self.memory_time, self.arithmetic_time)

    def to_json(self) -> str:
        return json.dumps(
            {
                "kernel": self.kernel, "dims": dict(self.env), "bytes": self.work.bytes, "read": dict(self.work.read),
                "written": dict(self.work.written), "flops": self.work.flops, "matrix_flops": dict(self.work.matrix),
                "vector_flops": self.work.vector, "open_loops": list(self.work.open),
                "averaged": list(self.work.averaged), "intensity": self.intensity,
                "machine": asdict(self.machine), "bound": self.bound, "floor_seconds": self.floor,
                "schedules": {t: {"value": json.loads(s.to_json()), "why": dict(s.reasons)}
                              for t, s in self.schedules.items()},
                "pass_seconds": {t: [list(p) for p in passes] for t, passes in self.passes.items()},
                "binary": dict(self.binary), "notes": list(self.notes), "cpu_copy": self.cpu_copy,
            }, indent=1,
        )  # fmt: skip

    def __str__(self) -> str:
        w = self.work
        dims = ", ".join(f"{k}={v}" for k, v in self.env.items())
        lines = [f"{self.kernel} ({dims})", ""]
        lines.append(f"bytes       {_unit(w.bytes, 'B')}: reads {_list(w.read)}; writes {_list(w.written)}")
        parts = [f"{_unit(n, 'FLOP')} {d} matrix" for d, n in w.matrix.items()] + [f"{_unit(w.vector, 'FLOP')} other"]
        lines.append(f"operations  {', '.join(parts)}")
        lines.append(f"intensity   {self.intensity:.2f} FLOP per byte")
        lines.append(
            f"roofline    {self.machine.name}: at least {_time(self.floor)}, bound by {self.bound} (memory "
            f"{_time(self.memory_time)}, arithmetic {_time(self.arithmetic_time)})"
        )
        if self.cpu_copy:
            lines.append(
                f"            this CPU copies {self.cpu_copy / 1e9:.1f} GB/s: {_time(w.bytes / self.cpu_copy)}"
            )
        for label in w.open:
            lines.append(f"            loop {label!r} depends on data and is counted once")
        if w.averaged:
            lines.append(
                f"            loops whose length is loaded are counted with the mean of {', '.join(w.averaged)}"
            )
        for target, schedule in self.schedules.items():
            lines.append("")
            lines.append(f"schedule    {target}: {schedule.to_json()}")
            for key, why in schedule.reasons.items():
                value = schedule.blocks.get(key, getattr(schedule, key, ""))
                lines.append(f"            {key} = {value}: {why}")
        if self.binary:
            lines += ["", "binary      " + ", ".join(f"{k} {v}" for k, v in self.binary.items())]
        for target, passes in self.passes.items():
            merged: dict[str, float] = {}
            for name, seconds in passes:
                merged[name] = merged.get(name, 0.0) + seconds
            text = ", ".join(f"{n} {s * 1e3:.2f}" for n, s in merged.items())
            lines += ["", f"passes      {target}: {sum(merged.values()) * 1e3:.1f} ms ({text})"]
        lines += [f"note        {note}" for note in self.notes]
        return "\n".join(lines)


def explain(
    kernel: Kernel, bound: Mapping[str, Any], copy_rate: bool = False, binary: bool = True,
    means: Mapping[str, float] | None = None,
) -> Explanation:  # fmt: skip
    """Explains a call with arguments by name. `binary`: compile it for Hopper, where Triton is installed. `means`: of
    integer tensors that have no data."""
    from tilery.tile.lowering import lower

    key, env = kernel.specialise(bound)
    start = time.perf_counter()
    ir = kernel.trace(key)
    seconds = time.perf_counter() - start
    known = {n: float(v) for n, v in bound.items() if isinstance(v, int) and not isinstance(v, bool)}
    for name, value in bound.items():
        if (
            isinstance(value, torch.Tensor)
            and value.numel()
            and not value.is_meta
            and not value.is_floating_point()
            and not value.is_complex()
        ):
            known[name] = float(value.double().mean())
    known |= means or {}
    schedules, passes = {}, {}
    notes: list[str] = []
    facts: dict[str, Any] = {}
    for target in ("cpu", "triton"):
        lowered = lower(ir, env, target, kernel.schedule_for(env, target))
        schedules[target] = lowered.schedule
        passes[target] = (("trace", seconds), *lowered.seconds)
        if target == "triton" and binary:
            facts, note = _binary(lowered.kernel, env, lowered.schedule, bound)
            notes += [note] if note else []
    return Explanation(
        kernel.name, env, count(ir, env, known), H100, schedules, passes, facts, tuple(notes),
        measure_copy() if copy_rate else None,
    )  # fmt: skip


def _binary(
    stage: KernelIR, env: Mapping[str, int], schedule: Schedule, bound: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """(registers, spills, shared memory of the Hopper binary, why there are none)."""
    if importlib.util.find_spec("triton") is None:
        return {}, "registers and shared memory need the package triton, which is not installed"
    from tilery.tile.targets.triton import emit, report, spec_of

    found = report(emit(stage, schedule, spec_of(stage, bound, env)))
    widths = ", ".join(f"{n} of {bits} bits" for bits, n in sorted(found.loads().items()))
    facts = {
        "target": "sm_90a", "registers": found.registers, "spilled_bytes": found.spills, "shared_bytes": found.shared,
        "cubin_bytes": found.cubin_bytes, "loads": widths or "none",
    }  # fmt: skip
    return facts, ""


def _list(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {_unit(b, 'B')}" for n, b in sizes.items()) or "nothing"


def _unit(value: float, unit: str) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
